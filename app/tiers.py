"""The composition root's part for the KV store: configuration → tiers, their sizes, the store that supervises them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from structlog.stdlib import get_logger

from app import memory
from app.config import Config
from app.core_config import residency_config
from engine.kernels.protocol import Kernels
from engine.model.fingerprint import Signature, kv_fingerprint, weights_hash
from engine.model.loading import Loaded
from engine.runner import ModelRunner
from engine.runner_cuda import CudaRunner
from kvstore import memory as memory_tiers
from kvstore.below import ResidencyConfig
from kvstore.copies import DEVICE, DISK, HOST, TierUp
from kvstore.disk import DiskTier
from kvstore.store import Opened, Store
from kvstore.tier import Tier, TierUnusable

HOST_SHARE = 0.5
"""Of the memory free when the pool has been taken, that the host tier may have at most."""

SMALL_SHARE = 0.5
"""Of the devices' KV: a host tier with less than that is told of. Preempted sequences soon find no room there."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Tiers:
    residency: ResidencyConfig
    store: Store | None  # None: there is no tier below the device
    fingerprint: str  # of all that decides the bytes of KV; "" where no key outlives the process
    host: Tier | None


def make_tiers(
    config: Config,
    directory: Path,
    files: Signature,
    loaded: Loaded,
    devices: Sequence[Tier],
) -> Tiers:
    """Takes the host arena and opens the disk. What cannot be had is logged, and done without.

    `devices`: of all replicas, which share what is below; `loaded`: the first one's model. `files`: of the model, from
    before it was loaded. Raises ModelChanged.
    """
    device = devices[0]
    memories: dict[str, Tier] = {DEVICE: device}
    if host := _host(config, device.block_bytes, pinned=loaded.model.device.type == "cuda"):
        memories[HOST] = host
        tell_if_small(host, devices)
    fallible, fingerprint = {}, ""
    if config.kvstore.disk.bytes:
        fingerprint = _fingerprint(weights_hash(directory, loaded=files), loaded, config.engine.block_size)
        fallible[DISK] = partial(_open_disk, config, device.block_bytes, fingerprint)
    if not host and not fallible:
        return Tiers(ResidencyConfig(), None, fingerprint, None)
    kvstore = config.kvstore
    store = Store(
        memories,
        fallible,
        hung_seconds=kvstore.hung_seconds,
        retry_seconds=kvstore.retry_seconds,
        notes=_note,
    )
    for number, each in enumerate(devices):
        store.put_device(number, each)
    store.open()
    host_blocks = host.stats().capacity_bytes // device.block_bytes if host else 0
    return Tiers(residency_config(config, device.block_bytes, host_blocks), store, fingerprint, host)


def device_tier(runner: ModelRunner | CudaRunner) -> Tier:
    if isinstance(runner, ModelRunner):
        return memory_tiers.pool_tier(runner.pool)
    from kvstore.cuda import CudaTier

    return CudaTier(runner.pool)


def _host(config: Config, block_bytes: int, *, pinned: bool) -> Tier | None:
    free = memory.free_cpu_bytes()
    blocks, reduced = memory_tiers.fitting_blocks(config.kvstore.host.bytes, block_bytes, free, HOST_SHARE)
    if reduced:
        log.warning("host_tier_reduced", reason=reduced)
    if not blocks:
        return None
    try:
        tier = memory_tiers.host_tier(blocks, block_bytes, pinned=pinned)
    except TierUnusable as error:
        log.error("tier_unusable", tier=HOST, reason=str(error))
        return None
    if tier.notice:
        log.warning("tier_notice", tier=HOST, notice=tier.notice)
    return tier


def tell_if_small(host: Tier, devices: Sequence[Tier]) -> None:
    """Of a host tier that is short beside the devices: one line in the log."""
    has, kv = host.stats().capacity_bytes, sum(device.stats().capacity_bytes for device in devices)
    if has < SMALL_SHARE * kv:
        reason = (
            f"the host tier has room for {has:,} bytes of KV, the device for {kv:,}: preempted requests that find no "
            "room there are computed again. Raise kvstore.host.bytes where there is memory"
        )
        log.warning("host_tier_small", reason=reason)


def _open_disk(config: Config, block_bytes: int, fingerprint: str) -> Opened:
    disk = config.kvstore.disk
    tier = DiskTier.open(
        Path(disk.path).expanduser(), quota_bytes=disk.bytes, block_bytes=block_bytes, fingerprint=fingerprint
    )
    try:
        return tier, TierUp(DISK, tier.records(), tier.capacity_blocks, tier.transaction_blocks)
    except BaseException:
        tier.close()
        raise


def _fingerprint(weights: str, loaded: Loaded, block_size: int) -> str:
    kernels: Kernels = loaded.model.kernels
    return kv_fingerprint(weights, loaded.config, loaded.dtype, kernels, loaded.model.kv_shape(block_size))


def _note(event: str, facts: dict[str, Any]) -> None:
    """The store's news, one line each."""
    level = "info" if event == "tier_up" else "warning"
    getattr(log, level)(event, **facts)
