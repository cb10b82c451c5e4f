"""The simulator's benchmark: comparisons by their goals, a recording read and simulated, the live workload."""

import gzip
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from app.simulate.command import PROFILES
from bench.simulator import Comparison, compare, compare_ticks, read_requests, read_ticks, simulate, table
from bench.simulator_live import capacity, report, simulated, workload
from engine.profile import read_profile
from engine.simulation import Served
from tests.app.test_profiling import tables


def recording(directory: Path) -> Path:
    tables(directory)
    (directory / "card_requests.csv.gz").write_bytes(
        gzip.compress(
            b"request,input_tokens,output_tokens,arrival_s,first_token_s,last_token_s\n"
            b"0,40,20,0.0,0.001,0.012\n1,30,10,0.002,0.004,0.01\n"
        )
    )
    (directory / "card_ticks.csv.gz").write_bytes(
        gzip.compress(b"t,running,waiting,kv_cache_pct\n1.0,2,0,10\n")
    )
    return directory


def test_a_recording_is_simulated_and_compared(tmp_path: Path) -> None:
    """Every request gets its recorded length; errors are relative to the recording."""
    outcome, took, blocks = simulate(recording(tmp_path))
    assert [each.output_tokens for each in sorted(outcome.served, key=lambda each: each.number)] == [20, 10]
    assert (len(took), blocks) == (3, 30)
    recorded = [each.served for each in read_requests(tmp_path)]
    found = compare(recorded, outcome.served)
    assert {each.metric for each in found} == {"ttft", "tpot", "e2e"}
    assert all(each.error == 0 for each in compare(recorded, recorded))
    assert table("a title", found).row_count == len(found)
    assert read_ticks(tmp_path) == [{"t": 1.0, "running": 2.0, "waiting": 0.0, "kv_cache_pct": 10.0}]
    outcome.ticks.clear()
    with pytest.raises(ValueError, match="mean"):
        compare_ticks(read_ticks(tmp_path), outcome, blocks)


@pytest.mark.parametrize(
    ("statistic", "simulated", "missed"),
    [
        ("mean", 1.04, False),
        ("mean", 0.94, True),
        ("p99", 1.09, False),
        ("p99", 1.2, True),
        ("p50", 9.0, False),
    ],
)
def test_goals_are_5_percent_of_the_mean_and_10_of_the_99th_percentile(
    statistic: str, simulated: float, missed: bool
) -> None:
    assert Comparison("ttft", statistic, 1.0, simulated).missed is missed


def test_the_live_workload_is_the_same_for_the_same_seed_and_fits_the_model() -> None:
    trace = workload(500, 10.0, seed=1)
    assert trace == workload(500, 10.0, seed=1)
    assert max(each.prompt_tokens + each.output_tokens for each in trace) <= 1200


MACHINE = read_profile(PROFILES / "epyc2-tales.json")


def lived(factor: float, others_cores: float = 0.0) -> str:
    """A live run whose latencies are so many times what the profile says."""
    served = [
        replace(
            each,
            first_token=each.arrived + factor * ((each.first_token or 0.0) - each.arrived),
            finished=each.arrived + factor * ((each.finished or 0.0) - each.arrived),
        )
        for each in simulated(workload(30, 20.0, seed=1), MACHINE).served
    ]
    facts = {"share": 0.5, "capacity": 40.0, "others_cores": others_cores, "late": 0.0}
    return json.dumps(facts | {"served": [asdict(each) for each in served]}) + "\n"


def test_a_goal_is_missed_only_beyond_the_spread_of_live_runs(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(lived(1.0))
    assert report(rows, MACHINE) == 0, "the same requests at the same times give the same figures"
    rows.write_text(lived(1.2) + lived(0.9) + lived(1.3))
    assert report(rows, MACHINE) == 0
    rows.write_text(lived(1.2) + lived(1.21))
    assert report(rows, MACHINE) == 1
    rows.write_text(lived(1.0, others_cores=0.4))
    assert report(rows, MACHINE) == 1, "nothing undisturbed says nothing"


def test_the_capacity_is_what_was_served_of_a_crowd() -> None:
    assert capacity([Served(0, 0.0, 1, 1, finished=2.0), Served(1, 0.0, 1, 1, finished=4.0)]) == 0.5
