"""Peers that load no model: real processes that speak the bench's protocol, with times that are made up."""

from pathlib import Path
from typing import Any

import pytest

from bench.process import Program

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
"""A model's config.json."""

PEER = """
import os, sys
from bench.peers.wire import Trace, serve

class Fake:
    facts = {{"version": "made up"}}

    def generate(self, prompts, new_tokens):
        {before}
        traces = []
        for stream, prompt in enumerate(prompts):
            first = {first}
            times = [first + {step} * i for i in range(new_tokens)]
            traces.append(Trace([sum(prompt) + i for i in range(new_tokens)], times))
        return traces

    def close(self):
        pass

def load(setup):
    {loading}
    return Fake()

serve(load)
"""


class Peers:
    """Writes the programs of fake peers where a Python started from here finds them."""

    def __init__(self, directory: Path, python: str) -> None:
        self._directory = directory
        self._python = python

    def scripted(self, name: str, source: str) -> Program:
        (self._directory / f"fake_{name}.py").write_text(source)
        return Program(name, self._python, f"fake_{name}")

    def peer(
        self,
        name: str,
        *,
        first: str = "0.001 * sum(map(len, prompts))",
        step: float = 0.25,
        before: str = "pass",
        loading: str = "pass",
    ) -> Program:
        """Python of it: `first`, seconds to the first token; `before` each job; `loading`."""
        return self.scripted(name, PEER.format(first=first, step=step, before=before, loading=loading))


def installed(directory: Path, monkeypatch: pytest.MonkeyPatch, python: str) -> Peers:
    """Peers whose programs can be run by `python -m`."""
    monkeypatch.setenv("PYTHONPATH", str(directory))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    return Peers(directory, python)
