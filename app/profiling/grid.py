"""The steps that a profile measures, as plans for a real runner: decode, prefill, and both in one step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.plan import Placement, Plan, Row, Sampling

DECODE_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (16, 128, 512, 2048, 8192, 32768)
CHUNKS = (2, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
MIXED_ROWS, MIXED_CHUNKS = (4, 16, 64), (16, 64, 256, 1024)
MOST_PAIRS = 2**22
"""(token, position) pairs of one prefill: more would take too long on a small machine."""


@dataclass(frozen=True, slots=True)
class Limits:
    block_size: int
    blocks: int
    context: int  # tokens
    max_sequences: int
    max_batch_tokens: int


@dataclass(frozen=True, slots=True)
class Part:
    """So many rows alike: `tokens` each, after `before` positions."""

    rows: int
    tokens: int
    before: int
    samples: bool = True

    def blocks(self, block_size: int) -> int:
        return self.rows * -(-(self.before + self.tokens) // block_size)


@dataclass(frozen=True, slots=True)
class Cell:
    kind: str
    parts: tuple[Part, ...]

    def fits(self, limits: Limits) -> bool:
        tokens = sum(part.rows * part.tokens for part in self.parts)
        return (
            sum(part.rows for part in self.parts) <= limits.max_sequences
            and sum(part.blocks(limits.block_size) for part in self.parts) <= limits.blocks
            and all(part.before + part.tokens <= limits.context for part in self.parts)
            and tokens <= limits.max_batch_tokens
            and all(part.tokens * (part.before + part.tokens) <= MOST_PAIRS for part in self.parts)
        )

    def plan(self, block_size: int) -> Plan:
        """Every row has blocks of its own, from the pool's first on."""
        placements: list[Placement] = []
        rows: list[Row] = []
        next_block = 0
        for part in self.parts:
            for _ in range(part.rows):
                slot, blocks = len(rows), -(-(part.before + part.tokens) // block_size)
                placements.append(Placement(slot, Sampling(seed=slot)))
                table = tuple(range(next_block, next_block + blocks))
                rows.append(Row(slot, part.before, (1,) * part.tokens, 0, table, part.samples))
                next_block += blocks
        return Plan(0, tuple(placements), tuple(rows))


def cells(limits: Limits) -> list[Cell]:
    """All that fit."""
    return [cell for cell in (*_decodes(), *_prefills(), *_mixed()) if cell.fits(limits)]


def _decodes() -> Iterator[Cell]:
    for rows in DECODE_ROWS:
        for context in CONTEXTS:
            yield Cell("decode", (Part(rows, 1, context - 1),))


def _prefills() -> Iterator[Cell]:
    for chunk in CHUNKS:
        for before in (0, *CONTEXTS[2:]):
            yield Cell("prefill", (Part(1, chunk, before),))
        yield Cell("prefill", (Part(1, chunk, 0, samples=False),))
        yield from _several(chunk)


def _several(chunk: int, counts: Sequence[int] = (2, 8)) -> Iterator[Cell]:
    for count in counts:
        yield Cell("several prefills", (Part(count, chunk, 0),))


def _mixed() -> Iterator[Cell]:
    for rows in MIXED_ROWS:
        for context in CONTEXTS[1:4]:
            for chunk in MIXED_CHUNKS:
                yield Cell("mixed", (Part(rows, 1, context - 1), Part(1, chunk, 0)))
