"""Compiled functions behind one address: how the CPU kernels are built, cached and called.

A kernel is a Python function of one argument, the address of a ctypes structure, compiled by numba (no compiler
on the user's machine). It runs on one thread, or on many (cpu_team.py). A call costs 0.2 µs on one thread; a numba
dispatcher with array arguments costs 3–10.

Kernels share work by claiming numbered pieces from a counter (`claim`), so the result may not depend on who
computes what. Nothing here knows what a kernel computes; vectors are in cpu_lanes.py.
"""

import ctypes
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from numba.core.registry import cpu_target

_Body = Callable[[Any], None]
_F = TypeVar("_F", bound=Callable[..., Any])


class Clock:
    """Adds up the wall seconds of calls that release the interpreter lock."""

    __slots__ = ("seconds",)

    def __init__(self) -> None:
        self.seconds = 0.0


_compiling = Lock()
"""Where compiled code is kept is numba's own global setting."""


class Native:
    """A kernel, compiled on first use. Its one argument is a structure of type `arguments`."""

    def __init__(self, body: _Body, arguments: type[ctypes.Structure]) -> None:
        self._body = body
        self._record = numba.from_dtype(np.dtype(arguments))
        self._address = 0
        self._alone: Any = None  # keeps the interpreter lock
        self._call_released: Any = None  # does not

    @property
    def address(self) -> int:
        if not self._address:
            self.compile()
        return self._address

    def compile(self) -> None:
        """Compiles, or loads from the cache: seconds, or milliseconds. One thread does, others wait for it."""
        with _compiling:
            if self._address:
                return
            signature = numba.types.void(numba.types.CPointer(self._record))
            with _cache_directory():
                self._compiled = numba.cfunc(signature, cache=True, error_model="numpy")(self._body)
            address = self._compiled.address
            self._alone = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(address)
            self._call_released = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
            self._address = address  # last: whoever sees it calls

    @property
    def from_cache(self) -> bool:
        """Whether it was compiled in an earlier process."""
        self.compile()
        return bool(self._compiled.cache_hits)

    def alone(self, arguments: ctypes.Structure) -> None:
        """Runs on this thread, the interpreter lock held: for work of some microseconds."""
        if not self._address:
            self.compile()
        self._alone(ctypes.addressof(arguments))

    def released(self, arguments: ctypes.Structure, clock: Clock) -> None:
        """Runs on this thread, the interpreter lock released."""
        if not self._address:
            self.compile()
        start = perf_counter()
        self._call_released(ctypes.addressof(arguments))
        clock.seconds += perf_counter() - start


def native(arguments: type[ctypes.Structure]) -> Callable[[_Body], Native]:
    """Decorator: compiles the function below (when first used) as a kernel that takes `arguments`."""
    return lambda body: Native(body, arguments)


def inner(function: _F) -> _F:
    """Decorator: a compiled function called by kernels, inlined into them. Typed as the Python function it is."""
    compiled: _F = numba.njit(error_model="numpy")(function)
    return compiled


def target() -> tuple[str, str, str]:
    """What numba compiles for: triple, CPU, and its features as "+this,-that"."""
    found: tuple[str, str, str] = cpu_target.target_context.codegen().magic_tuple()
    return found


class _cache_directory:
    """Points numba's cache at a directory named after the content of all kernel sources, while it is entered.

    numba notices a change of the kernel's own file only; a kernel is made of several.
    """

    def __enter__(self) -> None:
        self._before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(_cache_root(self._before) / sources_digest())

    def __exit__(self, *_: object) -> None:
        numba.config.CACHE_DIR = self._before


def _cache_root(configured: str) -> Path:
    """NUMBA_CACHE_DIR, else the user's cache, else (a home that cannot be written) the temporary directory."""
    if configured:
        return Path(configured)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parent = home if home.exists() else home.parent
    return (home if os.access(parent, os.W_OK) else Path(tempfile.gettempdir())) / "sluice" / "kernels"


_digest = ""


def sources_digest() -> str:
    global _digest
    if not _digest:
        files = sorted(Path(__file__).parent.glob("cpu*.py"))
        _digest = hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]
    return _digest


def structure(name: str, **fields: type) -> type[ctypes.Structure]:
    """A ctypes structure: the arguments of a kernel. Addresses and counts are c_int64, scalars c_float.

    Those of a kernel that a team runs begin with its two counters, `next` and `thread`, which the team clears.
    """
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


MAX_THREADS = max(os.cpu_count() or 1, torch.get_num_threads())
"""No kernel runs on more: scratch is laid out for so many."""


def threads() -> int:
    """As many as torch was told to use on this thread: what was last set when the thread first asked, or set itself."""
    return min(torch.get_num_threads(), MAX_THREADS)
