"""From the configuration to the core's: what needs no model and no torch, so that the simulator shares it."""

from app.config import Config
from app.policy_sections import PARAMETERS
from engine.checkpoint import CheckpointConfig
from engine.fleet import BalanceConfig
from engine.policy_set import PolicyConfig
from engine.scheduler import SchedulerConfig
from kvstore.below import ResidencyConfig

IN_FLIGHT_BYTES = 64 * 2**20
IN_FLIGHT_BLOCKS = 256
"""On their way down from the device at once: the larger of the two. A long prompt fills hundreds of blocks in a step or
two, and what finds no room to be saved is computed again after a preemption."""

COPY_BYTES = 4 * 2**20
"""Of one copy: small enough for others to come between."""


def scheduler_config(config: Config, blocks: int, block_bytes: int) -> SchedulerConfig:
    """All but the tiers below the device, whose sizes are known when they are there. `blocks`: of the device."""
    engine, checkpoint = config.engine, config.checkpoint
    return SchedulerConfig(
        block_size=engine.block_size,
        blocks=blocks,
        max_batch_tokens=engine.max_batch_tokens,
        max_sequences=engine.max_sequences,
        block_bytes=block_bytes,
        policies=policy_config(config),
        checkpoint=CheckpointConfig(
            checkpoint.every_tokens, checkpoint.every_seconds, checkpoint.ahead_steps
        ),
    )


def policy_config(config: Config) -> PolicyConfig:
    policies = config.policies
    return PolicyConfig(
        order=policies.order,
        victim=policies.victim,
        resume=policies.resume,
        prediction=policies.prediction,
        eviction=policies.eviction,
        placement=policies.placement,
        routing=policies.routing,
        rebalancing=policies.rebalancing,
        parameters={name: getattr(policies, name).model_dump() for name in PARAMETERS},
    )


def balance_config(config: Config) -> BalanceConfig:
    return BalanceConfig(**policy_config(config).parameters["balance"])


def residency_config(config: Config, block_bytes: int, host_blocks: int) -> ResidencyConfig:
    return ResidencyConfig(
        host_blocks=host_blocks,
        disk_blocks=config.kvstore.disk.bytes // block_bytes,  # until it is open and knows better
        copy_blocks=max(1, COPY_BYTES // block_bytes),
        spilling_blocks=max(IN_FLIGHT_BLOCKS, IN_FLIGHT_BYTES // block_bytes),
    )
