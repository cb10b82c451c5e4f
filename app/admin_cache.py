"""For operators: `/admin/cache/…`, what the KV store holds, and shrinking or clearing its tiers.

Bytes here are those of KV: blocks times the size of one; a record on disk takes whole pages, so somewhat more. What
stays, whatever is asked: blocks of running requests, blocks that a copy touches, and those that a waiting request's
snapshot relies on. Verifying the disk is app/admin_verify.py's; the command line's side is app/cache_command.py's.
"""

import asyncio
from typing import Annotated, Any, Literal

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field

from app.bodies import read_json
from app.errors import ApiError
from app.served import SERVED, Served
from engine.engine import Engine
from kvstore.copies import DEVICE, DISK, HOST
from kvstore.transfer import Measured, Totals

TIERS = (DEVICE, HOST, DISK)

BLOCKS_A_TURN = 1000
"""Forgotten in one turn of the event loop, at most: some milliseconds."""


class Clear(BaseModel):
    """Which tier; "all" are those in use."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    tier: Literal["device", "host", "disk", "all"]


class Prune(Clear):
    bytes: Annotated[int, Field(ge=0, le=2**60)]  # to be kept, of each


# --- stat -----------------------------------------------------------------------------------------------------------


async def stat(http: web.Request) -> web.Response:
    """What each tier holds, and has moved and lost since the start; how fast copies are.

    Hit tokens of a replica that was started again are those since then.
    """
    served = http.app[SERVED]
    answer = {
        "block_bytes": block_bytes(served),
        "tiers": {tier: _tier(served, tier) for tier in TIERS},
        "copies": [_route(measured) for measured in served.store.measured()] if served.store else [],
    }
    return web.json_response(answer)


def block_bytes(served: Served) -> int | None:
    """Of KV. None where there is no tier below the device: nobody asked the runner."""
    return served.store.block_bytes(DEVICE) if served.store else None


def _tier(served: Served, tier: str) -> dict[str, Any]:
    size = block_bytes(served)
    hits = sum(core.scheduler.counts.hit_tokens[tier] for core in served.engine.fleet.cores)
    totals = (served.store.totals() if served.store else {}).get(tier, Totals())
    reason = why_not_in_use(served, tier)
    blocks = _blocks(served.engine, tier)
    in_bytes = {
        name.replace("blocks", "bytes"): size and count * size
        for name, count in blocks.items()
        if name != "pinned_blocks"
    }
    moved = {
        "hit_tokens": hits,
        "read_bytes": totals.read_bytes,
        "written_bytes": totals.written_bytes,
        "lost_blocks": {loss.value: count for loss, count in totals.losses.items()},
    }
    return {"up": reason is None, "reason": reason} | blocks | in_bytes | moved


def _blocks(engine: Engine, tier: str) -> dict[str, int]:
    """Pinned: on the device, what sequences hold; below it, what snapshots rely on."""
    if tier == DEVICE:
        pools = [core.scheduler.pool for core in engine.fleet.cores]
        return {
            "used_blocks": sum(pool.held + pool.idle for pool in pools),
            "capacity_blocks": sum(pool.blocks for pool in pools),
            "pinned_blocks": sum(pool.held for pool in pools),
        }
    shelf = engine.fleet.common.below.shelves.named(tier)
    return {
        "used_blocks": len(shelf),
        "capacity_blocks": shelf.capacity,
        "pinned_blocks": shelf.pinned,
    }


def why_not_in_use(served: Served, tier: str) -> str | None:
    """One line; None where it is in use."""
    if tier == DEVICE or served.engine.fleet.common.below.shelves.named(tier).up:
        return None
    if not {HOST: served.kvstore.host.bytes, DISK: served.kvstore.disk.bytes}[tier]:
        return f"turned off: kvstore.{tier}.bytes is 0"
    found = served.store.down().get(tier) if served.store else None
    return found or "it could not be had at the start; the log says why"


def _route(measured: Measured) -> dict[str, Any]:
    return {
        "source": measured.source,
        "target": measured.target,
        "copy_bytes": measured.size_class,  # rounded up to a power of two
        "copies": measured.copies,
        "bytes_per_second": round(measured.bytes_per_second),
        "seconds": measured.seconds,
        "queued_seconds": measured.queued_seconds,
    }


# --- prune and clear ------------------------------------------------------------------------------------------------


async def prune(http: web.Request) -> web.Response:
    """Evicts by the policy until a tier has at most so many bytes. The device forgets all its idle blocks at once."""
    body = await read_json(http, Prune)
    size = block_bytes(http.app[SERVED])
    return await _shrink(http.app[SERVED], body.tier, body.bytes // size if size else 0)


async def clear(http: web.Request) -> web.Response:
    """Forgets all that is idle."""
    body = await read_json(http, Clear)
    return await _shrink(http.app[SERVED], body.tier, 0)


async def _shrink(served: Served, tier: str, blocks: int) -> web.Response:
    asked = TIERS if tier == "all" else (tier,)
    reasons = {each: why_not_in_use(served, each) for each in asked}
    if tier != "all" and reasons[tier]:
        raise ApiError(409, f"the {tier} tier is not in use: {reasons[tier]}", code="tier_not_in_use")
    answer = {}
    for each in (each for each in asked if not reasons[each]):
        dropped = await shrink(served.engine, each, blocks)
        left = _blocks(served.engine, each)["used_blocks"]
        size = block_bytes(served)
        answer[each] = {"dropped_blocks": dropped, "used_blocks": left, "used_bytes": size and left * size}
    return web.json_response({"tiers": answer})


async def shrink(engine: Engine, tier: str, blocks: int) -> int:
    """Shrinks a tier to `blocks`, some at a turn of the event loop. Returns how many blocks left it."""
    used = before = _blocks(engine, tier)["used_blocks"]
    while tier != DEVICE and used - blocks > BLOCKS_A_TURN:
        engine.prune(tier, used - BLOCKS_A_TURN)
        await asyncio.sleep(0)
        left = _blocks(engine, tier)["used_blocks"]
        if left >= used:
            break  # the policy finds nobody who may leave
        used = left
    if used > blocks:
        engine.prune(tier, blocks)
    return max(0, before - _blocks(engine, tier)["used_blocks"])
