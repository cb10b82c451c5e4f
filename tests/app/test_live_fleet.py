"""Replicas of the shipped model in one process: whoever migrates, whatever dies, bits are those of one alone."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from random import Random
from threading import Event

import pytest

from app.compose import load
from app.config import Config
from app.replica_tables import ReplicaTable
from app.serving import Parts, serving
from engine.engine import Engine
from engine.events import MigrationOver
from engine.plan import Launched, Plan, Runner, Sampling
from engine.request import Delta, Request, Stopping
from engine.worker import QueueWorker

ANSWER = 96


def requests(count: int = 12) -> list[Request]:
    """Half greedy, half seeded; with penalties, logprobs, and stop strings that some meet."""
    random = Random(7)
    return [
        Request(
            f"r{number}",
            tuple(random.randrange(300, 4000) for _ in range(random.randrange(20, 200))),
            Sampling(
                temperature=float(number % 2),
                seed=number,
                logprobs=2 if number % 3 == 0 else None,
                repetition_penalty=1.1 if number % 4 == 0 else 1.0,
                presence_penalty=0.3 if number % 4 == 1 else 0.0,
            ),
            Stopping(ANSWER, stop=("ee", "the b") if number % 5 == 0 else (), ignore_eos=True),
        )
        for number in range(count)
    ]


@asynccontextmanager
async def fleet(replicas: int) -> AsyncIterator[tuple[Engine, Parts]]:
    """At the end nothing is held, pinned or on its way, in any of them."""
    config = Config.model_validate(
        {
            "engine": {"kv_blocks": 400, "max_sequences": 16, "restart_seconds": 0.0},
            "kvstore": {"host": {"bytes": 2**27}},
            "policies": {"rebalancing": "none", "routing": "least_load"},
            "replicas": [ReplicaTable()] * replicas,
        }
    )
    parts = await asyncio.to_thread(load, config)
    steps = asyncio.ensure_future(asyncio.to_thread(parts.worker.run_forever))
    try:
        async with serving(parts) as (engine, _):
            yield engine, parts
            assert await engine.drain(60)
            await engine.quiet()
            parts.fleet.check()
            assert not len(parts.fleet.ledger)
    finally:
        parts.worker.stop()
        await steps


async def answers(
    engine: Engine, asked: list[Request], meanwhile: Callable[[], Awaitable[None]] | None = None
) -> dict[str, Delta]:
    """Each stream as one delta."""
    streams = [engine.submit(each) for each in asked]

    async def read(number: int) -> Delta:
        deltas = [delta async for delta in streams[number]]
        return deltas[-1]._replace(
            text="".join(delta.text for delta in deltas),
            token_ids=tuple(token for delta in deltas for token in delta.token_ids),
            logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
        )

    reading = [asyncio.ensure_future(read(number)) for number in range(len(asked))]
    if meanwhile is not None:
        await meanwhile()
    return dict(zip((each.id for each in asked), await asyncio.gather(*reading), strict=True))


@pytest.fixture(scope="module")
def alone() -> dict[str, Delta]:
    async def play() -> dict[str, Delta]:
        async with fleet(1) as (engine, _):
            return await answers(engine, requests())

    return asyncio.run(play())


async def test_streams_that_migrate_between_real_replicas_keep_their_bits(alone: dict[str, Delta]) -> None:
    over: list[MigrationOver] = []
    async with fleet(3) as (engine, _):
        engine.on_migration.append(over.append)
        random = Random(3)

        async def migrate() -> None:
            while engine.fleet.requests:
                running = [s for core in engine.fleet.cores for s in core.scheduler.running]
                if running and not len(engine.fleet.moves):
                    engine.migrate(random.choice(running).request.id)
                await asyncio.sleep(0)

        assert await answers(engine, requests(), migrate) == alone
        assert all(member.placed >= 4 for member in engine.fleet.members)
    moved = [each for each in over if not each.failure]
    assert len(moved) >= 10
    assert all(each.live for each in moved)


class Dying:
    """A runner that, after so many steps, raises, runs out of memory, or hangs until it is let go."""

    def __init__(self, runner: Runner, steps: int, manner: str) -> None:
        self._runner, self._steps, self._manner = runner, steps, manner
        self.let_go = Event()

    @property
    def exact(self) -> bool:
        return self._runner.exact

    def launch(self, plan: Plan) -> Launched:
        self._steps -= 1
        if self._steps > 0:
            return self._runner.launch(plan)
        if self._manner == "raises":
            raise RuntimeError("a device error")
        if self._manner == "out of memory":
            raise MemoryError
        self.let_go.wait()
        return self._runner.launch(plan)  # late: nobody must listen


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("manner", ["raises", "out of memory", "hangs"])
async def test_a_replica_fails_under_load_and_all_streams_are_right(
    manner: str, victim: int, alone: dict[str, Delta]
) -> None:
    async with fleet(3) as (engine, parts):
        worker = parts.workers[victim]
        assert isinstance(worker, QueueWorker)
        dying = worker.runner = Dying(worker.runner, 40, manner)

        async def look() -> None:
            """The shell's clock says that the step hangs as soon as nothing else happens."""
            if manner != "hangs":
                return
            while not engine.replicas[victim].lost and engine.fleet.requests:
                if dying._steps <= 0 and _only_hangs(engine, victim):
                    engine._hung_seconds = 0.0
                    engine.tick()
                    engine._hung_seconds = float("inf")
                await asyncio.sleep(0)

        try:
            assert await answers(engine, requests(), look) == alone
        finally:
            dying.let_go.set()
        assert engine.replicas[victim].lost
        assert not engine.fleet.members[victim].up
        assert engine.failure is None
        assert sum(not replica.lost for replica in engine.replicas) == 2


def _only_hangs(engine: Engine, victim: int) -> bool:
    now = engine._clock()
    return all(replica.number == victim or replica.working_seconds(now) == 0.0 for replica in engine.replicas)


async def test_a_lost_replica_starts_again_and_serves(alone: dict[str, Delta]) -> None:
    async with fleet(2) as (engine, parts):
        up = asyncio.Event()
        engine.on_replica.append(lambda number, is_up, reason: up.set() if is_up else None)
        parts.workers[1].runner = Dying(parts.workers[1].runner, 30, "raises")
        assert await answers(engine, requests()) == alone
        assert engine.replicas[1].lost
        engine.drain_replica(1, draining=False)
        await up.wait()
        before = engine.fleet.members[1].placed
        again = [
            Request(f"again {each.id}", each.prompt, each.sampling, each.stopping) for each in requests()
        ]
        found = await answers(engine, again)
        assert {name.removeprefix("again "): delta for name, delta in found.items()} == alone
        assert engine.fleet.members[1].placed > before
