"""The split never leaks, and the chats and rows made from the texts are whole."""

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from training import corpus, rows
from training.corpus import Work


def training_texts(works: list[Work]) -> list[str]:
    """Everything that a training run would read."""
    kept, _ = corpus.split(works)
    chats = corpus.chat_documents(kept, 512, seed=1)
    return corpus.plain_documents(kept) + [corpus.render(chat) for chat in chats]


def test_no_run_of_words_of_a_held_out_text_is_trained_on(works: list[Work]) -> None:
    _, held_out = corpus.split(works)
    forbidden = {item for work in held_out for item in corpus.shingles(work.text)}
    assert forbidden
    for text in training_texts(works):
        assert forbidden.isdisjoint(corpus.shingles(text))


def test_copies_of_held_out_stories_are_dropped_and_the_rest_is_kept(works: list[Work]) -> None:
    kept, held_out = corpus.split(works)
    titles = {work.title for work in kept}
    assert titles == {"story 0", "story 1", "story 2", "A Book", "Aesop's Fables"}
    assert {work.title for work in held_out} == {"story 4", "story 5", *corpus.HELD_OUT_BOOKS} - {
        sorted(corpus.HELD_OUT_BOOKS)[1]
    }


def test_every_training_question_is_asked_once(works: list[Work]) -> None:
    kept, _ = corpus.split(works)
    for work in kept:
        chats = corpus.passage_chats(work, 900, random.Random(3))
        asked = [m.content for chat in chats for m in chat if m.role == "user"]
        for item in work.questions:
            assert sum(item.question in text for text in asked) == 1


def test_titled_tales_are_found_in_collections(works: list[Work]) -> None:
    found = {tale.title: tale.paragraphs for tale in corpus.tales(works)}
    assert found["the fox and the hen"] == ["A fox met a hen."]
    assert found["the wolf"] == ["A wolf howled."]


@given(st.text(alphabet="ab .!\n\"'", max_size=200), st.integers(20, 100))
def test_a_cut_paragraph_is_a_beginning_and_fits(text: str, chars: int) -> None:
    short = corpus.cut(text, chars)
    assert len(short) <= chars
    assert text.startswith(short)


def test_the_same_seed_gives_the_same_rows(tokenizer: Tokenizer, works: list[Work]) -> None:
    first, again, other = (rows.epoch_rows(tokenizer, works, 128, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.ids, again.ids)
    assert np.array_equal(first.weights, again.weights)
    assert not np.array_equal(first.ids[:5], other.ids[:5])


@given(st.lists(st.integers(1, 33), min_size=1, max_size=40))
def test_packing_keeps_every_token_and_splits_no_piece(sizes: list[int]) -> None:
    pieces = [
        rows.Piece(np.full(size, i + 1, dtype=np.int16), np.full(size, 10, dtype=np.uint8))
        for i, size in enumerate(sizes)
    ]
    packed = rows.pack(pieces, 32, np.random.default_rng(0))
    assert packed.ids.shape[1] == 33
    for i, size in enumerate(sizes):
        assert sorted((packed.ids == i + 1).sum(axis=1))[-1] == size
    assert int((packed.weights > 0).sum()) == sum(sizes)


def test_answers_weigh_more_than_what_is_asked(tokenizer: Tokenizer) -> None:
    chat = [corpus.Message("user", "Where was the fox?"), corpus.Message("assistant", "In a wood.")]
    ids = np.array(tokenizer.encode(corpus.render(chat)).ids, dtype=np.int16)
    weights = rows.chat_weights(ids, tokenizer.encode("assistant\n").ids)
    answered = tokenizer.decode(ids[weights == rows.ANSWERED].tolist(), skip_special_tokens=False)
    assert answered == "In a wood.<|im_end|>"
