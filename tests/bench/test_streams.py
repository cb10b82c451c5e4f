"""The load benchmark's verdicts and figures, by hand-made answers."""

import asyncio
import math
import os
import re

import pytest

from bench import machine, streams
from bench.client import Answer
from bench.scrape import Histogram
from tests.app.rig import Rig, rig

RIGHT = Answer("ab", [1, 2], "stop", 2, [0.1, 0.2])
STATE = {"kv_used_blocks": 0, "running": 0}


def metrics(*counts: float) -> streams.Metrics:
    seen = Histogram((0.01, 0.02, math.inf), counts, 0.5)
    return streams.Metrics(seen, seen)


def run(*answers: Answer | BaseException) -> streams.Run:
    return streams.Run(list(answers), 2.0, metrics(100, 0, 0), streams.Watch())


def test_requests_are_the_same_in_every_run_half_greedy_and_all_valid() -> None:
    made = streams.bodies(8, prompt_words=5, max_tokens=1, model="m")
    assert made == streams.bodies(8, prompt_words=5, max_tokens=1, model="m")
    assert [body["temperature"] for body in made] == [0.8, 0.0] * 4
    assert {body["max_tokens"] for body in made} == {1}
    assert all(body["prompt"] for body in made)


@pytest.mark.parametrize(
    ("streamed", "said"),
    [
        (RIGHT, "right"),
        (Answer("ab", [1, 3], "stop", 2), "wrong"),
        (Answer("ab", [1, 2], None, 2), "incomplete"),
        (OSError("gone"), "failed: OSError gone"),
        (TimeoutError(), "failed: TimeoutError"),
    ],
)
def test_a_stream_is_right_when_it_is_what_the_same_request_gives_alone(
    streamed: Answer | BaseException, said: str
) -> None:
    assert streams.verdict(streamed, RIGHT) == said


def test_figures_count_whole_answers_and_an_empty_or_failed_one_does_no_harm() -> None:
    burst = run(RIGHT, Answer(), OSError("gone"))
    figures = streams.summary(burst, metrics(1, 0, 0), ["right", "incomplete", "failed"], STATE)
    assert (figures["streams"], figures["right"], figures["tokens_per_second"]) == (3, 1, 1.0)
    assert figures["first_chunk_p99_seconds"] == 0.1
    assert (figures["lag_p99_seconds"], figures["gil_share"]) == (0.01, 0.25)
    assert streams.shown(figures).row_count == len(figures)


def test_nothing_is_missed_when_all_is_right() -> None:
    assert streams.missed(streams.summary(run(RIGHT), metrics(1, 0, 0), ["right"], STATE)) == []


def test_each_miss_is_named() -> None:
    figures = streams.summary(run(RIGHT), metrics(1, 0, 0), ["wrong"], {"kv_used_blocks": 1, "running": 2})
    assert len(streams.missed(figures | {"lag_p99_seconds": 0.021})) == 4


async def sent_away(server: Rig) -> int:
    """Answers 429 so far, by the server's own count."""
    async with server.client.get("/metrics") as response:
        found = re.findall(
            r'^sluice:http_responses_total\{.*status="429"\} (\S+)$', await response.text(), re.M
        )
    return sum(int(float(count)) for count in found)


async def test_beyond_the_queue_requests_are_served_or_sent_away_and_anything_else_is_named() -> None:
    requests = streams.bodies(30, prompt_words=3, max_tokens=9, model="otter")
    async with rig(max_queue=10, max_sequences=2) as server:
        server.worker.gate.clear()  # nobody is served before all have come: the crowd is let in one by one
        crowd = asyncio.ensure_future(streams.overflow(server.client, requests))
        async with asyncio.timeout(10):
            held = 0
            while held + await sent_away(server) < 30:
                held = len(server.engine.requests())
        server.worker.gate.set()
        fates = await crowd
        assert fates[streams.SENT_AWAY] == 30 - held > 0
        assert fates[streams.SERVED] + fates[streams.SENT_AWAY] == 30
        assert (await streams.overflow(server.client, [requests[0] | {"n": 0}])) == {"400 invalid_value": 1}
        scraped = await streams.scraped(server.client)
    assert scraped.server_errors == 0
    figures = streams.summary(run(RIGHT), metrics(1, 0, 0), ["right"], STATE)
    assert streams.missed(figures | streams.beyond(fates, scraped.server_errors)) == []
    fates["500 internal_error"] = 1
    assert len(streams.missed(figures | streams.beyond(fates, 1))) == 2


async def test_watching_samples_memory_and_a_process_that_is_not_there_is_refused_at_once() -> None:
    async with streams.watching(os.getpid()) as watch:
        pass
    assert watch.resident_bytes[0] > 2**20
    with pytest.raises(machine.NoSuchProcess, match="no process 0"):
        await streams.watching(0).__aenter__()
