"""Weights from safetensors files, mapped into memory: a tensor is read when it is taken, and never kept here.

Covers one file or shards with an index. Not here: which tensors a model wants (its family's file says),
packing (engine/kernels).
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.model.errors import BrokenCheckpoint, ModelError, UnsupportedModel, listed
from engine.model.reading import read_json_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def files_of(directory: Path) -> list[Path]:
    """All that a model's weights are read from: the index, where there is one, and every file it names."""
    index = directory / INDEX
    return [*([index] if index.exists() else []), *sorted(_files(directory))]


class Checkpoint:
    """The tensors of a model directory, by name. A context manager: leaving it unmaps what no tensor uses.

    A file that others truncate while it is mapped kills the process (SIGBUS), so nothing taken from here
    outlives the loading but as a copy.
    """

    def __init__(self, directory: Path) -> None:
        """Opens every file and reads their headers; BrokenCheckpoint lists all that is damaged or absent."""
        self._files = ExitStack()
        self._where: dict[str, Any] = {}  # tensor name -> its open file
        problems: list[str] = []
        for path, names in _files(directory).items():
            self._open(path, names, problems)
        if problems:
            self._files.close()
            raise BrokenCheckpoint(listed(f"the weights in {directory} are not whole", problems))

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._where.clear()
        self._files.close()

    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype | str:
        """The stored dtype; its safetensors name where it is not a float that Sluice serves."""
        stored = str(self._where[name].get_slice(name).get_dtype())
        return DTYPES.get(stored, stored)

    def main_dtype(self) -> torch.dtype:
        """The float dtype that most tensors have (float32 if none has one: Weights refuses such files)."""
        floats = Counter(dtype for dtype in map(self.dtype, self.names()) if isinstance(dtype, torch.dtype))
        return max(floats, key=lambda dtype: (floats[dtype], str(dtype)), default=torch.float32)

    def take(self, name: str) -> Tensor:
        """The stored tensor: a view of the mapped file, read from disk as it is touched."""
        tensor: Tensor = self._where[name].get_tensor(name)
        return tensor

    def _open(self, path: Path, names: Iterable[str] | None, problems: list[str]) -> None:
        try:
            file = self._files.enter_context(safe_open(path, framework="pt", device="cpu"))
        except FileNotFoundError:
            problems.append(f"{path.name} is missing, though {INDEX} names it; download it")
            return
        except (SafetensorError, OSError) as error:
            problems.append(f"{path.name} is damaged ({error}); download it again")
            return
        held = set(file.keys())
        wanted = held if names is None else set(names)
        problems.extend(
            f"{name} is not in {path.name}, though {INDEX} says so" for name in sorted(wanted - held)
        )
        self._where.update(dict.fromkeys(wanted & held, file))


def _files(directory: Path) -> Mapping[Path, list[str] | None]:
    """The files to open, each with the names that an index gives it (None: all it holds)."""
    if (directory / SINGLE).exists():
        return {directory / SINGLE: None}
    if not (directory / INDEX).exists():
        raise ModelError(
            f"{directory} has neither {SINGLE} nor {INDEX}: supported are safetensors weights in the Hugging "
            "Face layout (pytorch_model.bin and GGUF are not)"
        )
    return _shards(directory)


def _shards(directory: Path) -> dict[Path, list[str] | None]:
    """The index's shards. A name that leads out of the directory is refused."""
    entries = read_json_object(directory / INDEX).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise BrokenCheckpoint(f"{directory / INDEX} has no weight_map; download it again")
    shards: dict[Path, list[str] | None] = {}
    for name, file in entries.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise BrokenCheckpoint(
                f"{directory / INDEX} puts {name} in {file!r}, which is no plain file name"
            )
        names = shards.setdefault(directory / file, [])
        assert names is not None
        names.append(name)
    return shards


class Weights:
    """A checkpoint's tensors, checked against `wanted` (name -> shape) and converted as they are taken."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        wanted: Mapping[str, tuple[int, ...]],
        *,
        ignored: tuple[str, ...] = (),
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """One error lists all that is missing, misfit or unexpected (names ending in `ignored` may be)."""
        self._checkpoint = checkpoint
        self._device = device
        self._dtype = dtype
        problems = _mismatches(checkpoint, wanted, ignored)
        if problems:
            raise BrokenCheckpoint(listed("the weights do not fit config.json", problems))
        _refuse_dtypes(checkpoint, wanted)

    def take(self, *names: str) -> Tensor:
        """The tensors joined along their first axis, converted; one alone may be a view of its file."""
        parts = [self._checkpoint.take(name).to(self._device, self._dtype) for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def own(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A copy that may be kept: it does not depend on the file."""
        return self._checkpoint.take(name).to(self._device, dtype or self._dtype, copy=True)


def _mismatches(
    checkpoint: Checkpoint, wanted: Mapping[str, tuple[int, ...]], ignored: tuple[str, ...]
) -> list[str]:
    held = checkpoint.names()
    problems = [f"{name} is missing" for name in wanted if name not in held]
    problems += [f"{name} is unexpected" for name in sorted(held - set(wanted)) if not name.endswith(ignored)]
    for name, shape in wanted.items():
        if name in held and checkpoint.shape(name) != shape:
            problems.append(f"{name} has shape {list(checkpoint.shape(name))}, expected {list(shape)}")
    return problems


def _refuse_dtypes(checkpoint: Checkpoint, wanted: Iterable[str]) -> None:
    stored = {name: checkpoint.dtype(name) for name in wanted}
    odd = [f"{name} is stored as {dtype}" for name, dtype in stored.items() if isinstance(dtype, str)]
    if odd:
        raise UnsupportedModel(listed("supported weights are float32, bfloat16 and float16", odd))
