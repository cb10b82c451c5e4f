"""The comparison of policies: systems are valid configurations, answers end where the trace says, figures are right."""

from pathlib import Path

import pytest

from app.config_sources import load
from bench.policies import Ending, Outcome, figures, report, rotated
from bench.systems import SYSTEMS
from engine.plan import Placement, Plan, Row, Sampling
from tests.fakes import ScriptedRunner, saying


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_is_a_configuration(system: str) -> None:
    flags = [f"policies.{key}={value}" for key, value in SYSTEMS[system].items()]
    policies = load(flags, {}, cwd=Path("/nowhere")).config.policies
    assert SYSTEMS[system].get("order", "hybrid") == policies.order


def test_a_sequence_ends_at_its_recorded_length_whatever_is_drawn() -> None:
    """Two tokens of output: the first as drawn, the second is the end."""
    ending = Ending(ScriptedRunner(saying([5]), block_size=4, max_sequences=1), end=9)
    ending.lengths[7] = (3, 2)
    prompt = Row(0, 0, (1, 2, 3), 0, (0,), samples=True)
    placed = Plan(1, (Placement(0, Sampling(seed=7)),), (prompt,))
    assert ending.launch(placed).collect().tokens == (5,)
    assert ending.launch(Plan(2, (), (Row(0, 3, (5,), 1, (), samples=True),))).collect().tokens == (9,)


def test_tax_is_what_was_computed_again_of_all_that_was_computed() -> None:
    outcome = Outcome(seconds=2.0, normalised=[0.1, 0.3], ttft=[0.1, 0.1], output_tokens=10, computed=200)
    outcome.recomputed = 20
    outcome.resumed = [(0.1, "reload host", 0.9, 1.0, 0.5), (0.2, "reload host", 1.5, 1.0, None)]
    told = figures(outcome)
    assert told["tax"] == 0.1
    assert told["resume_errors"] == {"reload host": (2, pytest.approx(0.3))}
    assert told["regret_seconds"] == 0.5
    assert told["tokens_per_second"] == 5.0


def test_a_report_is_bad_when_an_answer_differed(tmp_path: Path) -> None:
    row = (
        '{"trace": "t", "model": "m", "share": 0.4, "rate": 9.0, "blocks": 99, "system": "ours", "void": false,'
        ' "same": %s, "tax": 0.0, "preemptions": 1, "mean": 1.0, "p99": 1.0, "ttft": 1.0, "tokens_per_second": 1.0,'
        ' "resume_errors": {"reload host": [1, 0.1]}}\n'
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text(row % "true")
    assert report(rows) == 0
    rows.write_text(row % "false")
    assert report(rows) == 1


def test_every_system_is_first_in_its_turn() -> None:
    systems = list(SYSTEMS)
    orders = [rotated(systems, repeat) for repeat in range(len(systems) + 1)]
    assert {order[0] for order in orders} == set(systems)
    assert all(sorted(order) == sorted(systems) for order in orders)
    assert orders[-1] == orders[0] == systems
