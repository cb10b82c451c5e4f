"""What is simulated: a configuration, a trace and a rate; and the product of what is swept. No running here."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product

from app.config import Config
from app.core_config import balance_config, residency_config, scheduler_config
from app.replica_tables import ReplicaTable, replicas_of
from app.simulate.arguments import MOST_REPLICAS
from engine.core import CoreConfig
from engine.fleet import FleetConfig, ReplicaConfig
from engine.profile import Profile
from engine.simulation import EOS

RATE, REPLICAS = "rate", "replicas"
"""What may be swept beside configuration keys."""


class BadSweep(Exception):
    """A sweep that says nothing; the message shows one that does."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """`settings`: `section.key=value` over the configuration's own; `rate` None: the trace's. `replicas`: so many
    alike; None: the configuration's.
    """

    settings: tuple[str, ...] = ()
    rate: float | None = None
    replicas: int | None = None

    @property
    def policies(self) -> str:
        """What tells it from others at the same rate."""
        told = [setting.removeprefix("policies.") for setting in self.settings]
        if self.replicas is not None:
            told.append(f"replicas={self.replicas}")
        return " ".join(told) or "as configured"

    @property
    def name(self) -> str:
        return self.policies if self.rate is None else f"{self.policies} @ {self.rate:g}/s"


def scenarios(sweeps: Iterable[str], rate: float | None, replicas: int | None = None) -> list[Scenario]:
    """The product of sweeps such as `policies.order=fcfs,hybrid`, `rate=1,2` and `replicas=4,8`. Raises BadSweep."""
    axes = [_axis(sweep) for sweep in sweeps]
    keys = [key for key, _ in axes]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise BadSweep(
            f"--sweep {twice[0]} is given twice: all of its values belong into one, as in {twice[0]}=A,B"
        )
    found = []
    for values in product(*(values for _, values in axes)):
        chosen = list(zip((key for key, _ in axes), values, strict=True))
        settings = tuple(f"{key}={value}" for key, value in chosen if key not in (RATE, REPLICAS))
        rates = [_rate(value) for key, value in chosen if key == RATE]
        counts = [_replicas(value) for key, value in chosen if key == REPLICAS]
        found.append(Scenario(settings, [rate, *rates][-1], [replicas, *counts][-1]))
    return found


def _axis(sweep: str) -> tuple[str, list[str]]:
    key, _, text = sweep.partition("=")
    values = [value.strip() for value in text.split(",") if value.strip()]
    if not key or not values or (key not in (RATE, REPLICAS) and "." not in key):
        raise BadSweep(
            f"--sweep {sweep!r}: wanted is section.key=value,value, rate=number,number or replicas=number,number"
        )
    return key, values


def _replicas(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MOST_REPLICAS:
        raise BadSweep(f"--sweep replicas: {text!r} is no whole number from 1 to {MOST_REPLICAS}")
    return int(text)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError as error:
        raise BadSweep(f"--sweep rate: {text!r} is no number") from error
    if not 0 < rate < float("inf"):
        raise BadSweep(f"--sweep rate: {text} is no rate")
    return rate


def for_block_size(profile: Profile, block_size: int) -> Profile:
    """The same machine with blocks of another size: as many bytes in all."""
    return replace(
        profile,
        block_size=block_size,
        block_bytes=profile.block_bytes * block_size // profile.block_size,
        kv_blocks=max(1, profile.kv_blocks * profile.block_size // block_size),
    )


def fleet_config(config: Config, profile: Profile, replicas: int | None = None) -> FleetConfig:
    """So many replicas alike, or as the `[[replica]]` tables say but for their devices: each is the profile's machine.

    Tiers below the devices have the bytes of the configuration in all, as in a server: replicas share them.
    """
    tables = replicas_of(config.replicas) if replicas is None else (ReplicaTable(),) * replicas
    return FleetConfig(
        tuple(
            ReplicaConfig(core_config(config, profile, table.kv_blocks), table.role, table.limit_tokens)
            for table in tables
        ),
        balance_config(config),
    )


def core_config(config: Config, profile: Profile, kv_blocks: int = 0) -> CoreConfig:
    """The core as the server would make it on the profile's machine, whose block size is the configuration's."""
    blocks = kv_blocks or config.engine.kv_blocks or profile.kv_blocks
    host_blocks = config.kvstore.host.bytes // profile.block_bytes
    residency = residency_config(config, profile.block_bytes, host_blocks)
    return CoreConfig(
        scheduler=replace(scheduler_config(config, blocks, profile.block_bytes), residency=residency),
        model_context=profile.context,
        max_queue=config.engine.max_queue,
        max_outstanding=2 if profile.runs_ahead else 1,
        eos_token_ids=(EOS,),
    )
