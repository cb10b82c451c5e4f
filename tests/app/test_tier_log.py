"""Failures of tiers in the log: once a kind, not once a block."""

from structlog.testing import capture_logs

from app.tier_log import SILENCE_SECONDS, TierLog
from engine.records import CopyRecord
from kvstore.copies import DISK, HOST, Loss


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
