"""Fakes: a runner without a model whose tokens are right only if every block it reads is, and tiers for its blocks.

`ScriptedRunner` keeps in its paged pool, instead of KV, the token and the position that were computed there. A token
is drawn from all that a row's block table leads to, so a block reused too early, a stale table or a skipped position
changes the answer or fails an assertion at once. Who asks for penalties must have been placed with just these tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256

from engine.plan import PENDING, Launched, Logprob, Plan, Row, Sampling, StepResult
from kvstore.block import Key
from kvstore.copies import DEVICE, DISK, HOST, Copy, CopyDone, Drop, Loss, Place

Content = tuple[tuple[int, int] | None, ...]
"""A block of a ScriptedRunner: (token, position) by offset."""

Script = Callable[[Sequence[int], Sampling], int]


def hashed(vocabulary: int) -> Script:
    """Draws below `vocabulary`, from all tokens so far, the seed and the choice."""

    def draw(tokens: Sequence[int], sampling: Sampling) -> int:
        text = f"{list(tokens)} {sampling.seed} {sampling.choice}"
        token = int.from_bytes(sha256(text.encode()).digest()[:4], "little") % vocabulary
        while len(tokens) < sampling.suppressed_until and token in sampling.suppressed:
            token = (token + 1) % vocabulary
        return token

    return draw


def saying(text: Sequence[int]) -> Script:
    """Says `text` again and again, whatever the prompt; counted by absolute position."""
    return lambda tokens, sampling: text[len(tokens) % len(text)]


@dataclass(frozen=True, slots=True)
class Done:
    result: StepResult

    def collect(self) -> StepResult:
        return self.result


class ScriptedRunner:
    exact = True

    def __init__(self, script: Script, *, block_size: int, max_sequences: int) -> None:
        self.computed_positions = 0
        self.seconds = 0.001  # that a step says to have taken
        self.plans: list[Plan] = []
        self._script = script
        self._block_size = block_size
        self._pool: dict[tuple[int, int], tuple[int, int]] = {}  # (block, offset) -> (token, position)
        self._tables: list[list[int]] = [[] for _ in range(max_sequences)]
        self._samplings = [Sampling()] * max_sequences
        self._histories: list[list[int]] = [[] for _ in range(max_sequences)]
        self._last = [PENDING] * max_sequences

    def launch(self, plan: Plan) -> Launched:
        self.plans.append(plan)
        for placement in plan.placements:
            self._tables[placement.slot] = []
            self._samplings[placement.slot] = placement.sampling
            self._histories[placement.slot] = list(placement.history)
            self._last[placement.slot] = PENDING
        tokens = tuple(token for row in plan.rows if (token := self._compute(row)) is not None)
        logprobs = tuple(
            Logprob(-1.0, ()) if self._samplings[row.slot].logprobs is not None else None
            for row in plan.rows
            if row.samples
        )
        return Done(
            StepResult(plan.step, tokens, logprobs, seconds=self.seconds, gil_seconds=self.seconds / 2)
        )

    def _compute(self, row: Row) -> int | None:
        table = self._tables[row.slot]
        assert row.blocks_at <= len(table), "a block table has a hole"
        table[row.blocks_at :] = row.blocks
        tokens = (self._last[row.slot],) if row.tokens == (PENDING,) else row.tokens
        assert PENDING not in tokens, "a pending token that nobody sampled"
        for position, token in enumerate(tokens, row.start):
            self._pool[self._place(table, position)] = (token, position)
            self.computed_positions += 1
        if not row.samples:
            return None
        context = [self._pool[self._place(table, position)] for position in range(row.start + len(tokens))]
        assert [position for _, position in context] == list(range(len(context))), (
            "a block holds other positions"
        )
        self._last[row.slot] = self._script([token for token, _ in context], self._samplings[row.slot])
        if self._samplings[row.slot].penalises:
            history = self._histories[row.slot]
            assert history == [token for token, _ in context], "penalties would count other tokens"
            history.append(self._last[row.slot])
        return self._last[row.slot]

    def block(self, block: int) -> Content:
        """What a block holds."""
        return tuple(self._pool.get((block, offset)) for offset in range(self._block_size))

    def fill(self, block: int, content: Content | None) -> None:
        """Overwrites a block; None is garbage."""
        for offset in range(self._block_size):
            self._pool.pop((block, offset), None)
            if content and offset < len(content) and (cell := content[offset]):
                self._pool[block, offset] = cell

    def _place(self, table: list[int], position: int) -> tuple[int, int]:
        return table[position // self._block_size], position % self._block_size


class ScriptedStore:
    """Tiers below the pools of ScriptedRunners, one a replica.

    A copy takes no effect until `end`; its slots must be left alone till then.

    From its beginning on a copy's target holds garbage; at its end the source must hold what it held at the beginning,
    but for records of the disk that were dropped meanwhile.
    """

    def __init__(self, *runners: ScriptedRunner) -> None:
        self.under_way: list[tuple[Copy, ScriptedRunner, list[Content | None]]] = []
        self.ended: list[Copy] = []
        self.host: dict[int, Content] = {}
        self.disk: dict[Key, Content] = {}
        self.seconds = 0.001  # that a copy says to have taken
        self._runners = list(runners)

    def put_device(self, replica: int, runner: ScriptedRunner) -> None:
        self._runners[replica] = runner

    def begin(self, copy: Copy) -> None:
        runner = self._runners[copy.replica]
        self.under_way.append(
            (copy, runner, [self._get(copy.source, place, runner) for place in copy.sources])
        )
        for place in copy.targets:
            self._put(copy.target, place, None, runner)

    def drop(self, drop: Drop) -> None:
        for key in drop.keys:
            self.disk.pop(key, None)

    def end(
        self, which: int = 0, lost: Callable[[Copy, Place], Loss | None] = lambda copy, place: None
    ) -> CopyDone:
        """Ends the copy `which` of those under way. Blocks for which `lost` says why do not arrive."""
        copy, runner, contents = self.under_way.pop(which)
        self.ended.append(copy)
        losses: list[tuple[int, Loss]] = []
        for key in copy.drops:
            self.disk.pop(key, None)
        for index, (source, target, before) in enumerate(
            zip(copy.sources, copy.targets, contents, strict=True)
        ):
            content = self._get(copy.source, source, runner)
            gone = copy.source == DISK and content is None
            assert gone or content == before, f"{source} changed while it was copied"
            assert content is not None or copy.source == DISK, (
                f"{source} was never filled: memory has no checksum"
            )
            reason = Loss.MISSING if content is None else lost(copy, source)
            if reason is not None:
                losses.append((index, reason))
            else:
                self._put(copy.target, target, content, runner)
        return CopyDone(copy.id, tuple(losses), seconds=self.seconds)

    def _get(self, tier: str, place: Place, runner: ScriptedRunner) -> Content | None:
        if tier == DEVICE:
            return runner.block(place.slot)[: place.tokens]
        return self.host.get(place.slot) if tier == HOST else self.disk.get(place.key)

    def _put(self, tier: str, place: Place, content: Content | None, runner: ScriptedRunner) -> None:
        if tier == DEVICE:
            runner.fill(place.slot, content)
        elif tier == HOST:
            self.host.pop(place.slot, None)
            if content is not None:
                self.host[place.slot] = content
        elif content is not None:
            self.disk[place.key] = content
