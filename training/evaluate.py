"""Measure the trained model: held-out bits per byte against a 3-gram model and gzip, answers, samples.

    python -m training.evaluate DATA --model app/shipped/tales

All measures are of the same held-out stories and books, which share no run of twelve words with the training
text.
"""

from __future__ import annotations

import argparse
import gzip
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from training import corpus, rows
from training.corpus import Chat, Message, Work
from training.model import Llama, pick_device, shape_from
from training.rows import END_OF_TEXT_ID, IM_END_ID, Ids

DISCOUNT = 0.75
Keys = NDArray[np.int64]
Floats = NDArray[np.float64]

MILLER = (
    "There was once a miller who had three sons. When he died, the eldest got the mill, the second got the "
    "donkey, and the youngest got nothing but the cat. He sat down on a stone and wept."
)
PROMPTS: tuple[str | Chat, ...] = (
    "Once upon a time there was a little girl who lived with her grandmother",
    [Message("user", "Tell me a story about a little fox.")],
    [Message("user", MILLER + "\n\nWhat did the youngest son get?")],
    [Message("user", "Hello!")],
)


# ---------------------------------------------------------------- the model


def load_model(folder: Path, device: torch.device) -> Llama:
    """The model of a folder, its bfloat16 weights widened to float32."""
    model = Llama(shape_from(folder / "config.json"))
    model.load_state_dict({name: w.float() for name, w in load_file(folder / "model.safetensors").items()})
    return model.to(device).eval()


@torch.inference_mode()
def model_bits(model: Llama, documents: list[Ids], device: torch.device) -> float:
    """Bits for all tokens of the documents, each read in full windows that overlap by half."""
    context = model.shape.max_position_embeddings
    total = 0.0
    for ids in track(documents, "model"):
        for window, fresh in windows(ids, context):
            total += _window_bits(model, torch.from_numpy(window).to(device), fresh)
    return total


def windows(ids: Ids, context: int) -> Iterator[tuple[Keys, int]]:
    """Windows of at most C + 1 ids, and how many of each one's last targets no earlier window had.

    A document is read after an end-of-text token, so that its first token is predicted too.
    """
    whole = np.concatenate(([END_OF_TEXT_ID], ids)).astype(np.int64)
    done = 1
    while done < len(whole):
        end = min(len(whole), done + (context if done == 1 else context // 2))
        yield whole[max(0, end - context - 1) : end], end - done
        done = end


def _window_bits(model: Llama, window: Tensor, fresh: int) -> float:
    with torch.autocast(window.device.type, torch.bfloat16):
        logits = model(window[None, :-1])[0, -fresh:]
    nats = F.cross_entropy(logits.float(), window[-fresh:], reduction="sum")
    return nats.item() / float(np.log(2))


@torch.inference_mode()
def generate(
    model: Llama, prompt: list[int], count: int, temperature: float = 0.8, top_p: float = 0.95, seed: int = 0
) -> list[int]:
    """Sample up to ``count`` tokens after the prompt, the likeliest ones at temperature 0; no cache: slow."""
    device = model.model.embed_tokens.weight.device
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(count):
        recent = torch.tensor([ids[-model.shape.max_position_embeddings :]], device=device)
        chosen = choose(model(recent)[0, -1].float().cpu(), temperature, top_p, generator)
        if chosen in (END_OF_TEXT_ID, IM_END_ID):
            break
        ids.append(chosen)
    return ids[len(prompt) :]


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token id from logits [V]: the smallest set of likely tokens that holds ``top_p`` of the chance."""
    if temperature == 0:
        return int(logits.argmax())
    chances, order = F.softmax(logits / temperature, dim=-1).sort(descending=True)
    chances[chances.cumsum(0) - chances >= top_p] = 0
    return int(order[torch.multinomial(chances, 1, generator=generator)])


# ---------------------------------------------------------------- the 3-gram model


class Trigram:
    """An interpolated Kneser-Ney 3-gram model over the same tokens, with one fixed discount."""

    def __init__(self, documents: list[Ids], vocabulary: int) -> None:
        self.base = vocabulary
        seen = np.concatenate([self._triples(ids) for ids in documents])
        triples, counts = np.unique(seen, return_counts=True)
        pairs, pair_counts = np.unique(triples % self.base**2, return_counts=True)
        words, word_counts = np.unique(pairs % self.base, return_counts=True)
        self.tables = [(triples, counts), (pairs, pair_counts), (words, word_counts)]
        self.contexts = [self._contexts(keys, values) for keys, values in self.tables]

    def bits(self, ids: Ids) -> float:
        """Bits for the tokens of one document."""
        keys, chance = self._triples(ids), np.full(len(ids), 1.0 / self.base)
        for order in (2, 1, 0):
            chance = self._level(order, keys % self.base ** (3 - order), chance)
        return float(-np.log2(chance).sum())

    def _triples(self, ids: Ids) -> Keys:
        """Each token with the two before it as one number, [T]."""
        padded = np.concatenate(([END_OF_TEXT_ID] * 2, ids)).astype(np.int64)
        return (padded[:-2] * self.base + padded[1:-1]) * self.base + padded[2:]

    def _contexts(self, keys: Keys, counts: Keys) -> tuple[Keys, Keys, Keys]:
        """The contexts of a table, each with its total count and its number of different next tokens."""
        contexts, where = np.unique(keys // self.base, return_inverse=True)
        totals = np.bincount(where, weights=counts).astype(np.int64)
        return contexts, totals, np.bincount(where).astype(np.int64)

    def _level(self, order: int, keys: Keys, lower: Floats) -> Floats:
        """Chances at one order, given those of the next lower one, [T]."""
        contexts, totals, kinds = self.contexts[order]
        total = look_up(contexts, totals, keys // self.base)
        seen = np.maximum(look_up(*self.tables[order], keys) - DISCOUNT, 0)
        left = DISCOUNT * look_up(contexts, kinds, keys // self.base)
        mixed: Floats = (seen + left * lower) / np.maximum(total, 1)
        return np.where(total > 0, mixed, lower)


def look_up(keys: Keys, values: Keys, wanted: Keys) -> Floats:
    """The value of each wanted key in a sorted table, 0 where it is missing, [T]."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0).astype(np.float64)


# ---------------------------------------------------------------- the table


def compare(model: Llama, tokenizer: Tokenizer, works: list[Work], held_out: list[Work]) -> dict[str, float]:
    """Held-out bits per byte of each method."""
    device = model.model.embed_tokens.weight.device
    documents = [ids[:-1] for ids in rows.encode_works(tokenizer, held_out)]
    text = [work.text.encode() for work in held_out]
    size = sum(map(len, text))
    trigram = Trigram(rows.encode_works(tokenizer, works), model.shape.vocab_size)
    return {
        "this model": model_bits(model, documents, device) / size,
        "3-gram, Kneser-Ney, same tokens and training text": sum(map(trigram.bits, documents)) / size,
        "gzip -9": 8 * len(gzip.compress(b"\n\n".join(text), 9)) / size,
    }


def overlap(answer: str, truth: str) -> float:
    """The F1 of the words that an answer shares with the true one, 0 to 1."""
    given, wanted = (Counter(corpus.WORD.findall(text.lower())) for text in (answer, truth))
    both = sum((given & wanted).values())
    return 2 * both / max(1, sum(given.values()) + sum(wanted.values()))


def answers(
    model: Llama, tokenizer: Tokenizer, held_out: list[Work], count: int
) -> list[tuple[str, str, str]]:
    """Question with passage, true answer and the model's likeliest one, for ``count`` held-out questions."""
    works, rng, found = [work for work in held_out if work.questions], random.Random(0), []
    chats = [
        chat for work in works for chat in corpus.passage_chats(work, 1200, rng) if chat[0].role == "user"
    ]
    rng.shuffle(chats)
    for chat in track(chats[:count], "answers"):
        prompt = tokenizer.encode(corpus.render(chat[:1], generate=True)).ids
        reply = tokenizer.decode(generate(model, prompt, 40, temperature=0))
        found.append((chat[0].content, chat[1].content, reply))
    return found


def samples(model: Llama, tokenizer: Tokenizer, count: int) -> Iterator[tuple[str, str]]:
    """Prompt and sampled continuation for a few fixed prompts."""
    for prompt in PROMPTS:
        text = prompt if isinstance(prompt, str) else corpus.render(prompt, generate=True)
        reply = generate(model, tokenizer.encode(text).ids, count)
        yield (text if isinstance(prompt, str) else prompt[-1].content), tokenizer.decode(reply)


def show(console: Console, measured: dict[str, float]) -> None:
    """Print the table of bits per byte."""
    table = Table("held-out text", "bits per byte")
    for name, bits in measured.items():
        table.add_row(name, f"{bits:.3f}")
    console.print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the *.jsonl.gz texts")
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--questions", type=int, default=100, help="held-out questions to answer")
    parser.add_argument("--tokens", type=int, default=300, help="tokens a sample")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    console = Console(highlight=False)
    tokenizer = Tokenizer.from_file(str(given.model / "tokenizer.json"))
    model = load_model(given.model, pick_device(given.device))
    works, held_out = corpus.split(corpus.load(given.data))
    show(console, compare(model, tokenizer, works, held_out))
    found = answers(model, tokenizer, held_out, given.questions)
    console.print(f"word F1 of {len(found)} answers: {np.mean([overlap(a, t) for _, t, a in found]):.2f}")
    for asked, reply in samples(model, tokenizer, given.tokens):
        console.print(f"\n> {asked}\n\n{reply}", markup=False)


if __name__ == "__main__":
    main()
