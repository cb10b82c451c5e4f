"""The slow tier takes its time and keeps every byte; what is said of decisions that turn is what was decided."""

import numpy as np
import pytest

from bench.slow_tier import Link, SlowTier
from bench.throttled import asked, parsed, turned
from kvstore.copies import HOST, Place
from kvstore.memory import MemoryTier


def test_a_link_takes_its_latency_and_its_bytes_and_may_become_slower() -> None:
    link = Link(latency_seconds=0.5, bytes_per_second=10.0)
    assert link.seconds(20) == 2.5
    link.slowdown = 20.0
    assert link.seconds(20) == 50.0


def test_a_slow_tier_moves_the_bytes_of_the_one_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lends no slot, so that nothing goes past the link."""
    slept: list[float] = []
    monkeypatch.setattr("bench.slow_tier.time.sleep", slept.append)
    blocks = np.arange(32, dtype=np.uint8).reshape(4, 8)
    tier = SlowTier(MemoryTier(HOST, blocks.copy()), Link(100.0, 1.0))
    assert tier.buffer(1) is None
    into = np.zeros(8, dtype=np.uint8)
    assert tier.write([Place(b"", 3)], [blocks[1]]) == [None]
    assert tier.read([Place(b"", 3)], [into]) == [None]
    assert (into == blocks[1]).all()
    assert [round(each) for each in slept] == [108, 108]


def test_decisions_have_turned_when_most_of_the_last_went_the_new_way() -> None:
    """Those before the change do not count."""
    decisions = [(0.5, True), (1.5, False), (2.0, True), (2.5, True), (3.5, True), (4.0, False)]
    assert turned(decisions, since=1.0, way=True) == 2.5
    assert turned(decisions, since=1.0, way=False) is None


def test_the_command_line_says_how_slow_the_link_is_and_how_often_requests_come() -> None:
    words = "--trace t --rows r --latency 0.05 --rate 4e7 --per-second 28 --order fcfs"
    run = asked(parsed(words.split()))
    assert (run.latency_seconds, run.bytes_per_second, run.rate) == (0.05, 4e7, 28.0)
    assert (run.order, run.system, run.policies) == ("fcfs", "cheapest", {})
