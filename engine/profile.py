"""A machine's profile: how long steps and copies take on it. One JSON file (docs/simulation.md has the format).

`sluice bench profile` measures one (app/profiling/); the simulator takes virtual time by it. No measuring here.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import to_json

from engine.step_time import CurveTime, Number, Points, Shape, TableTime, on_curve

Route = Annotated[
    str, Field(pattern=r"^(device>host|host>device|host>disk|device>disk|disk>host|disk>device)$")
]


class ProfileError(Exception):
    """A profile that cannot be used, with its path and what is wrong in it."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """Of one copy on one route: seconds = latency + bytes ÷ rate, from the moment its lane takes it up."""

    latency_seconds: Number
    bytes_per_second: Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Between:
    """Seconds from a step's end to the next one's launch: the loop wakes, the core decides, a thread takes the plan.

    They add up. Hidden where the next step was launched ahead.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    rows: Points = ((0.0, 0.0),)  # by rows of the step that ended: its tokens become text and news
    finished: Number = 0.0  # for each choice that ended with it
    admitted: Number = 0.0  # for each that the next step is the first of
    copy: Number = 0.0  # for each copy from or to the device that is begun with the next step
    copied_byte: Number = 0.0  # and for each of their bytes
    prefill: Number = 0.0  # more, where the step that ended had rows of several tokens
    idle: Number = 0.0  # instead of all that, where no step has just ended: from an arrival to the launch

    def copying(self, copies: int, copied_bytes: int) -> float:
        """More, where these are begun with the next step."""
        return self.copy * copies + self.copied_byte * copied_bytes

    def after(self, step: Shape, finished: int, admitted: int) -> float:
        """From the end of this step to the launch of the next."""
        more = self.prefill if step.prefill_rows else 0.0
        return on_curve(self.rows, step.rows) + more + self.finished * finished + self.admitted * admitted


@dataclass(frozen=True)
class Profile:
    __pydantic_config__ = ConfigDict(extra="forbid")

    machine: str
    model: str
    dtype: str
    source: str  # how the figures came about, with what they assume
    block_size: Annotated[int, Field(gt=0)]  # tokens
    block_bytes: Annotated[int, Field(gt=0)]
    context: Annotated[int, Field(gt=0)]  # tokens the model can attend to
    kv_blocks: Annotated[int, Field(gt=0)]  # of the device, unless the configuration says
    runs_ahead: bool  # the next step is launched while one runs
    step: Annotated[CurveTime | TableTime, Field(discriminator="kind")]
    between: Between = Between()
    transfers: dict[Route, Transfer] = field(default_factory=dict)
    disk_readers: Annotated[int, Field(ge=1)] = 2
    sluice_profile: Literal[1] = 1

    def transfer(self, source: str, target: str) -> Transfer:
        """Raises ProfileError: a tier that is turned on needs its routes measured."""
        if (found := self.transfers.get(f"{source}>{target}")) is None:
            raise ProfileError(
                f"the profile of {self.machine} has no transfers {source}>{target}: turn that tier off"
            )
        return found


_PROFILE = TypeAdapter(Profile)


def read_profile(path: Path) -> Profile:
    """Raises ProfileError."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ProfileError(f"{path} cannot be read: {error.strerror}") from error
    return _validated(text, path)


def checked(profile: Profile, source: Path) -> Profile:
    """As it will be read from its file. Raises ProfileError."""
    return _validated(to_json(profile), source)


def _validated(text: bytes, path: Path) -> Profile:
    try:
        return _PROFILE.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        why = f"{place}: {message}" if place else message
        raise ProfileError(f"{path} is no profile: {why}") from error


def write_profile(profile: Profile, path: Path) -> None:
    path.write_bytes(to_json(profile, indent=2) + b"\n")
