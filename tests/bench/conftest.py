"""Fake peers, and a model's directory with nothing to load in it."""

import json
import sys
from pathlib import Path

import pytest

from bench.peers.wire import Setup
from tests.bench import fakes


@pytest.fixture
def peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fakes.Peers:
    directory = tmp_path / "programs"
    directory.mkdir()
    return fakes.installed(directory, monkeypatch, sys.executable)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(fakes.TINY))
    (directory / "model.safetensors").write_bytes(b"")
    return directory


@pytest.fixture
def setup(model: Path) -> Setup:
    return Setup(str(model), "float32", vocabulary=100, kv_tokens=1024, max_streams=8, threads=1)
