"""Trials of what must survive: a server killed at random moments, again and again, on one disk store.

Each life is a fresh process under the load of a few clients: conversations of several turns over a shared prefix,
greedy and seeded, on a device pool and a host tier far too small for them, the disk under its quota. A seeded draw
says when SIGKILL comes: while it starts, or under load. Every start must serve; every answer must be the one that an
unpressured server without tiers gave; a store with records must be hit. With --cancels the other trial: see
bench/cancels.py. Ends with 1 when something is not as it must be.
"""

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from aiohttp import ClientError, ClientSession
from rich.console import Console
from rich.table import Table

from bench import cancels, client, conversations, machine, server
from bench.conversations import Conversation, Shape, Turn
from bench.models import SHIPPED
from bench.server import Server

CLIENTS = 6
WATCH_SECONDS = 0.25
STARTING_SHARE = 0.15
"""Of the kills, that come before the server is ready."""

BLOCK_BYTES = 48 * 2**10  # of the shipped model: 16 tokens × 6 layers × K and V × 2 heads × 64 × bf16
PRESSURED: dict[str, object] = {
    "engine.kv_blocks": 72,
    "engine.max_sequences": CLIENTS,
    "kvstore.host.bytes": 32 * BLOCK_BYTES,
    "kvstore.disk.bytes": 12 * 2**20,  # fewer blocks than the conversations have: it evicts too
    "checkpoint.every_tokens": 16,
    "policies.admission.risk": 1.0,  # whoever fits is admitted: pressure
    "policies.resume": "reload",
    "log.level": "info",
}
FAILURES = (ClientError, TimeoutError, client.Incomplete, ConnectionError)


@dataclass(slots=True)
class Life:
    """One process, from its launch to its kill."""

    number: int
    kind: str  # starting, or serving
    moment_seconds: float  # of the kill: since the launch, or since the first answer
    records: int | None = None  # that the disk tier found at its start; None: it did not get so far
    ready_seconds: float | None = None
    answers: int = 0
    wrong: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)  # before the kill
    first_hit_tokens: float | None = None  # from disk, when the first answer was there
    seen: dict[str, float] = field(default_factory=dict)  # metrics, shortly before the kill
    warnings: list[dict[str, Any]] = field(default_factory=list)
    killed: bool = False

    @property
    def problems(self) -> list[str]:
        found = [*(f"wrong answer: {wrong}" for wrong in self.wrong), *self.errors]
        if self.kind == "serving" and not self.answers:
            found.append("it answered nothing")
        if self.records and self.kind == "serving" and not self.first_hit_tokens:
            found.append(f"{self.records} records at its start, and no hit")
        return [f"life {self.number}: {problem}" for problem in found]


def plan(kills: int, seed: int, load_seconds: float, start_seconds: float) -> list[Life]:
    """When each kill comes. The last is under load, so that whatever the others left must serve once more."""
    drawn = random.Random(seed)
    lives = []
    for number in range(kills):
        starting = drawn.random() < STARTING_SHARE and number < kills - 1
        moment = drawn.uniform(0.0, start_seconds if starting else load_seconds)
        lives.append(Life(number, "starting" if starting else "serving", moment))
    return lives


async def live(life: Life, settings: server.Settings, talks: Sequence[Conversation]) -> None:
    """Lives it: start, serve, be killed at its moment. Writes down in `life` what happened."""
    started = await Server.launch(settings)
    try:
        if life.kind == "starting":
            await asyncio.sleep(life.moment_seconds)
        else:
            await started.ready()
            await _serve(life, started, talks)
    except server.ServerFailed as error:
        life.errors.append(f"it did not serve: {error}")
    finally:
        life.killed = True
        await started.kill()
        _note_log(life, started)


def _note_log(life: Life, started: Server) -> None:
    ups = [line for line in started.events("tier_up") if line["tier"] == "disk"]
    life.records = ups[0]["records"] if ups else None
    life.ready_seconds = started.ready_seconds or None
    life.warnings = [line for line in started.log if line.get("level") in ("warning", "error", "critical")]
    life.warnings += [line for line in started.log if "text" in line]


async def _serve(life: Life, started: Server, talks: Sequence[Conversation]) -> None:
    async with server.session(started) as http:
        first = asyncio.Event()
        drawn = random.Random(life.number)
        tasks = [
            asyncio.ensure_future(_client(life, http, random.Random(drawn.random()), talks, first))
            for _ in range(CLIENTS)
        ]
        tasks.append(asyncio.ensure_future(_watch(life, http)))
        async with _ended(tasks):
            await asyncio.wait([asyncio.ensure_future(first.wait()), *tasks], return_when="FIRST_COMPLETED")
            life.first_hit_tokens = server.total(
                await server.metrics(http), "sluice:kv_tier_hit_tokens_total", tier="disk"
            )
            await asyncio.sleep(life.moment_seconds)
            life.killed = True
            await started.kill()  # under load: clients are cut off in the middle


@contextlib.asynccontextmanager
async def _ended(tasks: Sequence[asyncio.Future[None]]) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _client(
    life: Life,
    http: ClientSession,
    drawn: random.Random,
    talks: Sequence[Conversation],
    first: asyncio.Event,
) -> None:
    """Goes on with conversations, from any turn on, until the server is killed."""
    while not life.killed:
        talk = drawn.choice(talks)
        for turn in talk[drawn.randrange(len(talk)) :]:
            try:
                answer = await drawn.choice((client.complete, client.stream))(http, turn.body)
            except FAILURES as error:
                if not life.killed:
                    life.errors.append(f"{type(error).__name__}: {error}")
                return
            _note(life, turn, answer)
            first.set()


def _note(life: Life, turn: Turn, answer: client.Answer) -> None:
    life.answers += 1
    if not answer.same(turn.answer):
        life.wrong.append({"body": turn.body, "right": turn.answer.tokens, "got": answer.tokens})


async def _watch(life: Life, http: ClientSession) -> None:
    """Samples what proves that there was pressure; the last sample before the kill stays."""
    while not life.killed:
        with contextlib.suppress(*FAILURES):  # the kill: the clients report what else there is
            text = await server.metrics(http)
            life.seen = {
                "preemptions": server.total(text, "vllm:num_preemptions_total"),
                "resumptions": server.total(text, "sluice:resumptions_total"),
                "disk_hit_tokens": server.total(text, "sluice:kv_tier_hit_tokens_total", tier="disk"),
                "host_hit_tokens": server.total(text, "sluice:kv_tier_hit_tokens_total", tier="host"),
                "disk_written_bytes": server.total(text, "sluice:kv_tier_write_bytes_total", tier="disk"),
                "tier_errors": server.total(text, "sluice:kv_tier_errors_total"),
            }
        await asyncio.sleep(WATCH_SECONDS)


def summary(lives: Sequence[Life]) -> dict[str, Any]:
    serving = [life for life in lives if life.kind == "serving"]
    stocked = [life for life in serving if life.records]
    ready = sorted(life.ready_seconds for life in lives if life.ready_seconds)
    return {
        "kills": len(lives),
        "kills while starting": len(lives) - len(serving),
        "starts that had to serve": len(serving),
        "starts that served": sum(life.answers > 0 for life in serving),
        "answers": sum(life.answers for life in lives),
        "wrong answers": sum(len(life.wrong) for life in lives),
        "errors before a kill": sum(len(life.errors) for life in lives),
        "starts with records": len(stocked),
        "of these with hits from disk": sum(bool(life.first_hit_tokens) for life in stocked),
        "records at start, median": median([life.records or 0 for life in serving]) if serving else 0,
        "stores moved aside": sum(_aside(life) for life in lives),
        "preemptions": _sum(lives, "preemptions"),
        "resumptions": _sum(lives, "resumptions"),
        "tokens hit on disk": _sum(lives, "disk_hit_tokens"),
        "MiB written to disk": _sum(lives, "disk_written_bytes") // 2**20,
        "blocks lost by tiers": _sum(lives, "tier_errors"),
        "ready after, median s": median(ready) if ready else None,
        "ready after, most s": max(ready, default=None),
    }


def _sum(lives: Sequence[Life], name: str) -> int:
    return int(sum(life.seen.get(name, 0) for life in lives))


def _aside(life: Life) -> bool:
    return any("aside" in str(line) for line in life.warnings)


async def trial(options: argparse.Namespace, store: Path, rows: Path) -> list[Life]:
    talks = await conversations.known(SHIPPED, Shape(), options.seed)
    settings = PRESSURED | {"kvstore.disk.path": str(store)}
    lives = plan(options.kills, options.seed, options.load_seconds, options.start_seconds)
    with rows.open("w") as out:
        out.write(json.dumps({"machine": machine.description(), "seed": options.seed}) + "\n")
        for life in lives:
            await live(life, settings | _variation(life), talks)
            out.write(json.dumps(asdict(life) | {"problems": life.problems}) + "\n")
            out.flush()
            print(_line(life), flush=True)
    return lives


def _variation(life: Life) -> dict[str, object]:
    """Every third life does without the host tier, on the same store: blocks go straight to disk then."""
    return {"kvstore.host.bytes": 0} if life.number % 3 == 2 else {}


def _line(life: Life) -> str:
    ready = f"{life.ready_seconds:.1f} s" if life.ready_seconds else "never"
    said = f"{life.number}: {life.kind}, ready {ready}, records {life.records}, answers {life.answers}"
    return " | ".join([said, *life.problems, *(str(warning)[:200] for warning in life.warnings)])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.crashes", description=__doc__)
    add = parser.add_argument
    add("--kills", type=int, default=0)
    add("--cancels", type=int, default=0)
    add("--seed", type=int, default=0)
    add("--load-seconds", type=float, default=2.0, help="a kill under load comes within so long")
    add("--start-seconds", type=float, default=4.0, help="… and one while it starts")
    add("--out", type=Path, default=Path(".bench"), help="a directory for the rows")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    console, stamp, problems = Console(), time.strftime("%Y%m%d-%H%M%S"), []
    with tempfile.TemporaryDirectory(prefix="sluice-crashes-") as directory:
        if options.kills:
            rows = options.out / f"crashes-{stamp}.jsonl"
            lives = asyncio.run(trial(options, Path(directory) / "kills", rows))
            console.print(_table("kill -9 at random moments", summary(lives)), f"rows: {rows}")
            problems += [problem for life in lives for problem in life.problems]
        if options.cancels:
            outcome = asyncio.run(cancels.trial(options.cancels, options.seed, Path(directory) / "cancels"))
            console.print(_table("cancels at random states", outcome.summary))
            problems += outcome.problems
    if problems:
        sys.exit("\n".join(problems))


def _table(title: str, figures: dict[str, Any]) -> Table:
    table = Table("figure", "value", title=title)
    for name, value in figures.items():
        table.add_row(name, f"{value:,.1f}" if isinstance(value, float) else f"{value}")
    return table


if __name__ == "__main__":
    main()
