"""Draws each sequence's next token from its logits: a table of sampling parameters by slot, one batched draw.

What is drawn, for a row of logits l at temperature T:

1. At temperature 0 the largest logit wins (equal ones: the lowest id). Else d = (l - max l) / T.
2. Of the tokens ordered by d (equal ones by id) are kept: the first top_k; of these the fewest whose
   probabilities, made to sum to 1 again, reach top_p; of these the ones at least min_p times as likely
   as the likeliest. This is the order of Hugging Face transformers. One token always stays; none below
   2**-40 of the likeliest ever does.
3. The token is argmax(d + g) over the kept, where g = -log(-log(u)) and u is a hash of (seed, choice,
   position, token id): a draw from their softmax ("Gumbel max"), and a function of the request alone.

Before that come penalties and logit bias (sampler_penalties.py), then suppressed tokens (min_tokens), which are as if
their logits were -inf. Log-probabilities are of the raw logits.
A row gives the same token and the same log-probability bits in every batch. The CPU's loops and torch
may draw differently where two sums of distance and noise are equal to about 1e-15, or a sum of masses
and top_p to 1e-12.
"""

import math
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine import sampler_torch
from engine.plan import Logprob, Placement, Sampling
from engine.sampler_penalties import Penalties
from engine.sampler_rows import MASS_BITS, Summary
from engine.sampler_table import Table

Integers = NDArray[np.int64]


class Arithmetic(Protocol):
    """What sampler_cpu and sampler_torch both are."""

    def draw(
        self, logits: Tensor, table: Table, slots: Integers, positions: Integers, /
    ) -> tuple[Tensor, Tensor]: ...

    def summarise(self, logits: Tensor, wanted: Integers, tokens: Tensor, top: int, /) -> Summary: ...

    def released_seconds(self) -> float: ...


class BrokenLogits(Exception):
    """The model produced logits nothing can be drawn from: NaN, +inf, or nothing above -inf."""


class Drawn:
    """The tokens of one step. Nothing waits for the device until `check` or `logprobs` is called."""

    def __init__(
        self, tokens: Tensor, sound: Tensor | None, asked: Integers, summary: Summary | None
    ) -> None:
        """sound: bool [S], None if all rows are known to be.

        asked: [S], how many likeliest tokens each row wants, -1: no log-probabilities.

        Copies to the host are queued now: behind this draw, before the step that comes next.
        """
        self.tokens = tokens  # int64 [S], on the sampler's device
        self._asked = asked
        self._sound = None if sound is None else sampler_torch.download(sound)
        self._parts = [sampler_torch.download(part) for part in summary.parts()] if summary else []
        self._copied = sampler_torch.mark(tokens.device)

    def check(self) -> None:
        """Waits for the draw; raises BrokenLogits. A broken row's token is a valid id, but means nothing."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._sound is not None:
            _check(self._sound)

    def logprobs(self) -> tuple[Logprob | None, ...]:
        """One for each row, None where the request did not ask. Waits and raises as `check` does."""
        self.check()
        if not self._parts:
            return (None,) * len(self._asked)
        summaries = zip(*(part.tolist() for part in self._parts), strict=True)
        return tuple(None if top < 0 else _logprob(top, *next(summaries)) for top in self._asked.tolist())


class Sampler:
    """Sampling parameters by slot, on the host, and the draw on the device of the logits."""

    def __init__(
        self,
        max_sequences: int,
        vocab_size: int,
        device: torch.device | str,
        arithmetic: Arithmetic | None = None,
    ) -> None:
        """`vocab_size`: the width of the logits, which may be more than the tokenizer knows.

        `arithmetic`: the one made for the device, unless given.
        """
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._arithmetic = arithmetic or _arithmetic(self._device)
        self._table = Table(max_sequences, vocab_size)
        self._penalties = Penalties(max_sequences, vocab_size, self._device)

    def place(self, placement: Placement) -> None:
        """From now on rows of its slot are drawn by its sampling; the door has seen to the ranges."""
        self._table.place(placement.slot, placement.sampling)
        self._penalties.place(placement)

    def sample(self, logits: Tensor, slots: NDArray[Any], positions: NDArray[Any]) -> Drawn:
        """Draws a token for each row of logits: fp32 or bf16 [S, vocab_size], left as they are.

        slots, positions: integers [S] on the host; positions[s] is the one that row s's token will take.
        Unsound logits raise BrokenLogits: on a CPU here, elsewhere when the result is read.
        """
        assert logits.shape == (len(slots), self._vocab_size)
        assert len(positions) == len(slots)
        slots = np.ascontiguousarray(slots, np.int64)
        positions = np.ascontiguousarray(positions, np.int64)
        sound: Tensor | None
        wanted = self._penalties.applied(logits, slots) if self._penalties.active else logits
        tokens, sound = self._arithmetic.draw(
            self._masked(wanted, slots, positions), self._table, slots, positions
        )
        if logits.device.type == "cpu":
            _check(sound)
            sound = None  # nothing is left to check
        if self._penalties.active:
            self._penalties.drawn(tokens, slots)
        asked = self._table.logprobs[slots]
        return Drawn(tokens, sound, asked, self._summary(logits, tokens, asked))

    def warm_up(self) -> None:
        """Takes what a first draw would wait for (compilers); touches no slot."""
        other = Sampler(1, self._vocab_size, self._device, self._arithmetic)
        other.place(Placement(0, Sampling(top_p=0.5, logprobs=1)))
        other.sample(
            torch.zeros(1, self._vocab_size, device=self._device), np.array([0]), np.array([0])
        ).check()

    @property
    def released_seconds(self) -> float:
        """Seconds spent so far with the interpreter lock released, by the samplers on this thread."""
        return self._arithmetic.released_seconds()

    def _masked(self, logits: Tensor, slots: Integers, positions: Integers) -> Tensor:
        """The logits, or a copy with suppressed tokens at -inf where a row has any at its position."""
        if not self._table.suppresses:
            return logits
        rows, ids = self._table.suppressed(slots, positions)
        if not len(rows):
            return logits
        index = (sampler_torch.upload(rows, logits.device), sampler_torch.upload(ids, logits.device))
        return logits.index_put(index, logits.new_full((), -torch.inf))

    def _summary(self, logits: Tensor, tokens: Tensor, asked: Integers) -> Summary | None:
        if not self._table.wants_logprobs:
            return None
        wanted = np.flatnonzero(asked >= 0)
        if not len(wanted):
            return None
        return self._arithmetic.summarise(logits, wanted, tokens, int(asked.max()))


def _arithmetic(device: torch.device) -> Arithmetic:
    """The CPU's loops are imported where they are used: numba takes half a second to import."""
    if device.type != "cpu":
        return sampler_torch
    from engine import sampler_cpu

    return sampler_cpu


def _check(sound: Tensor) -> None:
    flags = sound.numpy()
    if not flags.all():
        broken = np.flatnonzero(~flags).tolist()
        raise BrokenLogits(
            f"logits of rows {broken} of {len(flags)} hold NaN or +inf, or nothing finite: the weights are "
            "damaged, or the dtype is too narrow for this model (try model.dtype = 'float32')"
        )


def _logprob(top: int, peak: float, mass: int, chosen: float, ids: list[int], values: list[float]) -> Logprob:
    """A row's numbers put together on the host, so in the same bits whatever device they come from."""
    normaliser = peak + math.log(mass / (1 << MASS_BITS))
    likeliest = zip(ids[:top], (value - normaliser for value in values), strict=False)
    return Logprob(chosen - normaliser, tuple(likeliest))
