"""What operators see of the fleet: its state as plain data, for `/admin/state`, `/admin/requests` and `/metrics`."""

from collections.abc import Sequence as Sequence_

from engine.fleet import Fleet
from engine.member import Member
from engine.policy_set import FAMILIES
from engine.replica import Replica
from engine.request import Finished
from engine.sequence import Sequence


def fleet_state(fleet: Fleet, replicas: Sequence_[Replica], block_bytes: int) -> dict[str, object]:
    """Sums over all replicas, then each by itself. `block_bytes`: of one block; 0 where there is no store."""
    cores = fleet.cores
    pools = [core.scheduler.pool for core in cores]
    return {
        "context": fleet.context,
        "block_size": cores[0].scheduler.config.block_size,
        "kv_blocks": sum(pool.blocks for pool in pools),
        "kv_used_blocks": sum(pool.held for pool in pools),
        "kv_peak_blocks": sum(replica.kv_peak_blocks for replica in replicas),
        "kv_cached_blocks": sum(pool.cached for pool in pools),
        "running": sum(len(core.scheduler.running) for core in cores),
        "waiting": fleet.waiting,
        "preemptions": sum(core.scheduler.counts.preemptions for core in cores),
        "tiers": _tiers(fleet, block_bytes),
        "copies": sum(len(core.scheduler.residency.flights) for core in cores),
        "policies": policies(fleet),
        "migrations_under_way": len(fleet.moves),
        "stayed": fleet.stayed,
        "replicas": replica_states(fleet, replicas),
    }


def replica_states(fleet: Fleet, replicas: Sequence_[Replica]) -> list[dict[str, object]]:
    """Of each, by number."""
    return [_replica_state(member, replica) for member, replica in zip(fleet.members, replicas, strict=True)]


def _replica_state(member: Member, replica: Replica) -> dict[str, object]:
    """`kv_peak_blocks`: most held after any step: demand, where there was no pressure. `epoch`: how often it was lost.

    Counts begin anew with a lost one's restart.
    """
    core, error = member.core, member.errors
    scheduler = core.scheduler
    return {
        "replica": member.number,
        "state": _state(member, replica),
        "reason": member.down_reason,
        "role": member.role,
        "limit_tokens": member.limit_tokens,
        "epoch": replica.epoch,
        "context": core.config.context,
        "kv_blocks": scheduler.pool.blocks,
        "kv_used_blocks": scheduler.pool.held,
        "kv_peak_blocks": replica.kv_peak_blocks,
        "kv_cached_blocks": scheduler.pool.cached,
        "running": len(scheduler.running),
        "loading": len(scheduler.loading),
        "waiting": scheduler.waiting,
        "preemptions": scheduler.counts.preemptions,
        "charged": member.requests,
        "placed": member.placed,
        "charged_seconds": member.charged_seconds,
        "backlog_seconds": member.backlog_seconds,
        "pace": scheduler.valuation.costs.steps.pace,
        "forecast_tokens": member.forecast_tokens,
        "forecast_error": error.mean_relative_error,
        "forecast_bias": error.bias,
    }


def _state(member: Member, replica: Replica) -> str:
    if replica.starting:
        return "starting"
    return "down" if not member.up else "draining" if member.draining else "up"


def policies(fleet: Fleet) -> dict[str, str]:
    """The names in force, by family."""
    return {family: getattr(fleet.common.config, family) for family in FAMILIES}


def _tiers(fleet: Fleet, block_bytes: int) -> dict[str, object]:
    return {
        shelf.name: {
            "up": shelf.up,
            "blocks": len(shelf),
            "capacity_blocks": shelf.capacity,
            "pinned_blocks": shelf.pinned,
            "block_bytes": block_bytes,
        }
        for shelf in fleet.common.below.shelves
    }


TierBytes = tuple[bool, int, int]
"""Whether a tier is in use, the bytes it may hold, and those it holds."""


def device_bytes(fleet: Fleet, block_bytes: int) -> list[TierBytes]:
    """By replica. None where there is no store."""
    if not block_bytes:
        return []
    pools = [(member.up, member.core.scheduler.pool) for member in fleet.members]
    return [(up, pool.blocks * block_bytes, (pool.held + pool.idle) * block_bytes) for up, pool in pools]


def tier_bytes(fleet: Fleet, block_bytes: int) -> dict[str, TierBytes]:
    """Of the tiers below the devices, by name. None where there is no store."""
    return {
        shelf.name: (shelf.up, shelf.capacity * block_bytes, len(shelf) * block_bytes)
        for shelf in (fleet.common.below.shelves if block_bytes else ())
    }


def summary(fleet: Fleet, request_id: str, ended: Sequence_[Finished]) -> dict[str, object]:
    """One request's choices as one entry: its state is that of the choice that is furthest on.

    `ended`: those that have ended; what all have had is added up, so that no figure falls when one ends.
    """
    sequences = fleet.sequences_of(request_id)
    replicas = [core.replica for core in fleet.cores if request_id in core.sequences]
    first = sequences[0]
    everyone: list[Sequence | Finished] = [*sequences, *ended]
    states = {sequence.state.value for sequence in sequences}
    return {
        "id": first.request.id,
        "state": next(state for state in ("running", "loading", "waiting") if state in states),
        "replica": replicas[0],
        "replicas": replicas,
        "choices": len(everyone),
        "priority": first.request.priority,
        "class": first.class_name,
        "tenant": first.tenant,
        "arrived": first.arrived,
        "prompt_tokens": first.prompt_tokens,
        "cached_tokens": next((each.cached_tokens for each in everyone if each.choice == 0), 0),
        "output_tokens": sum(each.output_tokens for each in everyone),
        "preemptions": sum(each.preemptions for each in everyone),
        "promotions": sum(each.promotions for each in everyone),
        "migrations": sum(each.migrations for each in everyone),
        "recomputed_tokens": sum(each.recomputed_tokens for each in everyone),
        "reloaded_tokens": sum(each.reloaded_tokens for each in everyone),
        "kv_blocks": sum(sequence.held_blocks for sequence in sequences),
    }
