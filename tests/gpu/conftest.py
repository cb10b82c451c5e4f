"""Where the GPU tests run: on a card, or, kernels only, on the CPU in Triton's interpreter
(TRITON_INTERPRET=1).
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


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
