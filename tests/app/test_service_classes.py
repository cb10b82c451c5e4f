"""Service classes: the tables of the file, which class a request is in, and whether it got what that promises."""

import asyncio
import json
from hashlib import sha256
from pathlib import Path

import pytest

from app.attainment import judged
from app.config import ConfigError
from app.config_sources import load
from app.salt import tenant_of
from app.service_classes import Classes, ClassTable
from engine.request import Finished, FinishReason, ServiceClass
from tests.app.rig import Rig, rig
from tests.app.test_metrics import scrape, value

TEXT = "/v1/completions"
KEY = {"Authorization": "Bearer of-a-friend"}
DIGEST = tenant_of(KEY)


def read(tmp_path: Path, text: str, *flags: str) -> list[ClassTable]:
    file = tmp_path / "config.toml"
    file.write_text(text)
    return load(flags, {}, file).config.classes


def problems(tmp_path: Path, text: str, *flags: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, *flags)
    return caught.value.problems


# --- the tables -------------------------------------------------------------------------------------------------------


def test_tables_are_read_in_order_and_what_is_left_out_has_a_default(tmp_path: Path) -> None:
    tables = read(
        tmp_path,
        f"""
        [[class]]
        name = "interactive"
        priority_max = 0
        weight = 4
        ttft_seconds = 0.5
        api_keys = ["{DIGEST}"]
        [[class]]
        name = "batch"
        """,
    )
    assert [table.name for table in tables] == ["interactive", "batch"]
    assert tables[0] == ClassTable(
        name="interactive", priority_max=0, weight=4, ttft_seconds=0.5, api_keys=[DIGEST]
    )
    assert (tables[1].weight, tables[1].ttft_seconds, tables[1].ranged) == (1.0, 0.0, False)


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ('name = "a"\nwieght = 1.0', "[[class]] 1: unknown key wieght; did you mean weight?"),
        ("weight = 1.0", "[[class]] 1: name is missing"),
        ('name = ""', "[[class]] 1: name"),
        ('name = "a"\nweight = 0.0', "[[class]] 1: weight = 0.0: input should be greater than 0"),
        ('name = "a"\nweight = nan', "weight"),
        ('name = "a"\npriority_max = "0"', "priority_max"),
        ('name = "a"\npriority_min = 2\npriority_max = 1', "priority_min is above priority_max"),
        ('name = "a"\nttft_seconds = -1.0', "ttft_seconds"),
        ('name = "a"\n[[class]]\nname = "a"', "two classes are named 'a'"),
        (
            'name = "a"\npriority_max = 3\n[[class]]\nname = "b"\npriority_min = 3',
            "classes 'a' and 'b' both take priority 3",
        ),
        (
            f'name = "a"\napi_keys = ["{DIGEST}"]\n[[class]]\nname = "b"\napi_keys = ["{DIGEST}"]',
            "both list API key",
        ),
    ],
)
def test_a_bad_table_is_refused_and_says_why(tmp_path: Path, table: str, reason: str) -> None:
    (problem,) = problems(tmp_path, f"[[class]]\n{table}\n")
    assert problem.startswith(str(tmp_path / "config.toml"))
    assert reason in problem


def test_a_key_that_is_no_hash_is_refused_and_not_repeated(tmp_path: Path) -> None:
    """Somebody has put the key itself there."""
    (problem,) = problems(tmp_path, '[[class]]\nname = "a"\napi_keys = ["sk-secret"]\n')
    assert "sha256sum" in problem
    assert "sk-secret" not in problem


def test_every_bad_table_is_told_at_once_beside_other_mistakes(tmp_path: Path) -> None:
    found = problems(tmp_path, "[[class]]\n[[class]]\nx = 1\n[[clas]]\n[sever]\n")
    assert len(found) == 5
    assert any("did you mean [[class]]?" in problem for problem in found)


def test_one_table_is_no_array(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, '[class]\nname = "a"\n')
    assert "write [[class]]" in problem


def test_tables_are_set_in_the_file_only(tmp_path: Path) -> None:
    assert "in the file only" in problems(tmp_path, "", "class.name=a")[0]
    with pytest.raises(ConfigError, match="in the file only"):
        load([], {"SLUICE__CLASS__NAME": "a"}, cwd=tmp_path)


# --- who is in which --------------------------------------------------------------------------------------------------

TABLES = (
    ClassTable(name="partner", weight=8.0, api_keys=[DIGEST]),
    ClassTable(name="interactive", priority_max=0, weight=4.0, ttft_seconds=10.0),
    ClassTable(name="soon", priority_min=1, priority_max=5),
    ClassTable(name="batch", priority_min=10, ttft_seconds=1e-9, tpot_seconds=10.0),
)


def test_a_class_is_by_key_then_by_priority_then_the_last() -> None:
    classes = Classes(TABLES)
    assert classes.of(DIGEST, 20) == ServiceClass("partner", 0, 8.0)
    assert classes.of("", -3) == ServiceClass("interactive", 1, 4.0)
    assert classes.of("somebody", 5) == ServiceClass("soon", 2, 1.0)
    assert classes.of("", 7).name == "batch", "no range takes it"


def test_without_tables_all_are_alike() -> None:
    assert Classes().of(DIGEST, 7) == ServiceClass("", 0, 1.0)


async def test_the_engine_is_told_class_tenant_and_hint() -> None:
    async with rig(classes=TABLES) as server:
        server.worker.gate.clear()
        body: dict[str, object] = {
            "prompt": "a",
            "max_tokens": 2,
            "priority": 12,
            "expected_output_tokens": 7,
        }
        calls = [asyncio.ensure_future(server.post(TEXT, **body))]
        async with asyncio.TaskGroup() as tasks:
            keyed = tasks.create_task(_with_key(server, body))
            await server.until(running=2)
            requests = {s.request.service.name: s.request for [s] in server.engine.core.sequences.values()}
            server.worker.gate.set()
        await asyncio.gather(*calls)
        assert keyed.result() == 200
    assert (requests["partner"].tenant, requests["batch"].tenant) == (DIGEST, "")
    assert {request.expected_output_tokens for request in requests.values()} == {7}
    assert requests["batch"].service == ServiceClass("batch", 3, 1.0)


async def _with_key(server: Rig, body: dict[str, object]) -> int:
    async with server.client.post(TEXT, json=body, headers=KEY) as response:
        return response.status


def test_the_hash_is_that_of_the_one_liner_in_the_documentation() -> None:
    assert sha256(b"bearer of-a-friend").hexdigest() == DIGEST


# --- objectives -------------------------------------------------------------------------------------------------------


def ended(first_token: float | None, finished: float, output_tokens: int = 11) -> Finished:
    return Finished(
        "r", 0, FinishReason.STOP, 1, output_tokens, 0, 0, 0, 10.0, 10.0, first_token, finished, 0.0
    )


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (ended(11.0, 12.0), [("ttft", True), ("tpot", True)]),
        (ended(11.1, 12.0), [("ttft", False), ("tpot", True)]),
        (ended(11.0, 14.0), [("ttft", True), ("tpot", False)]),
        (ended(11.0, 11.0, 1), [("ttft", True)]),
        (ended(None, 10.5, 0), []),
        (ended(None, 12.0, 0), [("ttft", False)]),
    ],
)
def test_objectives_are_judged_by_what_the_client_saw(
    choice: Finished, expected: list[tuple[str, bool]]
) -> None:
    """Who leaves without a token is judged only when the objective had passed."""
    table = ClassTable(name="c", ttft_seconds=1.0, tpot_seconds=0.15)
    assert list(judged(choice, table)) == expected
    assert list(judged(choice, ClassTable(name="c"))) == []


async def test_attainment_is_counted_by_class_refusals_included() -> None:
    async with rig(classes=TABLES, max_sequences=1, max_queue=1) as server:
        before = await scrape(server)
        assert value(before, SLO, **{"class": "interactive"}, objective="ttft", met="false") == 0
        await server.post(TEXT, prompt="a", max_tokens=4)
        await server.post(TEXT, prompt="a", max_tokens=4, priority=10)
        server.worker.gate.clear()
        calls = [asyncio.ensure_future(server.post(TEXT, prompt="a", max_tokens=4)) for _ in range(2)]
        await server.until(running=2)
        assert (await server.post(TEXT, prompt="a", max_tokens=4))[0] == 429
        server.worker.gate.set()
        await asyncio.gather(*calls)
        samples = await scrape(server)
    assert value(samples, SLO, **{"class": "interactive"}, objective="ttft", met="true") == 3
    assert value(samples, SLO, **{"class": "interactive"}, objective="ttft", met="false") == 1
    assert value(samples, SLO, **{"class": "batch"}, objective="ttft", met="false") == 1
    assert value(samples, SLO, **{"class": "batch"}, objective="tpot", met="true") == 1
    assert not any("partner" in json.dumps(sorted(labels)) for name, labels in samples if name == SLO)


SLO = "sluice:slo_requests_total"
