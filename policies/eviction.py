"""Which cached block leaves a tier: a score per block, lowest first.

A score may change only when its block is used, and then only grow: the books keep one heap entry a block, and look
again at what comes up (`kvstore/shelf.py`). Scores end with the block's depth, deepest first, so that of a chain used
at one moment the children go before their parents.
"""

from collections.abc import Callable

from policies.views import BlockView

Eviction = Callable[[BlockView], tuple[float, ...]]


def lru(block: BlockView) -> tuple[float, ...]:
    """The longest unused. Ties: the deepest in its chain.

    Assumes that what was used lately is used again soon. Worst case: one scan of blocks that never return, longer than
    the tier, turns it over entirely. Source: the usual one of every engine's prefix cache (vLLM, SGLang).
    """
    return (block.used, -block.depth)


def lfu(block: BlockView) -> tuple[float, ...]:
    """The least often used; among these the longest unused.

    Assumes that use so far predicts use to come. Worst case: once-popular blocks that nobody asks for again stay for
    ever, as counts never fall. A scan cannot turn the tier over.
    """
    return (block.hits, block.used, -block.depth)


EVICTIONS: dict[str, Eviction] = {"lru": lru, "lfu": lfu}
