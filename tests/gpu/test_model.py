"""A whole model over the CUDA kernels and the overlapped runner, against the plain runner and reference
kernels.

On a card, or on the CPU in Triton's interpreter, like test_kernels.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.kernels.protocol import Kernels
from engine.kernels.reference import ReferenceKernels
from engine.model.decoder import Decoder
from engine.model.loading import load_model
from engine.model.random_weights import llama_config, write_random_llama
from engine.plan import Placement, Row, Sampling
from engine.runner import ModelRunner
from engine.sampler import Sampler
from tests.engine.test_runner_cuda import BLOCK, BLOCKS, SLOTS, InlineDevice, results
from tests.gpu.conftest import INTERPRETED

pytest.importorskip("triton", reason="needs Triton: it comes with torch's CUDA wheels")

from engine.kernels.cuda import CudaKernels
from engine.runner_cuda import CudaRunner

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
VOCABULARY = 300


QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32, "use_sliding_window": True}


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama with biases; Qwen3, whose heads are normed, with a window in one of two layers."""
    more: dict[str, Any] = QWEN3 | {"sliding_window": 6, "max_window_layers": 1}
    if request.param == "llama":
        more = {}
    config = llama_config(vocab_size=VOCABULARY, max_position_embeddings=64, attention_bias=True, **more)
    return write_random_llama(tmp_path_factory.mktemp("model"), config)


def load(directory: Path, device: torch.device, kernels: Kernels) -> Decoder:
    return load_model(directory, device=device, dtype="float32", kernels=lambda *_: kernels).model


def overlapped(directory: Path, device: torch.device) -> CudaRunner:
    return CudaRunner(
        load(directory, device, CudaKernels(torch.float32, device, exact=True)),
        Sampler(SLOTS, VOCABULARY, device),
        kv_blocks=BLOCKS,
        block_size=BLOCK,
        max_sequences=SLOTS,
        device=InlineDevice() if INTERPRETED else None,
    )


def test_plans_give_what_the_reference_gives(directory: Path, device: torch.device) -> None:
    """Prefill, mixed steps and padded decode graphs: same tokens, log-probabilities but for rounding."""
    plain = ModelRunner(
        load(directory, CPU, ReferenceKernels(torch.float32, CPU)),
        Sampler(SLOTS, VOCABULARY, CPU),
        kv_blocks=BLOCKS,
        block_size=BLOCK,
        max_sequences=SLOTS,
    )
    ours, theirs = results(overlapped(directory, device)), results(plain)
    assert [step.tokens for step in ours] == [step.tokens for step in theirs]
    drawn = [
        pair
        for a, b in zip(ours, theirs, strict=True)
        for pair in zip(a.logprobs, b.logprobs, strict=True)
        if all(pair)
    ]
    assert drawn
    assert all(a and b and a.logprob == pytest.approx(b.logprob, abs=1e-4) for a, b in drawn)


def test_logits_do_not_depend_on_chunks(directory: Path, device: torch.device) -> None:
    """A position's logits and KV: in one piece, and in chunks beside another row."""
    tokens = tuple(range(20, 31))
    found, slabs = [], []
    for chunks in ((11,), (4, 1, 6)):
        runner, position, logits = overlapped(directory, device), 0, []
        for slot in (1, 3):
            runner.tables.place(Placement(slot, Sampling()))
        for chunk in chunks:
            part = tokens[position : position + chunk]
            mine = Row(1, position, part, 0, () if position else (5, 2, 9), samples=True)
            beside = [Row(3, 0, (7, 8), 0, (1,), samples=True)] * (len(chunks) > 1)
            logits.append(runner.logits([mine, *beside])[:chunk])
            position += chunk
        found.append(torch.cat(logits))
        slabs.append(runner.slabs(1))
    assert torch.equal(*found)
    assert torch.equal(*slabs)
