"""Prefix hit rate by cache size: the eviction policies on a recorded trace, beside LRU, LFU and Belady's optimum.

`python -m bench.hit_rate --trace FILE [--sizes 0.25 2] [--share 0.1] [--rows FILE] [--chart FILE.png]`

The hit rate is tokens found ÷ prompt tokens. What is simulated, and what not, is prefix_cache.py's.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from app.workload import formats
from app.workload.drawing import Drawing
from app.workload.transform import thin
from bench.prefix_cache import BLOCK_TOKENS, Cache, Prompt, belady, policy_cache, prompts, unlimited
from policies.eviction import EVICTIONS

SIZES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
BELADY = "belady"


@dataclass(frozen=True, slots=True)
class Row:
    trace: str
    share: float
    policy: str
    cache_tokens: int
    hit_tokens: int
    prompt_tokens: int

    @property
    def rate(self) -> float:
        return self.hit_tokens / self.prompt_tokens


def hit_tokens(cache: Cache, requests: Sequence[Prompt]) -> int:
    return sum(cache(request) for request in requests) * BLOCK_TOKENS


def cache_of(policy: str, requests: Sequence[Prompt], blocks: int) -> Cache:
    if policy == BELADY:
        return belady(requests, blocks)
    return policy_cache(EVICTIONS[policy](blocks), blocks, max(len(each.blocks) for each in requests))


def rows(name: str, share: float, requests: Sequence[Prompt], millions: Sequence[float]) -> Iterator[Row]:
    total = sum(request.tokens for request in requests)
    for size in millions:
        blocks = round(size * 1e6) // BLOCK_TOKENS
        for policy in (*EVICTIONS, BELADY):
            hit = hit_tokens(cache_of(policy, requests, blocks), requests)
            yield Row(name, share, policy, blocks * BLOCK_TOKENS, hit, total)


def table(found: Sequence[Row], limit: float) -> Table:
    policies = list(dict.fromkeys(row.policy for row in found))
    title = f"{found[0].trace}: prefix hit rate in %; a cache without end has {limit:.1%}"
    shown = Table("M tokens", *policies, "cost ÷ lru", "cost ÷ best of lru, lfu", title=title)
    for size in dict.fromkeys(row.cache_tokens for row in found):
        rates = {row.policy: row.rate for row in found if row.cache_tokens == size}
        ratios = (ratio(rates["cost"], best) for best in (rates["lru"], max(rates["lru"], rates["lfu"])))
        shown.add_row(f"{size / 1e6:.2f}", *(f"{100 * rates[policy]:.2f}" for policy in policies), *ratios)
    return shown


def ratio(rate: float, of: float) -> str:
    return f"{rate / of:.2f}" if of else "-"


def chart(found: Sequence[Row], limit: float, path: Path) -> None:
    """A line a policy over the cache's size. matplotlib is optional (the extra `charts`)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    panel = figure.subplots()
    for policy in dict.fromkeys(row.policy for row in found):
        points = [(row.cache_tokens / 1e6, 100 * row.rate) for row in found if row.policy == policy]
        panel.plot(*zip(*points, strict=True), marker="o", label=policy)
    panel.axhline(100 * limit, color="0.6", linestyle=":", label="without end")
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set(xlabel="cache, M tokens", ylabel="prefix hit rate, %", title=found[0].trace)
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.hit_rate", description=__doc__.partition("\n")[0])
    parser.add_argument("--trace", type=Path, required=True, help="one with block ids")
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES, help="of the cache, in M tokens")
    parser.add_argument("--share", type=float, default=1.0, help="of the trace's sessions, each whole")
    parser.add_argument("--rows", type=Path, help="JSON Lines, appended to")
    parser.add_argument("--chart", type=Path, help="a PNG")
    options = parser.parse_args()
    requests = prompts(thin(formats.load(options.trace, Drawing()), options.share))
    if not any(request.blocks for request in requests):
        parser.error(f"{options.trace} records no block ids, or the share leaves none")
    limit = hit_tokens(unlimited(), requests) / sum(request.tokens for request in requests)
    found = list(rows(options.trace.name, options.share, requests, options.sizes))
    Console().print(table(found, limit))
    if options.rows:
        with options.rows.open("a") as file:
            file.writelines(json.dumps(asdict(row)) + "\n" for row in found)
    if options.chart:
        chart(found, limit, options.chart)


if __name__ == "__main__":
    main()
