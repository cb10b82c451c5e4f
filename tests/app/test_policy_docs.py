"""docs/policies.md says what there is, and its example works."""

import asyncio
import re
from pathlib import Path

import pytest

from app.config import AlsoSection, PoliciesSection
from app.config_sources import load
from app.plugins import load_plugins
from app.policy_sections import PARAMETERS
from engine.policy_set import BUILT_IN, SIMULATED, PolicyConfig
from policies.decisions import Kind
from tests.app.rig import rig
from tests.app.test_metrics import scrape, value
from tests.app.test_plugins import pressed
from tests.engine.driving import UNFORESEEN

PAGE = (Path(__file__).parents[2] / "docs" / "policies.md").read_text()


def block(language: str, number: int = 0) -> str:
    """A code block of a language."""
    blocks = re.finditer(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    return [found[1] for found in blocks][number]


def test_every_policy_and_every_parameter_is_on_the_page() -> None:
    for family, policies in BUILT_IN.items():
        assert f"`{family}`" in PAGE
        for name in set(policies) - SIMULATED:
            assert f"`{name}`" in PAGE, f"{family} policy {name} is not documented"
    for name, section in PARAMETERS.items():
        for key in section.model_fields:
            assert f"`{key}`" in PAGE, f"[policies.{name}] {key} is not documented"


def test_every_kind_of_decision_is_on_the_page() -> None:
    for kind in Kind:
        assert f"`{kind.value}`" in PAGE


def test_the_defaults_stand_first() -> None:
    defaults = PoliciesSection()
    for family in BUILT_IN:
        first = re.search(r"^\| `(\w+)`", PAGE.partition(f"**`{family}`**")[2], re.MULTILINE)
        assert first
        assert first[1] == getattr(defaults, family)


def test_the_classes_of_the_page_are_a_configuration(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(block("toml"))
    assert [table.name for table in load([], {}, file).config.classes] == ["interactive", "batch"]


async def test_the_example_plug_in_decides_and_never_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "house.py").write_text(block("python"))
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = load_plugins(
        PoliciesSection(order="house:Deadline", also=AlsoSection(victim=["house:longest_prompt"]))
    )
    policies = PolicyConfig(order="house:Deadline", victim="house:longest_prompt", parameters=UNFORESEEN)
    async with rig() as plain:
        truth = await pressed(plain)
    async with rig(max_sequences=3, blocks=20, context=320, policies=policies, plugins=plugins) as server:
        assert await pressed(server) == truth
        samples = await scrape(server)
    assert value(samples, "sluice:preemptions_total", victim_policy="house:longest_prompt") > 0
    assert not any(name == "sluice:policy_failures_total" for name, _ in samples)


async def test_the_example_for_replicas_places_and_moves_and_never_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten at two replicas that run two each; then a third one takes requests, and who waits goes there."""
    (tmp_path / "crowd.py").write_text(block("python", 1))
    monkeypatch.syspath_prepend(str(tmp_path))
    names = {"routing": "crowd:fewest", "rebalancing": "crowd:spread"}
    plugins = load_plugins(PoliciesSection.model_validate(names))
    policies = PolicyConfig(parameters=UNFORESEEN).having(names)
    async with rig(replicas=3, max_sequences=2, policies=policies, plugins=plugins, max_queue=20) as server:
        server.engine.drain_replica(2, draining=True)
        for worker in server.workers:
            worker.gate.clear()
        calls = [
            asyncio.ensure_future(server.post("/v1/completions", prompt="a" * 40, max_tokens=5))
            for _ in range(10)
        ]
        await server.until(running=10)
        before = [str(each["replica"]) for each in server.engine.requests()]
        server.engine.drain_replica(2, draining=False)
        after = [str(each["replica"]) for each in server.engine.requests()]
        for worker in server.workers:
            worker.gate.set()
        assert [status for status, _ in await asyncio.gather(*calls)] == [200] * 10
        samples = await scrape(server)
    assert sorted(before) == ["0"] * 5 + ["1"] * 5
    assert after.count("2") >= 1
    moved = [
        number
        for (name, labels), number in samples.items()
        if name == "sluice:migrations_total"
        and ("reason", "load") in labels
        and ("outcome", "moved") in labels
    ]
    assert sum(moved) >= 1
    assert not any(name == "sluice:policy_failures_total" for name, _ in samples)
