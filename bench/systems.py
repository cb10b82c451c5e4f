"""Systems that are compared: keys of [policies], ours and what others do, on the same engine. Live and simulated."""

from argparse import ArgumentTypeError
from collections.abc import Mapping

UNFORESEEING = {"admission.risk": "1.0", "admission.wait_steps": "0", "promotion.service_tokens": "0"}
SYSTEMS: Mapping[str, Mapping[str, str]] = {
    "ours": {},
    "vllm": {"order": "fcfs", "victim": "last_admitted", "resume": "recompute"} | UNFORESEEING,
    "fcfs_reload": {"order": "fcfs", "victim": "last_admitted", "resume": "reload"} | UNFORESEEING,
    "sglang": {"order": "fcfs", "victim": "fewest_output", "resume": "recompute"} | UNFORESEEING,
    "vllm_53723": {"order": "fcfs", "victim": "least_computed", "resume": "recompute"} | UNFORESEEING,
    "fastserve": {"order": "mlq", "victim": "last_admitted", "resume": "reload"} | UNFORESEEING,
}
"""What is left out has its default."""


def named(text: str) -> tuple[str, dict[str, str]]:
    """A system of the command line: NAME, or NAME=key:value,key:value over the defaults. Raises ArgumentTypeError."""
    name, _, told = text.partition("=")
    if not told:
        if name not in SYSTEMS:
            raise ArgumentTypeError(f"there is no system {name!r}: {', '.join(SYSTEMS)}, or NAME=key:value,…")
        return name, dict(SYSTEMS[name])
    pairs = [each.partition(":") for each in told.split(",")]
    return name, {key: value for key, _, value in pairs}
