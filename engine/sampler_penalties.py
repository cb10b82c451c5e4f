"""Penalties and logit bias: what a request's tokens so far, and its own wishes, do to its logits before a draw.

For a row of logits l, in fp32 and in this order, which is vLLM's, with c the tokens generated so far, counted:

1. l[i] += logit_bias[i];
2. for every i of the prompt or generated: l[i] /= repetition_penalty if l[i] > 0, else l[i] *= it;
3. l[i] -= frequency_penalty * c[i];
4. l[i] -= presence_penalty where c[i] > 0.

Counts live on the device of the logits, for the slots that ask alone: what a draw adds is known there before the host
knows it. A slot's counts begin with the history of its placement, so a sequence that was preempted, or whose prompt was
cached, has what one that never stopped has. Beside the counts are the tokens themselves, so that only logits that may
change are looked at: a vocabulary is much longer than most histories. A token that comes twice is written twice, with
the same bits. All is elementwise: a row's bits do not depend on its batch. What is drawn is sampler.py's.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.plan import Placement, Sampling
from engine.sampler_torch import upload

Integers = NDArray[np.int64]

IN_PROMPT = 1 << 30
"""Added to the count of a token that the prompt holds: a context is shorter than this."""

LEAST_TOKENS = 256
"""Room for so many tokens of each history, at least; then twice as many."""


class Penalties:
    """Per slot: tokens so far and their counts [vocabulary] where a penalty is asked for; pairs of ids and biases."""

    def __init__(self, max_sequences: int, vocab_size: int, device: torch.device) -> None:
        self.active = False  # whether any slot asks: most steps need not look
        self._vocab_size = vocab_size
        self._device = device
        self._counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        # the tokens that rows of counts have counted, in order; filled up with the first
        self._tokens = torch.zeros((0, LEAST_TOKENS), dtype=torch.int64, device=device)
        self._lengths = np.zeros(max_sequences, np.int64)
        self._places = np.full(max_sequences, -1, np.int64)  # which row of counts is a slot's; -1: none
        self._free: list[int] = []  # rows of counts that are nobody's
        self._repetition = np.ones(max_sequences, np.float32)
        self._frequency = np.zeros(max_sequences, np.float32)
        self._presence = np.zeros(max_sequences, np.float32)
        self._bias_ids = np.full((max_sequences, 0), -1, np.int64)  # filled up with -1; widened when needed
        self._biases = np.zeros((max_sequences, 0), np.float32)

    def place(self, placement: Placement) -> None:
        """From now on the slot has these parameters, and its history is this."""
        slot, sampling = placement.slot, placement.sampling
        if not (self.active or sampling.penalises or sampling.logit_bias):
            return
        self._repetition[slot] = sampling.repetition_penalty
        self._frequency[slot] = sampling.frequency_penalty
        self._presence[slot] = sampling.presence_penalty
        self._set_bias(slot, sampling)
        if sampling.penalises:
            self._count(slot, placement.history, placement.prompt_tokens)
        elif self._places[slot] >= 0:
            self._free.append(int(self._places[slot]))
            self._places[slot] = -1
        self.active = bool((self._places >= 0).any() or (self._bias_ids >= 0).any())

    def applied(self, logits: Tensor, slots: Integers) -> Tensor:
        """Logits [S, vocabulary] as fp32 with the slots' wishes; themselves, where none has any. Left as they are."""
        counted = np.flatnonzero(self._places[slots] >= 0)
        rows, ids, biases = self._pairs(slots)
        if not len(counted) and not len(rows):
            return logits
        out = logits.to(torch.float32, copy=True)
        if len(rows):
            at = (upload(rows, out.device), upload(ids, out.device))
            out[at] = out[at] + upload(biases, out.device)
        if len(counted):
            self._penalise(out, counted, slots[counted])
        return out

    def drawn(self, tokens: Tensor, slots: Integers) -> None:
        """Counts what the slots drew: int64 [S], on the device."""
        counted = np.flatnonzero(self._places[slots] >= 0)
        if not len(counted):
            return
        self._make_room(int(self._lengths[slots[counted]].max()) + 1)
        places, width = self._places[slots[counted]], self._tokens.shape[1]
        drawn = tokens[upload(counted, self._device)]
        at = upload(places * self._vocab_size, self._device) + drawn
        ends = upload(places * width + self._lengths[slots[counted]], self._device)
        with torch.inference_mode():
            self._counts.view(-1).index_add_(0, at, torch.ones_like(at, dtype=torch.int32))
            self._tokens.view(-1)[ends] = drawn
        self._lengths[slots[counted]] += 1

    def _penalise(self, logits: Tensor, rows: Integers, slots: Integers) -> None:
        """Steps 2 to 4 for these rows of [S, vocabulary], fp32. No fused multiply-add: all devices round alike."""

        def column(values: NDArray[Any]) -> Tensor:
            return upload(values[slots], self._device)[:, None]

        places = column(self._places)
        ids = self._tokens[places[:, 0], : int(self._lengths[slots].max())]
        counts = self._counts.view(-1)[places * self._vocab_size + ids]
        at = upload(rows, self._device)[:, None] * self._vocab_size + ids
        found, repetition = logits.view(-1)[at], column(self._repetition)
        found = torch.where(found > 0, found / repetition, found * repetition)
        generated = counts & (IN_PROMPT - 1)
        found -= column(self._frequency) * generated
        found -= column(self._presence) * (generated > 0)
        logits.view(-1)[at] = found

    def _make_room(self, length: int) -> None:
        """For so many tokens of each."""
        width = self._tokens.shape[1]
        if length > width:
            with torch.inference_mode():
                more = self._tokens[:, :1].expand(-1, max(width, length - width))
                self._tokens = torch.cat((self._tokens, more), dim=1)

    def _count(self, slot: int, history: tuple[int, ...], prompt_tokens: int) -> None:
        assert 0 < prompt_tokens <= len(history) < IN_PROMPT
        if self._places[slot] < 0:
            self._places[slot] = self._free.pop() if self._free else self._grown()
        tokens = np.array(history, np.int64)
        counts = np.bincount(tokens[prompt_tokens:], minlength=self._vocab_size).astype(np.int32)
        counts[tokens[:prompt_tokens]] |= IN_PROMPT
        self._make_room(len(tokens))
        row = np.full(self._tokens.shape[1], tokens[0], np.int64)
        row[: len(tokens)] = tokens
        self._lengths[slot] = len(tokens)
        with torch.inference_mode():
            self._counts[int(self._places[slot])] = upload(counts, self._device)
            self._tokens[int(self._places[slot])] = upload(row, self._device)

    def _grown(self) -> int:
        """Twice the rows of counts; one of the new ones."""
        held = len(self._counts)
        with torch.inference_mode():
            room = self._counts.new_zeros((max(1, held), self._vocab_size))
            self._counts = torch.cat((self._counts, room))
            self._tokens = torch.cat(
                (self._tokens, self._tokens.new_zeros((len(room), self._tokens.shape[1])))
            )
        self._free.extend(range(len(self._counts) - 1, held, -1))
        return held

    def _set_bias(self, slot: int, sampling: Sampling) -> None:
        missing = len(sampling.logit_bias) - self._bias_ids.shape[1]
        if missing > 0:
            wider = ((0, 0), (0, missing))
            self._bias_ids = np.pad(self._bias_ids, wider, constant_values=-1)
            self._biases = np.pad(self._biases, wider)
        self._bias_ids[slot] = -1
        for column, (token, bias) in enumerate(sampling.logit_bias):
            assert 0 <= token < self._vocab_size
            self._bias_ids[slot, column], self._biases[slot, column] = token, bias

    def _pairs(self, slots: Integers) -> tuple[Integers, Integers, NDArray[np.float32]]:
        """(rows, ids, biases) of all biases of these slots; a row has an id once."""
        ids = self._bias_ids[slots]
        rows, columns = np.nonzero(ids >= 0)
        return rows, ids[rows, columns], self._biases[slots[rows], columns]
