"""The open loop in virtual time: who is sent when, what a session goes on from, and what is counted of failures."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from app.load.client import Failed, Reply
from app.load.conversation import Asking, Conversations, of_run
from app.load.figures import figures, latencies
from app.load.generator import NOT_SENT, UNFINISHED, Generator, Sample
from app.load.synthetic import Lengths, Synthetic, synthetic
from app.simulate.figures import Objectives
from app.workload.drawing import Drawing
from app.workload.trace import Trace, TraceRequest
from app.workload.transform import retimed
from tests.app.load.virtual import run

ASKING = Asking("m")


class FakeServer:
    """Answers after `first_seconds`, a token every `step_seconds`; what it says is its number and a counter."""

    def __init__(
        self, first_seconds: float = 0.5, step_seconds: float = 0.1, fails: Sequence[int] = ()
    ) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self._first, self._step, self._fails = first_seconds, step_seconds, fails

    async def ask(self, body: bytes, reply: Reply) -> None:
        loop = asyncio.get_running_loop()
        number = len(self.bodies)
        self.bodies.append(json.loads(body))
        self.times.append(loop.time())
        if number in self._fails:
            raise Failed("http_503", "full")
        await asyncio.sleep(self._first)
        tokens = self.bodies[number]["max_tokens"]
        for token in range(tokens):
            if token:
                await asyncio.sleep(self._step)
            reply.take({"choices": [{"text": f" w{token}", "token_ids": [7000 + token]}]}, loop.time())
        usage = {"completion_tokens": tokens, "prompt_tokens": 5}
        reply.take({"choices": [{"text": "", "finish_reason": "length"}], "usage": usage}, loop.time())


def played(trace: Trace, server: FakeServer, asking: Asking = ASKING) -> list[Sample]:
    async def play() -> list[Sample]:
        generator = Generator(trace, Conversations(trace, asking), server.ask)
        await generator.play()
        return generator.samples

    return run(play())


def test_requests_are_sent_when_due_however_slow_the_server_is() -> None:
    trace = [TraceRequest(number, str(number), float(number), 20, 3) for number in range(600)]
    server = FakeServer(first_seconds=1e5)
    samples = played(trace, server)
    assert server.times == pytest.approx([float(number) for number in range(600)])
    assert all(sample.sent == pytest.approx(sample.due) for sample in samples)


def test_latencies_count_from_the_scheduled_arrival() -> None:
    """Of three tokens, 0.5 s to the first and 0.1 s between; a request that was sent late waited longer."""
    (sample,) = played([TraceRequest(0, "a", 2.0, 20, 3)], FakeServer())
    assert latencies(sample) == pytest.approx({"ttft": 0.5, "e2e": 0.7, "tpot": 0.1, "normalised": 0.7 / 3})
    sample.due -= 0.2
    assert (latencies(sample) or {})["ttft"] == pytest.approx(0.7)
    found = figures([sample], Objectives())
    assert found.spreads["itl"].mean == pytest.approx(0.1)
    assert found.void, "a generator that was late by 0.2 s"


def test_a_follow_up_goes_on_from_the_real_answer_after_its_user_has_thought() -> None:
    """By token ids, by words and as messages; what is shared begins all prompts."""
    what = Synthetic(2, Lengths(20, 20), Lengths(4, 4), turns=3, turn_input=Lengths(5, 5), think_seconds=2.0,
                     shared_tokens=32)  # fmt: skip
    trace = synthetic(what, Drawing(0))
    for prompts in ("ids", "text", "chat"):
        server = FakeServer()
        samples = played(trace, server, Asking("m", prompts))
        assert [sample.error for sample in samples] == [""] * 6
        assert server.times == pytest.approx([0.0, 0.0, 2.8, 2.8, 5.6, 5.6])
        first, _, second, *_ = server.bodies
        if prompts == "ids":
            assert [len(body["prompt"]) for body in server.bodies] == [52, 52, 61, 61, 70, 70]
            assert second["prompt"][:56] == first["prompt"] + [7000, 7001, 7002, 7003]
            openings = server.bodies[0]["prompt"], server.bodies[1]["prompt"]
            assert openings[0][:32] == openings[1][:32]
            assert openings[0][32:36] != openings[1][32:36]
        elif prompts == "text":
            assert second["prompt"].startswith(first["prompt"] + "  w0 w1 w2 w3 ")
        else:
            roles = [message["role"] for message in server.bodies[-1]["messages"]]
            assert roles == ["user", "assistant", "user", "assistant", "user"]
            assert second["messages"][1]["content"] == " w0 w1 w2 w3"


def test_a_session_whose_request_failed_was_attempted_to_its_end() -> None:
    what = Synthetic(2, Lengths(20, 20), Lengths(4, 4), turns=3)
    samples = played(synthetic(what, Drawing(0)), FakeServer(fails=[0]))
    found = figures(samples, Objectives(ttft=1.0))
    assert (found.attempted, found.answered) == (6, 3)
    assert found.errors == {NOT_SENT: 2, "http_503": 1}
    assert found.attainment == 0.5
    assert found.spreads["ttft"].p99 == pytest.approx(0.5)


def test_a_run_that_is_stopped_has_what_was_measured_so_far() -> None:
    trace = [TraceRequest(number, str(number), float(number), 20, 3) for number in range(100)]
    server = FakeServer()

    async def stopped() -> list[Sample]:
        generator = Generator(trace, Conversations(trace, ASKING), server.ask)
        task = asyncio.ensure_future(generator.play())
        await asyncio.sleep(10.55)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return generator.samples

    samples = run(stopped())
    assert [sample.error for sample in samples] == [""] * 10 + [UNFINISHED]
    assert len(samples[-1].times) == 1


def test_the_same_seed_asks_the_same_at_the_same_times_and_runs_share_nothing() -> None:
    def bodies(seed: int, number: int = 1) -> tuple[list[float], list[dict[str, Any]]]:
        what = Synthetic(8, Lengths(20, 90), Lengths(1, 9), shared_tokens=16)
        trace = of_run(retimed(synthetic(what, Drawing(seed)), 3.0, seed), number)
        server = FakeServer()
        played(trace, server)
        return server.times, server.bodies

    assert bodies(1) == bodies(1)
    assert bodies(1)[0] != bodies(2)[0]
    assert bodies(1)[0] == bodies(1, 2)[0]
    first, second = ({tuple(body["prompt"][:16]) for body in bodies(1, run)[1]} for run in (1, 2))
    assert not first & second
