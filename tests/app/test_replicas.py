"""Several replicas over HTTP: sending requests on, draining, resuming, one that dies; metrics and log by replica."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import ClientPayloadError

from engine.engine import Revived
from engine.policy_set import PolicyConfig
from tests.app.rig import Rig, gated, rig
from tests.app.test_logs import lines, logged
from tests.app.test_metrics import scrape, value
from tests.engine.driving import UNFORESEEN
from tests.fakes import hashed

TEXT = "/v1/completions"
SCRIPT = hashed(128)
"""A token depends on all before it: a sequence that goes on wrongly elsewhere says something else."""

ASKED = {"prompt": "a" * 40, "max_tokens": 30, "seed": 1, "return_token_ids": True}


def gates(server: Rig, *, opened: bool) -> None:
    for worker in server.workers:
        if opened:
            worker.gate.set()
        else:
            worker.gate.clear()


def tokens(frames: list[dict[str, Any]]) -> list[int]:
    return [token for frame in frames for choice in frame["choices"] for token in choice["token_ids"]]


async def truth(**asked: object) -> list[int]:
    """What one replica says."""
    async with rig(SCRIPT) as server:
        return tokens(await server.stream(TEXT, **(ASKED | asked)))


@asynccontextmanager
async def streaming(server: Rig, *, output: int = 3, **asked: object) -> AsyncIterator["asyncio.Task[Any]"]:
    """A stream in its midst, no step going on; afterwards it ends."""
    gates(server, opened=True)
    task = asyncio.ensure_future(server.stream(TEXT, **(ASKED | asked)))
    async with asyncio.timeout(5):
        while not any(int(str(each["output_tokens"])) >= output for each in server.engine.requests()):  # noqa: ASYNC110 - no event says that a token came
            await asyncio.sleep(0)
    gates(server, opened=False)
    yield task
    gates(server, opened=True)
    await task


def only(server: Rig) -> tuple[str, int]:
    """The id of the request at hand, and where it is."""
    (request,) = server.engine.requests()
    return str(request["id"]), int(str(request["replica"]))


# --- a request goes on elsewhere --------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [True, False])
async def test_a_stream_that_migrates_is_what_it_would_have_been(chosen: bool) -> None:
    stream, expected = io.StringIO(), await truth()
    async with logged(stream), rig(SCRIPT, replicas=2) as server:
        async with streaming(server) as task:
            name, here = only(server)
            body = {"replica": 1 - here} if chosen else {}
            status, answer = await server.post(f"/admin/requests/{name}/migrate", **body)
            assert (status, answer) == (200, {"id": name, "state": "migrating", **body})
            assert only(server) == (name, 1 - here)
        assert tokens(task.result()) == expected
        timeline = await server.get(f"/admin/requests/{name}")
        samples = await scrape(server)
    assert (timeline["replica"], timeline["migrations"]) == (1 - here, 1)
    decisions = {each["kind"]: each for each in timeline["decisions"]}
    assert decisions["placed"]["chosen"] == f"replica {here}"
    assert len(decisions["placed"]["alternatives"]) == 2
    assert decisions["migrated"]["chosen"] == f"replica {1 - here}"
    labels = {"engine": str(here), "reason": "operator"}
    assert value(samples, "sluice:migrations_total", outcome="moved", **labels) == 1
    assert value(samples, "sluice:migrations_total", outcome="failed", **labels) == 0
    (line,) = lines(stream, "migrated")
    assert (line["id"], line["source"], line["target"], line["reason"]) == (name, here, 1 - here, "operator")
    (line,) = lines(stream, "request_finished")
    assert (line["replica"], line["migrations"]) == (1 - here, 1)


async def test_each_choice_of_a_request_migrates() -> None:
    async with rig(SCRIPT, replicas=2) as server:
        async with streaming(server, n=3) as task:
            name, here = only(server)
            assert (await server.post(f"/admin/requests/{name}/migrate", replica=1 - here))[0] == 200
            (request,) = server.engine.requests()
            assert (request["replicas"], request["migrations"]) == ([1 - here], 3)
        chosen = [[c for f in task.result() for c in f["choices"] if c["index"] == n] for n in range(3)]
    async with rig(SCRIPT) as server:
        _, answer = await server.post(TEXT, **(ASKED | {"n": 3}))
    said = [[token for choice in choices for token in choice["token_ids"]] for choices in chosen]
    assert said == [choice["token_ids"] for choice in answer["choices"]]


@pytest.mark.parametrize(
    ("replica", "status", "code"),
    [
        (9, 400, "no_such_replica"),
        (-1, 400, "invalid_value"),
        ("1", 400, "invalid_value"),
        (0, 409, "same_replica"),
        (1, 409, "replica_draining"),
        (2, 409, "replica_down"),
    ],
)
async def test_where_a_request_cannot_go_it_is_told_and_stays(
    replica: object, status: int, code: str
) -> None:
    async with rig(SCRIPT, replicas=3) as server:
        server.engine.drain_replica(1, draining=True)
        async with streaming(server) as task:
            name, here = only(server)
            assert here == 0
            server.engine._lose(server.engine.replicas[2], RuntimeError("a test"))
            answer = await server.post(f"/admin/requests/{name}/migrate", replica=replica)
            assert (answer[0], answer[1]["error"]["code"]) == (status, code)
            assert answer[1]["error"]["param"] == "replica"
            assert only(server) == (name, 0)
        assert tokens(task.result()) == await truth()


async def test_a_request_that_no_other_replica_takes_stays_and_its_timeline_says_so() -> None:
    stream = io.StringIO()
    async with logged(stream), rig(SCRIPT, replicas=2) as server:
        server.engine.drain_replica(1, draining=True)
        async with streaming(server) as task:
            name, _ = only(server)
            assert (await server.post(f"/admin/requests/{name}/migrate"))[0] == 200
            timeline = await server.get(f"/admin/requests/{name}")
        assert tokens(task.result()) == await truth()
        samples = await scrape(server)
    assert timeline["decisions"][-1]["kind"] == "stayed"
    assert "no other replica takes it" in timeline["decisions"][-1]["reason"]
    assert value(samples, "sluice:migrations_total", reason="operator", outcome="failed") == 1
    (line,) = lines(stream, "migration_failed")
    assert line["failure"] == "no other replica takes it"


async def test_with_one_replica_nothing_migrates_and_unknown_requests_are_unknown() -> None:
    async with rig(SCRIPT) as server:
        status, answer = await server.post("/admin/requests/nobody/migrate")
        assert (status, answer["error"]["code"]) == (404, "request_not_found")
        async with streaming(server):
            name, _ = only(server)
            status, answer = await server.post(f"/admin/requests/{name}/migrate")
            assert (status, answer["error"]["code"]) == (409, "only_one_replica")
        async with server.client.post(f"/admin/requests/{name}/migrate", data="{}") as response:
            assert response.status == 415, "as a form of another web page is"


# --- replicas come and go ---------------------------------------------------------------------------------------------


async def test_a_drained_replica_hands_on_what_it_has_and_takes_again_when_it_is_resumed() -> None:
    async with rig(SCRIPT, replicas=2) as server:
        async with streaming(server) as task:
            name, here = only(server)
            status, answer = await server.post(f"/admin/replicas/{here}/drain")
            assert (status, answer["replica"], answer["state"]) == (200, here, "draining")
            assert only(server) == (name, 1 - here)
            assert (await server.post(f"/admin/replicas/{here}/drain"))[0] == 200, "twice is no harm"
            async with streaming(server, output=5):
                assert {each["replica"] for each in server.engine.requests()} == {1 - here}
                gates(server, opened=True)
        assert tokens(task.result()) == await truth()
        samples = await scrape(server)
        assert value(samples, "sluice:replica_draining", engine=str(here)) == 1
        assert (
            value(samples, "sluice:migrations_total", engine=str(here), reason="drain", outcome="moved") == 1
        )
        status, answer = await server.post(f"/admin/replicas/{1 - here}/drain")
        assert (status, answer["error"]["code"]) == (409, "last_replica")
        status, answer = await server.post(f"/admin/replicas/{here}/resume")
        assert (status, answer["state"]) == (200, "up")
        assert (await server.post(f"/admin/replicas/{1 - here}/drain"))[0] == 200


@pytest.mark.parametrize("number", ["2", "-1", "x", "00", "1.0"])
async def test_unknown_replicas_are_not_found(number: str) -> None:
    async with rig(replicas=2) as server:
        for what in ("drain", "resume"):
            status, answer = await server.post(f"/admin/replicas/{number}/{what}")
            assert (status, answer["error"]["code"]) == (404, "replica_not_found")


async def test_when_a_replica_dies_in_mid_stream_the_others_go_on_and_all_streams_are_right() -> None:
    stream = io.StringIO()
    async with logged(stream), rig(SCRIPT, replicas=3) as server:
        gates(server, opened=False)
        asked = [{"prompt": letter * 40} for letter in "abcdef"]
        tasks = [asyncio.ensure_future(server.stream(TEXT, **(ASKED | each))) for each in asked]
        await server.until(running=6)
        hit = [each["id"] for each in server.engine.requests() if each["replica"] == 0]
        assert hit
        server.workers[0].explode()
        gates(server, opened=True)
        said = [tokens(frames) for frames in await asyncio.gather(*tasks)]
        assert said == [await truth(**each) for each in asked]
        state = await server.get("/admin/state")
        assert (await server.client.get("/livez")).status == 200
        status, answer = await server.post("/admin/replicas/0/resume")
        samples = await scrape(server)
    assert [each["state"] for each in state["replicas"]] == ["down", "up", "up"]
    assert state["replicas"][0]["reason"] == "RuntimeError: the device is on fire"
    assert (status, answer["error"]["code"]) == (409, "replica_lost"), "nobody can start it again here"
    assert value(samples, "sluice:replica_up") == 0
    assert value(samples, "sluice:replica_outages_total") == 1
    assert value(samples, "sluice:replica_up", engine="1") == 1
    moved = value(samples, "sluice:migrations_total", reason="failure", outcome="moved")
    assert moved == len(hit) == len(lines(stream, "migrated"))
    (line,) = lines(stream, "replica_lost")
    assert (line["level"], line["replica"]) == ("error", 0)
    assert "on fire" in line["reason"]


async def test_what_a_lost_replica_had_counted_in_its_last_step_is_in_the_metrics() -> None:
    """Whoever was admitted in it is not admitted for the first time again elsewhere."""
    async with rig(SCRIPT, replicas=2) as server:
        gates(server, opened=False)
        calls = [asyncio.ensure_future(server.post(TEXT, **(ASKED | {"seed": n}))) for n in range(2)]
        await server.until(running=2)
        server.engine._lose(server.engine.replicas[0], RuntimeError("a test"))
        steps = value(await scrape(server), "vllm:iteration_tokens_total_count")
        gates(server, opened=True)
        await asyncio.gather(*calls)
        samples = await scrape(server)
    assert steps == 0, "its step never ended"
    for name in ("vllm:prompt_tokens_total", "vllm:prefix_cache_queries_total"):
        assert [value(samples, name, engine=engine) for engine in ("0", "1")] == [40, 40]


async def test_a_request_whose_replica_is_lost_and_that_fits_nowhere_else_is_an_error() -> None:
    """Half an answer would look like a whole one: a 200, and [DONE]."""
    async with rig(SCRIPT, replicas=2, last_blocks=4) as server:
        gates(server, opened=False)
        asked = {"prompt": "a" * 100, "max_tokens": 100}
        whole = asyncio.ensure_future(server.post(TEXT, **asked))
        async with server.client.post(TEXT, json=asked | {"stream": True}) as response:
            await server.until(running=2)
            server.workers[0].explode()
            status, answer = await whole
            assert response.status == 200
            told = await response.content.readuntil(b"\n\n")
            with pytest.raises(ClientPayloadError):
                await response.content.read()
    assert (status, answer["error"]["code"]) == (500, "replica_lost")
    assert json.loads(told.removeprefix(b"data: ")) == answer


async def test_a_request_that_only_a_lost_replica_has_room_for_may_come_again_later() -> None:
    async with rig(SCRIPT, replicas=2, last_blocks=4) as server:
        server.workers[0].explode()
        asked = {"prompt": "a" * 100, "max_tokens": 100}
        assert (await server.post(TEXT, **asked))[0] == 500
        async with server.client.post(TEXT, json=asked) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (503, "no_replica")
            assert int(response.headers["Retry-After"]) >= 1


async def test_a_lost_replica_is_started_again_once_and_serves() -> None:
    """However often an operator asks for it while it starts; one that cannot start is told, and may be asked again."""
    stream, may_start, broken = io.StringIO(), asyncio.Event(), [True]
    started = []

    async def revive(number: int) -> Revived:
        await may_start.wait()
        if broken[0]:
            raise RuntimeError("still on fire")
        started.append(gated(SCRIPT))
        return Revived(started[-1], None)

    async def resume(server: Rig) -> str:
        status, answer = await server.post("/admin/replicas/0/resume")
        assert status == 200
        return str(answer["state"])

    async def until(server: Rig, state: str) -> None:
        async with asyncio.timeout(5):
            while (await server.get("/admin/state"))["replicas"][0]["state"] != state:
                pass

    async with logged(stream), rig(SCRIPT, replicas=2, revive=revive) as server:
        server.engine._lose(server.engine.replicas[0], RuntimeError("the device is on fire"))
        assert await resume(server) == "starting"
        may_start.set()
        await until(server, "down")
        broken[0] = False
        may_start.clear()
        assert [await resume(server), await resume(server)] == ["starting"] * 2
        may_start.set()
        await until(server, "up")
        server.engine.drain_replica(1, draining=True)
        assert tokens(await server.stream(TEXT, **ASKED)) == await truth()
        samples = await scrape(server)
    assert len(started) == 1
    assert value(samples, "vllm:request_success_total", finished_reason="length") == 1
    assert value(samples, "sluice:replica_outages_total") == 1
    assert value(samples, "sluice:replica_restarts_total") == 1
    told = [each["event"] for each in map(dict, _replica_lines(stream))]
    assert told == ["replica_lost", "replica_not_started", "replica_started_again"]


def _replica_lines(stream: io.StringIO) -> list[dict[str, Any]]:
    events = ("replica_lost", "replica_not_started", "replica_started_again")
    found = [line for event in events for line in lines(stream, event)]
    return sorted(found, key=lambda line: str(line["timestamp"]))


async def test_when_the_last_replica_dies_clients_are_told() -> None:
    async with rig(SCRIPT, replicas=2) as server:
        gates(server, opened=False)
        calls = [asyncio.ensure_future(server.post(TEXT, **ASKED)) for _ in range(4)]
        await server.until(running=4)
        for worker in server.workers:
            worker.explode()
        for status, answer in await asyncio.gather(*calls):
            assert (status, answer["error"]["code"]) == (500, "engine_dead")
        assert str(server.engine.failure) == "the device is on fire"


# --- where it went ----------------------------------------------------------------------------------------------------


async def test_metrics_of_each_replica_are_its_own() -> None:
    policies = PolicyConfig(routing="round_robin", parameters=UNFORESEEN)
    async with rig(replicas=2, policies=policies) as server:
        gates(server, opened=False)
        lengths = (4, 8, 16)  # the first and the last to replica 0
        calls = []
        for number, length in enumerate(lengths):
            prompt = "abc"[number] * 20
            calls.append(asyncio.ensure_future(server.post(TEXT, prompt=prompt, max_tokens=length)))
            await server.until(running=number + 1)
        during = await scrape(server)
        gates(server, opened=True)
        await asyncio.gather(*calls)
        after = await scrape(server)
    for engine, requests in (("0", 2), ("1", 1)):
        assert value(during, "vllm:num_requests_running", engine=engine) == 1, "a step is under way"
        assert value(during, "vllm:num_requests_waiting", engine=engine) == requests - 1
        assert value(during, "vllm:kv_cache_usage_perc", engine=engine) == 2 / 64
        assert value(during, "sluice:replica_backlog_seconds", engine=engine) > 0
        assert value(during, "sluice:replica_pace", engine=engine) == 1, "too few steps to say more"
        assert value(during, "sluice:replica_forecast_tokens", engine=engine) >= 0
        assert value(after, "vllm:prompt_tokens_total", engine=engine) == 20 * requests
        ended = {"engine": engine, "finished_reason": "length"}
        assert value(after, "vllm:request_success_total", **ended) == requests
        assert value(after, "vllm:time_to_first_token_seconds_count", engine=engine) == requests
        facts = {"block_size": "16", "num_gpu_blocks": "64", "enable_prefix_caching": "True"}
        assert value(after, "vllm:cache_config_info", engine=engine, **facts) == 1
    assert value(after, "vllm:generation_tokens_total", engine="0") == 20
    assert value(after, "vllm:generation_tokens_total", engine="1") == 8
    assert value(after, "vllm:request_params_n_count") == 3, "of the process"
    assert ("vllm:request_params_n_count", frozenset({("model_name", "otter"), ("engine", "1")})) not in after
    assert value(after, "sluice:stayed_total") == 0


async def test_a_session_goes_where_it_was_and_two_tenants_have_two_of_one_name() -> None:
    policies = PolicyConfig(routing="session", parameters=UNFORESEEN)
    async with rig(replicas=3, policies=policies) as server:

        async def ask(session: str, key: str) -> tuple[str, int]:
            """The engine's name of the session, and where it is served."""
            gates(server, opened=False)
            body = {"prompt": "a" * 40, "max_tokens": 2, "session_id": session}
            headers = {"Authorization": f"Bearer {key}"}
            call = asyncio.ensure_future(server.client.post(TEXT, json=body, headers=headers))
            await server.until(running=1)
            name, replica = only(server)
            (sequence,) = server.engine.fleet.sequences_of(name)
            gates(server, opened=True)
            async with await call as response:
                assert response.status == 200
            return sequence.request.session, replica

        first, second = await ask("chat", "alice"), await ask("chat", "bob")
        assert first[0] != second[0]
        assert first[1] != second[1], "where least is charged, or was placed"
        assert [await ask("chat", "alice"), await ask("chat", "bob")] == [first, second]
        assert (await ask("", "alice"))[0] == ""
        status, answer = await server.post(TEXT, prompt="a", session_id="x" * 257)
        assert (status, answer["error"]["param"]) == (400, "session_id")


async def test_another_web_page_cannot_make_a_browser_drain_a_replica() -> None:
    """Who sends no body need say nothing of its type; a browser says where the page is from, and must say JSON."""
    async with rig(replicas=2) as server:
        async with server.client.post(
            "/admin/replicas/1/drain", headers={"Origin": "http://evil.test"}
        ) as answer:
            assert answer.status == 415
        assert server.engine.fleet.members[1].accepting
        async with server.client.post("/admin/replicas/1/drain") as answer:
            assert answer.status == 200
        assert not server.engine.fleet.members[1].accepting
