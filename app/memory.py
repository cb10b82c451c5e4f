"""How many KV blocks the memory at hand allows, for one pool or several, when the configuration leaves it open."""

import os
from collections.abc import Sequence

CPU_SHARE = 0.3
"""Of the memory free at start: the machine has other work, and steps need some too."""

GPU_SHARE = 0.9


class NotEnoughMemory(Exception):
    """The KV pool does not fit."""


def free_cpu_bytes() -> int:
    """Memory that can be had without swapping: the kernel's own estimate where there is one."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            facts = dict(line.split(":", 1) for line in lines)
        return int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_fits(blocks: int, block_bytes: int, free_bytes: int) -> None:
    """Raises NotEnoughMemory when so many do not fit."""
    if blocks * block_bytes > free_bytes:
        raise NotEnoughMemory(
            f"kv_blocks = {blocks} needs {_gib(blocks * block_bytes)}, "
            f"but {_gib(free_bytes)} are free; lower it, or set it to 0"
        )


def kv_blocks(wanted: int, *, block_bytes: int, useful_blocks: int, free_bytes: int, share: float) -> int:
    """Blocks to allocate: `wanted`, or for 0 what `share` of the free memory holds, at most `useful_blocks`.

    Raises NotEnoughMemory when they do not fit.
    """
    check_fits(wanted, block_bytes, free_bytes)
    fitting = int(free_bytes * share) // block_bytes
    if not wanted and fitting < 1:
        raise NotEnoughMemory(
            f"not one KV block of {_gib(block_bytes)} fits into {_gib(free_bytes)} of free memory"
        )
    return wanted or min(fitting, useful_blocks)


def divided(
    wanted: Sequence[int], *, block_bytes: int, useful_blocks: int, free_bytes: int, share: float
) -> list[int]:
    """Blocks of each of several pools on one device, as `kv_blocks` has them for one.

    Those that want 0 get equal parts of `share` of what the others leave.
    """
    check_fits(sum(wanted), block_bytes, free_bytes)
    free_bytes -= sum(wanted) * block_bytes
    part = share / max(1, wanted.count(0))
    return [
        blocks
        or kv_blocks(
            0, block_bytes=block_bytes, useful_blocks=useful_blocks, free_bytes=free_bytes, share=part
        )
        for blocks in wanted
    ]


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
