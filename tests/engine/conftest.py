"""Random models on disk, written once a session and shared by whoever asks for their shape."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.engine.models import SHIPPED, write_shape


@pytest.fixture(autouse=True)
def one_thread_for_the_reference(request: pytest.FixtureRequest) -> Iterator[None]:
    """Reference kernels compute row by row: too little for two threads, which wait for each other."""
    threads = torch.get_num_threads()
    if "reference" in request.node.name:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a shape, or "shipped" -> a model directory (fp32 weights, the shipped one's bf16)."""

    @cache
    def directory(name: str) -> Path:
        return SHIPPED if name == "shipped" else write_shape(name, tmp_path_factory.mktemp(name))

    return directory
