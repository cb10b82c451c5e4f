"""The model's hash follows its bytes, is computed once, and nothing that decides KV's bytes is left out."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.kernels.protocol import KVShape
from engine.kernels.select import reference_kernels
from engine.model import fingerprint
from engine.model.config import ModelConfig
from engine.model.family import Traits
from engine.model.fingerprint import ModelChanged, kv_fingerprint, signature, weights_hash
from engine.model.rope import Rope

LONG_AGO = 10**18
CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model-1.safetensors").write_bytes(b"one" * 1000)
    (directory / "model-2.safetensors").write_bytes(b"two" * 1000)
    named = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    return directory


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files written just now may be cached."""
    monkeypatch.setattr(fingerprint, "SETTLED_NS", -LONG_AGO)


def test_it_is_computed_once_and_kept_for_our_eyes_only(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache" / "fingerprints.json"
    first = weights_hash(model, cache)
    monkeypatch.setattr(fingerprint, "_hash", lambda files: pytest.fail("computed again"))
    assert weights_hash(model, cache) == first
    assert cache.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in cache.parent.iterdir()] == [cache.name], "nothing half written is left"


@pytest.mark.parametrize("name", ["config.json", "model-2.safetensors"])
def test_one_byte_changes_it_even_with_the_same_size_and_an_older_time(
    name: str, model: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "fingerprints.json"
    before, file = weights_hash(model, cache), model / name
    times = file.stat().st_mtime_ns
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times, times))
    assert weights_hash(model, cache) != before


def test_another_file_or_another_name_changes_it(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "fingerprints.json"
    found = {weights_hash(model, cache)}
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors"}}))
    found.add(weights_hash(model, cache))
    (model / "model-2.safetensors").rename(model / "model-3.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "model-3.safetensors", "b": "model-1.safetensors"}}))
    found.add(weights_hash(model, cache))
    (model / "README.md").write_text("this does not")
    (model / "unused.safetensors").symlink_to(tmp_path / "nowhere")
    assert len({*found, weights_hash(model, cache)}) == 3


def test_a_model_that_changed_while_it_was_loaded_is_refused(model: Path, tmp_path: Path) -> None:
    loaded = signature(model)
    (model / "model-1.safetensors").write_bytes(b"new" * 1000)
    with pytest.raises(ModelChanged, match="start again"):
        weights_hash(model, tmp_path / "fingerprints.json", loaded=loaded)


def test_a_copy_elsewhere_has_the_same(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    cache = tmp_path / "fingerprints.json"
    assert weights_hash(other, cache) == weights_hash(model, cache)
    assert len(json.loads(cache.read_text())) == 2


def test_what_changed_a_moment_ago_is_not_cached(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "SETTLED_NS", LONG_AGO)
    cache = tmp_path / "fingerprints.json"
    weights_hash(model, cache)
    assert not cache.exists()


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"x": 1}'])
def test_a_cache_that_is_no_cache_is_only_slower(content: bytes, model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "fingerprints.json"
    truth = weights_hash(model, tmp_path / "another.json")
    cache.write_bytes(content)
    assert weights_hash(model, cache) == truth


def test_a_cache_that_cannot_be_written_is_only_slower(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    assert weights_hash(model, tmp_path / "file" / "fingerprints.json") == weights_hash(
        model, tmp_path / "other"
    )


def test_all_that_decides_the_bytes_of_kv_changes_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(
        architecture="LlamaForCausalLM", vocab_size=99, hidden_size=32, intermediate_size=64, layers=2,
        heads=4, kv_heads=2, head_dim=16, max_positions=64, norm_eps=1e-5, tied=True,
        rope=Rope(10000.0), eos_token_ids=(0,), traits=Traits(),
    )  # fmt: skip
    kernels, shape = reference_kernels(CPU, torch.float32), KVShape(2, 2, 16, 16)

    def found(
        weights: str = "w",
        config: ModelConfig = config,
        dtype: torch.dtype = torch.float32,
        shape: KVShape = shape,
    ) -> str:
        return kv_fingerprint(weights, config, dtype, kernels, shape)

    variants = [
        found(),
        found(weights="v"),
        found(config=replace(config, rope=Rope(20000.0))),
        found(config=replace(config, rope=Rope(10000.0, "yarn", 4.0))),
        found(config=replace(config, traits=Traits(qkv_bias=True))),
        found(config=replace(config, traits=Traits(head_norm=True))),
        found(config=replace(config, traits=Traits(windows=(0, 32)))),
        found(dtype=torch.bfloat16),
        found(shape=replace(shape, block_size=32)),
        found(shape=replace(shape, layers=3)),
    ]
    kernels.exact = not kernels.exact
    variants.append(found())
    monkeypatch.setattr(kernels, "identity", "another machine")
    variants.append(found())
    monkeypatch.setattr(fingerprint, "LAYOUT_VERSION", fingerprint.LAYOUT_VERSION + 1)
    variants.append(found())
    monkeypatch.setattr(torch, "__version__", "another")
    variants.append(found())
    assert len(set(variants)) == len(variants)
    assert found() == variants[-1]
