"""What a step must at least read and compute, counted by hand for a model of a few numbers."""

from pathlib import Path

import pytest

from bench.cells import Cell, Kind
from bench.limits import Work, matrix_shapes, work
from bench.models import RANDOM_100M, find
from engine.model.config import ModelConfig, parse_config
from tests.bench import fakes

TINY = parse_config(fakes.TINY)
LAYERS = 2 * (32 * 16 + 16 * 16 + 48 * 16 + 16 * 24)  # q, k and v; o; gate and up; down
HEAD = 100 * 16
KV = 2 * 2 * 2 * 4  # numbers of a position: K and V, layers, KV heads, of 4 each
PAIR = 2 * 2 * 2 * 4 * 4  # FLOPs: multiply and add, scores and values, layers, heads, of 4 each


def test_a_decode_step_reads_weights_once_and_each_streams_context() -> None:
    need = work(Cell(Kind.DECODE, 3, 10), TINY, item_bytes=4)
    assert need == Work(
        rows=3,
        bytes=4 * (LAYERS + HEAD + 3 * 10 * KV),
        flops=3 * (2 * (LAYERS + HEAD) + 10 * PAIR),
        tokens=3,
    )


def test_a_prefill_computes_every_causal_pair_and_the_head_of_last_positions_alone() -> None:
    need = work(Cell(Kind.PREFILL, 3, 10), TINY, item_bytes=2)
    assert need == Work(
        rows=30,
        bytes=2 * (LAYERS + HEAD),
        flops=2 * (30 * LAYERS + 3 * HEAD) + 3 * 55 * PAIR,
        tokens=30,
    )


def numbers(config: ModelConfig) -> int:
    shapes = [n * k for n, k in matrix_shapes(config)]
    return config.layers * sum(shapes[:-1]) + shapes[-1]


def test_the_matrices_of_the_random_model_are_its_hundred_million_parameters() -> None:
    """All but the norms', which are a few thousand."""
    assert numbers(parse_config(RANDOM_100M)) == pytest.approx(100.1e6, rel=1e-3)


def test_half_the_bytes_a_number_are_half_the_bytes_and_the_same_work() -> None:
    cell = Cell(Kind.DECODE, 8, 32)
    whole, half = (work(cell, TINY, item_bytes) for item_bytes in (4, 2))
    assert (half.bytes * 2, half.flops) == (whole.bytes, whole.flops)


def test_the_shipped_model_is_found_by_name_and_any_other_by_directory(tmp_path: Path) -> None:
    shipped = find("shipped", tmp_path)
    assert find(str(shipped.directory), tmp_path).config == shipped.config
    assert find(str(shipped.directory), tmp_path).name == shipped.directory.name
