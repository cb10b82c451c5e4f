"""The table and the rows of the hit rates come from traces alone; no cache beats what is possible."""

from pathlib import Path

from app.workload.trace import TraceRequest
from bench.hit_rate import BELADY, Row, chart, hit_tokens, rows, table
from bench.prefix_cache import Prompt, belady, prompts, unlimited


def request(number: int, ids: tuple[tuple[int, int], ...], tokens: int, size: int = 512) -> TraceRequest:
    return TraceRequest(number, str(number), float(number), tokens, 1, block_runs=ids, block_size=size)


def test_only_full_blocks_are_kept_and_finer_ones_taken_together() -> None:
    assert prompts([request(0, ((1, 3),), 1030)])[0].blocks == (1, 2)
    assert prompts([request(0, ((1, 9), (50, 8)), 17 * 64, 64)])[0].blocks == (8, 56)
    assert prompts([request(0, (), 2000, 0)])[0].blocks == ()


def test_belady_keeps_what_is_used_again_first_and_every_parent_of_it() -> None:
    turns = [(1, 2), (3,), (4,), (1, 2), (3,), (4,)]
    found = [Prompt(float(at), blocks, 512 * len(blocks)) for at, blocks in enumerate(turns)]
    assert list(map(belady(found, 2), found)) == [0, 0, 0, 2, 0, 0]
    assert list(map(unlimited(), found)) == [0, 0, 0, 2, 1, 1]


def test_rows_of_every_policy_and_size_fill_the_table_and_the_chart(tmp_path: Path) -> None:
    found = [Prompt(float(at), (at % 7, 100 + at % 7), 1100) for at in range(60)]
    told = list(rows("trace", 1.0, found, [0.002, 0.02]))
    assert {row.policy for row in told} == {"lru", "lfu", "cost", BELADY}
    most = {row.cache_tokens: row.hit_tokens for row in told if row.policy == BELADY}
    assert all(row.hit_tokens <= most[row.cache_tokens] <= hit_tokens(unlimited(), found) for row in told)
    assert table(told, 0.9).row_count == 2
    chart(told, 0.9, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000


def test_a_rate_is_of_all_prompt_tokens() -> None:
    assert Row("trace", 1.0, "lru", 512, 256, 1024).rate == 0.25
