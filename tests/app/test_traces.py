"""Loaders: a few lines of each format become requests; what is wrong in a file is told with its line."""

import gzip
import json
import pickle
from pathlib import Path

import pytest

from app.workload.drawing import Drawing
from app.workload.formats import FORMATS, detect, load
from app.workload.trace import TraceError, TraceRequest, rate, runs

MOONCAKE = (
    '{"timestamp": 3000, "input_length": 1000, "output_length": 7, "hash_ids": [0, 1]}\n'
    '{"timestamp": 0, "input_length": 513, "output_length": 5, "hash_ids": [0, 9]}\n'
)
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.6805900,374,44\n"
    "2023-11-16 18:15:50.9951690,396,109\n"
)
BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
    "45,ChatGPT,1087,0,1087,Conversation log\n"
    "118,GPT-4,417,276,693,API log\n"
)
ARXIV = (
    "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n3772,54,3826,69.8\n2015,156,2171,12.9\n"
)
SERVEGEN = "".join(
    json.dumps(
        {
            "client": name,
            "arrivals": [[0, rate, 1.0, kind, shape, 0.1], [600, rate, 1.0, kind, shape, 0.1]],
            "lengths": [{"t": 0, "quantiles": {"input_tokens": [10, 20, 40], "output_tokens": [1, 5]}}],
        }
    )
    + "\n"
    for name, rate, kind, shape in ((7, 2.0, "Gamma", 1.0), (8, 6.0, "Weibull", 0.5))
)
AGENTIC = (
    json.dumps(
        {
            "id": "a",
            "block_size": 64,
            "tool_tokens": 10,
            "system_tokens": 5,
            "requests": [
                {"t": 0.0, "in": 130, "out": 20, "api_s": 2.0, "think_s": 0.0, "hash_runs": [[1, 2]]},
                {"t": 9.0, "in": 200, "out": 0, "api_s": None, "think_s": 7.5, "hash_runs": [[1, 3]]},
                {"t": 30.0, "in": 210, "out": 3, "api_s": 1.0, "think_s": None, "hash_runs": [[1, 3]]},
            ],
            "subagents": [
                {
                    "t": 12.0,
                    "kind": "Explore",
                    "requests": [
                        {"t": 0.0, "in": 70, "out": 4, "api_s": 1.0, "think_s": 0.0, "hash_runs": [[9, 1]]},
                        {"t": 3.0, "in": 90, "out": 4, "api_s": 1.0, "think_s": 2.0, "hash_runs": [[9, 1]]},
                    ],
                }
            ],
        }
    )
    + "\n"
)
FILES = {
    "agentic": AGENTIC + AGENTIC.replace('"a"', '"b"', 1),
    "arxiv": ARXIV,
    "azure": AZURE,
    "burstgpt": BURSTGPT,
    "mooncake": MOONCAKE,
    "servegen": SERVEGEN,
}

OWN = Drawing()


def loaded(tmp_path: Path, text: str, drawing: Drawing = OWN, name: str | None = None) -> list[TraceRequest]:
    path = tmp_path / "trace"
    path.write_text(text)
    return load(path, drawing, name)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_known_by_its_first_line_and_loads_the_same_from_gzip(name: str, tmp_path: Path) -> None:
    plain, zipped = tmp_path / "plain", tmp_path / "zipped"
    plain.write_text(FILES[name])
    zipped.write_bytes(gzip.compress(FILES[name].encode()))
    assert detect(plain) == detect(zipped) == name
    found = load(plain, Drawing())
    assert found == load(zipped, Drawing(), name)
    assert [each.arrival for each in found] == sorted(each.arrival for each in found)
    assert len({each.number for each in found}) == len(found)


def test_mooncake_has_blocks_of_512_and_seconds(tmp_path: Path) -> None:
    """Sorted by arrival; the last block may be partial."""
    second, first = loaded(tmp_path, MOONCAKE)
    assert (first.arrival, first.prompt_tokens, first.output_tokens) == (3.0, 1000, 7)
    assert (first.block_runs, first.block_size) == (((0, 2),), 512)
    assert list(second.block_ids()) == [0, 9]
    assert second.blocks == 2


def test_azure_counts_from_its_first_row(tmp_path: Path) -> None:
    first, second = loaded(tmp_path, AZURE)
    assert first.arrival == 0.0
    assert second.arrival == pytest.approx(4.314579)
    assert (second.prompt_tokens, second.output_tokens) == (396, 109)


def test_burstgpt_leaves_failed_requests_out(tmp_path: Path) -> None:
    found = loaded(tmp_path, BURSTGPT)
    assert [(each.arrival, each.output_tokens) for each in found] == [(0.0, 18), (113.0, 276)]


def test_recorded_arrivals_count_from_the_first(tmp_path: Path) -> None:
    """Regression: a day from the middle of BurstGPT began after weeks of nothing, with a tick for each second."""
    later = BURSTGPT.replace("\n5,", "\n5000005,").replace("\n118,", "\n5000118,")
    assert [each.arrival for each in loaded(tmp_path, later)] == [0.0, 113.0]
    later = MOONCAKE.replace(": 3000,", ": 1700000003000,").replace(
        '"timestamp": 0,', '"timestamp": 1700000000000,'
    )
    assert loaded(tmp_path, later) == loaded(tmp_path, MOONCAKE)


def test_a_byte_order_mark_quotes_and_crlf_do_not_matter(tmp_path: Path) -> None:
    """Regression: the first column was not found behind the mark, nor the format behind quotes."""
    quoted = AZURE.replace(
        "TIMESTAMP,ContextTokens,GeneratedTokens", '"TIMESTAMP","ContextTokens","GeneratedTokens"'
    )
    wanted = loaded(tmp_path, AZURE)
    assert loaded(tmp_path, "\ufeff" + AZURE) == loaded(tmp_path, quoted) == wanted
    assert loaded(tmp_path, AZURE.replace("\n", "\r\n")) == wanted


def test_arxiv_draws_arrivals_at_the_wanted_rate(tmp_path: Path) -> None:
    text = ARXIV + "100,10,110,10\n" * 2000
    found = loaded(tmp_path, text, Drawing(seed=3, rate=4.0))
    assert rate(found) == pytest.approx(4.0, rel=0.1)
    assert found == loaded(tmp_path, text, Drawing(seed=3, rate=4.0))
    assert found != loaded(tmp_path, text, Drawing(seed=4, rate=4.0))


def test_servegen_draws_each_client_at_its_share_of_the_rate(tmp_path: Path) -> None:
    found = loaded(tmp_path, SERVEGEN, Drawing(rate=20.0, seconds=900))
    assert rate(found) == pytest.approx(20.0, rel=0.15)
    share = sum(each.session == "7" for each in found) / len(found)
    assert share == pytest.approx(0.25, abs=0.05)
    assert {each.prompt_tokens for each in found} <= set(range(10, 41))
    assert max(each.arrival for each in found) < 900


def test_agentic_sessions_are_closed_loops_with_ids_of_their_own(tmp_path: Path) -> None:
    found = loaded(tmp_path, AGENTIC + AGENTIC.replace('"a"', '"b"', 1), Drawing(rate=0.5))
    a = [each for each in found if each.session == "a"]
    first, second, agent, agents_second, third = a
    assert first.after is None
    assert (second.after, second.think_seconds) == (first.number, 7.5)
    assert third.after == agent.after == second.number
    assert third.think_seconds == pytest.approx(21.0)  # by the times
    assert agent.think_seconds == pytest.approx(3.0)
    assert agents_second.after == agent.number
    assert second.output_tokens == 1
    ids = [{i for each in found if each.session == name for i in each.block_ids()} for name in "ab"]
    assert not ids[0] & ids[1]


@pytest.mark.parametrize(
    ("name", "text", "line", "why"),
    [
        ("mooncake", MOONCAKE + "{}\n", 3, "'input_length'"),
        ("mooncake", '{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [1, 2]}', 1, "do not fit"),
        ("mooncake", "[]\n", 1, "not a JSON object"),
        ("azure", AZURE + "2023-11-16 18:15:46,0,1\n", 4, "at least 1"),
        ("azure", AZURE + "yesterday,1,1\n", 4, "yesterday"),
        ("azure", "TIMESTAMP,Tokens\n", 1, "no column ContextTokens, GeneratedTokens"),
        ("burstgpt", BURSTGPT + "1,2\n", 5, "6 fields wanted, 2 found"),
        ("burstgpt", BURSTGPT + "-1,ChatGPT,472,18,490,API log\n", 5, "no time"),
        ("arxiv", ARXIV + "12.5,1,2,3\n", 4, "no number of tokens"),
        ("mooncake", MOONCAKE.replace("[0, 1]", "[1e999, 1]"), 1, "infinity"),
        ("mooncake", MOONCAKE.replace(": 7", ": 1" + 400 * "0"), 1, "too large"),
        ("servegen", SERVEGEN.replace("Weibull", "Cauchy"), 2, "known: Gamma, Weibull"),
        ("servegen", SERVEGEN.replace("0, 6.0", "0, Infinity"), 2, "with rate inf"),
        ("servegen", SERVEGEN.replace('"Weibull", 0.5', '"Weibull", 0.001'), 2, "shape 0.001"),
        ("servegen", SERVEGEN.replace("[1, 5]", "[NaN, NaN]"), 1, "be finite"),
        ("agentic", AGENTIC.replace("[[1, 2]]", "[[1, -2]]"), 1, "at least 1"),
        ("agentic", AGENTIC.replace("[[1, 2]]", "[[1, 5]]"), 1, "more than a prompt of 130"),
    ],
)  # fmt: skip
def test_a_bad_row_is_told_with_its_file_and_line(
    name: str, text: str, line: int, why: str, tmp_path: Path
) -> None:
    with pytest.raises(TraceError, match=why) as raised:
        loaded(tmp_path, text, name=name)
    assert f"trace:{line}: " in str(raised.value)


def test_a_file_of_no_known_format_or_without_requests_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"trace:1: of no known format; known: agentic"):
        loaded(tmp_path, "a,b\n")
    with pytest.raises(TraceError, match="no request in it"):
        loaded(tmp_path, AZURE.partition("\n")[0])
    with pytest.raises(TraceError, match="cannot be read"):
        load(tmp_path / "none", Drawing())


def test_an_error_comes_out_of_another_process_as_it_is() -> None:
    """Regression: a pool of processes whose trace could not be read was told to be broken, and no more."""
    error = TraceError(Path("trace"), 3, "it is not JSON")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "trace:3: it is not JSON"


def test_runs_are_consecutive_ids() -> None:
    assert runs([4, 5, 6, 1, 2, 9]) == ((4, 3), (1, 2), (9, 1))
