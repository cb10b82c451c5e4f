"""The CPU's kernels give a row the same bits in any company, and agree with plain torch.

Whole models on them are in test_bits.py and test_model_parity.py.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.kernels.cpu import CpuKernels, UnsupportedOnCpu
from engine.kernels.cpu_tiles import amx_available
from engine.kernels.protocol import AttentionShape, Batch, KVShape
from engine.kernels.reference import ReferenceKernels

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.04}
PATHS = [
    pytest.param(torch.float32, False, id="float32-vectors"),
    pytest.param(torch.bfloat16, False, id="bfloat16-vectors"),
    pytest.param(
        torch.bfloat16,
        True,
        id="bfloat16-tiles",
        marks=pytest.mark.skipif(not amx_available(), reason="needs a CPU with amx-bf16"),
    ),
]
ROOT = Path(__file__).parents[2]

# float32 and bfloat16 on vectors, in a process of its own: prints whether the kernel came from the cache.
LINEAR_ALONE = """
import torch
from engine.kernels import cpu_linear
from engine.kernels.cpu import CpuKernels
for dtype in (torch.float32, torch.bfloat16):
    weight, x = torch.randn(64, 256).to(dtype) / 16, torch.randn(8, 256).to(dtype)
    out = CpuKernels(dtype, amx=False).linear(weight, None)(x)
    assert (out.float() - x.float() @ weight.float().T).abs().max() < 0.04, dtype
print(cpu_linear.linear_lanes.from_cache)
"""


def near(dtype: torch.dtype, found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found.float(), wanted.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "amx"), PATHS)
@pytest.mark.parametrize(("outputs", "inputs"), [(100, 96), (512, 256), (64, 2048)])
def test_a_linear_row_has_the_same_bits_among_any_rows(
    dtype: torch.dtype, amx: bool, outputs: int, inputs: int
) -> None:
    """Row counts around every tile's edge; the result is torch's within rounding, bias included."""
    generator = torch.Generator().manual_seed(outputs)
    weight = (torch.randn(outputs, inputs, generator=generator) * inputs**-0.5).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    x = torch.randn(300, inputs, generator=generator).to(dtype)
    linear = CpuKernels(dtype, amx=amx).linear(weight, bias)
    whole = linear(x)
    assert near(dtype, whole, x.float() @ weight.float().T + bias.float())
    for rows in (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 64, 257):
        assert torch.equal(linear(x[:rows]), whole[:rows]), rows
        assert torch.equal(linear(x[-rows:]), whole[-rows:]), rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rowwise_kernels_agree_with_torch_and_do_not_see_their_neighbours(dtype: torch.dtype) -> None:
    """Widths that are not whole vectors, row counts on one thread and on all."""
    kernels, reference = CpuKernels(dtype), ReferenceKernels(dtype, torch.device("cpu"))
    for rows, width in ((1, 256), (5, 250), (70, 768)):
        table, weight = torch.randn(50, width).to(dtype), torch.randn(width).to(dtype)
        tokens = torch.randint(0, 50, (rows,))
        stream, wanted = kernels.embed(table, tokens), reference.embed(table, tokens)
        assert torch.equal(stream, wanted)
        delta, one = torch.randn(rows, width).to(dtype), stream[-1:].clone()
        normed = kernels.add_norm(stream, delta, weight, 1e-5)
        assert near(dtype, normed, reference.add_norm(wanted, delta, weight, 1e-5))
        assert torch.equal(kernels.add_norm(one, delta[-1:], weight, 1e-5), normed[-1:])
        gate_up = torch.randn(rows, 2 * width).to(dtype) * 3
        gated = kernels.silu_mul(gate_up)
        assert near(dtype, gated, reference.silu_mul(gate_up))
        assert torch.equal(kernels.silu_mul(gate_up[-1:]), gated[-1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "head_dim"), [(1, 64), (5, 50), (90, 128)])
def test_heads_are_normed_alone_and_values_left_alone(dtype: torch.dtype, rows: int, head_dim: int) -> None:
    """q's and k's heads by weights of their own, as plain torch has it; a row's bits are its own."""
    shape = AttentionShape(6, 2, head_dim, 1.0)
    qkv, weights = torch.randn(rows, 10 * head_dim).to(dtype) * 3, torch.randn(2, head_dim).to(dtype)
    kernels, reference = CpuKernels(dtype), ReferenceKernels(dtype, torch.device("cpu"))
    found, wanted, last = qkv.clone(), qkv.clone(), qkv[-1:].clone()
    kernels.head_norm(found, weights, shape, 1e-6)
    reference.head_norm(wanted, weights, shape, 1e-6)
    kernels.head_norm(last, weights, shape, 1e-6)
    assert near(dtype, found, wanted)
    assert torch.equal(found[:, 8 * head_dim :], qkv[:, 8 * head_dim :])
    assert not near(dtype, found[:, : 8 * head_dim], qkv[:, : 8 * head_dim])
    assert torch.equal(last, found[-1:])


def rope_table(positions: int, head_dim: int) -> Tensor:
    frequency = 1 / 10000 ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.arange(positions).float()[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin()), 1).contiguous()


def batch_of(rows: Sequence[tuple[int, int, int]], tables: Tensor) -> Batch:
    """rows: (slot, first position, tokens)."""
    positions = torch.cat([torch.arange(start, start + count) for _, start, count in rows]).int()
    starts = torch.tensor([0, *(count for _, _, count in rows)]).cumsum(0).int()
    slots = torch.tensor([slot for slot, _, _ in rows], dtype=torch.int32)
    longest = max(count for _, _, count in rows)
    tokens = torch.zeros(len(positions), dtype=torch.int64)
    return Batch(tokens, positions, starts, slots, tables, longest, int(positions.max()) + 1, {})


@pytest.mark.parametrize(("dtype", "amx"), PATHS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block", "window"),
    [
        (4, 2, 64, 16, 0),
        (12, 4, 64, 32, 0),
        (4, 4, 32, 16, 0),
        (8, 1, 128, 32, 0),
        (6, 2, 80, 16, 0),
        (4, 2, 64, 16, 1),
        (4, 2, 64, 16, 33),
        (8, 1, 128, 32, 48),
        (6, 2, 80, 16, 130),
    ],
)
def test_attention_has_the_same_bits_in_any_chunks(
    dtype: torch.dtype, amx: bool, heads: int, kv_heads: int, head_dim: int, block: int, window: int
) -> None:
    """Two rows at once in one piece; then in pieces of 1 to 40 in the other order: outputs and pool are equal.

    With a window too, that ends in one unit of keys or spans two, and leaves whole units out.
    """
    length, torch_seed = 200, 7
    torch.manual_seed(torch_seed)
    kernels = CpuKernels(dtype, amx=amx)
    shape, kv = (
        AttentionShape(heads, kv_heads, head_dim, head_dim**-0.5, window),
        KVShape(2, kv_heads, block, head_dim),
    )
    rope = rope_table(256, head_dim)
    qkv = torch.randn(2 * length, (heads + 2 * kv_heads) * head_dim).to(dtype)
    tables = torch.randperm(60)[: 2 * (256 // block)].view(2, -1).int().contiguous()
    pool, chunked = kernels.new_pool(64, kv), kernels.new_pool(64, kv)
    chunked.fill_(3.0)  # what former owners left must not matter
    reference = ReferenceKernels(dtype, torch.device("cpu"))
    both = [(0, 0, length), (1, 0, length)]
    whole = kernels.attend(pool, 1, qkv, rope, shape, batch_of(both, tables))
    other = reference.attend(reference.new_pool(64, kv), 1, qkv, rope, shape, batch_of(both, tables))
    assert near(dtype, whole, other)
    start, pieces = 0, [1, 1, 2, 3, 16, 1, 40, 5, 33, 7, 1, 64, 26]
    assert sum(pieces) == length
    for count in pieces:
        end = start + count
        x = torch.cat([qkv[length + start : length + end], qkv[start:end]])
        rows = [(1, start, count), (0, start, count)]
        out = kernels.attend(chunked, 1, x, rope, shape, batch_of(rows, tables))
        assert torch.equal(out[:count], whole[length + start : length + end])
        assert torch.equal(out[count:], whole[start:end])
        start = end


def test_one_thread_and_many_give_the_same_bits() -> None:
    """Who claims which piece of work does not matter."""
    kernels, before = CpuKernels(torch.float32), torch.get_num_threads()
    linear, x = kernels.linear(torch.randn(512, 256), None), torch.randn(100, 256)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(linear(x))
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_a_kernel_loaded_from_the_cache_computes_what_a_fresh_one_does(tmp_path: Path) -> None:
    """Regression: the cached copy of a kernel had lost a store (see cpu_lanes.pointer); the fresh one had not."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LINEAR_ALONE]
    runs = [
        subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        for _ in range(2)
    ]
    assert [run.returncode for run in runs] == [0, 0], runs[-1].stderr
    assert [run.stdout.strip() for run in runs] == ["False", "True"]  # the second one did come from the cache


def test_what_cannot_run_is_refused_with_a_hint() -> None:
    """float16, a block that is no multiple of 16, and a head that is none."""
    with pytest.raises(UnsupportedOnCpu, match=r"model\.dtype"):
        CpuKernels(torch.float16)
    kernels = CpuKernels(torch.float32)
    with pytest.raises(UnsupportedOnCpu, match=r"engine\.block_size = 24"):
        kernels.new_pool(4, KVShape(1, 1, 24, 64))
    with pytest.raises(UnsupportedOnCpu, match="head size of 40"):
        kernels.new_pool(4, KVShape(1, 1, 16, 40))
