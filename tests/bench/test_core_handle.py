"""The bench of `core.handle` drives a core that is as full as it says, and under pressure where it says so."""

from bench.core_handle import measured, table


def test_a_full_core_is_measured_with_its_queue() -> None:
    rows = measured("fcfs", running=8, waiting=20, steps=60, short=False)
    assert [row["event"] for row in rows] == ["StepDone", "Arrived"]
    assert all(row["running"] == 8 and row["waiting"] > 20 for row in rows)
    assert all(0 < row["median_seconds"] <= row["p99_seconds"] for row in rows)


def test_a_short_one_preempts() -> None:
    rows = measured("fcfs", running=8, waiting=20, steps=200, short=True)
    assert rows[0]["preemptions"] > 0
    assert table(rows).row_count == 2
