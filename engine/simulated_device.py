"""A replica's device in virtual time: what it was told, and what keeps its next step waiting."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.events import Instruction, Report
from engine.profile import Profile
from engine.step_time import Shape
from kvstore.copies import DEVICE, Copy


@dataclass(slots=True)
class Device:
    free: float = 0.0  # when all that it was told is done
    under_way: deque[Shape] = field(default_factory=deque)
    last_step_done: int = 0
    ended: Shape = field(default_factory=Shape)  # what that step was, …
    ended_at: float = -1.0  # … and when
    held_copies: list[Copy] = field(default_factory=list)  # these wait for a step to end
    # with the event at hand
    finished: int = 0  # choices that ended
    copies: int = 0  # from and to it, begun
    copied_blocks: int = 0

    def begin_count(self) -> None:
        """Another event is at hand."""
        self.finished = self.copies = self.copied_blocks = 0

    def count(self, instructions: Iterable[Instruction]) -> None:
        """Of what that leads to, what keeps a next step waiting."""
        for each in instructions:
            if type(each) is Report:
                self.finished += 1
            elif type(each) is Copy and DEVICE in (each.source, each.target):
                self.copies += 1
                self.copied_blocks += len(each.sources)

    def pause(self, now: float, admitted: int, profile: Profile) -> float:
        """Until a step is launched that is told with the event at hand, and is the first of so many choices."""
        between = profile.between
        ended = self.ended_at == now
        pause = between.after(self.ended, self.finished, admitted) if ended else between.idle
        return pause + between.copying(self.copies, self.copied_blocks * profile.block_bytes)
