"""Runners from `[[replica]]` tables: what they share, what each has of its own, and one made anew."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event

import pytest
import torch

from app import memory, replica_runners
from app.compose import SHIPPED, _revive, core_config
from app.config import Config, EngineSection
from app.memory import NotEnoughMemory, divided
from app.replica_runners import (
    CORES,
    NoSuchDevice,
    ReplicaRunner,
    Replicas,
    UnlikeReplicas,
    load_replicas,
    threads_each,
)
from app.replica_tables import ReplicaTable
from engine.model.loading import load_model
from engine.plan import Placement, Plan, Row, Sampling
from kvstore.below import ResidencyConfig
from policies.cost import StepSample

TABLES = [ReplicaTable(role="long"), ReplicaTable(kv_blocks=40), ReplicaTable(device="cpu", limit_tokens=64)]
SMALL = EngineSection(max_sequences=4, max_batch_tokens=128)


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def replicas() -> Replicas:
    return load_replicas(Config(engine=SMALL, replicas=TABLES), SHIPPED)


def greedy(replica: ReplicaRunner) -> tuple[int, ...]:
    row = Row(0, 0, (5, 6, 7), 0, (1,), samples=True)
    return replica.runner.launch(Plan(0, (Placement(0, Sampling(temperature=0)),), (row,))).collect().tokens


def test_each_replica_has_a_pool_of_its_own_and_all_the_same_weights(replicas: Replicas) -> None:
    runners = list(replicas.runners.values())
    assert [each.number for each in runners] == [0, 1, 2]
    assert [each.table for each in runners] == TABLES
    assert len({id(each.loaded.model) for each in runners}) == 1
    assert len({each.runner.pool.data_ptr() for each in runners}) == 3
    assert [len(each.runner.pool) for each in runners] == [each.scheduler.blocks for each in runners]
    whole = 4 * runners[0].loaded.config.max_positions // 16
    assert [each.scheduler.blocks for each in runners] == [whole, 40, whole]
    assert len({greedy(each) for each in runners}) == 1
    assert not any(each.runs_ahead for each in runners)


def test_threads_are_divided_among_the_replicas_on_the_cpu(replicas: Replicas) -> None:
    """A thread that computes from now on has its part."""
    with ThreadPoolExecutor(1) as other:
        assert other.submit(torch.get_num_threads).result() == threads_each(len(TABLES))
    assert threads_each(1) == CORES
    assert threads_each(10**6) == 1


def test_steps_are_measured_once_and_stand_for_all_on_the_device(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def calibrated(*arguments: object) -> tuple[StepSample, ...]:
        measured.append(arguments)
        return (StepSample(1, 1.0, 0, 0, 0.5),)

    monkeypatch.setattr(replica_runners, "calibrate", calibrated)
    residency = ResidencyConfig(host_blocks=3)
    replicas.make(0)
    schedulers = replicas.schedulers(residency, None)
    assert len(measured) == 1
    assert [scheduler.calibration for scheduler in schedulers] == [(StepSample(1, 1.0, 0, 0, 0.5),)] * 3
    assert [scheduler.residency for scheduler in schedulers] == [residency] * 3
    assert [scheduler.blocks for scheduler in schedulers] == [
        replicas.runners[number].scheduler.blocks for number in range(3)
    ]


def test_one_replica_is_made_anew_on_any_thread_and_the_others_stay(replicas: Replicas) -> None:
    """It draws what the one before did; that one's pool is given back when nobody has it any more."""
    before, others = replicas.runners[1], [replicas.runners[0], replicas.runners[2]]
    drawn, pool = greedy(before), weakref.ref(before.runner.pool)
    with ThreadPoolExecutor(1) as other:
        made = other.submit(replicas.make, 1).result()
        assert made is replicas.runners[1]
        assert (made.scheduler, made.table, made.loaded) == (before.scheduler, before.table, before.loaded)
        assert other.submit(greedy, made).result() == drawn
    assert greedy(made) == drawn
    assert [replicas.runners[0], replicas.runners[2]] == others
    gc.disable()
    try:
        assert pool() is not None
        del before
        assert pool() is None
    finally:
        gc.enable()


def test_a_runner_is_not_made_where_there_is_no_room_for_its_pool(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_cpu_bytes", lambda: 1000)
    with pytest.raises(NotEnoughMemory, match="kv_blocks = 40 needs"):
        replicas.make(1)


@pytest.mark.parametrize(
    ("wanted", "blocks"),
    [
        ([0], [50]),  # half of 1000 bytes
        ([0, 0], [25, 25]),
        ([60, 0, 0], [60, 10, 10]),  # of the 400 that are left, a half, between two
        ([60, 40], [60, 40]),
    ],
)
def test_memory_is_divided_among_the_pools_of_a_device(wanted: list[int], blocks: list[int]) -> None:
    assert divided(wanted, block_bytes=10, useful_blocks=80, free_bytes=1000, share=0.5) == blocks
    assert divided(wanted, block_bytes=10, useful_blocks=9, free_bytes=1000, share=0.5) == [
        each or 9 for each in wanted
    ]


@pytest.mark.parametrize("wanted", [[60, 41], [60, 40, 0]])
def test_pools_that_do_not_fit_together_are_refused(wanted: list[int]) -> None:
    with pytest.raises(NotEnoughMemory, match="free"):
        divided(wanted, block_bytes=10, useful_blocks=80, free_bytes=1000, share=0.5)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(NoSuchDevice, match="cuda:7"):
        load_replicas(Config(replicas=[ReplicaTable(device="cuda:7")]), SHIPPED)


def test_replicas_whose_bits_differ_are_refused() -> None:
    """As those of a CPU and a GPU do: here it is the dtype."""
    dtypes = ("bfloat16", "float32")
    unlike = [load_model(SHIPPED, device=torch.device("cpu"), dtype=dtype) for dtype in dtypes]
    replica_runners._refuse_unlike(unlike[:1] * 2)
    with pytest.raises(UnlikeReplicas, match="devices of one kind"):
        replica_runners._refuse_unlike(unlike)


def test_a_stop_token_that_the_model_has_no_row_for_is_none(replicas: Replicas) -> None:
    """It is never drawn; and the sampler, told to keep it from being drawn, would look beyond its rows."""
    first = replicas.runners[0]
    odd = replace(first.loaded.generation, eos_token_ids=(2, first.loaded.config.vocab_size))
    replica = replace(first, loaded=replace(first.loaded, generation=odd))
    assert core_config(Config(), replica, first.scheduler, "").eos_token_ids == (2,)


async def test_a_replica_whose_restart_hangs_takes_no_thread_from_others_and_keeps_no_process(
    monkeypatch: pytest.MonkeyPatch, replicas: Replicas
) -> None:
    began, ends = Event(), Event()

    def hangs(_replicas: Replicas, number: int) -> ReplicaRunner:
        began.set()
        ends.wait()
        raise NoSuchDevice(f"no {number}")

    monkeypatch.setattr(Replicas, "make", hangs)
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    restart = asyncio.ensure_future(_revive(replicas, 1))
    try:
        await asyncio.wait_for(asyncio.to_thread(began.wait), 5)
        assert await asyncio.wait_for(asyncio.to_thread(int), 5) == 0
        (thread,) = (each for each in threading.enumerate() if each.name == "replica 1, made anew")
        assert thread.daemon
    finally:
        ends.set()
    with pytest.raises(NoSuchDevice, match="no 1"):
        await restart
