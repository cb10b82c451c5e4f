"""The team of threads: a call is complete when it returns, whoever took part in it."""

import ctypes
from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest
import torch
from numba import carray

from engine.kernels.cpu_lanes import claim, get_i64, put_i64
from engine.kernels.cpu_native import Clock, native, structure
from engine.kernels.cpu_team import Team, _look
from engine.kernels.cpu_team import team as team_of_thread

_i64 = ctypes.c_int64
PIECES = 50
GrowArguments = structure("GrowArguments", next=_i64, thread=_i64, counters=_i64, numbers=_i64)


@native(GrowArguments)
def _grow(arguments: Any) -> None:
    """Adds one to each of PIECES numbers, read and written apart: done twice at once, one is lost."""
    a = carray(arguments, 1)[0]
    while True:
        piece = claim(a.counters)
        if piece >= PIECES:
            break
        put_i64(a.numbers + 8 * piece, get_i64(a.numbers + 8 * piece) + 1)


WaitArguments = structure("WaitArguments", next=_i64, thread=_i64, counters=_i64, open=_i64)


@native(WaitArguments)
def _wait_for_gate(arguments: Any) -> None:
    """Returns when somebody has opened it: a kernel that hangs meanwhile."""
    a = carray(arguments, 1)[0]
    while _look(a.counters + 24) == 0:
        pass


class Work:
    def __init__(self) -> None:
        self.numbers = (_i64 * PIECES)()
        self.arguments = GrowArguments(numbers=ctypes.addressof(self.numbers))
        self.arguments.counters = ctypes.addressof(self.arguments)

    def done_by(self, team: Team, times: int) -> None:
        for _ in range(times):
            team.run(_grow, self.arguments, Clock())


@pytest.fixture
def team() -> Iterator[Team]:
    """A team of two, the caller's thread among them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    team = Team()
    yield team
    team.stop()
    torch.set_num_threads(threads)


def test_each_call_is_whole_before_the_next_begins(team: Team) -> None:
    work = Work()
    work.done_by(team, 3000)
    assert list(work.numbers) == [3000] * PIECES


def test_who_never_comes_is_not_waited_for(team: Team) -> None:
    """The other thread has ended; its caller does all the work."""
    work = Work()
    work.done_by(team, 1)
    team.stop()
    work.done_by(team, 10)
    assert list(work.numbers) == [11] * PIECES


def test_a_thread_has_a_team_of_its_own_which_ends_with_it() -> None:
    """Threads that call at once each find their work done; no member outlives its leader for long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    works, members = [Work(), Work()], []

    def calling(work: Work) -> None:
        work.done_by(team_of_thread(), 300)
        members.extend(team_of_thread()._members)

    callers = [Thread(target=calling, args=(work,)) for work in works]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    torch.set_num_threads(threads)
    assert [list(work.numbers) for work in works] == [[300] * PIECES] * 2
    assert len(set(members)) == 2
    for member in members:
        member.join(60)
        assert not member.is_alive()


def test_a_team_that_waits_for_its_kernel_holds_up_no_other() -> None:
    """One thread's call does not return; another thread's does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gate = WaitArguments()
    gate.counters = ctypes.addressof(gate)
    stuck = Thread(target=lambda: team_of_thread().run(_wait_for_gate, gate, Clock()), daemon=True)
    stuck.start()
    work = Work()
    work.done_by(team_of_thread(), 10)
    assert stuck.is_alive()
    assert list(work.numbers) == [10] * PIECES
    gate.open = 1
    stuck.join(60)
    torch.set_num_threads(threads)
    assert not stuck.is_alive()
