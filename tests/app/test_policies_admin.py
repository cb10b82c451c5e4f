"""`/admin/policies`: what is in force, what may be, and changing it while requests run."""

import asyncio
import io
from typing import Any

import pytest

from engine.policy_set import FAMILIES, PolicyConfig
from tests.app.rig import Rig, rig
from tests.app.test_logs import lines, logged
from tests.app.test_metrics import scrape, value
from tests.engine.driving import UNFORESEEN

TEXT = "/v1/completions"
PATH = "/admin/policies"
PLUGINS: dict[str, dict[str, Any]] = {"victim": {"mine:longest": lambda view, offer: (-view.prompt_tokens,)}}


async def put(server: Rig, **names: object) -> tuple[int, dict[str, Any]]:
    async with server.client.put(PATH, json=names) as response:
        return response.status, await response.json()


async def get(server: Rig, path: str = PATH) -> dict[str, Any]:
    async with server.client.get(path) as response:
        assert response.status == 200
        found: dict[str, Any] = await response.json()
        return found


async def test_names_in_force_names_available_and_parameters_are_shown() -> None:
    policies = PolicyConfig(order="sjf", parameters={"sjf": {"prefill_tokens_per_round": 64.0}})
    async with rig(policies=policies, plugins=PLUGINS) as server:
        shown = await get(server)
        assert shown["policies"] == (await get(server, "/admin/state"))["policies"]
    assert shown["policies"]["order"] == "sjf"
    assert set(shown["policies"]) == set(FAMILIES)
    assert {"fcfs", "hybrid"} <= set(shown["available"]["order"])
    assert "mine:longest" in shown["available"]["victim"]
    assert "oracle" not in shown["available"]["prediction"], "no server knows that"
    assert shown["parameters"] == {"sjf": {"prefill_tokens_per_round": 64.0}}


async def test_a_change_is_in_force_at_once_logged_and_seen_in_metrics_and_state() -> None:
    stream = io.StringIO()
    async with logged(stream), rig() as server:
        before = await scrape(server)
        status, answer = await put(server, order="sjf", victim="fewest_output", resume="reload")
        after = await scrape(server)
        state = await get(server, "/admin/state")
    assert status == 200
    assert answer["policies"]["order"] == state["policies"]["order"] == "sjf"
    assert value(before, "sluice:policy_info", family="order", policy="fcfs") == 1
    assert value(after, "sluice:policy_info", family="order", policy="sjf") == 1
    assert sum(number for (name, _), number in after.items() if name == "sluice:policy_info") == len(FAMILIES)
    told = [(line["family"], line["before"], line["policy"]) for line in lines(stream, "policy_changed")]
    assert told == [("order", "fcfs", "sjf"), ("victim", "last_admitted", "fewest_output")]


async def test_eviction_and_placement_are_changed_like_the_others() -> None:
    plugins = {"placement": {"mine:never": lambda block, leaving: False}}
    async with rig(plugins=plugins) as server:
        status, answer = await put(server, eviction="cost", placement="mine:never")
        state = await get(server, "/admin/state")
    assert status == 200
    assert {"lru", "lfu", "cost"} == set(answer["available"]["eviction"])
    assert (state["policies"]["eviction"], state["policies"]["placement"]) == ("cost", "mine:never")


@pytest.mark.parametrize(
    ("names", "code", "words"),
    [
        ({"order": "sjff"}, "unknown_policy", "did you mean sjf?"),
        ({"order": "zzz"}, "unknown_policy", "known are cache_aware"),
        ({"ordr": "sjf"}, "invalid_value", "did you mean order?"),
        ({"victim": "os:system"}, "unknown_policy", "policies.also.victim"),
        ({"victim": "mine:longest", "order": "mine:longest"}, "unknown_policy", "policies.also.order"),
        ({"prediction": "oracle"}, "unknown_policy", "oracle"),
        ({"eviction": "mru"}, "unknown_policy", "did you mean lru?"),
        ({"placement": "mine:longest"}, "unknown_policy", "policies.also.placement"),
        ({"order": 1}, "invalid_value", "string"),
    ],
)
async def test_what_was_not_loaded_is_refused_and_nothing_changes(
    names: dict[str, object], code: str, words: str
) -> None:
    async with rig(plugins=PLUGINS) as server:
        before = await get(server)
        status, answer = await put(server, **names)
        assert await get(server) == before
    assert (status, answer["error"]["code"]) == (400, code)
    assert words in answer["error"]["message"]
    assert answer["error"]["param"] in names


async def test_only_json_changes_policies() -> None:
    async with rig() as server, server.client.put(PATH, data='{"order": "sjf"}') as response:
        assert response.status == 415


async def test_the_victim_label_follows_the_policy_in_force() -> None:
    policies = PolicyConfig(parameters=UNFORESEEN)
    async with rig(blocks=20, context=320, policies=policies, plugins=PLUGINS) as server:
        counted: dict[str, float] = {}
        for victim in ("last_admitted", "mine:longest", "fewest_output"):
            assert (await put(server, victim=victim))[0] == 200
            before = await scrape(server)
            await server.post(TEXT, prompt=["a" * 40, "b" * 41, "c" * 42, "d" * 43], max_tokens=160)
            after = await scrape(server)
            counted[victim] = value(after, NAME, victim_policy=victim) - value(
                before, NAME, victim_policy=victim
            )
            preemptions = value(after, "vllm:num_preemptions_total") - value(
                before, "vllm:num_preemptions_total"
            )
            assert counted[victim] == preemptions > 0
        await put(server, victim="last_admitted")
        server.worker.gate.clear()
        call = asyncio.ensure_future(server.post(TEXT, prompt="a" * 40, max_tokens=5))
        await server.until(running=1)
        await server.post(f"/admin/requests/{server.engine.requests()[0]['id']}/preempt")
        server.worker.gate.set()
        await call
        assert value(await scrape(server), NAME, victim_policy="operator") == 1


NAME = "sluice:preemptions_total"


async def test_what_one_family_has_learned_outlives_a_change_of_another() -> None:
    async with rig(policies=PolicyConfig(prediction="histogram")) as server:
        learned = server.engine.core.scheduler._policies.prediction
        await put(server, order="sjf")
        assert server.engine.core.scheduler._policies.prediction is learned
        await put(server, prediction="histogram")
        assert server.engine.core.scheduler._policies.prediction is learned
        await put(server, prediction="hint")
        assert server.engine.core.scheduler._policies.prediction is not learned


async def test_waiters_stand_by_the_new_order_at_once() -> None:
    """Long before short by arrival; by work, the short one goes first."""
    async with rig(max_sequences=1) as server:
        server.worker.gate.clear()
        ended: list[int] = []

        async def ask(max_tokens: int) -> None:
            await server.post(TEXT, prompt="a", max_tokens=max_tokens)
            ended.append(max_tokens)

        calls = []
        for number, max_tokens in enumerate((5, 200, 3), 1):
            calls.append(asyncio.ensure_future(ask(max_tokens)))
            await server.until(running=number)
        assert (await put(server, order="sjf"))[0] == 200
        server.worker.gate.set()
        await asyncio.gather(*calls)
    assert ended == [5, 3, 200]


async def test_a_dead_engine_takes_no_policies() -> None:
    async with rig() as server:
        server.worker.explode()
        await server.post(TEXT, prompt="a", max_tokens=5)
        assert (await get(server))["policies"]["order"] == "fcfs"
        status, answer = await put(server, order="sjf")
    assert (status, answer["error"]["code"]) == (409, "engine_dead")
