"""Machines without AVX512-BF16 and AMX, as most laptops are: the same kernels compile there, and round the same.

Their products of bfloat16 are chains of float32, other bits than where pairs are multiplied; right and exact too.
"""

import os
import subprocess
import sys

from llvmlite.binding import get_host_cpu_features

SCRIPT = """
import hashlib, torch
from engine.kernels.cpu import CpuKernels
kernels = CpuKernels(torch.bfloat16, amx=False)
torch.manual_seed(0)
gate_up = torch.randn(40, 512)
gate_up[0, :4] = torch.tensor([float("nan"), float("inf"), 3.3e38, -0.0])
found = kernels.silu_mul(gate_up.to(torch.bfloat16))
print("avx512bf16" in kernels.identity.replace("-avx512bf16", ""))
print(found.isnan().sum().item(), hashlib.sha256(found.nan_to_num().view(torch.int16).numpy().tobytes()).hexdigest())
"""

# A linear layer of bfloat16: the greatest error, and whether rows keep their bits alone.
PRODUCTS = """
import torch
from engine.kernels.cpu import CpuKernels
torch.manual_seed(0)
weight, x = torch.randn(100, 256).bfloat16() / 16, torch.randn(40, 256).bfloat16()
linear = CpuKernels(torch.bfloat16, amx=False).linear(weight, None)
whole = linear(x)
print((whole.float() - x.float() @ weight.float().T).abs().max().item())
print(all(torch.equal(linear(x[at : at + rows]), whole[at : at + rows]) for at, rows in ((0, 1), (3, 7), (8, 32))))
"""


def printed(script: str, **env: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | env, capture_output=True, text=True, check=True
    )
    return done.stdout.split("\n")[:2]


def lacking(*instructions: str) -> dict[str, str]:
    """The environment of a process that compiles for a machine without these."""
    features = ",".join(
        f"{'+' if there and not name.startswith(instructions) else '-'}{name}"
        for name, there in get_host_cpu_features().items()
    )
    return {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features}


def test_a_machine_without_the_instructions_computes_the_same() -> None:
    here = printed(SCRIPT)
    there = printed(SCRIPT, **lacking("avx512", "amx", "avx10"))
    assert there[0] == "False"
    assert there[1] == here[1]


def test_without_products_of_bfloat16_a_linear_layer_is_right_and_exact() -> None:
    error, exact = printed(PRODUCTS, **lacking("avx512bf16", "amx", "avx10"))
    assert float(error) < 0.04
    assert exact == "True"
