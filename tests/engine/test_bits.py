"""A position's KV and logits are the same bits whatever shares its batch and however its tokens were chunked.

Each test computes a sequence alone in one piece, then along another way, and compares raw bytes.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.plan import PENDING, Placement, Plan, Row, Sampling
from engine.runner import flatten
from tests.engine.models import BLOCK, FAMILIES, Driver, Piece, driver_for, load, random_tokens, runner_for

LENGTH = 80  # five whole blocks
WINDOWED_LENGTH = 240  # so that a window begins in a later unit of the CPU's attention than the context does
CASES = [
    ("gqa", "reference", "float32"),  # exact by construction, so one case shows that the tests are right
    ("odd_sizes", "cpu", "float32"),
    ("odd_sizes", "cpu", "bfloat16"),
    ("mqa", "cpu", "bfloat16"),
    ("shipped", "cpu", "float32"),
    ("shipped", "cpu", "bfloat16"),
    *((name, "cpu", dtype) for name in FAMILIES for dtype in ("float32", "bfloat16")),
]
Directories = Callable[[str], Path]


class Case:
    """A loaded model, a sequence, and what it gives alone in one piece."""

    def __init__(self, directory: Path, kernels: str, dtype: str) -> None:
        self.loaded = load(directory, kernels, dtype)
        assert self.loaded.model.kernels.exact
        self.length = WINDOWED_LENGTH if self.loaded.config.traits.windows else LENGTH
        self.tokens = self.sequence(self.length, seed=1)
        alone = driver_for(self.loaded)
        alone.run(0, self.tokens, chunk=self.length)
        self.logits = alone.all_logits(0)
        self.slabs = alone.runner.slabs(0)

    def sequence(self, length: int, seed: int) -> list[int]:
        return random_tokens(length, self.loaded.config.vocab_size, seed)

    def check(self, driver: Driver, slot: int) -> None:
        """The slot's KV and logits are, byte for byte, those of the sequence alone."""
        assert torch.equal(raw(driver.all_logits(slot)), raw(self.logits))
        assert torch.equal(raw(driver.runner.slabs(slot)), raw(self.slabs))


@cache
def case_of(directory: Path, kernels: str, dtype: str) -> Case:
    return Case(directory, kernels, dtype)


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, model_directory: Directories) -> Case:
    model, kernels, dtype = request.param
    return case_of(model_directory(model), kernels, dtype)


def raw(tensor: Tensor) -> Tensor:
    """Its bytes: unlike floats, they tell -0.0 from 0.0 and one NaN from another."""
    return tensor.contiguous().view(torch.uint8)


def pieces_of(lengths: Sequence[int], case: Case) -> list[Piece]:
    """Other sequences' pieces, one of each length, in slots from 1 on."""
    return [Piece(slot, case.sequence(n, seed=100 + slot)) for slot, n in enumerate(lengths, start=1)]


@pytest.mark.parametrize("chunk", [1, 16, 64])
def test_chunking_changes_no_bit(case: Case, chunk: int) -> None:
    """Chunks of 1, 16 and 64 tokens, in scattered blocks, equal one piece in consecutive blocks."""
    driver = driver_for(case.loaded, shuffle=chunk)
    driver.run(0, case.tokens, chunk)
    case.check(driver, 0)


@pytest.mark.parametrize("others", [1, 6, 15, 63])
def test_a_mixed_batch_changes_no_bit(case: Case, others: int) -> None:
    """Beside 1 to 63 rows of other lengths and contexts, prompts and single tokens mixed, the bits stay."""
    driver = driver_for(case.loaded, shuffle=others)
    lengths = [(7 * slot) % 23 + 1 for slot in range(others)]
    driver.step(pieces_of(lengths, case))
    position = 0
    chunks = (1, 30, 1, 1, 17, 1, 29, *[case.length - LENGTH] * (case.length > LENGTH))
    for step, chunk in enumerate(chunks):
        beside = [piece for piece in pieces_of([1] * others, case) if (piece.slot + step) % 3]
        mine = Piece(0, case.tokens[position : position + chunk])
        at = (step * 5) % (len(beside) + 1)
        driver.step([*beside[:at], mine, *beside[at:]])
        position += chunk
    assert position == case.length
    case.check(driver, 0)


def test_a_batch_of_prompts_changes_no_bit(case: Case) -> None:
    """One step that computes the whole sequence beside three other prompts equals the sequence alone."""
    driver = driver_for(case.loaded, shuffle=9)
    first, *others = pieces_of([45, 1, 90], case)
    driver.step([first, Piece(0, case.tokens), *others])
    case.check(driver, 0)


def test_a_prefix_computed_by_another_changes_no_bit(case: Case) -> None:
    """A sequence that shares blocks which another slot computed has the same bits."""
    driver = driver_for(case.loaded, shuffle=4)
    driver.run(5, case.tokens[:48], chunk=48)
    shared = tuple(driver.runner.tables.blocks(5).tolist())
    driver.runner.tables.place(Placement(0, Sampling()))
    own = tuple(driver.free.pop() for _ in range(case.length // BLOCK - 3))
    rest = Row(0, 48, tuple(case.tokens[48:]), 0, shared + own, samples=True)
    logits = driver.runner.logits([rest])
    assert torch.equal(raw(logits), raw(case.logits[48:]))
    assert torch.equal(raw(driver.runner.slabs(0)), raw(case.slabs))


def test_picking_rows_for_logits_changes_no_bit(case: Case) -> None:
    """The served path, which carries only sampling tokens past the last attention, gives the same logits."""
    runner = runner_for(case.loaded)
    runner.tables.place(Placement(0, Sampling()))
    row = Row(0, 0, tuple(case.tokens), 0, tuple(range(case.length // BLOCK)), samples=True)
    runner.tables.write(row)
    picked = [3, 40, case.length - 1]
    with torch.inference_mode():
        batch = runner.batch(flatten([row]))
        some = case.loaded.model.forward(batch, runner.pool, torch.tensor(picked))
    assert torch.equal(raw(some), raw(case.logits[picked]))


def test_drawn_tokens_do_not_depend_on_the_batch(case: Case) -> None:
    """Eight sequences, half greedy and half seeded, draw the same 12 tokens together as each alone."""
    samplings = [Sampling(temperature=slot % 2, top_p=0.9, seed=slot) for slot in range(8)]
    prompts = [case.sequence(11 + 3 * slot, seed=50 + slot) for slot in range(8)]
    together = draw(case, dict(enumerate(zip(prompts, samplings, strict=True))))
    alone = [draw(case, {slot: (prompts[slot], samplings[slot])})[slot] for slot in range(8)]
    assert [together[slot] for slot in range(8)] == alone
    assert len({tuple(tokens) for tokens in alone}) > 4  # not one answer to everything


def draw(case: Case, sequences: dict[int, tuple[list[int], Sampling]]) -> dict[int, list[int]]:
    """12 tokens of each slot's sequence, all in one batch, later ones read as PENDING."""
    runner = runner_for(case.loaded, kv_blocks=64, max_sequences=8)
    placements = tuple(Placement(slot, sampling) for slot, (_, sampling) in sequences.items())
    rows = tuple(
        Row(slot, 0, tuple(prompt), 0, tuple(range(slot * 4, slot * 4 + 4)), samples=True)
        for slot, (prompt, _) in sequences.items()
    )
    steps = [runner.launch(Plan(0, placements, rows)).collect().tokens]
    for step in range(11):
        rows = tuple(
            Row(slot, len(prompt) + step, (PENDING,), 4, (), samples=True)
            for slot, (prompt, _) in sequences.items()
        )
        steps.append(runner.launch(Plan(step + 1, (), rows)).collect().tokens)
    return {slot: [tokens[index] for tokens in steps] for index, slot in enumerate(sequences)}
