"""A tiny corpus in the layout of the real one, and a tokenizer trained on it."""

import gzip
import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from training import corpus
from training.tokenizer import train_tokenizer

NAMES = ("fox", "hen", "king", "miller", "witch", "wolf")
DEEDS = (
    "went into the wood",
    "sat by the well",
    "found a golden ring",
    "slept under the tree",
    "sang a song",
)
PLACES = ("early in the morning", "when the moon was up", "behind the high wall", "near the old mill")


def name(rng: random.Random) -> str:
    """A made-up name, so that no two sentences are the same."""
    return "".join(rng.choices("abdeiklmnorstu", k=6)).capitalize()


def paragraph(rng: random.Random) -> str:
    """A few made-up sentences."""
    return " ".join(
        f"The {rng.choice(NAMES)} {name(rng)} {rng.choice(DEEDS)} {rng.choice(PLACES)}."
        for _ in range(rng.randint(2, 4))
    )


def story(rng: random.Random) -> str:
    """A made-up story of a dozen paragraphs."""
    return "\n\n".join(["Once upon a time there was a fox.", *(paragraph(rng) for _ in range(12))])


def write(path: Path, rows: list[dict[str, object]]) -> None:
    """Gzipped JSON Lines."""
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with three books (one held out), six stories (two held out) and their questions.

    One book repeats a paragraph of a held-out story, and one training story is a copy of a held-out one.
    """
    folder, rng = tmp_path_factory.mktemp("text"), random.Random(7)
    texts = [story(rng) for _ in range(6)]
    texts[3] = texts[5]
    splits = ["train"] * 4 + ["val", "test"]
    stories: list[dict[str, object]] = [
        {"title": f"story {i}", "split": s, "text": t}
        for i, (s, t) in enumerate(zip(splits, texts, strict=True))
    ]
    books: list[dict[str, object]] = [
        {"title": "A Book", "text": story(rng) + "\n\n" + texts[4].split("\n\n")[5]},
        {
            "title": "Aesop's Fables",
            "text": "THE FOX AND THE HEN A fox met a hen.\n\nTHE WOLF A wolf howled.",
        },
        {"title": sorted(corpus.HELD_OUT_BOOKS)[0], "text": story(rng)},
    ]
    asked: list[dict[str, object]] = [
        {
            "story": f"story {i}",
            "sections": [s],
            "question": f"Where was the fox in {s}?",
            "answer": "in a wood",
        }
        for i in range(6)
        for s in (1, 5, 9)
    ]
    write(folder / "childrens_books.jsonl.gz", books)
    write(folder / "fairytale_stories.jsonl.gz", stories)
    write(folder / "fairytale_qa.jsonl.gz", asked)
    return folder


@pytest.fixture(scope="session")
def works(data: Path) -> list[corpus.Work]:
    """All works of the tiny corpus."""
    return corpus.load(data)


@pytest.fixture(scope="session")
def tokenizer(works: list[corpus.Work]) -> Tokenizer:
    """A tokenizer of 320 entries trained on the tiny corpus."""
    return train_tokenizer(corpus.plain_documents(works), 320)
