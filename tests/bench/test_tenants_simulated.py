"""Two tenants in the simulator: who is whose, Jain's index, and a row for each order."""

from pathlib import Path

import pytest

from app.simulate.figures import Objectives
from app.workload.trace import TraceRequest
from bench.policies_simulated import Cell, Workload
from bench.tenants_simulated import GREEDY, MODEST, jain, report, rows_of, tenants


def test_one_sends_ten_times_as_much() -> None:
    whose = tenants(TraceRequest(number, "", 0.0, 1, 1) for number in range(100, 133))
    assert list(whose.values()).count(GREEDY) == 30
    assert [number for number, tenant in whose.items() if tenant == MODEST] == [100, 111, 122]


def test_jains_index_is_1_of_equals_and_one_half_where_one_has_all() -> None:
    assert jain([3.0, 3.0]) == 1.0
    assert jain([3.0, 0.0]) == 0.5


def test_the_modest_tenant_waits_less_by_a_fair_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"2023-11-16 18:15:00.0,{800 + 97 * each % 900},{80 + 61 * each % 300}" for each in range(44)]
    trace = tmp_path / "trace.csv"
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    workload = Workload(trace, requests=44, block=16, answers_over=4, cap=96, context=640)
    cell = Cell(workload, "epyc2-tales", 2.0, (0.4,), 0, {}, 4, Objectives())
    found = {row["order"]: row for row in rows_of(cell, ("fcfs", "fair"))}
    assert found["fair"]["slowdown"] < found["fcfs"]["slowdown"]
    assert found["fair"]["jain"] > found["fcfs"]["jain"]
    report(list(found.values()))
    assert "slowdown" in capsys.readouterr().out
