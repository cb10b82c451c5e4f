"""Where the GPU tests run: on a card, or, kernels only, on the CPU in Triton's interpreter
(TRITON_INTERPRET=1).
"""

import os
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def product(a: NDArray[Any], b: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """[m, k] by [k, n] in one order of summation, whatever m is: BLAS has another on each CPU, and for other m."""
    total = np.zeros((a.shape[0], b.shape[1]), dtype)
    for column, row in zip(a.T.astype(dtype), b.astype(dtype), strict=True):
        total += column[:, None] * row
    return total


@pytest.fixture(scope="session", autouse=INTERPRETED)
def _matrix_units_keep_one_order() -> None:
    """Triton's interpreter multiplies matrices by BLAS; a card's units do not depend on the other rows."""
    from triton.runtime import interpreter

    def create_dot(_builder: Any, a: Any, b: Any, d: Any, _precision: Any, _imprecise: Any) -> Any:
        found = product(a.data, b.data, d.data.dtype) + d.data
        return interpreter.TensorHandle(found, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


@pytest.fixture(scope="session")
def device() -> torch.device:
    """For tests of kernels: the card, or the CPU when Triton's interpreter runs them."""
    pytest.importorskip("triton", reason="needs Triton: it comes with torch's CUDA wheels")
    return torch.device("cpu") if INTERPRETED else _card()


@pytest.fixture(scope="session")
def card() -> torch.device:
    """For tests of streams, graphs and speed: a card alone will do."""
    if INTERPRETED:
        pytest.skip("needs a card: an interpreter has no streams")
    return _card()


def _card() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")
