"""The comparison over HTTP: its workload, a real small run of ours under pressure, and the report's ratios."""

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

from bench.pressure_http import SHIPPED, report, run, workload


def trace(directory: Path, requests: int) -> Path:
    path = directory / "trace.jsonl"
    rows = (
        {"timestamp": n, "input_length": 512 * 3, "output_length": 24, "hash_ids": [0, 2 * n + 1, 2 * n + 2]}
        for n in range(requests)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompts_shrink_answers_keep_their_length_and_both_fit(tmp_path: Path) -> None:
    found = workload(trace(tmp_path, 5), 4, rate=2.0, context=64)
    assert [(each.prompt_tokens, each.output_tokens, each.block_size) for each in found] == [(40, 24, 16)] * 4
    assert len({each.arrival for each in found}) == 4


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_a_small_run_under_pressure_measures_demand_and_then_a_share_of_it(tmp_path: Path) -> None:
    """Ours alone, in processes of their own; vLLM has no place in a test."""
    options = argparse.Namespace(
        trace=trace(tmp_path, 12), requests=12, rate=200.0, context=256, demand=None, shares=[0.5], model=SHIPPED,
        vllm_python="", rows=tmp_path / "rows.jsonl", ttft=60.0, tpot=60.0, timeout=60.0,
    )  # fmt: skip
    await run(options)
    ample, short = await asyncio.to_thread(read, options.rows)
    assert (ample["answered"], short["answered"], short["goodput"] > 0) == (12, 12, True)
    assert ample["recomputed"] == 0
    assert 4 <= short["blocks"] <= short["demand"] / 2 + 2
    assert short["computed"] >= 12 * 24
    assert len(report([ample, short]).rows) > 2


def test_the_report_sets_medians_of_vllm_over_those_of_sluice_in_the_same_cell() -> None:
    about: dict[str, Any] = {"share": 0.4, "blocks": 8, "rate": 1.0, "requests": 9, "void": False}
    ours = about | {"server": "sluice", "tax": 0.01, "ttft_mean": 2.0, "recomputed": 0}
    theirs = about | {"server": "vllm", "tax": 0.2, "ttft_mean": 6.0, "recomputed": 50}
    slow = theirs | {"ttft_mean": 8.0, "void": True}
    columns = [list(column.cells) for column in report([ours, theirs, slow]).columns[3:]]
    lines = {line[0]: line[1:] for line in zip(*columns, strict=True)}
    assert lines["TTFT mean"] == ("2", "7", "3.50")
    assert lines["tax"] == ("1.0%", "20.0%", "")
    assert lines["recomputed"] == ("0", "50", "")
    assert lines["runs"] == ("1", "2, 1 VOID", "")
