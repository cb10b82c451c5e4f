"""What can be learned of one request: its timeline, its place in the line, and the totals of its log line."""

import asyncio
import io
from typing import Any

from app.service_classes import ClassTable
from engine.policy_set import PolicyConfig
from policies.decisions import Decision, Kind
from tests.app.lives import configuration, served
from tests.app.rig import Rig, rig
from tests.app.test_logs import lines, logged
from tests.engine.driving import UNFORESEEN

TEXT = "/v1/completions"
CLASSES = (
    ClassTable(name="now", priority_max=-1, weight=4.0),
    ClassTable(name="later", priority_min=0),
)


async def timeline(server: Rig, request_id: object) -> tuple[int, dict[str, Any]]:
    async with server.client.get(f"/admin/requests/{request_id}") as response:
        return response.status, await response.json()


async def test_a_timeline_tells_what_was_decided_while_it_runs_and_after() -> None:
    async with rig() as server:
        server.worker.gate.clear()
        call = asyncio.ensure_future(server.post(TEXT, prompt="a" * 40, max_tokens=20))
        await server.until(running=1)
        (request,) = server.engine.requests()
        status, running = await timeline(server, request["id"])
        await server.post(f"/admin/requests/{request['id']}/preempt")
        server.worker.gate.set()
        _, answer = await call
        _, ended = await timeline(server, answer["id"])
    assert (status, running["state"], running["id"]) == (200, "running", answer["id"])
    assert [each["kind"] for each in running["decisions"]] == ["admitted"]
    assert set(running["decisions"][0]) == {
        "after_seconds", "choice", "kind", "policy", "chosen", "reason", "seconds", "alternatives"
    }  # fmt: skip
    assert (ended["state"], ended["output_tokens"], ended["preemptions"]) == ("finished", 20, 1)
    assert [each["kind"] for each in ended["decisions"]][:3] == ["admitted", "preempted", "admitted"]
    by_hand = ended["decisions"][1]
    assert (by_hand["policy"], by_hand["reason"]) == ("", "an operator asked for it")
    times = [each["after_seconds"] for each in ended["decisions"]]
    assert times == sorted(times)
    assert times[0] >= 0
    (choice,) = ended["ended_choices"]
    assert (choice["finish_reason"], choice["output_tokens"]) == ("length", 20)


async def test_a_preemption_names_its_policy_its_reason_and_the_alternatives() -> None:
    policies = PolicyConfig(parameters=UNFORESEEN)
    async with rig(blocks=20, context=320, policies=policies) as server:
        _, answer = await server.post(TEXT, prompt=["a" * 40, "b" * 40, "c" * 40, "d" * 40], max_tokens=160)
        found = [(await timeline(server, f"{answer['id']}-{index}"))[1] for index in range(4)]
    preempted = [each for one in found for each in one["decisions"] if each["kind"] == "preempted"]
    assert len(preempted) == sum(one["preemptions"] for one in found) > 0
    assert {each["policy"] for each in preempted} == {"last_admitted"}
    assert all("blocks were missing for" in each["reason"] for each in preempted)
    assert all(each["chosen"] in [one["name"] for one in each["alternatives"]] for each in preempted)


async def test_an_infinite_price_is_null() -> None:
    """JSON has no infinity."""
    async with rig() as server:
        _, answer = await server.post(TEXT, prompt="a", max_tokens=2)
        decision = Decision(Kind.SPARED, "", "x", "a test", float("inf"))
        server.engine.timelines.note(answer["id"], 0, decision, 0.0)
        _, found = await timeline(server, answer["id"])
    assert found["decisions"][-1]["seconds"] is None


async def test_a_request_that_nobody_knows_is_a_404_that_says_what_is_kept() -> None:
    async with rig() as server:
        await server.post(TEXT, prompt="a", max_tokens=2)
        status, answer = await timeline(server, "cmpl-nobody")
    assert (status, answer["error"]["code"]) == (404, "request_not_found")
    assert "1 requests are remembered" in answer["error"]["message"]


async def test_a_request_that_ended_in_the_queue_has_a_timeline_too() -> None:
    async with rig(max_sequences=1) as server:
        server.worker.gate.clear()
        calls = [asyncio.ensure_future(server.post(TEXT, prompt="a", max_tokens=2)) for _ in range(2)]
        await server.until(running=2)
        waiting = next(each["id"] for each in server.engine.requests() if each["state"] == "waiting")
        _, before = await timeline(server, waiting)
        await server.post(f"/admin/requests/{waiting}/cancel")
        _, after = await timeline(server, waiting)
        server.worker.gate.set()
        await asyncio.gather(*calls)
    assert (before["state"], before["decisions"]) == ("waiting", [])
    assert (after["state"], after["ended_choices"][0]["finish_reason"]) == ("finished", "cancelled")


# --- priority ---------------------------------------------------------------------------------------------------------


async def test_a_waiter_goes_first_when_an_operator_says_so_and_its_class_follows() -> None:
    async with rig(max_sequences=1, policies=PolicyConfig(order="priority"), classes=CLASSES) as server:
        server.worker.gate.clear()
        ended: list[int] = []

        async def ask(number: int) -> None:
            await server.post(TEXT, prompt="a", max_tokens=3, priority=5)
            ended.append(number)

        calls = []
        for number in range(3):
            calls.append(asyncio.ensure_future(ask(number)))
            await server.until(running=number + 1)
        last = server.engine.requests()[-1]["id"]
        status, answer = await server.post(f"/admin/requests/{last}/priority", priority=-1)
        _, told = await timeline(server, last)
        server.worker.gate.set()
        await asyncio.gather(*calls)
    assert (status, answer) == (200, {"id": last, "priority": -1, "class": "now"})
    assert ended.index(2) < ended.index(1)
    assert (told["priority"], told["class"]) == (-1, "now")
    assert told["decisions"][-1]["reason"] == "an operator changed the priority from 5 to -1"


async def test_a_priority_is_a_whole_number_of_a_request_at_hand() -> None:
    async with rig() as server:
        assert (await server.post("/admin/requests/nobody/priority", priority=1))[0] == 404
        for body in ({}, {"priority": "high"}, {"priority": 2**31}, {"priority": 1, "class": "x"}):
            assert (await server.post("/admin/requests/nobody/priority", **body))[0] == 400


# --- the log line -----------------------------------------------------------------------------------------------------


async def test_the_log_line_has_the_totals_of_a_life_under_pressure() -> None:
    stream, policies = io.StringIO(), PolicyConfig(parameters=UNFORESEEN)
    async with logged(stream), rig(blocks=20, context=320, policies=policies, classes=CLASSES) as server:
        body = {"prompt": ["a" * 40, "b" * 40, "c" * 40, "d" * 40], "max_tokens": 160}
        headers = {"Authorization": "Bearer key-of-a"}
        async with server.client.post(TEXT, json=body, headers=headers) as response:
            assert response.status == 200
        counted = server.engine.core.scheduler.counts
    told = lines(stream, "request_finished")
    assert len(told) == 4
    assert sum(line["preemptions"] for line in told) == counted.preemptions > 0
    assert sum(line["recomputed_tokens"] for line in told) > 0
    assert all(line["reloaded_tokens"] == 0 for line in told), "there is no tier below the device"
    assert all((line["class"], len(line["tenant"])) == ("later", 8) for line in told)
    assert all(line["queued_seconds"] >= 0 and line["promotions"] == 0 for line in told)


async def test_tokens_that_came_back_from_the_host_are_counted_as_reloaded() -> None:
    config = configuration(kv_blocks=12, host_bytes=2**22)
    policies = config.policies.model_copy(update={"resume": "reload"})
    async with served(config.model_copy(update={"policies": policies})) as server:
        prompts = [f"{word} upon a time there was " * 6 for word in ("Once", "Twice", "Never")]
        await asyncio.gather(*(server.asked(prompt=prompt, max_tokens=60) for prompt in prompts))
        lives = list(server.engine.timelines._ended.values())
        preemptions = await server.metric("vllm:num_preemptions_total")
        reloaded = await server.metric("sluice:resumptions_total", way="reload", tier="host")
        assert await server.metric("sluice:resume_seconds_count", kind="actual") == await server.metric(
            "sluice:resume_seconds_count", kind="predicted"
        )
    assert len(lives) == 3
    assert min(preemptions, reloaded) > 0
    assert sum(choice.reloaded_tokens for life in lives for choice in life.finished) > 0
