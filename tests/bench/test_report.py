"""Tables from rows: medians, ratios, goals, and a warning when the machine was shared."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import report


def row(peer: str, rate: float, **more: Any) -> dict[str, Any]:
    cell = {"model": "some/where/tales", "dtype": "float32", "kind": "decode", "streams": 8, "context": 128}
    return cell | {"peer": peer, "tokens_per_second": rate} | more


def printed(rows: list[dict[str, Any]]) -> str:
    console = Console(width=report.FILE_WIDTH, color_system=None)
    with console.capture() as capture:
        report.show(rows, console)
    return capture.get()


def figures(rows: list[dict[str, Any]]) -> list[str]:
    """The cells of the only row."""
    (line,) = [line for line in printed(rows).splitlines() if "decode" in line]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_a_row_has_medians_ratios_and_a_mark_where_a_goal_is_missed() -> None:
    rows = [row("sluice", rate) for rate in (1, 3000, 9000)]
    rows += [row("vllm", 1500), row("generate", 2000), row("limit", 6000)]
    assert figures(rows) == [
        *("decode", "8", "128", "3,000", "1,500", "2,000", "-", "6,000"),
        *("2.00", "1.50!", "-", "0.50", "-", "-"),
    ]


def test_a_peer_that_never_answered_leaves_dashes() -> None:
    assert figures([row("limit", 6000)])[3:] == ["-"] * 4 + ["6,000"] + ["-"] * 6


def test_agreement_is_the_worst_and_disturbance_the_median() -> None:
    rows = [row("sluice", 1, agrees=share, others_cores=cores) for share, cores in [(1.0, 0.0), (0.5, 0.1)]]
    assert figures(rows)[-2:] == ["50%", "0.05"]


@pytest.mark.parametrize(
    ("kind", "streams", "peer", "goal"),
    [
        ("decode", 8, "vllm", 1.5),
        ("decode", 1, "vllm", None),
        ("decode", 1, "limit", 0.5),
        ("prefill", 8, "vllm", 1.0),
        ("prefill", 8, "limit", None),
    ],
)
def test_goals_hold_for_their_cells_only(kind: str, streams: int, peer: str, goal: float | None) -> None:
    assert report.goal_of(kind, streams, peer) == goal


def test_prefills_stand_above_decodes_and_each_model_and_dtype_has_its_table() -> None:
    rows = [row("limit", 1), row("limit", 1, kind="prefill"), row("limit", 1, dtype="bfloat16")]
    tables = report.tables(rows)
    assert [table.title for table in tables] == [
        f"tales, {dtype}: median tokens/s" for dtype in ("float32", "bfloat16")
    ]
    assert list(tables[0].columns[0].cells) == ["prefill", "decode"]


def test_rows_measured_beside_other_work_are_counted() -> None:
    rows = [row("sluice", 1, others_cores=0.5), row("sluice", 1, others_cores=0.0), row("limit", 1)]
    assert "1 of 2 rows shared the machine" in printed(rows)
    assert "shared the machine" not in printed(rows[1:])


def test_only_lines_with_figures_are_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    figure = row("sluice", 1)
    path.write_text("".join(json.dumps(line) + "\n" for line in [{"machine": {}}, {"peers": {}}, figure]))
    assert report.read([path, path]) == [figure, figure]
