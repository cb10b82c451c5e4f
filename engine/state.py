"""What operators see of a core: its state as plain data, for `/admin/state`, `/admin/requests` and `/metrics`."""

from engine.core import Core
from engine.policy_set import FAMILIES
from engine.sequence import Sequence
from kvstore.copies import DEVICE


def core_state(core: Core, kv_peak_blocks: int, block_bytes: int) -> dict[str, object]:
    """`kv_peak_blocks`: most held after any step: demand, where there was no pressure. `block_bytes`: of one block."""
    scheduler = core.scheduler
    return {
        "context": core.config.context,
        "block_size": scheduler.config.block_size,
        "kv_blocks": scheduler.pool.blocks,
        "kv_used_blocks": scheduler.pool.held,
        "kv_peak_blocks": kv_peak_blocks,
        "kv_cached_blocks": scheduler.pool.cached,
        "running": len(scheduler.running),
        "waiting": scheduler.waiting,
        "preemptions": scheduler.counts.preemptions,
        "tiers": _tiers(core, block_bytes),
        "copies": len(scheduler.residency.flights),
        "policies": policies(core),
    }


def policies(core: Core) -> dict[str, str]:
    """The names in force, by family."""
    return {family: getattr(core.scheduler.policy_config, family) for family in FAMILIES}


def _tiers(core: Core, block_bytes: int) -> dict[str, object]:
    return {
        shelf.name: {
            "up": shelf.up,
            "blocks": len(shelf),
            "capacity_blocks": shelf.capacity,
            "pinned_blocks": shelf.pinned,
            "block_bytes": block_bytes,
        }
        for shelf in core.scheduler.residency.shelves
    }


def tier_bytes(core: Core, block_bytes: int) -> dict[str, tuple[bool, int, int]]:
    """By tier: whether it is in use, the bytes it may hold, and those it holds. None where there is no store."""
    if not block_bytes:
        return {}
    pool = core.scheduler.pool
    below = {
        shelf.name: (shelf.up, shelf.capacity * block_bytes, len(shelf) * block_bytes)
        for shelf in core.scheduler.residency.shelves
    }
    return {DEVICE: (True, pool.blocks * block_bytes, (pool.held + pool.idle) * block_bytes), **below}


def summary(sequences: list[Sequence]) -> dict[str, object]:
    """One request's choices as one entry: its state is that of the choice that is furthest on."""
    first = sequences[0]
    states = {sequence.state.value for sequence in sequences}
    return {
        "id": first.request.id,
        "state": next(state for state in ("running", "loading", "waiting") if state in states),
        "replica": 0,
        "choices": len(sequences),
        "priority": first.request.priority,
        "class": first.class_name,
        "tenant": first.tenant,
        "arrived": first.arrived,
        "prompt_tokens": first.prompt_tokens,
        "cached_tokens": first.cached_tokens,
        "output_tokens": sum(sequence.output_tokens for sequence in sequences),
        "preemptions": sum(sequence.preemptions for sequence in sequences),
        "promotions": sum(sequence.promotions for sequence in sequences),
        "recomputed_tokens": sum(sequence.recomputed_tokens for sequence in sequences),
        "reloaded_tokens": sum(sequence.reloaded_tokens for sequence in sequences),
        "kv_blocks": sum(sequence.held_blocks for sequence in sequences),
    }
