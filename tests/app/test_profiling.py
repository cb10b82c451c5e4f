"""Profiles: fits find what made the samples, grids stay inside their limits, operator tables become a profile."""

import gzip
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from app.cli import main
from app.config import Config
from app.profiling import live, measuring
from app.profiling.fitting import Gap, Sample, errors, fit_between, fit_steps, fit_transfer, nonnegative
from app.profiling.grid import Limits, cells
from app.profiling.operator_tables import TIMES_PER_LAYER, read_tables
from engine.profile import Between, ProfileError, read_profile
from engine.step_time import CurveTime, Shape, shape

LIMITS = Limits(block_size=16, blocks=2000, context=2048, max_sequences=64, max_batch_tokens=1024)
TRUTH = CurveTime(
    dense=((1, 1e-3), (64, 2e-3), (1024, 20e-3)),
    head=((0, 0.0), (64, 2e-3)),
    decode_row=1e-5,
    decode_position=2e-8,
    prefill_pair=1e-9,
)


def test_every_cell_stays_inside_the_limits_and_has_blocks_of_its_own() -> None:
    found = cells(LIMITS)
    assert {cell.kind for cell in found} == {"decode", "prefill", "several prefills", "mixed"}
    for cell in found:
        plan = cell.plan(16)
        blocks = [block for row in plan.rows for block in row.blocks]
        assert len(set(blocks)) == len(blocks)
        assert max(blocks) < 2000
        assert shape(plan).tokens <= 1024
        assert len(plan.placements) == len(plan.rows) <= 64
        assert all(row.start + len(row.tokens) <= min(2048, 16 * len(row.blocks)) for row in plan.rows)


def test_a_fit_finds_the_times_that_made_the_samples() -> None:
    seconds = TRUTH.timer()
    samples = [Sample(cell.kind, each := shape(cell.plan(16)), seconds(each)) for cell in cells(LIMITS)]
    fitted = fit_steps(samples)
    assert all(error.worst < 0.08 and error.mean < 0.02 for error in errors(samples, fitted.timer()))
    assert fitted.decode_position == pytest.approx(2e-8, rel=0.2)


def test_coefficients_are_never_negative() -> None:
    rows, wanted = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]]), np.array([3.0, 2.0, 1.0])
    assert (nonnegative(rows, wanted) >= 0).all()
    assert nonnegative(rows, wanted)[1] == 0


def test_copies_are_latency_and_bandwidth() -> None:
    found = fit_transfer([(size, 1e-5 + size / 2e9) for size in (10_000, 100_000, 1_000_000)])
    assert found.latency_seconds == pytest.approx(1e-5, rel=1e-3)
    assert found.bytes_per_second == pytest.approx(2e9, rel=1e-3)


def test_noise_does_not_make_a_fit_too_small() -> None:
    """Half of the steps take half as long again as the others: the fit is the mean, not what is most often right."""
    samples = [
        Sample("live", Shape(rows, rows, rows, rows), seconds * rows)
        for rows in (1, 2)
        for seconds in (1.0, 2.0)
    ]
    fitted = fit_steps([], samples).timer()
    assert fitted(Shape(1, 1, 1, 1)) == pytest.approx(1.5, rel=1e-3)
    assert fitted(Shape(2, 2, 2, 2)) == pytest.approx(3.0, rel=1e-3)


def test_live_steps_outweigh_those_measured_alone() -> None:
    decode = Shape(1, 1, 1, 16)
    fitted = fit_steps([Sample("alone", decode, 1.0)] * 4, [Sample("live", decode, 2.0)] * 100).timer()
    assert fitted(decode) == pytest.approx(2.0, rel=0.02)


def test_what_passes_between_steps_is_found_by_its_causes() -> None:
    truth = Between(((1, 1e-4), (2, 2e-4), (4, 3e-4)), 5e-5, 7e-5, 3e-4, 4e-10, 2e-4, 1e-3)
    gaps = []
    for rows, prefill, finished, admitted in product((1, 2, 3, 4), (0, 1), (0, 1), (0, 2)):
        step = Shape(rows, rows, rows - prefill, 0, prefill)
        for copies, size in ((0, 0), (1, 10**5), (2, 10**6)):
            seconds = truth.after(step, finished, admitted) + truth.copying(copies, size)
            gaps.append(Gap(step, finished, admitted, seconds, copies, size))
    found = fit_between(gaps, 1e-3)
    assert found.idle == 1e-3
    for gap in gaps:
        fitted = found.after(gap.step, gap.finished, gap.admitted) + found.copying(
            gap.copies, gap.copied_bytes
        )
        assert fitted == pytest.approx(gap.seconds, rel=1e-3)


def tables(directory: Path) -> Path:
    def write(name: str, lines: list[str]) -> None:
        (directory / f"card_{name}.csv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))

    operators = [*TIMES_PER_LAYER, "embedding", "final_layernorm"]
    write(
        "profile_dense", ["layer,tokens,time_us", *(f"{name},{n},{n}" for name in operators for n in (1, 10))]
    )
    write("profile_per_sequence", ["layer,sequences,time_us", "lm_head,1,100", "sampler,1,10"])
    cells = ((0, 0, 1, 16), (0, 0, 1, 64), (16, 0, 0, 0), (16, 64, 0, 0), (16, 0, 1, 16), (16, 0, 1, 64))
    write("profile_attention", ["prefill_chunk,kv_prefill,n_decode,kv_decode,time_us",
                                *(f"{a},{b},{c},{d},5" for a, b, c, d in cells)])  # fmt: skip
    meta = {
        "model": "meta-llama/Llama-3.1-8B",
        "vllm_version": "0",
        "engine_kwargs": {
            "dtype": "bfloat16",
            "max_model_len": 100,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
        },
        "kv_cache": {"num_gpu_blocks": 30, "block_size": 16},
        "device": {"device_name": "a card"},
    }
    (directory / "card_meta.json").write_text(json.dumps(meta))
    return directory


def test_operator_tables_become_a_profile(tmp_path: Path) -> None:
    """32 layers of eight operators (the norm runs twice), what runs once, head, sampler and attention."""
    profile = read_tables(tables(tmp_path))
    assert (profile.kv_blocks, profile.block_bytes) == (30, 2 * 32 * 8 * 128 * 16 * 2)
    decode = Shape(1, 1, 1, 16)
    assert profile.step.timer()(decode) == pytest.approx((32 * (8 + 5) + 2 + 110) * 1e-6)
    out = tmp_path / "profile.json"
    assert main(["bench", "profile", "--tables", str(tmp_path), "--out", str(out)]) == 0
    assert read_profile(out) == profile


def test_tables_that_lack_something_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ProfileError, match=r"0 files \*_meta.json"):
        read_tables(tmp_path)
    assert main(["bench", "profile", "--tables", str(tmp_path)]) == 2
    assert "meta.json" in capsys.readouterr().err
    meta = tables(tmp_path) / "card_meta.json"
    meta.write_text(meta.read_text().replace("Llama-3.1-8B", "Otter-1B"))
    with pytest.raises(ProfileError, match="known: meta-llama"):
        read_tables(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "why"),
    [
        ("meta.json", "{", "is no meta file"),
        ("meta.json", "{}", "there is no 'engine_kwargs'"),
        ("profile_per_sequence.csv.gz", "layer,sequences,time_us\n", "have no operator"),
        (
            "profile_attention.csv.gz",
            "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n0,0,1,16,5\n",
            "two values",
        ),
        ("profile_per_sequence.csv.gz", "layer,sequences,time_us\nlm_head,1,-5\n", "head.0.1: .* equal to 0"),
    ],
)
def test_tables_that_would_be_no_profile_are_refused_as_they_are_read(
    file: str, text: str, why: str, tmp_path: Path
) -> None:
    """Regression: they ended in tracebacks, or in a profile that simulate could not use."""
    (tables(tmp_path) / f"card_{file}").write_text(text)
    with pytest.raises(ProfileError, match=why):
        read_tables(tmp_path)


def test_an_out_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: it was refused at the end, without saying which option it was. Else there is no file before."""
    there: list[bool] = []

    def measured(*_: object) -> None:
        there.append(out.exists())
        raise ProfileError("nothing is measured here")

    monkeypatch.setattr(measuring, "measure", measured)
    for place in (tmp_path, tmp_path / "none" / "profile.json", Path("/proc/none")):
        assert main(["bench", "profile", "--out", str(place)]) == 2
        assert capsys.readouterr().err.startswith(f"sluice: --out {place} cannot be written: ")
    out = tmp_path / "profile.json"
    assert main(["bench", "profile", "--out", str(out)]) == 2
    assert there == [False]


def test_a_real_runner_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps of the shipped model; what it says may be slow, not absurd."""
    monkeypatch.setattr(measuring, "cells", lambda limits: cells(limits)[::12])
    monkeypatch.setattr(live, "CLIENTS", (1, 4))
    monkeypatch.setattr(live, "SECONDS", 0.1)
    config = Config.model_validate(
        {"engine": {"kv_blocks": 300, "max_sequences": 8, "max_batch_tokens": 128}, "log": {"level": "error"}}
    )
    said: list[str] = []
    profile, found = measuring.measure(config, said.append)
    assert profile.transfers.keys() == {"device>host", "host>device"}
    assert all(transfer.bytes_per_second > 1e6 for transfer in profile.transfers.values())
    assert {error.kind for error in found} >= {"decode", "prefill"}
    assert 0 < profile.step.timer()(Shape(1, 1, 1, 16)) < 5
    assert (profile.kv_blocks, profile.context, profile.runs_ahead) == (300, 2048, False)
    assert said
    assert 0 < profile.between.rows[0][1] < 1
    assert 0 < profile.between.idle < 1
