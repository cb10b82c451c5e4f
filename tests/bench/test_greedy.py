"""The optimum is the least of all placements; the rows keep to the bound and are the same for the same seed."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from bench.greedy import optimum, rows, table


@given(st.lists(st.integers(1, 20).map(float), min_size=1, max_size=5), st.integers(1, 3))
def test_no_placement_is_better_than_the_optimum(works: list[float], count: int) -> None:
    makespans = [
        max(
            sum(work for work, at in zip(works, places, strict=True) if at == number)
            for number in range(count)
        )
        for places in product(range(count), repeat=len(works))
    ]
    assert optimum(works, count) == min(makespans)


def test_rows_keep_to_the_bound_and_depend_on_the_seed_alone() -> None:
    found = list(rows((2, 3), (4, 6), draws=10, seed=1))
    assert found == list(rows((2, 3), (4, 6), draws=10, seed=1))
    assert found != list(rows((2, 3), (4, 6), draws=10, seed=2))
    assert all(1.0 <= row.mean_ratio <= row.worst_ratio <= row.bound for row in found)
    assert table(found).row_count == 4
