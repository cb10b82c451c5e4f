"""Step times: what a plan's shape is, curves and grids between and beyond their points, profiles as files."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.plan import PENDING, Plan, Row
from engine.profile import ProfileError, read_profile, write_profile
from engine.step_time import CurveTime, Grid, Shape, TableTime, on_curve, shape
from tests.engine.test_simulation import PROFILE


def row(start: int, tokens: int, samples: bool = True) -> Row:
    return Row(0, start, (PENDING,) if tokens == 1 else (1,) * tokens, 0, (), samples)


def test_a_shape_counts_decode_and_prefill_apart() -> None:
    found = shape(Plan(1, (), (row(9, 1), row(99, 1), row(0, 4, False), row(10, 2))))
    assert found == Shape(
        tokens=8,
        samples=3,
        decode_rows=2,
        decode_context=110,
        prefill_rows=2,
        prefill_tokens=6,
        prefill_before=20,
        prefill_pairs=(1 + 2 + 3 + 4) + (11 + 12),
    )


def test_a_curve_is_flat_before_its_first_point_and_goes_on_beyond_its_last() -> None:
    points = ((2.0, 1.0), (4.0, 3.0), (8.0, 4.0))
    assert [on_curve(points, x) for x in (0, 2, 3, 4, 6, 8, 12)] == [1, 1, 2, 3, 3.5, 4, 5]
    assert on_curve(((1.0, 7.0),), 100) == 7


def linear(chunk: float, before: float, rows: float, context: float) -> float:
    return 1e-6 * (chunk * (1 + before) + rows * (3 + context))


CELLS = tuple(
    (chunk, before, rows, context, linear(chunk, before, rows, context))
    for chunk in (0, 16, 64)
    for before in ((0, 100, 400) if chunk else (0,))
    for rows in ((0, 1, 8, 32) if not chunk else (0, 1, 8))
    for context in ((16, 128, 512) if rows else (0,))
    if chunk or rows
)
TABLES = TableTime(
    layers=2, dense=((1, 1e-3), (100, 2e-3)), once=((1, 1e-4),), head=((1, 1e-3),), attention=Grid(CELLS)
)


def attention(step: Shape) -> float:
    """What is left of a table's time beside its curves."""
    head = 1e-3 if step.samples else 0.0
    return (TABLES.timer()(step) - head - 1e-4) / 2 - on_curve(TABLES.dense, step.tokens)


@given(
    st.integers(0, 64), st.integers(0, 400), st.integers(0, 8), st.integers(16, 512)
)  # inside, where the function is linear in each variable
def test_a_grid_is_exact_where_time_is_multilinear(chunk: int, before: int, rows: int, context: int) -> None:
    if chunk and chunk < 16:
        chunk = 16
    step = Shape(chunk + rows, rows, rows, rows * context, chunk > 0, chunk, chunk * before)
    wanted = linear(chunk, before if chunk else 0, rows, context if rows else 0)
    if rows or chunk:
        assert attention(step) == pytest.approx(wanted, abs=1e-9)


def test_more_rows_beside_a_chunk_than_measured_cost_in_proportion() -> None:
    step = Shape(16 + 32, 33, 32, 32 * 128, 1, 16, 0)
    assert attention(step) == pytest.approx(linear(16, 0, 8, 128) * 4)


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    for profile in (PROFILE, replace(PROFILE, step=TABLES)):
        write_profile(profile, tmp_path / "profile.json")
        assert read_profile(tmp_path / "profile.json") == profile


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (('"kind": "curves"', '"kind": "guesses"'), "step"),
        (('"block_bytes": 1000', '"block_bytes": 0'), "block_bytes"),
        (('"machine"', '"machinery"'), "machin"),
        (('"sluice_profile": 1', '"sluice_profile": 2'), "sluice_profile"),
        (('"host>disk"', '"host>moon"'), "transfers"),
        (('"finished"', '"seconds_per_row"'), "between.seconds_per_row"),
        (('"block_size": 16', '"block_size": 0'), "block_size"),
        (('"idle": 0.0', '"idle": -1.0'), "between.idle: .* greater than or equal to 0"),
        (('"decode_row": 0.0', '"decode_row": Infinity'), "decode_row: .* finite"),
        (("0.02\n", "NaN\n"), "dense.1.1: .* finite"),
        (("0.02\n", "0.002\n"), "dense: the last piece falls"),
        ((" 100,\n", " 0,\n"), "dense: x must rise"),
    ],
)
def test_a_profile_with_something_wrong_is_refused_with_its_place(
    change: tuple[str, str], why: str, tmp_path: Path
) -> None:
    """Regression: curves that fall below 0, or are no numbers, ended in a traceback, or in runs that served nobody."""
    path = tmp_path / "profile.json"
    write_profile(PROFILE, path)
    assert change[0] in path.read_text()
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(ProfileError, match=why):
        read_profile(path)
    with pytest.raises(ProfileError, match="cannot be read"):
        read_profile(tmp_path / "none.json")


def test_curves_add_up() -> None:
    model = CurveTime(
        dense=((0, 0.0), (10, 1.0)),
        head=((0, 0.0), (10, 0.1)),
        decode_row=1e-2,
        decode_position=1e-3,
        prefill_row=1e-4,
        prefill_pair=1e-5,
    )
    step = Shape(5, 2, 1, 7, 1, 4, 0, 10.0)
    assert model.timer()(step) == pytest.approx(0.5 + 0.02 + 0.01 + 0.007 + 1e-4 + 1e-4)
