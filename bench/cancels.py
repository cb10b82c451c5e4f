"""Cancels at random states, over HTTP, against a server that is short of room in every tier: nothing may be left.

Clients leave in the middle of an answer, or before it began, or the request is cancelled from outside
(`/admin/requests/{id}/cancel`); some stay, and their answers must be right. Then: nothing runs or waits, no block is
held or pinned, no copy is on its way, no tier was ever over its quota, and answers are right still.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import ClientError, ClientSession

from bench import client, conversations, server
from bench.conversations import Conversation, Shape, Turn
from bench.models import SHIPPED
from bench.server import Server

CLIENTS = 12
LONGEST_SECONDS = 0.8  # that a client waits before it leaves
STAYING_SHARE = 0.1
OUTSIDE_SHARE = 0.4
SETTLE_SECONDS = 15.0
LOOK_SECONDS = 0.1
CHECKED_AFTERWARDS = 12

BLOCK_BYTES = 48 * 2**10  # of the shipped model
CRAMPED: dict[str, object] = {
    "engine.kv_blocks": 72,
    "engine.max_sequences": 8,
    "kvstore.host.bytes": 24 * BLOCK_BYTES,
    "kvstore.disk.bytes": 6 * 2**20,
    "checkpoint.every_tokens": 16,
    "policies.admission.risk": 1.0,  # whoever fits is admitted: pressure
    "policies.resume": "reload",
    "log.level": "info",
}


@dataclass(slots=True)
class Outcome:
    """What was done, and what was not as it must be."""

    wanted: int
    cancelled: Counter[str] = field(default_factory=Counter)  # by how, and the request's state just before
    right: int = 0
    peak_disk_bytes: int = 0
    metrics: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def enough(self) -> bool:
        return self.cancelled.total() >= self.wanted or bool(self.problems)

    @property
    def summary(self) -> dict[str, Any]:
        return {
            "cancelled": self.cancelled.total(),
            **dict(sorted(self.cancelled.items())),
            "answers that stayed, right": self.right,
            "disk at most, bytes": self.peak_disk_bytes,
            **self.metrics,
            "problems": len(self.problems),
        }


async def trial(cancels: int, seed: int, store: Path, shape: Shape | None = None) -> Outcome:
    """A server of its own, so many requests cancelled, then a look at what they left. Raises ServerFailed."""
    talks = await conversations.known(SHIPPED, shape or Shape(), seed)
    outcome, drawn = Outcome(cancels), random.Random(seed)
    settings = CRAMPED | {"kvstore.disk.path": str(store)}
    async with server.running(settings) as cramped, server.session(cramped) as http:
        watching = asyncio.ensure_future(_watch(outcome, http, store))
        try:
            await disturb(outcome, http, drawn, talks)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        await _ends_clean(outcome, cramped)
    return outcome


async def disturb(
    outcome: Outcome, http: ClientSession, drawn: random.Random, talks: Sequence[Conversation]
) -> None:
    """Asks and cancels until there were enough; then nothing may be left, and answers must be right."""
    clients = (
        _client(outcome, http, random.Random(drawn.random()), talks, number) for number in range(CLIENTS)
    )
    await asyncio.gather(*clients)
    await _settled(outcome, http)
    await _right_still(outcome, http, talks)
    await _settled(outcome, http)
    outcome.metrics = await _pressure(http)


async def _client(
    outcome: Outcome, http: ClientSession, drawn: random.Random, talks: Sequence[Conversation], number: int
) -> None:
    while not outcome.enough:
        turn = drawn.choice(drawn.choice(talks))
        asking = asyncio.ensure_future(client.stream(http, turn.body))
        try:
            if drawn.random() < STAYING_SHARE:
                _compare(outcome, turn, await asking)
            else:
                await asyncio.wait([asking], timeout=drawn.uniform(0.0, LONGEST_SECONDS))
                await _cancel(outcome, http, drawn, asking)
        except (client.Incomplete, ClientError) as error:
            if "cancel" not in str(error).lower():  # else somebody cancelled it from outside
                outcome.problems.append(f"client {number}: {type(error).__name__}: {error}")
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)


async def _cancel(
    outcome: Outcome, http: ClientSession, drawn: random.Random, asking: asyncio.Future[client.Answer]
) -> None:
    if drawn.random() < OUTSIDE_SHARE:
        await _cancel_one(outcome, http, drawn)
    if asking.done():
        await asking
    else:
        asking.cancel()
        outcome.cancelled["client left"] += 1


async def _cancel_one(outcome: Outcome, http: ClientSession, drawn: random.Random) -> None:
    """Whichever it is: each client hears of its own."""
    async with http.get("/admin/requests") as response:
        requests = (await response.json())["requests"]
    if not requests:
        return
    chosen = drawn.choice(requests)
    async with http.post(f"/admin/requests/{chosen['id']}/cancel") as response:
        if response.status == 200:
            outcome.cancelled[f"from outside, {chosen['state']}"] += 1
        elif response.status != 404:  # it has ended meanwhile
            outcome.problems.append(f"cancel: {response.status} {await response.text()}")


def _compare(outcome: Outcome, turn: Turn, answer: client.Answer) -> None:
    if answer.same(turn.answer):
        outcome.right += 1
    else:
        outcome.problems.append(f"wrong answer: {turn.body}: {answer.tokens}, not {turn.answer.tokens}")


async def _watch(outcome: Outcome, http: ClientSession, store: Path) -> None:
    """Quotas hold at every moment that is looked at."""
    quota = int(str(CRAMPED["kvstore.disk.bytes"]))
    while True:
        size = _files_bytes(store)
        outcome.peak_disk_bytes = max(outcome.peak_disk_bytes, size)
        if size > quota:
            outcome.problems.append(f"the disk tier has {size} bytes, over its quota of {quota}")
        for name, tier in (await server.state(http))["tiers"].items():
            if tier["blocks"] > tier["capacity_blocks"]:
                outcome.problems.append(f"{name} is over its quota: {tier}")
        await asyncio.sleep(LOOK_SECONDS)


def _files_bytes(store: Path) -> int:
    """Of all files that are there now; none is moved or deleted while the server runs."""
    return sum(path.stat().st_size for path in store.glob("*"))


async def _settled(outcome: Outcome, http: ClientSession) -> None:
    """All returns to zero by itself."""
    for _ in range(round(SETTLE_SECONDS / LOOK_SECONDS)):
        if not _left(await server.state(http)):
            return
        await asyncio.sleep(LOOK_SECONDS)
    outcome.problems += _left(await server.state(http))


def _left(state: dict[str, Any]) -> list[str]:
    counts = {name: state[name] for name in ("running", "waiting", "kv_used_blocks")}
    counts |= {f"pinned in {name}": tier["pinned_blocks"] for name, tier in state["tiers"].items()}
    return [f"left behind: {name} = {count}" for name, count in counts.items() if count]


async def _right_still(outcome: Outcome, http: ClientSession, talks: Sequence[Conversation]) -> None:
    turns = [turn for talk in talks for turn in talk][-CHECKED_AFTERWARDS:]
    answers = await asyncio.gather(*(client.complete(http, turn.body) for turn in turns))
    for turn, answer in zip(turns, answers, strict=True):
        _compare(outcome, turn, answer)


async def _pressure(http: ClientSession) -> dict[str, int]:
    """That what should be met was met."""
    text = await server.metrics(http)
    tiers = {
        f"tokens hit in {tier}": server.total(text, "sluice:kv_tier_hit_tokens_total", tier=tier)
        for tier in ("device", "host", "disk")
    }
    found = {
        "preemptions": server.total(text, "vllm:num_preemptions_total"),
        **tiers,
        "writes refused by a full disk tier": server.total(
            text, "sluice:kv_tier_errors_total", tier="disk", kind="full"
        ),
    }
    return {name: int(count) for name, count in found.items()}


async def _ends_clean(outcome: Outcome, cramped: Server) -> None:
    """SIGTERM waits for copies under way: the server says so when some never ended."""
    code = await cramped.stop()
    if code:
        outcome.problems.append(f"it exited with {code}: {cramped.last_words()}")
    if cramped.events("store_stopped_early"):
        outcome.problems.append("copies were under way when nothing else was")
    outcome.problems += [f"logged: {line}" for line in cramped.log if _unexpected(line)]


def _unexpected(line: dict[str, Any]) -> bool:
    """A refused write is not: one reader that is slow keeps a small store's pages from reuse, and it is counted."""
    return line.get("level") in ("warning", "error", "critical") and line.get("kind") != "full"
