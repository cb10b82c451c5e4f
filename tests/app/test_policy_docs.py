"""docs/policies.md says what there is, and its example works."""

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


def block(language: str) -> str:
    """The first code block of a language."""
    found = re.search(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert found
    return found[1]


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
