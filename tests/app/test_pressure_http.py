"""Requests that end in every way at a server that is short of room in all tiers: nothing is left, answers are right.

A thousand of them: `python -m bench.crashes --cancels 1000`.
"""

import random
from pathlib import Path

from app.compose import SHIPPED
from bench import cancels, conversations
from tests.app.lives import configuration, served

SHAPE = conversations.Shape(
    conversations=6,
    turns=3,
    system_tokens=64,
    opening_tokens=32,
    user_tokens=24,
    least_answer=16,
    most_answer=40,
)
BLOCK_BYTES = 49152


async def test_cancels_at_random_states_leave_nothing_behind_in_any_tier(tmp_path: Path) -> None:
    async with served(configuration(kv_blocks=512)) as unpressured:
        talks = await conversations.answered(unpressured.http, SHIPPED, SHAPE, seed=0)
    cramped = configuration(tmp_path / "kv", kv_blocks=32, host_bytes=16 * BLOCK_BYTES, disk_bytes=4 * 2**20)
    outcome = cancels.Outcome(wanted=60)
    async with served(cramped) as server:  # at its end it checks pins, copies, blocks and books
        await cancels.disturb(outcome, server.http, random.Random(0), talks)
        for kind in ("missing", "corrupt", "io", "down"):  # "full" is how a small store says: not now
            assert await server.metric("sluice:kv_tier_errors_total", kind=kind) == 0
    assert outcome.problems == []
    assert outcome.cancelled.total() >= 60
    assert outcome.metrics["preemptions"] > 0
    assert outcome.metrics["tokens hit in disk"] > 0
    assert sum((file.stat().st_size for file in (tmp_path / "kv").iterdir()), 0) <= 4 * 2**20
