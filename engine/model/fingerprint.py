"""What determines the bytes of KV, as one short text: part of every block's key, and of the disk store's identity.

The weights count by content: a model that was trained further in place has other KV. Hashing reads all of them, so the
hash is kept in a small file of the user's cache, and is good as long as no file's size, times or inode have changed.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from engine.kernels.protocol import Kernels, KVShape
from engine.model.config import ModelConfig
from engine.model.errors import ModelError
from engine.model.weights import files_of

LAYOUT_VERSION = 1
"""Of a block's slab: raise it when any kernels order K and V differently, or compute them differently."""


Signature = list[list[int | str]]
"""Of a model's files: equal as long as nobody has written to them."""

SETTLED_NS = 2 * 10**9
"""A file that changed so lately may change again at the same tick of the file system's clock, unseen: not cached."""


def default_cache() -> Path:
    """Where hashes are kept: the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "sluice" / "fingerprints.json"


class ModelChanged(ModelError):
    """The model's files were changed while it was loaded."""


def signature(directory: Path) -> Signature:
    """Take it before the model is loaded: the hash is then known to be of what was loaded."""
    return [_signature(file) for file in _model_files(directory)]


def weights_hash(directory: Path, cache: Path | None = None, *, loaded: Signature | None = None) -> str:
    """SHA-256, in hex, over names and contents of config.json, the weights and their index. Cached in `cache`.

    Raises ModelChanged when the files are not those of `loaded` (None: whatever they are now).
    """
    loaded = loaded or signature(directory)
    cache = cache or default_cache()
    known = _read(cache)
    entry = known.get(str(directory.resolve()))
    if isinstance(entry, dict) and entry.get("files") == loaded and isinstance(entry.get("hash"), str):
        found = str(entry["hash"])
    else:
        found = _hash(_model_files(directory))
    if signature(directory) != loaded:
        raise ModelChanged(f"the files in {directory} were changed while the model was loaded; start again")
    if _newest_change(_model_files(directory)) <= time.time_ns() - SETTLED_NS:
        _write(cache, known | {str(directory.resolve()): {"files": loaded, "hash": found}})
    return found


def kv_fingerprint(
    weights: str, config: ModelConfig, dtype: torch.dtype, kernels: Kernels, shape: KVShape
) -> str:
    """Equal for two processes only if they compute the same bytes for the same tokens."""
    facts = {
        "weights": weights,
        "dtype": str(dtype),
        "layout": LAYOUT_VERSION,
        "rope": repr(config.rope),
        "traits": repr(config.traits),
        "shape": repr(shape),
        "kernels": kernels.identity,
        "torch": torch.__version__,  # computes the rotary table, and whatever the kernels leave to it
        "exact": kernels.exact,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _model_files(directory: Path) -> list[Path]:
    return [directory / "config.json", *files_of(directory)]


def _signature(file: Path) -> list[int | str]:
    found = file.stat()
    return [file.name, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _newest_change(files: Iterable[Path]) -> int:
    """Nanoseconds since 1970."""
    return max(file.stat().st_ctime_ns for file in files)


def _hash(files: Iterable[Path]) -> str:
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            content = hashlib.file_digest(opened, "sha256").digest()
        whole.update(file.name.encode() + b"\0" + content)
    return whole.hexdigest()


def _read(cache: Path) -> dict[str, Any]:
    """What the cache holds; nothing, where it cannot be read: it is only a shortcut."""
    with suppress(OSError, ValueError):
        found = json.loads(cache.read_text("utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def _write(cache: Path, content: dict[str, Any]) -> None:
    """All or nothing; nothing, where the directory cannot be written."""
    with suppress(OSError):
        cache.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        half = cache.with_name(f"{cache.name}.{os.getpid()}")
        half.touch(mode=0o600)
        half.write_text(json.dumps(content, indent=1), "utf-8")
        half.replace(cache)
