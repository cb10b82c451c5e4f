"""transformers' continuous batching as a peer: its manager with SDPA (there is no flash attention on a CPU).

Prefix sharing is on, in pages of its default size. Times are its own, taken at each step.
"""

import importlib
import time
from collections.abc import Sequence
from typing import Any

from bench.peers.wire import Setup, Trace, serve

PAGE_SIZE = 256
MAX_BATCH_TOKENS = 2048


def load(setup: Setup) -> "Manager":
    import torch

    transformers: Any = importlib.import_module("transformers")
    torch.set_num_threads(setup.threads)
    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        setup.model, dtype=getattr(torch, setup.dtype), attn_implementation="sdpa"
    ).eval()
    return Manager(model, setup, {"version": transformers.__version__, "threads": setup.threads})


class Manager:
    def __init__(self, model: Any, setup: Setup, facts: dict[str, Any]) -> None:
        transformers: Any = importlib.import_module("transformers")
        self.facts = facts
        self._manager = model.init_continuous_batching(
            transformers.GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1),
            transformers.ContinuousBatchingConfig(
                page_size=PAGE_SIZE,
                num_blocks=setup.kv_tokens // PAGE_SIZE + 2 * setup.max_streams,
                max_batch_tokens=MAX_BATCH_TOKENS,
                max_requests_per_batch=setup.max_streams,
            ),
        )
        self._manager.start()

    def generate(self, prompts: Sequence[list[int]], new_tokens: int) -> list[Trace]:
        begun = time.perf_counter()
        names = [
            self._manager.add_request(
                prompt, max_new_tokens=new_tokens, record_timestamps=True, eos_token_id=-1
            )
            for prompt in prompts
        ]
        results = [self._result() for _ in prompts]
        traces = {r.request_id: Trace(r.generated_tokens, [t - begun for t in r.timestamps]) for r in results}
        return [traces[name] for name in names]

    def _result(self) -> Any:
        result = self._manager.get_result()
        assert result is not None, "continuous batching has stopped"
        assert result.error is None, f"continuous batching failed: {result.error}"
        return result

    def close(self) -> None:
        self._manager.stop(block=True)


if __name__ == "__main__":
    serve(load)
