"""Conversations whose right answers are known: what trials ask a server under pressure, and compare with.

All begin with the same system text; each turn's prompt is the turn before it, its answer, and a user's new words. Some
are greedy, some sampled with a seed. The truth comes once from a server without pressure and without tiers, which
finds nothing of one request cached for another.
"""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import ClientSession

from bench import client, server
from bench.streams import WORDS
from engine.tokenizer import Tokenizer

UNPRESSURED: dict[str, object] = {
    "engine.kv_blocks": 4096,
    "engine.max_sequences": 8,
    "kvstore.host.bytes": 0,
    "kvstore.disk.bytes": 0,
}


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes in tokens, but for the first two. A conversation ends at a few hundred tokens."""

    conversations: int = 12
    turns: int = 4
    system_tokens: int = 128
    opening_tokens: int = 48
    user_tokens: int = 32
    least_answer: int = 24
    most_answer: int = 64


@dataclass(frozen=True, slots=True)
class Turn:
    """A request, and its right answer."""

    body: dict[str, Any]
    answer: client.Answer


Conversation = Sequence[Turn]


async def known(model: Path, shape: Shape, seed: int) -> list[Conversation]:
    """The same conversations and answers for the same model, shape and seed, from a server of their own."""
    settings = UNPRESSURED | {"model.path": str(model)}
    async with server.running(settings) as reference, server.session(reference) as http:
        return await answered(http, model, shape, seed)


async def answered(http: ClientSession, model: Path, shape: Shape, seed: int) -> list[Conversation]:
    """The conversations, with the answers of this server: it must be one that can be trusted."""
    words = await asyncio.to_thread(Words, model, random.Random(seed))
    system = words.draw(shape.system_tokens)
    return await asyncio.gather(
        *(_conversation(http, number, shape, system, words) for number in range(shape.conversations))
    )


class Words:
    """Draws token ids of plain words."""

    def __init__(self, model: Path, drawn: random.Random) -> None:
        self._tokenizer = Tokenizer.load(model)
        self._drawn = drawn

    def draw(self, tokens: int) -> list[int]:
        text = " ".join(self._drawn.choices(WORDS, k=2 * tokens))
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        assert len(ids) >= tokens, "a word is a token at least"
        return ids[:tokens]


async def _conversation(
    http: ClientSession, number: int, shape: Shape, system: list[int], words: Words
) -> Conversation:
    drawn = random.Random(number)
    asked = [words.draw(shape.user_tokens) for _ in range(shape.turns)]  # before any await: always the same
    prompt = [*system, *words.draw(shape.opening_tokens)]
    turns: list[Turn] = []
    for user in asked:
        prompt = prompt + user
        body = _body(number, prompt, drawn.randint(shape.least_answer, shape.most_answer))
        salted = body | {"cache_salt": f"{number}-{len(turns)}"}
        turns.append(Turn(body, await client.complete(http, salted)))
        prompt = prompt + turns[-1].answer.tokens
    return turns


def _body(number: int, prompt: list[int], max_tokens: int) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0.0 if number % 2 else 0.9,
        "seed": number,
        "ignore_eos": True,
    }
