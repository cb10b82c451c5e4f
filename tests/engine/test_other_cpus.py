"""Machines without AVX512-BF16 and AMX, as most laptops are: the same kernels compile there, and round the same."""

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


def rounded(**env: str) -> list[str]:
    """Whether the kernels use the instruction, and a hash of what they compute."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=os.environ | env, capture_output=True, text=True, check=True
    )
    return done.stdout.split("\n")[:2]


def test_a_machine_without_the_instructions_computes_the_same() -> None:
    lacking = ("avx512", "amx", "avx10")
    features = ",".join(
        f"{'+' if there and not name.startswith(lacking) else '-'}{name}"
        for name, there in get_host_cpu_features().items()
    )
    here = rounded()
    there = rounded(NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES=features)
    assert there[0] == "False"
    assert there[1] == here[1]
