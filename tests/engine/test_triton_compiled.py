"""The CUDA kernels compiled for Hopper (sm_90), which needs no card: what the compiler made of them.

Registers, spills and layouts are read off ptxas and Triton's own intermediate form. Not here: whether they
run (tests/gpu), whether their logic is right (test_triton_interpreted.py).
"""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is for Linux alone: its wheels are there")

from engine.kernels import triton_attention, triton_matmul  # noqa: E402 (they import Triton)

HEAD_DIM = 128
TYPES = {"scale_log2": "fp32", "partials": "*fp32", "extremes": "*fp32"}
TYPES |= dict.fromkeys(("positions", "row_starts", "slots", "tables"), "*i32")
TYPES |= dict.fromkeys(("queries", "pool", "out", "x", "weight", "bias"), "*bf16")
SMALL = ("positions", "row_starts", "slots", "tables", "rows", "splits", "scale_log2")  # alignment unknown


def compiled(kernel: Any, constants: dict[str, Any]) -> Any:
    """The kernel for sm_90, pointers and strides multiples of 16, as in a real model."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {key: constants[key] for key in ("num_warps", "num_stages", "enable_fp_fusion")}
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in names}
    fixed = {(at,): constants[name] for at, name in enumerate(names) if name in constants}
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, name in enumerate(names)
        if name not in constants and name not in SMALL
    }
    source = ASTSource(kernel, signature, fixed, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def stack_bytes(kernel: Any, folder: Path) -> int:
    """What spilled out of registers."""
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    ran = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
    found = re.search(r"STACK:(\d+)", ran.stdout + ran.stderr)
    assert found
    return int(found[1])


def attention(kernel: Any) -> Any:
    tile = triton_attention.tile_for(torch.bfloat16, HEAD_DIM)
    sizes = {"HEADS": 32, "KV_HEADS": 8, "DIM": HEAD_DIM, "DIM_PAD": HEAD_DIM, "BLOCK": 16, "ROWS": 32}
    tiles = {"SPLIT": triton_attention.SPLIT, "QUERIES": tile.queries, "KEYS": tile.keys, "PRECISION": "ieee"}
    tiles |= {"WINDOW": triton_attention.NO_WINDOW}
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}
    return compiled(kernel, sizes | tiles | options)


def reductions(kernel: Any) -> list[str]:
    """The types, layouts spelled out, of the products of matrices and of the sums over keys, in order."""
    text = re.sub(r"(\w+)_\d+", r"\1", kernel.asm["ttgir"])
    layouts = dict(re.findall(r"^(#mma\d*) = (.*)$", text, flags=re.MULTILINE))
    dots = re.findall(r"warp_group_dot .*-> (tensor<.*?>) loc", text)
    sums = re.findall(r"}\) : \((tensor<\d+x\d+xf32, .*?>)\) ->", text)
    assert len(dots) == 2
    assert len(sums) == 2
    return [re.sub(r"#mma\d*", lambda name: layouts[name[0]], kind) for kind in (*dots, *sums)]


def test_attention_for_prefill_and_decode_reduces_alike(tmp_path: Path) -> None:
    """Both kernels use wgmma, in one layout, and sum over keys in one layout: one order. Neither spills."""
    prefill, decode = attention(triton_attention._attend_tiles), attention(triton_attention._attend_splits)
    assert reductions(prefill) == reductions(decode)
    assert stack_bytes(prefill, tmp_path) == stack_bytes(decode, tmp_path) == 0


@pytest.mark.parametrize("tile", triton_matmul.TILES, ids=str)
def test_matmul_tiles_use_wgmma_in_steps_of_16(tile: triton_matmul.Tile, tmp_path: Path) -> None:
    """One instruction family, 64 rows × some columns × 16 of K: K is summed in one order."""
    sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "BAND": triton_matmul.BAND}
    flags = {"HAS_BIAS": False, "EVEN_DEPTH": True, "EVEN_COLUMNS": True}
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}
    kernel = compiled(triton_matmul._matmul, sizes | flags | options)
    assert set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+(k\d+)", kernel.asm["ptx"])) == {"k16"}
    assert stack_bytes(kernel, tmp_path) == 0
