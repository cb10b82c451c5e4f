"""vLLM as a peer: its engine in this process, stepped by hand, so that each step's tokens get their time.

Nothing of a server is in the way, and nothing is detokenised: vLLM's best case. Its allocator and OpenMP are
preloaded as its documentation asks, where they are installed. Prefix caching is on; block size 32 (its CPU
attention asks for a multiple of 32). Run by the Python of an environment that has vLLM.
"""

import importlib
import os
import sys
import time
from collections.abc import Sequence
from ctypes.util import find_library
from pathlib import Path
from typing import Any

from bench.peers.wire import Setup, Trace, serve

BLOCK_SIZE = 32
PRELOADS = {"tcmalloc_minimal": "libtcmalloc_minimal.so.4", "iomp5": "libiomp5.so"}


def preloads() -> list[str]:
    """The libraries that vLLM wants in LD_PRELOAD: from its environment's lib, or the system's."""
    own = Path(sys.prefix) / "lib"
    found = [
        str(own / file) if (own / file).exists() else find_library(name) for name, file in PRELOADS.items()
    ]
    return [library for library in found if library]


def begin_again_preloaded() -> None:
    """A process cannot preload for itself: this one starts over, once, with the variable set."""
    if "LD_PRELOAD" not in os.environ and (libraries := preloads()):
        again = [sys.executable, "-m", "bench.peers.vllm", *sys.argv[1:]]
        os.execve(sys.executable, again, os.environ | {"LD_PRELOAD": ":".join(libraries)})


def load(setup: Setup) -> "Stepper":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{setup.threads - 1}")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    vllm: Any = importlib.import_module("vllm")
    llm = vllm.LLM(
        model=setup.model,
        dtype=setup.dtype,
        skip_tokenizer_init=True,
        enable_prefix_caching=True,
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=setup.kv_tokens // BLOCK_SIZE + setup.max_streams,
        max_num_seqs=setup.max_streams,
        seed=0,
    )
    return Stepper(llm.llm_engine, facts(vllm.__version__, setup))


def facts(version: str, setup: Setup) -> dict[str, Any]:
    preloaded = [Path(library).name for library in os.environ.get("LD_PRELOAD", "").split(":") if library]
    return {"version": version, "threads": setup.threads, "preloaded": preloaded}


class Stepper:
    def __init__(self, engine: Any, facts: dict[str, Any]) -> None:
        self.facts = facts
        self._engine = engine
        self._requests = 0

    def generate(self, prompts: Sequence[list[int]], new_tokens: int) -> list[Trace]:
        vllm: Any = importlib.import_module("vllm")
        sampling = vllm.SamplingParams(
            temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        traces: dict[str, Trace] = {}
        begun = time.perf_counter()
        for prompt in prompts:
            self._requests += 1
            traces[str(self._requests)] = Trace([], [])
            self._engine.add_request(str(self._requests), {"prompt_token_ids": prompt}, sampling)
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now = time.perf_counter() - begun
            for output in outputs:
                _extend(traces[output.request_id], output.outputs[0].token_ids, now)
        return list(traces.values())

    def close(self) -> None:
        """Nothing of its own runs on."""


def _extend(trace: Trace, tokens: Any, now: float) -> None:
    """`tokens` are all of a request's so far."""
    news = list(tokens)[len(trace.tokens) :]
    trace.tokens.extend(news)
    trace.times.extend(now for _ in news)


if __name__ == "__main__":
    begin_again_preloaded()
    serve(load)
