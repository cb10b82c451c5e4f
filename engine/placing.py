"""Which replica a request runs on: the routing policy is asked about those that can take it. Pure.

What the policy sees of a replica is candidates.py's and member.py's; what is done with the answer is fleet.py's.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from engine.candidates import Prompt, Wanted, candidate, prompt_of, work_seconds
from engine.common import Common
from engine.member import Member
from engine.request import Request
from engine.sequence import Sequence as EngineSequence
from kvstore.block import Key
from policies.decisions import Decision, Kind

KEPT_SESSIONS = 100_000
"""Whose last replica is remembered; the one that asked longest ago is forgotten first."""


class Place(NamedTuple):
    member: Member
    work_seconds: float  # what it is charged there
    decision: Decision | None  # None: there is one replica, so nothing was decided


class Placing:
    def __init__(self, members: list[Member], common: Common) -> None:
        self._members = members
        self._common = common
        self._sessions: OrderedDict[str, int] = OrderedDict()

    def taking(self, tokens: int) -> list[Member]:
        """Replicas that may take a request of so many tokens: those that drain, only when there are no others."""
        fitting = [member for member in self._members if member.up and tokens <= member.core.config.context]
        return [member for member in fitting if member.accepting] or fitting

    def newcomer(self, members: Sequence[Member], request: Request, keys: list[Key]) -> Place:
        """Of a request, whose prompt's full blocks have these keys. `members` are not empty."""
        expected = float(request.stopping.max_tokens)
        if not self._alone:
            core = self._members[0].core
            expected = self._common.policies.prediction.remaining(core.preview(request))
        return self._place(members, self._wanted(request, len(request.prompt), keys, expected))

    def anew(self, sequence: EngineSequence, members: Sequence[Member]) -> Member | None:
        """Of a sequence that is to go on elsewhere; None: there are no members."""
        if not members:
            return None
        keys, tokens = sequence.block_keys(self._block_size), len(sequence.tokens)
        wanted = self._wanted(sequence.request, tokens, keys, sequence.expected_remaining_tokens)
        return self._place(members, wanted).member

    def better(self, sequence: EngineSequence, here: Member) -> Member | None:
        """Among the other replicas that accept."""
        tokens = sequence.prompt_tokens + sequence.max_tokens
        others = [member for member in self.taking(tokens) if member is not here and member.accepting]
        return self.anew(sequence, others)

    def remember(self, session: str, replica: int) -> None:
        """The session's last request was there."""
        if session:
            self._sessions[session] = replica
            self._sessions.move_to_end(session)
            if len(self._sessions) > KEPT_SESSIONS:
                self._sessions.popitem(last=False)

    @property
    def _alone(self) -> bool:
        return len(self._members) == 1

    @property
    def _block_size(self) -> int:
        return self._members[0].core.config.scheduler.block_size

    def _wanted(self, request: Request, tokens: int, keys: list[Key], expected: float) -> Wanted:
        core = self._members[0].core
        return Wanted(
            prompt=Prompt(tokens, keys) if self._alone else prompt_of(core, tokens, keys),
            expected_tokens=expected,
            urgent=request.service.rank == 0 and bool(request.service.name),
            session_home=self._sessions.get(request.session) if request.session else None,
        )

    def _place(self, members: Sequence[Member], wanted: Wanted) -> Place:
        if self._alone:
            return Place(members[0], work_seconds(members[0], wanted), None)
        candidates = [candidate(member, wanted) for member in members]
        placed = self._common.policies.routing(candidates)
        chosen = next(each for each in candidates if each.number == placed.replica)
        where, name = f"replica {placed.replica}", self._common.config.routing
        decision = Decision(Kind.PLACED, name, where, placed.reason, placed.score, placed.alternatives)
        return Place(self._members[placed.replica], chosen.work_seconds, decision)
