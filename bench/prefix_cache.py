"""A tier as a prefix cache that a trace runs through, one request after another, and the two limits of any such cache.

Blocks are of 512 tokens, full ones only, as the server keys no others. A request's hits are its longest cached prefix;
then all its blocks are in, and those beyond the capacity leave, children before parents. The tier is the server's own
(`kvstore/shelf.py` with a policy). Pure. Not here: copies and their time, the device above, answers (whose ids no trace
records). The command is hit_rate.py's.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import islice

from app.workload.trace import Trace, TraceRequest
from kvstore.copies import Place
from kvstore.shelf import Shelf
from policies.eviction import Eviction

NEVER = 1 << 62


BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Prompt:
    at: float
    blocks: tuple[int, ...]
    tokens: int


def prompts(trace: Trace) -> list[Prompt]:
    """Finer blocks are taken together, under the id of the last: ids tell apart all that is before them, too."""
    return [Prompt(each.arrival, tuple(_full_blocks(each)), each.prompt_tokens) for each in trace]


def _full_blocks(request: TraceRequest) -> Iterator[int]:
    together = BLOCK_TOKENS // request.block_size if request.block_size else 1
    full = request.prompt_tokens // BLOCK_TOKENS * together
    return islice(request.block_ids(), together - 1, full, together)


Cache = Callable[[Prompt], int]
"""A prompt comes through; returns how many of its leading blocks were there."""


def policy_cache(eviction: Eviction, capacity: int, longest: int) -> Cache:
    """`longest`: blocks of the longest prompt, which come in before others leave."""
    shelf = Shelf("cache", capacity + longest, eviction, addressed=False)

    def through(prompt: Prompt) -> int:
        keys = [block.to_bytes(8) for block in prompt.blocks]
        found = sum(1 for _ in _prefix(shelf, keys))
        for depth, key in enumerate(keys):
            if entry := shelf.get(key):
                shelf.hit(entry, prompt.at)
            else:
                place = Place(key, -1, keys[depth - 1] if depth else b"", depth, BLOCK_TOKENS)
                shelf.written(shelf.add(place, prompt.at))
        _offer(shelf, keys[-1] if keys else b"")
        while len(shelf) > capacity:
            _evict(shelf, prompt.at)
        return found

    return through


def _prefix(shelf: Shelf, keys: Sequence[bytes]) -> Iterator[bytes]:
    for key in keys:
        if key not in shelf:
            return
        yield key


def _offer(shelf: Shelf, key: bytes) -> None:
    if not shelf.children(key):
        shelf.offer(shelf.get(key))


def _evict(shelf: Shelf, now: float) -> None:
    entry = shelf.pop_candidate(now)
    assert entry is not None, "every chain has an end"
    if not shelf.children(entry.key):  # else it is a candidate again when its last child has left
        shelf.remove(entry)
        _offer(shelf, entry.parent)


def unlimited() -> Cache:
    """Nothing ever leaves."""
    seen: set[int] = set()

    def through(prompt: Prompt) -> int:
        found = next((n for n, block in enumerate(prompt.blocks) if block not in seen), len(prompt.blocks))
        seen.update(prompt.blocks)
        return found

    return through


def belady(prompts: Sequence[Prompt], capacity: int) -> Cache:
    """Who is used again last leaves first (Belady 1966): no cache of equal blocks has more hits.

    A parent is never used later than its child, so with ties for the deepest chains need no rule of their own.
    """
    uses = _uses(prompts)
    cached: dict[int, int] = {}
    order: list[tuple[int, int, int]] = []

    def through(prompt: Prompt) -> int:
        found = next((n for n, block in enumerate(prompt.blocks) if block not in cached), len(prompt.blocks))
        for depth, block in enumerate(prompt.blocks):
            cached[block] = next(uses[block])
            heappush(order, (-cached[block], -depth, block))
        while len(cached) > capacity:
            again, _, block = heappop(order)
            if cached.get(block) == -again:
                del cached[block]
        return found

    return through


def _uses(prompts: Sequence[Prompt]) -> dict[int, Iterator[int]]:
    """By block: when it is used, after its first use, and NEVER."""
    uses: dict[int, list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        for block in prompt.blocks:
            uses[block].append(number)
    return {block: iter([*numbers[1:], NEVER]) for block, numbers in uses.items()}
