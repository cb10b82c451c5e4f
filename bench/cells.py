"""What is measured: how many streams, over which context, prefill or decode."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum


class Kind(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Cell:
    kind: Kind
    streams: int
    context: int  # tokens of each prompt

    @property
    def tokens(self) -> int:
        """Of all prompts."""
        return self.streams * self.context

    def within(self, max_positions: int, new_tokens: int) -> "Cell":
        """Its context shortened to leave room for `new_tokens`: what is run, where a model ends at it."""
        return replace(self, context=max(1, min(self.context, max_positions - new_tokens)))


def matrix(streams: Iterable[int], contexts: Iterable[int], *, prefill_tokens: int) -> list[Cell]:
    """Every prefill, then every decode, by rising streams and contexts: a context grows out of the last one.

    A prefill is thinned to as many streams as `prefill_tokens` allow, at least one: beyond a step's token
    budget an engine does one such batch after another, and figures per token stay the same. What this makes
    alike is done once.
    """
    wanted = [(s, c) for s in sorted(set(streams)) for c in sorted(set(contexts))]
    prefills = {(min(s, max(1, prefill_tokens // c)), c): None for s, c in wanted}
    return [Cell(Kind.PREFILL, *pair) for pair in prefills] + [Cell(Kind.DECODE, *pair) for pair in wanted]
