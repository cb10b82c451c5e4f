"""What is written down to disk, and when. (Full blocks go to the host as they fill, whatever the placement.)"""

from collections.abc import Callable

from policies.views import BlockView

Placement = Callable[[BlockView, bool], bool]
"""(block, it is about to leave the host) -> whether it is to be on disk."""


def write_through(block: BlockView, leaving: bool) -> bool:
    """Everything, as soon as it is in the host tier. What is on disk survives a crash, and leaves the host for free.

    Worst case: blocks that nobody asks for again wear the disk out.
    """
    return True


def selective(block: BlockView, leaving: bool) -> bool:
    """What was used again at least once. Worst case: the first return of every conversation finds nothing on disk."""
    return block.hits > 0


def on_evict(block: BlockView, leaving: bool) -> bool:
    """What the host has no room for any more. Fewest bytes written; a crash loses all that is in the host tier.

    Worst case: the host is full of blocks not on disk just when many are to come in; then some are dropped.
    """
    return leaving


PLACEMENTS: dict[str, Placement] = {
    "write_through": write_through,
    "selective": selective,
    "on_evict": on_evict,
}
