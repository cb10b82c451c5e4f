"""The CUDA kernels against plain torch, and against themselves in other batches, to the bit.

On a card, or on the CPU in Triton's interpreter (tests/engine/test_triton_interpreted.py runs them so, in
small).
"""

import pytest
import torch

from engine.kernels.protocol import AttentionShape
from engine.kernels.reference import ReferenceKernels
from tests.gpu.attention_cases import LAYER, Span, World
from tests.gpu.conftest import INTERPRETED

pytest.importorskip("triton", reason="needs Triton: it comes with torch's CUDA wheels")

from engine.kernels import triton_attention, triton_matmul
from engine.kernels.cuda import CudaKernels, UnsupportedDtype

pytestmark = pytest.mark.gpu

# Triton's interpreter multiplies the bits of bfloat16 as integers in tl.dot; float16 takes the same tiles
HALVES = (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SHAPES = {
    "grouped": AttentionShape(8, 2, 64, 0.125),
    "multi-head, odd sizes": AttentionShape(3, 3, 40, 0.2),
    "multi-query": AttentionShape(5, 1, 16, 0.25),
    "window in a split": AttentionShape(4, 2, 32, 0.2, window=9),
    "window over splits": AttentionShape(4, 1, 16, 0.25, window=200),
}
if not INTERPRETED:
    SHAPES |= {"8B's": AttentionShape(32, 8, 128, 0.088), "wide": AttentionShape(8, 4, 256, 0.0625)}
SPLIT = triton_attention.SPLIT
CONTEXT = SPLIT + 24  # two splits

CASES = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
if INTERPRETED:
    CASES = [
        ("grouped", torch.float16),
        ("multi-head, odd sizes", torch.float32),
        ("multi-query", torch.float16),
        ("window in a split", torch.float32),
        ("window over splits", torch.float16),
    ]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
cases = pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)


def kernels_for(dtype: torch.dtype, device: torch.device) -> CudaKernels:
    return CudaKernels(dtype, device, exact=True)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Relative error by norm: ‖a - b‖ / ‖b‖."""
    error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
    return bool(error < TOLERANCE[ours.dtype])


@cases
def test_attention_equals_the_reference(shape: str, dtype: torch.dtype, device: torch.device) -> None:
    """Rows of one and of many tokens, in both splits and across their border, over scattered blocks."""
    world = World(SHAPES[shape], dtype, device, slots=4, context=CONTEXT)
    spans = (Span(0, SPLIT - 3, SPLIT + 4), Span(1, 0, 5), Span(2, CONTEXT - 1, CONTEXT), Span(3, 7, 8))
    ours, theirs = world.pool.clone(), world.pool.clone()
    mixed = world.step(kernels_for(dtype, device), ours, spans)
    expected = world.step(ReferenceKernels(dtype, device), theirs, spans)
    assert close(torch.cat(mixed), torch.cat(expected))
    assert close(ours, theirs)
    assert torch.equal(ours[:, 1 - LAYER], world.pool[:, 1 - LAYER])


@cases
def test_bits_do_not_depend_on_chunks_or_neighbours(
    shape: str, dtype: torch.dtype, device: torch.device
) -> None:
    """A span as one chunk, as two, and single tokens beside other rows: same outputs, same KV."""
    world, kernels = World(SHAPES[shape], dtype, device, slots=3, context=CONTEXT), kernels_for(dtype, device)
    first, last = SPLIT - 4, SPLIT + 5
    whole, chunked = world.pool.clone(), world.pool.clone()
    [expected] = world.step(kernels, whole, [Span(0, first, last)])
    single = whole.clone()
    halves = [
        world.step(kernels, chunked, [Span(1, 2, 4), Span(0, start, end)])[1]
        for start, end in ((first, first + 3), (first + 3, last))
    ]
    assert torch.equal(torch.cat(halves), expected)
    for position in (SPLIT - 1, SPLIT, last - 1):
        decoded = world.step(kernels, single, [Span(2, 9, 10), Span(0, position, position + 1)])[1]
        assert torch.equal(decoded[0], expected[position - first])
    blocks = world.tables[0].long()
    assert torch.equal(chunked[blocks], whole[blocks])
    assert torch.equal(single[blocks], whole[blocks])


@dtypes
def test_empty_rows_change_nothing(dtype: torch.dtype, device: torch.device) -> None:
    """What pads a decode graph leaves the other rows' bits and the whole pool alone; its tokens get zeros."""
    world, kernels = (
        World(SHAPES["grouped"], dtype, device, slots=2, context=CONTEXT),
        kernels_for(dtype, device),
    )
    spans = [Span(0, SPLIT, SPLIT + 1), Span(1, 3, 4)]
    plain, padded = world.pool.clone(), world.pool.clone()
    expected = world.step(kernels, plain, spans)
    found = world.step(kernels, padded, spans, padding=6)
    assert torch.equal(torch.cat(found[:2]), torch.cat(expected))
    assert torch.equal(found[2], torch.zeros_like(found[2]))
    assert len(found[2]) == 6
    assert torch.equal(padded, plain)


@pytest.mark.parametrize("dtype", DTYPES[-1:] if INTERPRETED else DTYPES, ids=str)
def test_a_long_decode_batch_spreads_splits_less(dtype: torch.dtype, device: torch.device) -> None:
    """One program that reduces several splits in turn leaves the bits of a program a split."""
    shape = AttentionShape(8, 8, 16, 0.25)
    world, kernels = World(shape, dtype, device, slots=1, context=CONTEXT), kernels_for(dtype, device)
    alone, crowd = world.pool.clone(), world.pool.clone()
    span = Span(0, CONTEXT - 1, CONTEXT)
    rows = triton_attention.WANTED_PROGRAMS // shape.kv_heads
    [expected] = world.step(kernels, alone, [span])
    assert torch.equal(world.step(kernels, crowd, [span], padding=rows - 1)[0], expected)


@dtypes
def test_norm_adds_in_place(dtype: torch.dtype, device: torch.device) -> None:
    kernels = kernels_for(dtype, device)
    residual, delta = torch.randn(5, 200, device=device), torch.randn(5, 200, device=device).to(dtype)
    weight = torch.randn(200, device=device).to(dtype)
    total = residual + delta
    expected = torch.nn.functional.rms_norm(total, (200,), weight.float(), 1e-5).to(dtype)
    found = kernels.add_norm(residual, delta, weight, 1e-5)
    assert found.dtype == dtype
    assert close(found, expected)
    assert torch.equal(residual, total)
    assert torch.equal(kernels.add_norm(total.clone(), None, weight, 1e-5), found)
    assert torch.equal(kernels.add_norm(total[3:4].clone(), None, weight, 1e-5), found[3:4])


@dtypes
def test_heads_are_normed_alone(dtype: torch.dtype, device: torch.device) -> None:
    """q's and k's heads in place, by weights of their own; values are left alone, a row's bits are its own."""
    shape, kernels = AttentionShape(4, 2, 40, 1.0), kernels_for(dtype, device)
    qkv = torch.randn(5, 8 * 40, device=device).to(dtype)
    weights = torch.randn(2, 40, device=device).to(dtype)
    found, wanted, alone = qkv.clone(), qkv.clone(), qkv[3:4].clone()
    kernels.head_norm(found, weights, shape, 1e-6)
    ReferenceKernels(dtype, device).head_norm(wanted, weights, shape, 1e-6)
    kernels.head_norm(alone, weights, shape, 1e-6)
    assert close(found, wanted)
    assert torch.equal(found[:, 240:], qkv[:, 240:])
    assert torch.equal(alone, found[3:4])


@pytest.mark.parametrize("dtype", (*DTYPES, torch.bfloat16) if INTERPRETED else DTYPES, ids=str)
def test_silu_mul(dtype: torch.dtype, device: torch.device) -> None:
    gate_up = torch.randn(3, 2 * 1100, device=device).to(dtype)
    gate, up = gate_up.float().chunk(2, dim=1)
    assert close(
        kernels_for(dtype, device).silu_mul(gate_up), (torch.nn.functional.silu(gate) * up).to(dtype)
    )


@dtypes
@pytest.mark.parametrize(("columns", "depth"), [(96, 128), (33, 200)])
def test_linear_is_right_and_row_invariant(
    columns: int, depth: int, dtype: torch.dtype, device: torch.device
) -> None:
    """With a bias or without: a row alone has the bits that it has among 130."""
    kernels = kernels_for(dtype, device)
    weight, bias = torch.randn(columns, depth, device=device).to(dtype), torch.randn(columns, device=device)
    x = torch.randn(130, depth, device=device).to(dtype)
    exact = x.double() @ weight.double().T
    linear = kernels.linear(weight, bias.to(dtype))
    assert close(kernels.linear(weight, None)(x), exact.to(dtype))
    assert close(linear(x), (exact + bias.to(dtype).double()).to(dtype))
    assert torch.equal(linear(x[7:8]), linear(x)[7:8])
    assert torch.equal(linear(x[64:]), linear(x)[64:])


@pytest.mark.skipif(INTERPRETED, reason="seconds on a card, minutes in the interpreter")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_matmul_tile_gives_the_same_bits_on_a_card(dtype: torch.dtype, device: torch.device) -> None:
    """The claim of triton_matmul.TILES at an 8B model's shapes.

    If it fails, exact linears are right but slow.
    """
    for columns, depth in ((6144, 4096), (4096, 14336), (28672, 4096), (1000, 4100)):
        weight = torch.randn(columns, depth, device=device).to(dtype)
        assert triton_matmul.agree(weight, triton_matmul.TILES), (columns, depth)


def test_tiles_that_disagree_leave_one(device: torch.device) -> None:
    """A card where tiles differ in bits gets one tile for every number of rows."""
    weight = torch.randn(8, 64, device=device).half()
    tiles = triton_matmul.choose_tiles(weight, lambda weight, tiles: False)
    assert len(tiles) == 1
    assert {triton_matmul.pick(tiles, rows, 8) for rows in (1, 64, 10_000)} == set(tiles)


def test_one_tile_for_all_is_said(device: torch.device) -> None:
    """What costs speed is not silent; cards whose tiles agree have nothing to say."""
    quiet, loud = kernels_for(torch.float16, device), kernels_for(torch.float16, device)
    quiet._tiles[8, 64] = triton_matmul.TILES
    loud._tiles[8, 64] = triton_matmul.TILES[:1]
    assert quiet.facts == ()
    assert [("8 x 64" in fact) for fact in loud.facts] == [True]


def test_wide_tiles_serve_many_rows() -> None:
    """Decode gets narrow tiles, hence many programs; prefill the widest."""
    tiles = triton_matmul.TILES
    assert triton_matmul.pick(tiles, 1, 4096) == tiles[-1]
    assert triton_matmul.pick(tiles, 8192, 4096) == tiles[0]


def test_a_dtype_without_kernels_is_refused(device: torch.device) -> None:
    with pytest.raises(UnsupportedDtype, match="use bfloat16"):
        kernels_for(torch.float64, device)
