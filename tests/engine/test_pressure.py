"""A pool of 0.3 × demand: 64 requests of the real model finish with the tokens of the unpressured run.

Demand is the peak of held blocks in that unpressured run. The pressured run is recorded and replayed.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.core import Core, CoreConfig
from engine.engine import Engine, StepRecord
from engine.model.loading import Loaded
from engine.plan import Sampling
from engine.recording import FileRecorder, replay
from engine.request import Finished, Request, Stopping
from engine.scheduler import SchedulerConfig
from engine.worker import ThreadWorker
from tests.engine.models import BLOCK, load, random_tokens, runner_for

MAX_SEQUENCES = 64
Directories = Callable[[str], Path]


@dataclass(frozen=True)
class Outcome:
    tokens: dict[str, tuple[int, ...]]
    demand: int  # peak of held blocks
    preemptions: int
    recomputed_tokens: int


def requests(loaded: Loaded) -> list[Request]:
    """64 prompts of 5–44 tokens and answers of 20–60, half greedy, half seeded."""
    return [
        Request(
            id=f"r{i}",
            prompt=tuple(random_tokens(5 + i * 7 % 40, loaded.config.vocab_size, seed=i)),
            sampling=Sampling(temperature=float(i % 2), top_p=0.95, seed=i),
            stopping=Stopping(max_tokens=20 + i * 11 % 41, ignore_eos=True),
        )
        for i in range(64)
    ]


async def outcome(loaded: Loaded, blocks: int, recording: Path) -> Outcome:
    scheduler = SchedulerConfig(BLOCK, blocks, max_batch_tokens=128, max_sequences=MAX_SEQUENCES)
    config = CoreConfig(scheduler, loaded.config.max_positions, max_queue=100)
    core = Core(config, (b"x",) * loaded.config.vocab_size)
    runner = runner_for(loaded, kv_blocks=blocks, max_sequences=MAX_SEQUENCES)
    steps: list[StepRecord] = []
    ends: list[Finished] = []
    async with FileRecorder().writing(recording, config) as recorder:
        engine = Engine(core, ThreadWorker(runner), exact=runner.exact, recorder=recorder)
        engine.on_step.append(steps.append)
        engine.on_finished.append(ends.append)
        try:
            streams = [engine.submit(request) for request in requests(loaded)]
            answers = [[token async for delta in stream for token in delta.token_ids] for stream in streams]
        finally:
            await asyncio.to_thread(engine.stop)
    core.check()
    assert core.idle
    assert core.scheduler.pool.held == 0
    return Outcome(
        tokens={stream.request.id: tuple(answer) for stream, answer in zip(streams, answers, strict=True)},
        demand=max(step.kv_used_blocks for step in steps),
        preemptions=core.scheduler.counts.preemptions,
        recomputed_tokens=sum(end.recomputed_tokens for end in ends),
    )


CASES = [("shipped", "bfloat16"), ("shipped", "float32"), ("odd_sizes", "bfloat16")]


@pytest.fixture(params=CASES, ids="-".join)
def loaded(request: pytest.FixtureRequest, model_directory: Directories) -> Loaded:
    model, dtype = request.param
    return load(model_directory(model), "cpu", dtype)


async def test_under_pressure_nothing_changes_but_time(loaded: Loaded, tmp_path: Path) -> None:
    calm = await outcome(loaded, 1024, tmp_path / "calm.jsonl")
    assert calm.preemptions == 0
    pressed = await outcome(loaded, int(0.3 * calm.demand), tmp_path / "pressed.jsonl")
    assert pressed.preemptions > 0
    assert pressed.recomputed_tokens > 0
    assert pressed.tokens == calm.tokens
    assert len({*calm.tokens.values()}) == 64
    vocabulary = (b"x",) * loaded.config.vocab_size
    assert await asyncio.to_thread(replay, tmp_path / "pressed.jsonl", vocabulary) > 64
