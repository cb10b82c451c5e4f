"""The simulated comparison: every system serves the same requests, short of blocks; rows to a table and a chart."""

import io
from argparse import ArgumentTypeError
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from app.simulate.command import PROFILES
from app.simulate.figures import Objectives
from bench.policies_simulated import Cell, Workload, rows_of, worst
from bench.policies_simulated_report import draw, ratio, report
from bench.systems import SYSTEMS, named
from engine.profile import Transfer


@pytest.fixture
def cell(tmp_path: Path) -> Cell:
    rows = [f"2023-11-16 18:15:00.0,{800 + 97 * each % 900},{80 + 61 * each % 300}" for each in range(24)]
    trace = tmp_path / "trace.csv"
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    workload = Workload(trace, requests=24, block=16, answers_over=4, cap=96, context=640)
    systems = {name: SYSTEMS[name] for name in ("ours", "vllm", "fcfs_reload")}
    return Cell(workload, str(PROFILES / "epyc2-tales.json"), 2.0, (1.0, 0.4), 0, systems, 16, Objectives())


def test_a_cell_has_a_row_for_each_system_and_share(cell: Cell) -> None:
    """At 0.4 of the demand blocks run out; only who recomputes pays the tax. The same cell gives the same rows."""
    rows = rows_of(cell)
    assert [(row["share"], row["system"]) for row in rows] == [
        (share, system) for share in cell.shares for system in cell.systems
    ]
    assert all(row["blocks"] < row["demand"] for row in rows if row["share"] == 0.4)
    tight = {row["system"]: row for row in rows if row["share"] == 0.4}
    assert tight["vllm"]["preemptions"] > 0
    assert tight["vllm"]["tax"] > 0
    assert tight["fcfs_reload"]["tax"] < tight["vllm"]["tax"]
    assert rows_of(cell) == rows


def test_behind_a_slow_link_it_is_computed_again_and_the_demand_is_the_same(cell: Cell) -> None:
    systems = {"cheapest": {**SYSTEMS["fcfs_reload"], "resume": "cheapest"}}
    quick = rows_of(replace(cell, systems=systems))[-1]
    slow = rows_of(replace(cell, systems=systems, link=Transfer(0.1, 1e7)))[-1]
    assert slow["demand"] == quick["demand"]
    assert quick["ways"]["reload"] > 0
    assert slow["ways"]["recompute"] > slow["ways"]["reload"]
    assert slow["profile"] == "epyc2-tales.json, 100 ms + 10 MB/s"


def test_the_worst_requests_timelines_are_told(cell: Cell, capsys: pytest.CaptureFixture[str]) -> None:
    worst(cell, 1)
    told = capsys.readouterr().out
    assert told.count("ms/token") == len(cell.systems)
    assert "admitted" in told


def test_ratios_are_of_the_same_requests() -> None:
    """Medians of ratios by seed, not a ratio of medians: 2, 3 and 0.5 times as much."""
    ours = [{"seed": seed, "mean": mean} for seed, mean in enumerate((1.0, 2.0, 40.0))]
    theirs = [{"seed": seed, "mean": mean} for seed, mean in enumerate((2.0, 6.0, 20.0))]
    assert ratio(theirs, ours, "mean") == 2.0


def test_a_report_has_all_rows_and_a_chart(cell: Cell, tmp_path: Path) -> None:
    rows = rows_of(cell)
    told = io.StringIO()
    report(rows, Console(file=told, width=150))
    assert told.getvalue().count("fcfs_reload") == 2
    draw(rows, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 0


def test_a_system_is_a_name_or_keys_over_the_defaults() -> None:
    assert named("vllm") == ("vllm", SYSTEMS["vllm"])
    assert named("mine=order:sjf,admission.risk:0.5") == ("mine", {"order": "sjf", "admission.risk": "0.5"})
    with pytest.raises(ArgumentTypeError, match="no system 'mine'"):
        named("mine")
