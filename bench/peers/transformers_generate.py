"""transformers' `generate` as a peer: a static batch, greedy, with its default (growing) cache.

It has no prefix cache, so this keeps the last batch's KV and cuts it to what the next batch shares with it: a
context is then computed once for all repeats of a decode measurement, as in the other peers.
"""

import importlib
import time
from collections.abc import Sequence
from typing import Any

from bench.peers.wire import Setup, Trace, serve


def load(setup: Setup) -> "StaticBatch":
    import torch

    transformers: Any = importlib.import_module("transformers")
    torch.set_num_threads(setup.threads)
    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        setup.model, dtype=getattr(torch, setup.dtype)
    ).eval()
    return StaticBatch(model, {"version": transformers.__version__, "threads": setup.threads})


class Clock:
    """A transformers streamer that notes when each step's tokens came. The first call brings the prompts."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.times: list[float] = []
        self._prompted = False

    def put(self, _: Any) -> None:
        if self._prompted:
            self.times.append(time.perf_counter() - self.begun)
        self._prompted = True

    def end(self) -> None:
        pass


class StaticBatch:
    def __init__(self, model: Any, facts: dict[str, Any]) -> None:
        self.facts = facts
        self._model = model
        self._prompts: Sequence[list[int]] = []
        self._cache: Any = None

    def generate(self, prompts: Sequence[list[int]], new_tokens: int) -> list[Trace]:
        import torch

        clock = Clock()
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            answer = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=self._cache_for(prompts),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=-1,
                pad_token_id=0,
                streamer=clock,
                return_dict_in_generate=True,
            )
        self._prompts, self._cache = prompts, answer.past_key_values
        return [Trace(row[ids.shape[1] :].tolist(), clock.times) for row in answer.sequences]

    def _cache_for(self, prompts: Sequence[list[int]]) -> Any:
        """The last batch's KV, cut to the prefix that all prompts share with theirs, if any."""
        shared = self._shared(prompts)
        if self._cache is None or not shared:
            return None
        if surplus := self._cache.get_seq_length() - shared:
            self._cache.crop(-surplus)
        return self._cache

    def _shared(self, prompts: Sequence[list[int]]) -> int:
        """At most one token short of the prompts, since `generate` needs one to begin with."""
        if len(prompts) != len(self._prompts):
            return 0
        return min(_common(old, new[:-1]) for old, new in zip(self._prompts, prompts, strict=True))

    def close(self) -> None:
        """Nothing of its own runs on."""


def _common(first: list[int], second: list[int]) -> int:
    """How many tokens two prompts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


if __name__ == "__main__":
    serve(load)
