"""Many concurrent streams against a running server: all complete and right, the event loop on time.

Half are greedy, half sampled with a seed; lengths differ. Each is then asked for again alone, not streamed
and under another cache salt, so that nothing of the first answer can be reused; both must be equal. The
client is this process, not the server's. With --overflow, so many short ones come at once after that, more than the
server's queue takes: each has to be served, or sent away with 429. Ends with 1 when a stream is not right, a goal is
missed, or any answer was a 5xx.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import client, machine
from bench.scrape import Histogram, NoSuchMetric, histogram

WORDS = (
    "the",
    "a",
    "small",
    "old",
    "red",
    "house",
    "river",
    "dog",
    "girl",
    "king",
    "sat",
    "ran",
    "saw",
    "found",
)
LAG_GOAL_SECONDS = 0.020
SAMPLE_SECONDS = 0.1
ANSWERS = "sluice:http_responses_total"
SERVED, SENT_AWAY = "served", "sent away"
LAG, GIL = "sluice:event_loop_lag_seconds", "sluice:gil_held_seconds"


def bodies(count: int, prompt_words: int, max_tokens: int, model: str) -> list[dict[str, Any]]:
    """Requests that differ in prompt, length and sampling, the same in every run."""
    drawn = random.Random(0)
    return [
        {
            "model": model,
            "prompt": " ".join(drawn.choices(WORDS, k=drawn.randint(1, prompt_words))),
            "max_tokens": drawn.randint((max_tokens + 1) // 2, max_tokens),
            "temperature": 0.0 if number % 2 else 0.8,
            "seed": number,
            "ignore_eos": True,
        }
        for number in range(count)
    ]


@dataclass(slots=True)
class Watch:
    """What is sampled while the streams run."""

    resident_bytes: list[int] = field(default_factory=list)
    client_lags: list[float] = field(default_factory=list)  # a client that lags measures itself

    def sample(self, pid: int | None) -> None:
        if pid is not None:
            self.resident_bytes.append(machine.resident_bytes(pid))


@asynccontextmanager
async def watching(pid: int | None) -> AsyncIterator[Watch]:
    """Samples until the block ends. Raises NoSuchProcess: at once, or at the end if the process went."""
    watch = Watch()
    watch.sample(pid)
    task = asyncio.create_task(_watch(watch, pid))
    try:
        yield watch
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _watch(watch: Watch, pid: int | None) -> None:
    while True:
        due = time.perf_counter() + SAMPLE_SECONDS
        await asyncio.sleep(SAMPLE_SECONDS)
        watch.client_lags.append(time.perf_counter() - due)
        watch.sample(pid)


@dataclass(frozen=True, slots=True)
class Metrics:
    lag: Histogram
    gil: Histogram
    server_errors: float = 0.0  # answers that were a 5xx

    def since(self, earlier: "Metrics") -> "Metrics":
        errors = self.server_errors - earlier.server_errors
        return Metrics(self.lag.since(earlier.lag), self.gil.since(earlier.gil), errors)


async def scraped(session: ClientSession) -> Metrics:
    async with session.get("/metrics") as response:
        text = await response.text()
    return Metrics(histogram(text, LAG), histogram(text, GIL), _server_errors(text))


def _server_errors(text: str) -> float:
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return sum(s.value for s in samples if s.name == ANSWERS and s.labels["status"].startswith("5"))


async def got(session: ClientSession, path: str) -> dict[str, Any]:
    async with session.get(path) as response:
        answer: dict[str, Any] = await response.json()
    return answer


@dataclass(frozen=True, slots=True)
class Run:
    """One burst of streams: answers or errors in the order of the requests."""

    answers: list[client.Answer | BaseException]
    seconds: float
    metrics: Metrics
    watch: Watch


async def burst(session: ClientSession, requests: Sequence[dict[str, Any]], pid: int | None) -> Run:
    """All requests at once, streamed."""
    before, begun = await scraped(session), time.perf_counter()
    async with watching(pid) as watch:
        streams = (client.stream(session, body) for body in requests)
        answers = await asyncio.gather(*streams, return_exceptions=True)
    seconds = time.perf_counter() - begun
    return Run(answers, seconds, (await scraped(session)).since(before), watch)


async def overflow(session: ClientSession, requests: Sequence[dict[str, Any]]) -> Counter[str]:
    """All at once, not streamed, of a token each: how many were served, sent away, or answered otherwise."""
    short = [body | {"max_tokens": 1, "cache_salt": "overflow"} for body in requests]
    return Counter(await asyncio.gather(*(_fate(session, body) for body in short)))


async def _fate(session: ClientSession, body: dict[str, Any]) -> str:
    async with session.post("/v1/completions", json=body) as response:
        answer = await response.json()
        if response.status == 200:
            return SERVED if answer["usage"]["completion_tokens"] == 1 else "incomplete"
        polite = "Retry-After" in response.headers and answer["error"]["code"] == "queue_full"
        return (
            SENT_AWAY if response.status == 429 and polite else f"{response.status} {answer['error']['code']}"
        )


async def alone(session: ClientSession, requests: Sequence[dict[str, Any]]) -> list[client.Answer]:
    """One after another, not streamed, nothing cached."""
    salted = [body | {"cache_salt": "alone"} for body in requests]
    return [await client.complete(session, body) for body in track(salted, "each alone", transient=True)]


def verdict(streamed: client.Answer | BaseException, truth: client.Answer) -> str:
    if isinstance(streamed, BaseException):
        return f"failed: {type(streamed).__name__} {streamed}".rstrip()  # a timeout has no words of its own
    if not streamed.complete:
        return "incomplete"
    return "right" if streamed.same(truth) else "wrong"


def summary(run: Run, idle: Metrics, verdicts: Sequence[str], state: dict[str, Any]) -> dict[str, Any]:
    whole = [answer for answer in run.answers if isinstance(answer, client.Answer)]
    tokens = sum(len(answer.tokens) for answer in whole)
    resident = run.watch.resident_bytes
    return {
        "streams": len(verdicts),
        "right": verdicts.count("right"),
        "seconds": run.seconds,
        "tokens_per_second": tokens / run.seconds,
        "first_chunk_p99_seconds": _p99([answer.times[0] for answer in whole if answer.times]),
        "lag_p50_seconds": run.metrics.lag.quantile(0.5),
        "lag_p99_seconds": run.metrics.lag.quantile(0.99),
        "lag_observations": run.metrics.lag.count,
        "idle_lag_p99_seconds": idle.lag.quantile(0.99),
        "steps": run.metrics.gil.count,
        "gil_mean_seconds": run.metrics.gil.mean,
        "gil_p99_seconds": run.metrics.gil.quantile(0.99),
        "gil_share": run.metrics.gil.total / run.seconds,
        "client_lag_p99_seconds": _p99(run.watch.client_lags),
        "resident_start_bytes": resident[0] if resident else None,
        "resident_peak_bytes": max(resident, default=None),
        "blocks_held_after": state["kv_used_blocks"],
        "running_after": state["running"],
    }


def _p99(values: Sequence[float]) -> float:
    """0 for nothing."""
    return quantiles(values, n=100, method="inclusive")[-1] if len(values) > 1 else sum(values)


def missed(figures: dict[str, Any]) -> list[str]:
    """What is not as it should be, in words."""
    problems = {
        f"{figures['streams'] - figures['right']} streams are not right": figures["right"]
        != figures["streams"],
        "event loop lag p99 is over 20 ms": figures["lag_p99_seconds"] > LAG_GOAL_SECONDS,
        "blocks are held though nothing runs": figures["blocks_held_after"] != 0,
        "sequences run that nobody asked for": figures["running_after"] != 0,
        "answers were a 5xx": figures.get("server_errors", 0) > 0,
        "answers beyond the queue were neither 200 nor 429": bool(figures.get("overflow_others")),
    }
    return [problem for problem, so in problems.items() if so]


async def measure(options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The summary, and a row a stream."""
    connector = TCPConnector(limit=0)
    async with ClientSession(
        options.url, connector=connector, timeout=ClientTimeout(options.timeout)
    ) as session:
        model = (await got(session, "/v1/models"))["data"][0]["id"]
        requests = bodies(options.streams, options.prompt_words, options.max_tokens, model)
        await burst(session, requests[:2], None)  # connections and code paths are warm from here on
        start = await scraped(session)
        await asyncio.sleep(options.idle_seconds)
        idle = (await scraped(session)).since(start)
        run = await burst(session, requests, options.pid)
        state = await got(session, "/admin/state")
        truths = await alone(session, requests)
        more = bodies(options.overflow, options.prompt_words, 1, model)
        fates = await overflow(session, more)
        errors = (await scraped(session)).since(start).server_errors
    verdicts = [verdict(answer, truth) for answer, truth in zip(run.answers, truths, strict=True)]
    rows = [_row(*of) for of in zip(requests, run.answers, verdicts, strict=True)]
    return summary(run, idle, verdicts, state) | beyond(fates, errors), rows


def beyond(fates: Counter[str], server_errors: float) -> dict[str, Any]:
    """The figures of the overflow, and of the whole run's 5xx."""
    return {
        "overflow_served": fates[SERVED],
        "overflow_sent_away": fates[SENT_AWAY],
        "overflow_others": {fate: n for fate, n in fates.items() if fate not in (SERVED, SENT_AWAY)},
        "server_errors": server_errors,
    }


def _row(body: dict[str, Any], answer: client.Answer | BaseException, verdict: str) -> dict[str, Any]:
    came = asdict(answer) if isinstance(answer, client.Answer) else {}
    return {"request": body, "verdict": verdict} | came


def shown(figures: dict[str, Any]) -> Table:
    table = Table("figure", "value", title="concurrent streams")
    for name, value in figures.items():
        table.add_row(*_readable(name, value))
    return table


def _readable(name: str, value: float | None) -> tuple[str, str]:
    """Names end in their unit."""
    if value is None:
        return name, "- (give --pid)"
    if name.endswith("_bytes"):
        return name.removesuffix("_bytes"), f"{value / 2**20:.0f} MiB"
    if name.endswith("_seconds"):
        return name.removesuffix("_seconds"), f"{value * 1e3:.2f} ms"
    return name, f"{value:,.2f}" if isinstance(value, float) else str(value)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.streams", description=__doc__)
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000")
    add("--pid", type=int, help="the server's process, to watch its memory")
    add("--streams", type=int, default=200)
    add(
        "--overflow",
        type=int,
        default=0,
        help="short requests at once, after the streams; more than the queue",
    )
    add("--max-tokens", type=int, default=128)
    add("--prompt-words", type=int, default=60)
    add("--idle-seconds", type=float, default=3.0, help="for the lag without work")
    add("--timeout", type=float, default=600.0, help="seconds for any one request")
    add("--out", type=Path, default=Path(".bench"), help="a directory for the rows")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    try:
        figures, rows = asyncio.run(measure(options))
    except (ClientError, TimeoutError, client.Incomplete, NoSuchMetric, machine.NoSuchProcess) as error:
        sys.exit(f"{options.url} cannot be measured: {type(error).__name__} {error}")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / time.strftime("streams-%Y%m%d-%H%M%S.jsonl")
    head = {"machine": machine.description(), "summary": figures}
    path.write_text("".join(json.dumps(line) + "\n" for line in [head, *rows]))
    console = Console()
    console.print(shown(figures))
    console.print(f"rows: {path}")
    if problems := missed(figures):
        sys.exit("; ".join(problems))


if __name__ == "__main__":
    main()
