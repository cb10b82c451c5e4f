"""From the configuration's replicas to their runners: models loaded once a device, memory and cores divided.

Replicas on one device share the weights, which nobody writes once they are loaded. Each has a pool, a sampler and
scratch of its own, and on a CPU its thread has a team (engine/kernels/cpu_team.py). The only file of this package that
imports torch. Not here: threads that launch plans, tiers below the device (app/tiers.py), the rest (app/compose.py).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from structlog.stdlib import get_logger

from app import memory
from app.calibration import calibrate
from app.config import Config
from app.core_config import scheduler_config
from app.replica_tables import ReplicaTable, replicas_of
from app.tiers import device_tier
from engine.kernels.select import make_kernels
from engine.model.loading import Loaded, load_model
from engine.runner import ModelRunner
from engine.runner_cuda import CudaRunner
from engine.sampler import Sampler
from engine.scheduler import SchedulerConfig
from kvstore.below import ResidencyConfig
from kvstore.tier import Tier

CORES = torch.get_num_threads()
"""What there is to divide: torch's own count at the start, which OMP_NUM_THREADS bounds."""

DeviceKey = tuple[str, int]

log = get_logger(__name__)


class NoSuchDevice(Exception):
    """`model.device`, or a replica's, names a device that this machine has not."""


class UnlikeReplicas(Exception):
    """Replicas whose KV differs in bits, so that they cannot share what is below their devices."""


@dataclass(frozen=True, slots=True)
class ReplicaRunner:
    """What runs a replica's plans, and what the scheduler must know of its device."""

    number: int
    table: ReplicaTable
    loaded: Loaded  # of its device: other replicas there have the same
    runner: ModelRunner | CudaRunner  # warm
    device: Tier  # the runner's pool
    scheduler: SchedulerConfig  # without tiers below the device, and not calibrated: see Replicas.schedulers

    @property
    def runs_ahead(self) -> bool:
        """A CUDA device is given its next step while one runs; a CPU overlaps nothing."""
        return self.loaded.model.device.type == "cuda"


class Replicas:
    """The replicas of a process: `runners`, by number, and how one is made anew."""

    def __init__(self, config: Config, models: Sequence[Loaded], blocks: Sequence[int]) -> None:
        """Of each replica: the model on its device, and the size of its pool."""
        self._config, self._models, self._blocks = config, models, blocks
        self._tables = replicas_of(config.replicas)
        self.runners: dict[int, ReplicaRunner] = {}
        for number in range(len(self._tables)):
            self.make(number)

    def make(self, number: int) -> ReplicaRunner:
        """A runner with an empty pool, warm, in place of the one before. Called on any thread, for any other.

        Of the one before nothing is touched, as a thread may hang in it: only when all others too have let go of it,
        and of its pool's tier, is its memory free; until then there must be room for both. Raises NotEnoughMemory, and
        what a broken device raises.
        """
        self.runners.pop(number, None)
        loaded, table = self._models[number], self._tables[number]
        block_bytes = _block_bytes(self._config, loaded)
        blocks = self._blocks[number]
        memory.check_fits(blocks, block_bytes, _free_bytes(loaded))
        scheduler = scheduler_config(self._config, blocks, block_bytes)
        runner = _runner(loaded, scheduler)
        runner.warm_up()
        made = ReplicaRunner(number, table, loaded, runner, device_tier(runner), scheduler)
        self.runners[number] = made
        return made

    def schedulers(self, residency: ResidencyConfig, host: Tier | None) -> tuple[SchedulerConfig, ...]:
        """Each replica's by number, whole: with the tiers below, and with what steps and copies cost, measured now.

        The first replica on a device stands for all there. Nobody may hold a block or a slot of a pool or of `host`.
        """
        measured: dict[DeviceKey, SchedulerConfig] = {}
        runners = [self.runners[number] for number in sorted(self.runners)]
        for each in runners:
            key = _key(each.loaded.model.device)
            if key not in measured:
                scheduler = replace(each.scheduler, residency=residency)
                samples = calibrate(each.runner, scheduler, each.device, host)
                measured[key] = replace(scheduler, calibration=samples)
        return tuple(
            replace(measured[_key(each.loaded.model.device)], blocks=each.scheduler.blocks)
            for each in runners
        )


def load_replicas(config: Config, directory: Path) -> Replicas:
    """Loads the model on every device that a replica has, and makes all runners. On the main thread, before others
    compute: it sets how many threads each runner's own computes with.

    Raises NoSuchDevice, UnlikeReplicas, NotEnoughMemory, ModelError, UnsupportedDevice.
    """
    tables = replicas_of(config.replicas)
    devices = [choose_device(table.device or config.model.device) for table in tables]
    models = _load_each(config, directory, devices)
    _refuse_unlike(list(models.values()))
    on_cpu = sum(device.type == "cpu" for device in devices)
    if on_cpu > 1:
        torch.set_num_threads(threads_each(on_cpu))
    loaded = [models[_key(device)] for device in devices]
    return Replicas(config, loaded, _pool_blocks(config, tables, loaded))


def threads_each(replicas: int) -> int:
    """That a replica on the CPU computes with, the caller's own included."""
    return max(1, CORES // replicas)


def choose_device(name: str) -> torch.device:
    """auto: a CUDA device if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device, found = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise NoSuchDevice(f"device = {name!r}, but there are {found} CUDA devices; try auto or cpu")
    return device


def _key(device: torch.device) -> DeviceKey:
    """The same for "cuda" and "cuda:0"."""
    return device.type, device.index or 0


def _load_each(
    config: Config, directory: Path, devices: Sequence[torch.device]
) -> Mapping[DeviceKey, Loaded]:
    kernels = partial(make_kernels, exact=config.engine.exact)
    models: dict[DeviceKey, Loaded] = {}
    for device in devices:
        if _key(device) not in models:
            loaded = load_model(directory, device=device, dtype=config.model.dtype, kernels=kernels)
            models[_key(device)] = loaded
            for fact in loaded.facts:
                log.info("model_fact", fact=fact)
    return models


def _refuse_unlike(models: Sequence[Loaded]) -> None:
    kinds = {f"{model.dtype}, {model.model.kernels.identity}": model.model.device for model in models}
    if len(kinds) > 1:
        what = "; ".join(f"{device} has {kind}" for kind, device in kinds.items())
        raise UnlikeReplicas(
            f"all [[replica]]s share the tiers below their devices, so their KV must be the same in bits, but {what}: "
            "give them devices of one kind"
        )


def _pool_blocks(config: Config, tables: Sequence[ReplicaTable], models: Sequence[Loaded]) -> list[int]:
    """By number. One that asks for none may hold what lets every slot run a whole context, at most."""
    engine = config.engine
    on_device: dict[DeviceKey, list[int]] = defaultdict(list)
    for number, loaded in enumerate(models):
        on_device[_key(loaded.model.device)].append(number)
    blocks = [0] * len(models)
    for numbers in on_device.values():
        loaded = models[numbers[0]]
        on_gpu = loaded.model.device.type == "cuda"
        sizes = memory.divided(
            [tables[number].kv_blocks or engine.kv_blocks for number in numbers],
            block_bytes=_block_bytes(config, loaded),
            useful_blocks=-(-loaded.config.max_positions // engine.block_size) * engine.max_sequences,
            free_bytes=_free_bytes(loaded),
            share=memory.GPU_SHARE if on_gpu else memory.CPU_SHARE,
        )
        for number, size in zip(numbers, sizes, strict=True):
            blocks[number] = size
    return blocks


def _block_bytes(config: Config, loaded: Loaded) -> int:
    return loaded.model.kv_shape(config.engine.block_size).elements * loaded.dtype.itemsize


def _free_bytes(loaded: Loaded) -> int:
    device = loaded.model.device
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory.free_cpu_bytes()


def _runner(loaded: Loaded, scheduler: SchedulerConfig) -> ModelRunner | CudaRunner:
    device = loaded.model.device
    kind = CudaRunner if device.type == "cuda" else ModelRunner
    return kind(
        loaded.model,
        Sampler(scheduler.max_sequences, loaded.config.vocab_size, device),
        kv_blocks=scheduler.blocks,
        block_size=scheduler.block_size,
        max_sequences=scheduler.max_sequences,
    )
