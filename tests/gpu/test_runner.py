"""The runner on a card: bits in every batch, graphs against kernels one by one, no waiting inside a launch.

What runs here is the whole path, with the functions of tests/engine where they fit. Never run without a card.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.kernels.protocol import Kernels
from engine.model.loading import Loaded, load_model
from engine.plan import PENDING, Placement, Plan, Row, Sampling
from engine.runner import ModelRunner
from engine.sampler import Sampler
from tests.engine.models import BLOCK, Driver, Piece, random_tokens, write_shape
from tests.engine.test_model_parity import peer_tokens, prompt_for
from tests.engine.test_runner_cuda import plans, results

pytest.importorskip("triton", reason="needs Triton: it comes with torch's CUDA wheels")

from engine.kernels.cuda import CudaKernels
from engine.runner_cuda import CudaRunner

pytestmark = pytest.mark.gpu

LENGTH = 640  # three splits of attention
SLOTS = 64
SHAPES = ("gqa", "mqa", "biased", "odd_sizes")
DTYPES = ("float32", "float16", "bfloat16")
Directories = Callable[[str], Path]


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Directories:
    written: dict[str, Path] = {}

    def directory(name: str) -> Path:
        if name not in written:
            written[name] = write_shape(name, tmp_path_factory.mktemp(name))
        return written[name]

    return directory


def load(directory: Path, card: torch.device, dtype: str, *, exact: bool = True) -> Loaded:
    def kernels(device: torch.device, chosen: torch.dtype) -> Kernels:
        return CudaKernels(chosen, device, exact)

    return load_model(directory, device=card, dtype=dtype, kernels=kernels)


def runner_for(
    loaded: Loaded, *, graphs: bool = True, kv_blocks: int = 512, block: int = BLOCK
) -> CudaRunner:
    return CudaRunner(
        loaded.model,
        Sampler(SLOTS, loaded.config.vocab_size, loaded.model.device),
        kv_blocks=kv_blocks,
        block_size=block,
        max_sequences=SLOTS,
        graphs=graphs,
    )


def driver_for(loaded: Loaded, seed: int) -> Driver:
    """Blocks scattered by `seed`.

    A Driver asks its runner for tables, logits and slabs: both runners have them.
    """
    order = torch.randperm(512, generator=torch.Generator().manual_seed(seed)).tolist()
    return Driver(cast(ModelRunner, runner_for(loaded)), order)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the card raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", SHAPES)
def test_greedy_tokens_are_those_of_transformers(
    name: str, card: torch.device, directories: Directories
) -> None:
    """64 new tokens in fp32, by graphs, each step launched before its predecessor is collected."""
    loaded, prompt = load(directories(name), card, "float32"), prompt_for(directories(name))
    runner, expected = runner_for(loaded), peer_tokens(directories(name))
    blocks = tuple(range(-(-(len(prompt) + len(expected)) // BLOCK)))
    rows = [Row(1, 0, tuple(prompt), 0, blocks, samples=True)]
    rows += [
        Row(1, len(prompt) + step, (PENDING,), len(blocks), (), samples=True)
        for step in range(len(expected) - 1)
    ]
    placed = (Placement(1, Sampling(temperature=0)),)
    launched = [runner.launch(Plan(step, () if step else placed, (row,))) for step, row in enumerate(rows)]
    assert [token for step in launched for token in step.collect().tokens] == expected
    assert runner.captured == (1,)


@pytest.fixture(params=[(name, dtype) for name in ("gqa", "odd_sizes") for dtype in DTYPES], ids="-".join)
def case(
    request: pytest.FixtureRequest, card: torch.device, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Loaded, list[int], Tensor, Tensor]:
    """A model, a sequence, and its logits and KV alone in one piece."""
    name, dtype = request.param
    directory = write_long(name, tmp_path_factory.mktemp(name))
    loaded = load(directory, card, dtype)
    tokens = random_tokens(LENGTH, loaded.config.vocab_size, seed=1)
    alone = driver_for(loaded, seed=0)
    alone.run(0, tokens, chunk=LENGTH)
    return loaded, tokens, alone.all_logits(0), alone.runner.slabs(0)


def write_long(name: str, path: Path) -> Path:
    """The shape with a context of 1024, so that attention has several splits."""
    from engine.model.random_weights import llama_config, write_random_llama
    from tests.engine.models import SHAPES as SIZES

    return write_random_llama(path, llama_config(**SIZES[name], max_position_embeddings=1024), seed=len(name))


Case = tuple[Loaded, list[int], Tensor, Tensor]


@pytest.mark.parametrize("chunk", [16, 64, 257])
def test_chunking_changes_no_bit(chunk: int, case: Case) -> None:
    loaded, tokens, logits, slabs = case
    driver = driver_for(loaded, seed=chunk)
    driver.run(0, tokens, chunk)
    assert torch.equal(driver.all_logits(0), logits)
    assert torch.equal(driver.runner.slabs(0), slabs)


@pytest.mark.parametrize("others", [1, 15, 63])
def test_a_mixed_batch_changes_no_bit(others: int, case: Case) -> None:
    """Beside prompts and single tokens of other sequences; the last 40 tokens one by one."""
    loaded, tokens, logits, slabs = case
    driver, position = driver_for(loaded, seed=others), 0
    for chunk in (1, 250, 6, 200, 143, *[1] * 40):
        beside = [
            Piece(slot, random_tokens((slot * chunk) % 7 + 1 if chunk > 1 else 1, 300, seed=slot))
            for slot in range(1, others + 1)
        ]
        driver.step(
            [*beside[: others // 2], Piece(0, tokens[position : position + chunk]), *beside[others // 2 :]]
        )
        position += chunk
    assert position == LENGTH
    assert torch.equal(driver.all_logits(0), logits)
    assert torch.equal(driver.runner.slabs(0), slabs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_graphs_and_single_kernels_agree(dtype: str, card: torch.device, directories: Directories) -> None:
    """Tokens, log-probabilities and the whole pool, to the bit."""
    loaded = load(directories("gqa"), card, dtype)
    with_graphs, without = (
        runner_for(loaded, graphs=graphs, kv_blocks=32, block=4) for graphs in (True, False)
    )
    ours, theirs = results(with_graphs), results(without)
    assert [(step.tokens, step.logprobs) for step in ours] == [
        (step.tokens, step.logprobs) for step in theirs
    ]
    assert torch.equal(with_graphs.pool, without.pool)
    assert with_graphs.captured
    assert not without.captured


def test_nothing_waits_inside_a_launch(card: torch.device, directories: Directories) -> None:
    """Prefill, mixed steps, decode by graph, sampling with filters and log-probabilities."""
    runner = runner_for(load(directories("gqa"), card, "bfloat16"), kv_blocks=32, block=4)
    runner.warm_up()
    results(runner)  # compiles what these plans need
    with no_waiting():
        launched = [runner.launch(plan) for plan in plans()]
    assert all(step.collect().seconds > 0 for step in launched)


def test_the_sampler_draws_on_the_card_as_on_the_cpu(card: torch.device) -> None:
    """Greedy, seeded, filtered and penalised rows, twice: same tokens and log-probabilities."""
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(0)) * 4
    slots, positions = np.arange(6), np.arange(6) + 10
    asking = Sampling(seed=8, repetition_penalty=1.3, frequency_penalty=0.7, logit_bias=((5, 2.0),))
    found = []
    for device in (torch.device("cpu"), card):
        sampler = Sampler(6, 1000, device)
        sampler.place(Placement(0, Sampling(temperature=0, logprobs=3)))
        sampler.place(Placement(1, Sampling(seed=5, logprobs=0)))
        sampler.place(Placement(2, Sampling(seed=5, top_p=0.7)))
        sampler.place(Placement(3, Sampling(seed=6, top_k=4, min_p=0.1, logprobs=2)))
        sampler.place(Placement(4, Sampling(seed=7, suppressed=(1, 2, 3), suppressed_until=20)))
        sampler.place(Placement(5, asking, tuple(range(0, 900, 2)), 300))
        for later in range(2):
            drawn = sampler.sample(logits.to(device), slots, positions + later)
            found.append((drawn.tokens.tolist(), drawn.logprobs()))
    assert found[:2] == found[2:]


def test_cublas_says_that_it_is_not_exact(card: torch.device, directories: Directories) -> None:
    """engine.exact = false: near the exact logits, and the runner says so."""
    exact, fast = (load(directories("gqa"), card, "float32", exact=exact) for exact in (True, False))
    assert runner_for(exact).exact
    assert not runner_for(fast).exact
    tokens = random_tokens(90, exact.config.vocab_size, seed=4)
    logits = []
    for loaded in (exact, fast):
        driver = driver_for(loaded, seed=1)
        driver.run(0, tokens, chunk=90)
        logits.append(driver.all_logits(0))
    assert (logits[0] - logits[1]).abs().max() < 1e-3 * logits[0].abs().max()
