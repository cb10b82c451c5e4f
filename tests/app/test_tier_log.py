"""Failures of tiers in the log: once a kind, not once a block."""

import numpy as np
import pytest
from structlog.testing import capture_logs

from app.tier_log import SILENCE_SECONDS, TierLog
from app.tiers import tell_if_small
from engine.records import CopyRecord
from kvstore.copies import DEVICE, DISK, HOST, Loss
from kvstore.memory import MemoryTier


def test_a_kind_of_loss_is_one_line_until_it_is_old() -> None:
    now = [0.0]
    log = TierLog(clock=lambda: now[0])
    full = CopyRecord(HOST, DISK, 0, 0.1, 0.0, {Loss.FULL: 8})
    corrupt = CopyRecord(DISK, HOST, 0, 0.1, 0.0, {Loss.CORRUPT: 1})
    with capture_logs() as lines:
        for _ in range(5):
            log.observe(full)
        log.observe(corrupt)
        log.observe(CopyRecord(HOST, DISK, 100, 0.1, 0.0, {}))
        now[0] = SILENCE_SECONDS
        log.observe(full)
    assert [(line["tier"], line["kind"]) for line in lines] == [
        (DISK, "full"),
        (DISK, "corrupt"),
        (DISK, "full"),
    ]


@pytest.mark.parametrize(("host_blocks", "told"), [(3, True), (4, False)])
def test_a_host_tier_of_less_than_half_of_all_devices_kv_is_told_of(host_blocks: int, told: bool) -> None:
    host, *devices = (
        MemoryTier(name, np.zeros((blocks, 64), dtype=np.uint8))
        for name, blocks in ((HOST, host_blocks), (DEVICE, 5), (DEVICE, 3))
    )
    with capture_logs() as lines:
        tell_if_small(host, devices)
    assert [line["event"] for line in lines] == (["host_tier_small"] if told else [])
