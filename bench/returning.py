"""A conversation comes back: time to its first token from the device, the host, the disk, after a restart, and cold.

Over HTTP, each on a server as anyone starts it. A turn is a prompt of random token ids and a short answer; the next
turn's prompt is all of that and 32 ids more. Before it, what the case says is forgotten through the admin API. Rounds
take the cases in turn; figures are medians.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from aiohttp import ClientSession
from rich.console import Console
from rich.table import Table

from bench import client, machine, server
from bench.models import RANDOM_100M, SHIPPED, written

CASES = ("cold", "device", "host", "disk", "restart")
FORGET = {"device": (), "host": ("device",), "disk": ("device", "host"), "restart": ()}
GOALS = {"host": 10.0, "disk": 5.0, "restart": 5.0}
MORE_TOKENS = 32
ANSWER_TOKENS = 32
VOCABULARY = 4000
SAVED_SECONDS, LOOK_SECONDS = 120.0, 0.05  # for a conversation to be on disk


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, and how long its conversations are."""

    name: str
    directory: Path
    tokens: int

    @property
    def settings(self) -> dict[str, object]:
        return {
            "model.path": str(self.directory),
            "model.dtype": "bfloat16",
            "engine.kv_blocks": self.tokens // 16 * 3,
            "kvstore.host.bytes": 3 * 2**30,
            "kvstore.disk.bytes": 3 * 2**30,
            "log.level": "info",
        }


def subjects(names: Sequence[str], cache: Path) -> list[Subject]:
    wide = {**RANDOM_100M, "max_position_embeddings": 8448}
    known = {
        "shipped": lambda: Subject("shipped", SHIPPED, 1500),
        "random100m": lambda: Subject("random100m", written(cache / "random100m_8k", wide), 8000),
    }
    return [known[name]() for name in names]


@dataclass(frozen=True, slots=True)
class Row:
    model: str
    case: str
    round: int
    ttft_seconds: float
    cached_tokens: int
    prompt_tokens: int
    others_cores: float  # that the rest of the machine, this client too, kept busy meanwhile


class Trial:
    """One server after another on one disk store."""

    def __init__(self, subject: Subject, store: Path) -> None:
        self._subject = subject
        self._settings = subject.settings | {"kvstore.disk.path": str(store)}
        self._server: server.Server | None = None
        self._http: ClientSession | None = None

    async def start(self) -> None:
        self._server = await server.Server.launch(self._settings)
        await self._server.ready()
        self._http = server.session(self._server)
        await self.ask(random_tokens(200, seed=-1), 8)  # what a first request pays is no conversation's

    async def stop(self) -> None:
        assert self._server
        assert self._http
        await self._http.close()
        await self._server.stop()

    async def ask(self, prompt: list[int], new_tokens: int) -> tuple[client.Answer, int]:
        """The answer, and how many of the prompt's tokens were cached."""
        assert self._server
        assert self._http
        body = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        answer = await client.stream(self._http, body)
        finished = self._server.events("request_finished")
        while not finished or finished[-1]["prompt_tokens"] != len(prompt):
            await asyncio.sleep(0.01)  # its log line is on its way
            finished = self._server.events("request_finished")
        return answer, int(finished[-1]["cached_tokens"])

    async def forget(self, tier: str) -> None:
        assert self._http
        async with self._http.post("/admin/cache/clear", json={"tier": tier}) as response:
            response.raise_for_status()

    async def saved(self, blocks: int) -> None:
        """Waits until the disk has so many blocks. Raises ServerFailed."""
        assert self._http
        for _ in range(round(SAVED_SECONDS / LOOK_SECONDS)):
            if (await server.state(self._http))["tiers"]["disk"]["blocks"] >= blocks:
                return
            await asyncio.sleep(LOOK_SECONDS)
        raise server.ServerFailed(f"the disk has not {blocks} blocks after {SAVED_SECONDS:g} s")

    async def row(self, case: str, round: int) -> Row:
        """One conversation of its own: its first turn, what happens to it, and its return."""
        prompt = random_tokens(self._subject.tokens, seed=1000 * round + CASES.index(case))
        if case != "cold":
            await self.forget("all")
            answer, _ = await self.ask(prompt, ANSWER_TOKENS)
            prompt = [*prompt, *answer.tokens]
            await self.saved((len(prompt) - 1) // 16)
            await self._happen(case)
        returning = [*prompt, *random_tokens(MORE_TOKENS, seed=round)]
        assert self._server
        others = machine.Others(self._server.pid)
        answer, cached = await self.ask(returning, 4)
        return Row(self._subject.name, case, round, answer.times[0], cached, len(returning), others.cores())

    async def _happen(self, case: str) -> None:
        for tier in FORGET[case]:
            await self.forget(tier)
        if case == "restart":
            await self.stop()
            await self.start()


def random_tokens(count: int, seed: int) -> list[int]:
    choose = random.Random(seed)
    return [choose.randrange(5, VOCABULARY) for _ in range(count)]


async def measured(subject: Subject, rounds: int, console: Console) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as store:
        trial = Trial(subject, Path(store))
        await trial.start()
        for round in range(rounds):
            for case in CASES:
                rows.append(await trial.row(case, round))
                row = rows[-1]
                console.print(
                    f"{row.model} {case} {round}: {row.ttft_seconds * 1e3:.1f} ms, {row.cached_tokens} cached"
                )
        await trial.stop()
    return rows


def table(rows: Sequence[Row]) -> Table:
    found = Table(
        "model", "from", "tokens", "cached", "TTFT ms", "cold ÷ it", title="a returning conversation"
    )
    for model in dict.fromkeys(row.model for row in rows):
        cold = median(row.ttft_seconds for row in rows if (row.model, row.case) == (model, "cold"))
        for case in CASES:
            those = [row for row in rows if (row.model, row.case) == (model, case)]
            ttft = median(row.ttft_seconds for row in those)
            missed = "!" if model != "shipped" and cold / ttft < GOALS.get(case, 0) else ""
            found.add_row(
                model,
                case,
                str(those[0].prompt_tokens),
                str(min(row.cached_tokens for row in those)),
                f"{ttft * 1e3:.1f}",
                f"{cold / ttft:.1f}{missed}",
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["shipped", "random100m"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model-cache", type=Path, default=Path(".bench"))
    parser.add_argument("--out", type=Path, default=Path(".bench"))
    options = parser.parse_args()
    console = Console(stderr=True)
    rows: list[Row] = []
    for subject in subjects(options.models, options.model_cache):
        rows += asyncio.run(measured(subject, options.rounds, console))
    path = options.out / time.strftime("returning-%Y%m%d-%H%M%S.jsonl")
    options.out.mkdir(parents=True, exist_ok=True)
    lines = [{"machine": machine.description()}, *(asdict(row) for row in rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    Console().print(table(rows))
    sys.stdout.write(f"rows: {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
