"""Sluice as a peer: its engine as the server composes it, without HTTP.

As in the server, torch has the main thread and the event loop a second one, on which jobs are answered. Text
is made of tokens as for any client. Times are those of the core: when a step's results reached it.
"""

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from app.compose import load
from app.config import Config, EngineSection, LogSection, ModelSection
from app.serving import Parts
from bench.peers.wire import Peer, Setup, Trace, claim_stdout, serve
from engine.engine import Engine
from engine.plan import Sampling
from engine.request import Finished, Request, Stopping

BLOCK_SIZE = EngineSection().block_size


def configuration(setup: Setup) -> Config:
    """Defaults but for what the other peers are told too."""
    return Config(
        model=ModelSection.model_validate({"path": setup.model, "dtype": setup.dtype}),
        engine=EngineSection(
            kv_blocks=setup.kv_tokens // BLOCK_SIZE + setup.max_streams, max_sequences=setup.max_streams
        ),
        log=LogSection(level="warning"),
    )


class InProcess:
    """The engine on an event loop that runs while a job is answered. All calls on one thread, not main."""

    def __init__(self, parts: Parts) -> None:
        self.facts: dict[str, Any] = {"exact": parts.exact, "threads": torch.get_num_threads()}
        self._parts = parts
        self._runner = asyncio.Runner()
        self._engine = self._runner.run(self._start())
        self._finished: dict[str, Finished] = {}
        self._requests = 0

    async def _start(self) -> Engine:
        engine = Engine(
            self._parts.fleet,
            self._parts.workers,
            exact=self._parts.exact,
            store=self._parts.store,
            clock=time.perf_counter,
        )
        engine.on_finished.append(self._note)
        return engine

    def _note(self, finished: Finished) -> None:
        self._finished[finished.request] = finished

    def generate(self, prompts: Sequence[list[int]], new_tokens: int) -> list[Trace]:
        return self._runner.run(self._generate(prompts, new_tokens))

    async def _generate(self, prompts: Sequence[list[int]], new_tokens: int) -> list[Trace]:
        begun = time.perf_counter()
        streams = [self._engine.submit(self._request(prompt, new_tokens)) for prompt in prompts]
        tokens = await asyncio.gather(*(_tokens(stream) for stream in streams))
        ends = [self._finished.pop(stream.request.id) for stream in streams]
        times = [[at - begun for at in end.token_times] for end in ends]
        return [Trace(ids, at) for ids, at in zip(tokens, times, strict=True)]

    def _request(self, prompt: list[int], new_tokens: int) -> Request:
        self._requests += 1
        stopping = Stopping(max_tokens=new_tokens, ignore_eos=True)
        return Request(str(self._requests), tuple(prompt), Sampling(temperature=0.0), stopping)

    def close(self) -> None:
        self._engine.stop()
        if self._parts.store:
            self._parts.store.stop(10.0)
        self._runner.close()


async def _tokens(stream: Any) -> list[int]:
    return [token async for delta in stream for token in delta.token_ids]


def main() -> None:
    answers = claim_stdout()
    parts = load(configuration(Setup(**json.loads(sys.argv[1]))))

    def peer(setup: Setup) -> Peer:
        return InProcess(parts)

    parts.worker.run_beside(lambda: serve(peer, answers))


if __name__ == "__main__":
    main()
