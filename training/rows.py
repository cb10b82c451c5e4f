"""Turn documents into rows of token ids with a weight for each token, packed to the training context.

A row holds C + 1 tokens for a context of C: the model reads row[:-1] and is asked for row[1:].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from training import corpus
from training.corpus import Work

END_OF_TEXT_ID, IM_START_ID, IM_END_ID = 0, 1, 2
ASKED, TOLD, ANSWERED, PLAIN = 2, 10, 30, 10
SHORT_ANSWER = 64

Ids = NDArray[np.int16]
Weights = NDArray[np.uint8]


@dataclass(frozen=True)
class Rows:
    """Packed rows: ``ids`` [N, C+1] and the loss weight of each token in tenths [N, C+1]."""

    ids: Ids
    weights: Weights


@dataclass(frozen=True)
class Piece:
    """A document or a part of one that fits into a row, with its weights."""

    ids: Ids
    weights: Weights


def encode_works(tokenizer: Tokenizer, works: list[Work]) -> list[Ids]:
    """Token ids of each work's text, closed by the end-of-text token."""
    encoded = tokenizer.encode_batch([work.text for work in works])
    return [np.array([*item.ids, END_OF_TEXT_ID], dtype=np.int16) for item in encoded]


def chat_weights(ids: Ids, header: list[int]) -> Weights:
    """Weights [T] of a chat: little for what is asked, full for what is told, thrice for short answers.

    ``header`` is what an assistant's turn begins with: the tokens of "assistant" and the line end.
    """
    weights = np.full(len(ids), ASKED, dtype=np.uint8)
    for start in np.flatnonzero(ids == IM_START_ID):
        body = start + 1 + len(header)
        if ids[start + 1 : body].tolist() == header:
            end = body + int(np.argmax(ids[body:] == IM_END_ID)) + 1
            weights[body:end] = ANSWERED if end - body <= SHORT_ANSWER else TOLD
    return weights


def chat_pieces(tokenizer: Tokenizer, works: list[Work], context: int, seed: int) -> Iterator[Piece]:
    """The chats of one epoch, cut to the context."""
    header = tokenizer.encode("assistant\n").ids
    texts = [corpus.render(chat) for chat in corpus.chat_documents(works, context, seed)]
    for item in tokenizer.encode_batch(texts):
        ids = np.array([*item.ids, END_OF_TEXT_ID], dtype=np.int16)
        yield Piece(ids[: context + 1], chat_weights(ids, header)[: context + 1])


def plain_pieces(encoded: list[Ids], context: int, rng: np.random.Generator) -> Iterator[Piece]:
    """Running text in parts of C + 1 tokens; the first cut is random, so that each epoch cuts elsewhere."""
    for ids in encoded:
        cuts = [0, *range(int(rng.integers(1, context)), len(ids) - 1, context)]
        for start, end in zip(cuts, [*cuts[1:], len(ids) - 1], strict=True):
            part = ids[start : end + 1]
            yield Piece(part, np.full(len(part), PLAIN, dtype=np.uint8))


def pack(pieces: list[Piece], context: int, rng: np.random.Generator) -> Rows:
    """Fill rows greedily, largest piece first, each into the fullest row with room; pads weigh nothing.

    The pieces of a row then change places at random, or else a short chat would never begin one.
    """
    room: list[list[int]] = [[] for _ in range(context + 2)]
    filled: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda item: -len(item.ids)):
        size = len(piece.ids)
        space = next((s for s in range(size, context + 2) if room[s]), context + 1)
        row = room[space].pop() if room[space] else len(filled)
        if row == len(filled):
            filled.append([])
        filled[row].append(piece)
        room[space - size].append(row)
    return _stack([[row[i] for i in rng.permutation(len(row))] for row in filled], context)


def _stack(filled: list[list[Piece]], context: int) -> Rows:
    ids = np.full((len(filled), context + 1), END_OF_TEXT_ID, dtype=np.int16)
    weights = np.zeros((len(filled), context + 1), dtype=np.uint8)
    for row, pieces in enumerate(filled):
        joined = np.concatenate([piece.ids for piece in pieces])
        ids[row, : len(joined)] = joined
        weights[row, : len(joined)] = np.concatenate([piece.weights for piece in pieces])
    return Rows(ids, weights)


def epoch_rows(tokenizer: Tokenizer, works: list[Work], context: int, seed: int) -> Rows:
    """All rows of one epoch, shuffled; the same arguments give the same rows."""
    rng = np.random.default_rng(seed)
    pieces = list(plain_pieces(encode_works(tokenizer, works), context, rng))
    pieces += chat_pieces(tokenizer, works, context, seed)
    packed = pack(pieces, context, rng)
    order = rng.permutation(len(packed.ids))
    return Rows(packed.ids[order], packed.weights[order])


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """How many bytes of text each token stands for, [V]; special tokens stand for none."""
    size = tokenizer.get_vocab_size()
    lengths = [len(tokenizer.id_to_token(i) or "") for i in range(size)]
    lengths[: IM_END_ID + 1] = [0] * (IM_END_ID + 1)
    return np.array(lengths, dtype=np.int64)
