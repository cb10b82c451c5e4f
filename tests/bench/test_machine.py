"""What /proc says of this very process."""

import json
import os
import subprocess
import sys

import pytest

from bench import machine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks read /proc")


def test_the_machine_is_described_in_json() -> None:
    told = json.loads(json.dumps(machine.description()))
    assert told["processor"]
    assert told["cores"] == len(os.sched_getaffinity(0))


def test_a_process_has_used_what_its_own_clock_says() -> None:
    """Within the resolution of a tick, and what passes between the two readings."""
    before = time_used()
    used = machine.process_seconds(os.getpid())
    assert before - 2 / machine.TICKS_PER_SECOND <= used <= time_used() + 2 / machine.TICKS_PER_SECOND


def time_used() -> float:
    own = os.times()
    return own.user + own.system + own.children_user + own.children_system


def test_others_never_use_less_than_nothing() -> None:
    assert machine.Others(os.getpid()).cores() >= 0.0


def test_a_process_that_is_gone_is_named() -> None:
    with pytest.raises(machine.NoSuchProcess, match="no process 0 here"):
        machine.resident_bytes(0)


def test_a_process_is_of_its_own_family_and_so_are_its_children() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert {os.getpid(), child.pid} <= set(machine.family(os.getpid()))
        assert machine.family(child.pid) == [child.pid]
        child.communicate(b"\n")


def test_neighbours_are_there_for_as_long_as_they_are_wanted() -> None:
    before = len(machine.family(os.getpid()))
    with machine.neighbours(2):
        assert len(machine.family(os.getpid())) == before + 2
    assert len(machine.family(os.getpid())) == before
