"""What each family brings, under pressure: preempted and brought back, the tokens and the KV of the calm run.

As test_pressure.py, which has every way back with Llama; here one way, below the device, for what other families add.
"""

from pathlib import Path

import pytest

from engine.model.loading import Loaded
from kvstore.copies import DEVICE, HOST
from tests.engine.models import load
from tests.engine.test_pressure import Below, Directories, conversations, same_as_calm

CASES = [
    ("qwen2_window", "float32"),
    ("qwen3_biased", "bfloat16"),
    ("mistral_window", "bfloat16"),
    ("phi3_long", "float32"),
]


@pytest.fixture(params=CASES, ids="-".join)
def loaded(request: pytest.FixtureRequest, model_directory: Directories) -> Loaded:
    model, dtype = request.param
    return load(model_directory(model), "cpu", dtype)


async def test_victims_come_back_from_the_host(loaded: Loaded, tmp_path: Path) -> None:
    pressed = await same_as_calm(loaded, tmp_path, Below(host=1024), resume="reload")
    assert pressed.resumptions["reload", HOST] > 0


@pytest.fixture
def windowed(model_directory: Directories) -> Loaded:
    return load(model_directory("mistral_window"), "cpu", "float32")


async def test_turns_come_back_though_all_was_evicted_between(windowed: Loaded, tmp_path: Path) -> None:
    """A cached prefix longer than the window, beside a cold run of the same."""
    calm = await conversations(windowed, tmp_path / "calm", Below())
    evicted = await conversations(windowed, tmp_path / "evicted", Below(host=512))
    assert evicted.tokens == calm.tokens
    assert evicted.hit_tokens[HOST] > 0
    assert evicted.hit_tokens[DEVICE] == calm.hit_tokens.total() == 0
