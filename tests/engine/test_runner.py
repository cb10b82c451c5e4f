"""The runner's bookkeeping: a plan's arrays, block tables, pending tokens, times. Numbers: test_bits.py."""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from engine.model.loading import Loaded
from engine.plan import PENDING, Placement, Plan, Row, Sampling
from engine.runner import BlockTables, ModelRunner, flatten
from engine.sampler import Sampler
from tests.engine.models import BLOCK, CPU, load, random_tokens, runner_for

GREEDY = Sampling(temperature=0)
Directories = Callable[[str], Path]


@pytest.fixture(scope="module")
def loaded(model_directory: Directories) -> Loaded:
    return load(model_directory("gqa"), "reference", "float32")


def test_rows_flatten_in_their_order() -> None:
    """A chunk, a decode row and a chunk that samples: positions, starts and who samples, row after row."""
    flat = flatten(
        [
            Row(4, 32, (7, 8, 9), 0, (), samples=False),
            Row(2, 5, (PENDING,), 0, (), samples=True),
            Row(0, 0, (1, 2), 0, (), samples=True),
        ]
    )
    assert flat.tokens.tolist() == [7, 8, 9, PENDING, 1, 2]
    assert flat.positions.tolist() == [32, 33, 34, 5, 0, 1]
    assert flat.row_starts.tolist() == [0, 3, 4, 6]
    assert flat.slots.tolist() == [4, 2, 0]
    assert (flat.pending.tolist(), flat.pending_slots.tolist()) == ([3], [2])
    assert flat.sampled is not None
    assert flat.sampled.tolist() == [3, 5]
    assert (flat.sampled_slots.tolist(), flat.sampled_positions.tolist()) == ([2, 0], [6, 2])
    assert (flat.longest_row, flat.longest_context) == (3, 35)
    assert {str(array.dtype) for array in (flat.positions, flat.row_starts, flat.slots)} == {"int32"}


def test_a_step_of_single_tokens_that_all_sample_picks_none() -> None:
    """Nothing is to be gathered where every token wants logits; one row that does not sample ends that."""
    decode = [Row(2, 9, (5,), 0, (), samples=True), Row(0, 30, (PENDING,), 0, (), samples=True)]
    flat = flatten(decode)
    assert flat.sampled is None
    assert flat.tokens.tolist() == [5, PENDING]
    assert (flat.positions.tolist(), flat.row_starts.tolist(), flat.slots.tolist()) == (
        [9, 30],
        [0, 1, 2],
        [2, 0],
    )
    assert (flat.pending.tolist(), flat.pending_slots.tolist()) == ([1], [0])
    assert (flat.sampled_slots.tolist(), flat.sampled_positions.tolist()) == ([2, 0], [10, 31])
    assert (flat.longest_row, flat.longest_context) == (1, 31)
    quiet = flatten([*decode, Row(3, 9, (1,), 0, (), samples=False)])
    assert quiet.sampled is not None
    assert quiet.sampled.tolist() == [0, 1]


class TestBlockTables:
    def test_a_table_grows_and_its_blocks_may_give_way_to_equal_ones(self) -> None:
        """Blocks land at `blocks_at`, past the end or over older ones; a placement empties the table."""
        tables = BlockTables(max_sequences=2, max_blocks=8, block_size=4)
        tables.write(Row(1, 0, (1,) * 8, 0, (5, 6), samples=False))
        tables.write(Row(1, 8, (1,) * 4, 2, (7,), samples=False))
        tables.write(Row(1, 12, (1,), 1, (3, 7, 9), samples=False))
        assert tables.blocks(1).tolist() == [5, 3, 7, 9]
        assert tables.blocks(0).tolist() == []
        tables.place(Placement(1, GREEDY))
        assert tables.blocks(1).tolist() == []

    @pytest.mark.parametrize(
        "row",
        [
            Row(0, 0, (1,) * 5, 0, (1,), samples=False),
            Row(0, 0, (1,), 1, (1,), samples=False),
            Row(0, 0, (), 0, (1,), samples=False),
        ],
        ids=["too few blocks", "a hole", "no tokens"],
    )
    def test_a_row_that_would_spoil_the_pool_is_a_bug(self, row: Row) -> None:
        """Too few blocks, a hole in the table and an empty row fail before anything is computed."""
        tables = BlockTables(max_sequences=1, max_blocks=8, block_size=4)
        with pytest.raises(AssertionError):
            tables.write(row)


def test_pending_is_the_slots_last_draw(loaded: Loaded) -> None:
    """Rows that leave their token to the runner draw what rows that spell it out do, in any order."""
    prompts = {0: [1, 2, 3], 1: [9, 8, 7, 6, 5]}

    def steps(pending: bool) -> list[tuple[int, ...]]:
        runner = runner_for(loaded, kv_blocks=8, max_sequences=2)
        rows = [
            Row(slot, 0, tuple(p), 0, (slot * 2, slot * 2 + 1), samples=True) for slot, p in prompts.items()
        ]
        plan = Plan(0, (Placement(0, GREEDY), Placement(1, GREEDY)), tuple(rows))
        found = [runner.launch(plan).collect().tokens]
        for step, order in enumerate(([1, 0], [0, 1], [1, 0])):
            last = dict(zip([row.slot for row in rows], found[-1], strict=True))
            rows = [
                Row(
                    slot,
                    len(prompts[slot]) + step,
                    (PENDING if pending else last[slot],),
                    2,
                    (),
                    samples=True,
                )
                for slot in order
            ]
            found.append(runner.launch(Plan(step + 1, (), tuple(rows))).collect().tokens)
        return found

    assert steps(pending=True) == steps(pending=False)


def test_a_row_that_does_not_sample_draws_nothing(loaded: Loaded) -> None:
    """Results come for the sampling rows alone; a step without any still computes KV."""
    tokens = random_tokens(BLOCK, 512, seed=6)
    whole, parts = (runner_for(loaded, kv_blocks=4, max_sequences=2) for _ in range(2))
    place = (Placement(0, GREEDY),)
    expected = whole.launch(Plan(0, place, (Row(0, 0, tuple(tokens), 0, (0,), samples=True),))).collect()
    first = parts.launch(Plan(0, place, (Row(0, 0, tuple(tokens[:9]), 0, (2,), samples=False),))).collect()
    last = parts.launch(Plan(1, (), (Row(0, 9, tuple(tokens[9:]), 1, (), samples=True),))).collect()
    assert (first.tokens, first.logprobs, len(expected.tokens)) == ((), (), 1)
    assert last.tokens == expected.tokens


def test_log_probabilities_come_where_asked(loaded: Loaded) -> None:
    """One entry a sampling row: None, or the drawn token's with as many others as were asked for."""
    runner = runner_for(loaded, kv_blocks=4, max_sequences=3)
    asked = (None, 0, 2)
    plan = Plan(
        0,
        tuple(Placement(slot, Sampling(temperature=0, logprobs=top)) for slot, top in enumerate(asked)),
        tuple(Row(slot, 0, (1, 2), 0, (slot,), samples=True) for slot in range(3)),
    )
    none, bare, two = runner.launch(plan).collect().logprobs
    assert none is None
    assert bare is not None
    assert two is not None
    assert (len(bare.top), len(two.top)) == (0, 2)
    assert bare.logprob == two.logprob == two.top[0][1] < 0


def test_a_slot_placed_anew_starts_anew(loaded: Loaded) -> None:
    """A sequence placed in a used slot draws as in a fresh runner: nothing of before is left."""
    used, fresh = (runner_for(loaded, kv_blocks=4, max_sequences=1) for _ in range(2))
    used.launch(Plan(0, (Placement(0, Sampling(seed=3)),), (Row(0, 0, (5,) * 20, 0, (0, 1), samples=True),)))
    plan = Plan(1, (Placement(0, GREEDY),), (Row(0, 0, (1, 2, 3), 0, (1,), samples=True),))
    assert used.launch(plan).collect().tokens == fresh.launch(plan).collect().tokens
    assert used.tables.blocks(0).tolist() == [1]


class Releasing:
    """The reference's kernels, that say each norm let go of the interpreter's lock for 0.25 s."""

    def __init__(self, inner: object) -> None:
        self._inner = inner
        self.released_seconds = 0.0

    def twin(self) -> "Releasing":
        return self

    def __getattr__(self, name: str) -> object:
        if name == "add_norm":
            self.released_seconds += 0.25
        return getattr(self._inner, name)


def test_a_steps_time_is_split_by_the_interpreters_lock(model_directory: Directories) -> None:
    """`seconds` is the clock's; `gil_seconds` is what the kernels did not spend with the lock released."""
    loaded = load(model_directory("gqa"), "reference", "float32")
    norms = 2 * loaded.config.layers + 1
    loaded.model.kernels = Releasing(loaded.model.kernels)  # type: ignore[assignment]  # a fake by delegation
    sampler = Sampler(1, loaded.config.vocab_size, CPU)
    clock: Iterator[int] = count(step=10)
    runner = ModelRunner(
        loaded.model,
        sampler,
        kv_blocks=4,
        block_size=BLOCK,
        max_sequences=1,
        clock=lambda: float(next(clock)),
    )
    row = Row(0, 0, (1,), 0, (0,), samples=True)
    result = runner.launch(Plan(3, (Placement(0, GREEDY),), (row,))).collect()
    assert (result.step, result.seconds, result.gil_seconds) == (3, 10.0, 10.0 - 0.25 * norms)


def test_warming_up_leaves_no_trace(loaded: Loaded) -> None:
    """A runner that was warmed up draws as one that was not."""
    warm, cold = (runner_for(loaded, kv_blocks=4, max_sequences=1) for _ in range(2))
    warm.warm_up()
    plan = Plan(1, (Placement(0, GREEDY),), (Row(0, 0, (1, 2, 3), 0, (0,), samples=True),))
    assert warm.launch(plan).collect().tokens == cold.launch(plan).collect().tokens


@pytest.mark.parametrize("kv_blocks", [3, 1000])
def test_tables_are_as_long_as_the_model_and_the_pool_allow(loaded: Loaded, kv_blocks: int) -> None:
    """A context ends at the model's last position, or with the pool's last block."""
    runner = runner_for(loaded, kv_blocks=kv_blocks, max_sequences=1)
    assert runner.tables.array.shape == (1, min(kv_blocks, loaded.config.max_positions // BLOCK))
