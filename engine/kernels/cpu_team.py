"""Threads that compute compiled kernels together, and wait for none that is not there.

Work is a list of calls, one *phase* each; a phase begins when all of the one before is done. Every thread of the team,
the caller's too, enters the phase that is open, computes pieces until none is left, and leaves; the last to leave opens
the next. So whoever has a core goes on, and only a thread that the system stops in the middle of a piece is waited for.
An OpenMP team meets twice in every call, and with one other busy process on two cores it waited up to 260 ms a step.

A thread without work spins, then gives its core to whoever wants it, then sleeps. Every thread that calls kernels has
a team of its own (`team`), which ends with it: runners side by side neither wait for each other nor for one that hangs.
Which kernels there are, and how they share a phase (`claim`), is in cpu_native.py and theirs.
"""

import atexit
import ctypes
import weakref
from threading import Thread, local
from typing import Any

from llvmlite import ir
from numba import carray, types

from engine.kernels.cpu_lanes import call, clear, emitted, get_i64, pointer, put_i64
from engine.kernels.cpu_native import Clock, Native, inner, native, structure, target, threads

EVERYBODY = 1 << 16  # more than there are threads
_RING = 1024  # calls at most in one go
_SPINS = 2000  # some 50 µs: longer than most pieces
_YIELDS = 6000  # then 2 ms, unless others want the core: longer than the event loop needs between steps

LEAVING_SECONDS = 1.0
"""How long a team that is stopped waits for a member: a thousand times what one needs that does not hang."""

_i64 = ctypes.c_int64
_CALL_BYTES = 24  # function, argument, how many threads at most
TeamState = structure(
    "TeamState",
    state=_i64,  # the number of the open phase << 16 | threads inside
    end=_i64,  # the number of the first phase that is not known yet
    threads=_i64,  # those with lower numbers take part
    asleep=_i64,  # how many are, or are about to be
    stopped=_i64,
    mutex=_i64 * 16,  # a pthread_mutex_t: 40 to 64 bytes
    condition=_i64 * 16,  # a pthread_cond_t: 48 bytes or fewer; tells that `end` or `stopped` has changed
    ring=_i64
    * (3 * _RING),  # call n stands at n % _RING; never freed, so that a late thread reads no lost memory
)
_END, _THREADS, _CALLS = TeamState.end.offset, TeamState.threads.offset, TeamState.ring.offset
_ASLEEP, _STOPPED = TeamState.asleep.offset, TeamState.stopped.offset
_MUTEX, _CONDITION = TeamState.mutex.offset, TeamState.condition.offset
MemberArguments = structure(
    "MemberArguments",
    team=_i64,  # address of the TeamState
    number=_i64,  # 0 leads: it brings the calls, and returns when they are done; others when the team is stopped
    calls=_i64,  # the leader's
    count=_i64,
)
_ON_X86 = target()[0].startswith("x86")


@emitted(types.int64, types.int64)
def _look(builder: Any, address: Any) -> Any:
    return builder.load_atomic(pointer(builder, address), "seq_cst", 8, typ=ir.IntType(64))


@emitted(types.void, types.int64, types.int64)
def _add(builder: Any, address: Any, count: Any) -> None:
    builder.atomic_rmw("add", pointer(builder, address), count, "seq_cst")


@emitted(types.boolean, types.int64, types.int64, types.int64)
def _swap(builder: Any, address: Any, old: Any, new: Any) -> Any:
    """Whether the number at the address was `old`; it is `new` then."""
    found = builder.cmpxchg(pointer(builder, address), old, new, "seq_cst", "seq_cst")
    return builder.extract_value(found, 1)


@emitted(types.void, types.int64, types.int64)
def _invoke(builder: Any, function: Any, argument: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [ir.PointerType()])
    builder.call(builder.inttoptr(function, kind.as_pointer()), [pointer(builder, argument)])


@emitted(types.void, types.int64)
def _rest(builder: Any, waited: Any) -> None:
    """A moment's pause; after many, the core to whoever wants it."""
    with builder.if_else(builder.icmp_signed("<", waited, ir.Constant(ir.IntType(64), _SPINS))) as (
        soon,
        late,
    ):
        with soon:
            if _ON_X86:
                call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        with late:
            call(builder, "sched_yield", ir.IntType(32))


def _of_pthread(name: str, *kinds: Any) -> Any:
    """A function of the C library's, on addresses."""

    @emitted(types.void, *kinds)
    def calling(builder: Any, *addresses: Any) -> None:
        call(builder, name, ir.IntType(32), *(pointer(builder, address) for address in addresses))

    return calling


_lock = _of_pthread("pthread_mutex_lock", types.int64)
_unlock = _of_pthread("pthread_mutex_unlock", types.int64)
_wait = _of_pthread("pthread_cond_wait", types.int64, types.int64)
_broadcast = _of_pthread("pthread_cond_broadcast", types.int64)


@inner
def _sleep(team: int, end: int) -> None:
    """Until there are calls beyond `end`, or the team is stopped."""
    _add(team + _ASLEEP, 1)
    _lock(team + _MUTEX)
    while _look(team + _END) == end and _look(team + _STOPPED) == 0:
        _wait(team + _CONDITION, team + _MUTEX)
    _unlock(team + _MUTEX)
    _add(team + _ASLEEP, -1)


@inner
def _wake(team: int) -> None:
    """`end` or `stopped` has changed before: whoever is about to sleep sees it, or is counted."""
    if _look(team + _ASLEEP) > 0:
        _lock(team + _MUTEX)
        _broadcast(team + _CONDITION)
        _unlock(team + _MUTEX)


@inner
def _bring(team: int, calls: int, count: int) -> None:
    """Makes the calls known, their counters cleared. All earlier ones are done."""
    end = get_i64(team + _END)
    for i in range(count):
        for word in range(0, _CALL_BYTES, 8):
            to = team + _CALLS + (end + i) % _RING * _CALL_BYTES
            put_i64(to + word, get_i64(calls + i * _CALL_BYTES + word))
        clear(get_i64(calls + i * _CALL_BYTES + 8), 16)
    _add(team + _END, count)
    _wake(team)


@inner
def _leave(team: int) -> None:
    """The last to leave a phase opens the next: all its pieces are taken, and nobody is left at one."""
    while True:
        state = _look(team)
        if _swap(team, state, state - 1 if state & 0xFFFF > 1 else ((state >> 16) + 1) << 16):
            return


@native(MemberArguments)
def _take_part(arguments: Any) -> None:
    a = carray(arguments, 1)[0]
    team, leads = a.team, a.number == 0
    if leads:
        _bring(team, a.calls, a.count)
    waited, done = 0, -1
    while leads or _look(team + _STOPPED) == 0:
        state = _look(team)
        phase, end = state >> 16, _look(team + _END)
        over = phase == end
        if over and leads:
            return
        if over and waited > _SPINS + _YIELDS:
            _sleep(team, end)
            waited = 0
        its = team + _CALLS + phase % _RING * _CALL_BYTES
        full = state & 0xFFFF >= get_i64(its + 16) or a.number >= get_i64(team + _THREADS)
        if over or full or phase == done:
            _rest(waited)
            waited += 1
        elif _swap(team, state, state + 1):  # then the phase is open still, so what was read is true
            _invoke(get_i64(its), get_i64(its + 8))
            _leave(team)
            waited, done = 0, phase


@native(MemberArguments)
def _stop(arguments: Any) -> None:
    team = carray(arguments, 1)[0].team
    _add(team + _STOPPED, 1)
    _wake(team)


class Team:
    """As many threads as torch was told to use, the caller's included. For one caller at a time."""

    def __init__(self) -> None:
        self._state = TeamState()
        self._leader = MemberArguments(team=ctypes.addressof(self._state))
        self._call = (_i64 * 3)(0, 0, EVERYBODY)
        self._members: list[Thread] = []
        library, address = ctypes.CDLL(None), ctypes.addressof(self._state)
        library.pthread_mutex_init(ctypes.c_void_p(address + _MUTEX), None)
        library.pthread_cond_init(ctypes.c_void_p(address + _CONDITION), None)
        _stop.compile()  # not while a thread ends
        weakref.finalize(self, _dismiss, self._state).atexit = False
        _TEAMS.add(self)

    def run(self, kernel: Native, arguments: ctypes.Structure, clock: Clock) -> None:
        """Calls the kernel on all threads, the interpreter lock released."""
        self._call[0], self._call[1] = kernel.address, ctypes.addressof(arguments)
        self._lead(ctypes.addressof(self._call), 1, clock)

    def run_calls(self, calls: ctypes.Array[ctypes.c_int64], clock: Clock) -> None:
        """One call after another: function, argument, and how many threads at most may share it, for each."""
        address, count = ctypes.addressof(calls), len(calls) // 3
        for first in range(0, count, _RING):
            self._lead(address + first * _CALL_BYTES, min(_RING, count - first), clock)

    def stop(self) -> None:
        """Ends the other threads, from any thread. The caller of `run` is alone from now on.

        One that hangs in a kernel is waited for LEAVING_SECONDS.
        """
        _dismiss(self._state)
        for member in self._members:
            member.join(LEAVING_SECONDS)

    def _lead(self, calls: int, count: int, clock: Clock) -> None:
        if len(self._members) + 1 < threads():
            self._gather()
        self._state.threads = threads()
        self._leader.calls, self._leader.count = calls, count
        _take_part.released(self._leader, clock)

    def _gather(self) -> None:
        for number in range(len(self._members) + 1, threads()):
            arguments = MemberArguments(team=ctypes.addressof(self._state), number=number)
            member = Thread(
                target=_belong, args=(self._state, arguments), name=f"kernels {number}", daemon=True
            )
            self._members.append(member)
            member.start()


def _belong(state: ctypes.Structure, arguments: ctypes.Structure) -> None:
    """A member's whole life. It holds the state it reads: its team may go before it has noticed."""
    _take_part.released(arguments, Clock())


def _dismiss(state: ctypes.Structure) -> None:
    """Tells the members to end; waits for none, as it may be called while a thread is being taken apart."""
    _stop.alone(MemberArguments(team=ctypes.addressof(state)))


_TEAMS = weakref.WeakSet[Team]()


@atexit.register
def _stop_all() -> None:
    """Compiled code must not outlive what it reads."""
    for each in list(_TEAMS):
        each.stop()


class _OfThread(local):
    def __init__(self) -> None:
        self.team = Team()


_mine = _OfThread()


def team() -> Team:
    """This thread's. Its members end when the thread has."""
    return _mine.team
