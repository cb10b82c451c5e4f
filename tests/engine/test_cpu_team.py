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
from engine.kernels.cpu_team import Team

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


def test_a_team_serves_one_caller_at_a_time(team: Team) -> None:
    """Two threads that call at once each find their work done."""
    works = [Work(), Work()]
    callers = [Thread(target=work.done_by, args=(team, 300)) for work in works]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert [list(work.numbers) for work in works] == [[300] * PIECES] * 2
