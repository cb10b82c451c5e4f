"""The CUDA kernels' logic, proven without a card: some of tests/gpu in Triton's interpreter, on the CPU.

Whether Triton interprets is settled when kernels are imported, so that a process of its own runs them. Not
here: what only a card can show (speed, streams, graphs, bits of its matrix units): `make gpu`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip(
    "triton",
    minversion="3.9",
    reason="needs Triton 3.9 (Linux alone): the interpreter of 3.6 does not run beside numpy 2.4",
)

ROOT = Path(__file__).parents[2]
FILES = ("tests/gpu/test_kernels.py", "tests/gpu/test_model.py")
CASES = 20  # at least: that so many ran is part of the proof


def test_the_kernels_hold_in_the_interpreter() -> None:
    """Each kernel, and a model of them, equal plain torch, and themselves in other batches, to the bit."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *FILES]
    ran = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed
    assert int(passed[1]) >= CASES, ran.stdout
