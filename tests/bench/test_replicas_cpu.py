"""The bench of replicas on a CPU: every replica decodes, at once, and the table compares with one."""

from collections.abc import Iterator

import pytest
import torch

from app.compose import SHIPPED
from bench.replicas_cpu import CPU, Cell, run, table
from engine.model.loading import load_model


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_replicas_decode_together_and_are_compared_with_one() -> None:
    loaded = load_model(SHIPPED, device=CPU)
    cells = [Cell(1, 2, main=True), Cell(1, 2), Cell(3, 2)]
    rows = list(run(loaded, cells, context=20, steps=4, repeats=2, cores=6))
    assert [(row["replicas"], row["main"], row["repeat"]) for row in rows] == [
        *[(1, True, 0), (1, False, 0), (3, False, 0)],
        *[(3, False, 1), (1, False, 1), (1, True, 1)],
    ]
    for row in rows:
        assert len(row["each"]) == row["replicas"]
        assert min(row["each"]) > 0
        assert row["tokens_per_second"] == sum(row["each"])
    assert {row["replicas"]: row["threads"] for row in rows} == {1: 6, 3: 2}
    made = table(rows)
    assert list(made.columns[1].cells) == ["1, main", "1", "3"]
    assert list(made.columns[4].cells)[1] == "1.00"
