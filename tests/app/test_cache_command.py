"""`sluice cache`: beside a real server (shipped model, host and disk), and on the disk store without one."""

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from threading import Event

import pytest
from structlog.testing import capture_logs

from app.admin_verify import Stopped
from app.cache_store import oldest
from app.cli import main
from kvstore.copies import DISK, HOST, Loss, Place
from kvstore.disk import DiskTier, Verification
from kvstore.format import MAGIC
from tests.app.lives import Served, configuration, served
from tests.kvstore.disk_rig import crowded, filled, kept, key_of, open_tier

PROMPT = "Once upon a time there was a little fox who lived in a house by the river. " * 4
PAGE = 4096

Sluice = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def quiet_logs() -> Iterator[None]:
    """A server in this process would log to the output that is looked at."""
    with capture_logs():
        yield


@pytest.fixture
def sluice(capsys: pytest.CaptureFixture[str]) -> Sluice:
    """`sluice cache …`: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = main(["cache", *arguments])
        except SystemExit as end:  # argparse
            code = int(str(end.code))
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def no_server(tmp_path: Path) -> Sequence[str]:
    """Settings for a port where nobody listens, and a store of this test's own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return ("--set", f"server.port={port}", "--set", f"kvstore.disk.path={tmp_path / 'kv'}")


def spoil(data: Path, count: int) -> None:
    """Flips a bit in the payload of so many records."""
    content = bytearray(data.read_bytes())
    begins = [page for page in range(0, len(content), PAGE) if content[page + 24 : page + 32] == MAGIC]
    for page in Random(1).sample(begins, count):
        content[page + 1000] ^= 4
    with data.open("r+b") as file:  # the file that a server has open
        file.write(content)


# --- without a server -----------------------------------------------------------------------------------------------


def test_neither_a_server_nor_a_store_is_exit_code_3_and_makes_nothing(
    sluice: Sluice, no_server: Sequence[str], tmp_path: Path
) -> None:
    for action in ("stat", "verify", "clear"):
        code, out, error = sluice(action, *no_server)
        assert (code, out) == (3, "")
        assert "no server answers at http://127.0.0.1" in error
        assert "there is no store in" in error
    assert not (tmp_path / "kv").exists()


def test_a_store_of_whatever_model_is_shown_verified_and_left_as_it_is(
    sluice: Sluice, no_server: Sequence[str], tmp_path: Path
) -> None:
    numbers = filled(tmp_path / "kv")
    code, out, _ = sluice("stat", "--json", *no_server)
    disk = json.loads(out)["tiers"]["disk"]
    assert (code, disk["used_blocks"], disk["used_bytes"]) == (0, len(numbers), len(numbers) * 20_000)
    assert sluice("stat", *no_server)[0] == 0
    code, out, error = sluice("verify", *no_server)
    assert (code, out) == (0, f"{len(numbers)} records read, 0 of them corrupt.\n")
    assert f"{len(numbers)}/{len(numbers)}" in error, "the bar got to its end"
    tier = open_tier(tmp_path / "kv")
    assert (tier.notice, kept(tier)) == ("", {key_of(number) for number in numbers})
    tier.close()


def test_corrupt_records_are_named_are_exit_code_1_and_are_gone_afterwards(
    sluice: Sluice, no_server: Sequence[str], tmp_path: Path
) -> None:
    numbers = filled(tmp_path / "kv")
    tier = open_tier(tmp_path / "kv")
    tier.close()
    spoil_live(tmp_path / "kv", 3)
    code, out, _ = sluice("verify", "--json", *no_server)
    found = json.loads(out)
    assert (code, found["records"], found["corrupt"]) == (1, len(numbers), 3)
    assert {lost["reason"] for lost in found["lost"]} == {"corrupt"}
    code, out, _ = sluice("verify", "--json", *no_server)
    assert (code, json.loads(out)) == (0, {"records": len(numbers) - 3, "corrupt": 0, "lost": []})


def spoil_live(path: Path, count: int) -> None:
    """As `spoil`, but only records that the index has."""
    tier = DiskTier.open_existing(path)
    keys = sorted(place.key for place in tier.records())[:count]
    tier.close()
    content = bytearray((path / "data.mdb").read_bytes())
    for key in keys:
        for page in range(0, len(content), PAGE):
            if content[page + 24 : page + 32] == MAGIC and content[page + 48 : page + 80] == key:
                content[page + 1000] ^= 4
    (path / "data.mdb").write_bytes(content)


def test_a_store_with_damaged_pages_is_not_opened_and_is_exit_code_1(
    sluice: Sluice, no_server: Sequence[str], tmp_path: Path
) -> None:
    filled(tmp_path / "kv")
    data = tmp_path / "kv" / "data.mdb"
    data.write_bytes(data.read_bytes()[: 3 * PAGE])
    for action in ("verify", "stat"):
        code, _, error = sluice(action, *no_server)
        assert code == 1
        assert "is damaged" in error
    assert data.stat().st_size == 3 * PAGE, "it is where it was"
    assert not list(data.parent.glob("aside-*"))


def test_pruning_keeps_what_was_written_last_and_clearing_keeps_nothing(
    sluice: Sluice, no_server: Sequence[str], tmp_path: Path
) -> None:
    numbers = filled(tmp_path / "kv")
    size = (tmp_path / "kv" / "data.mdb").stat().st_size
    code, out, _ = sluice("prune", "--bytes", str(10 * 20_000 + 19_999), "--json", *no_server)
    assert (code, json.loads(out)["tiers"]["disk"]["used_blocks"]) == (0, 10)
    tier = open_tier(tmp_path / "kv")
    assert kept(tier) == {key_of(number) for number in numbers[-10:]}
    tier.close()
    code, out, _ = sluice("clear", *no_server)
    assert (code, out) == (0, "disk: 10 blocks dropped, 0 (0 bytes) left\n")
    assert (tmp_path / "kv" / "data.mdb").stat().st_size <= size, "it has no quota that says it may grow"


@pytest.mark.parametrize("quota_bytes", [0, 2 * 2**20])
def test_a_store_with_more_than_its_quota_has_room_for_can_be_pruned_and_cleared(
    sluice: Sluice, no_server: Sequence[str], tmp_path: Path, quota_bytes: int
) -> None:
    """By default the disk is turned off, and then its quota is 0."""
    crowded(tmp_path / "kv", 150)
    quota = ("--set", f"kvstore.disk.bytes={quota_bytes}")
    code, out, _ = sluice("prune", "--bytes", str(140 * 20_000), "--json", *no_server, *quota)
    assert (code, json.loads(out)["tiers"]["disk"]["used_blocks"]) == (0, 140)
    code, out, _ = sluice("clear", *no_server, *quota)
    assert (code, out) == (0, "disk: 140 blocks dropped, 0 (0 bytes) left\n")


def test_what_could_not_be_dropped_is_exit_code_3(
    sluice: Sluice, no_server: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path / "kv", 5)
    monkeypatch.setattr(DiskTier, "_transact", lambda *_: Loss.FULL)
    for action in (["prune", "--bytes", "0"], ["clear"]):
        code, out, error = sluice(*action, *no_server)
        assert (code, out) == (3, "")
        assert "5 blocks" in error


def test_a_store_that_a_server_has_open_is_left_alone(
    sluice: Sluice, no_server: Sequence[str], tmp_path: Path
) -> None:
    filled(tmp_path / "kv")
    tier = open_tier(tmp_path / "kv")
    code, _, error = sluice("clear", *no_server)
    tier.close()
    assert code == 3
    assert "in use by another server" in error
    assert "--url" in error


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune"],
        ["prune", "--bytes", "1G"],
        ["prune", "--bytes", "-1"],
        ["clear", "--tier", "tape"],
        ["dance"],
        ["clear", "--tier", "host"],
    ],
)
def test_usage_errors_are_exit_code_2(
    arguments: list[str], sluice: Sluice, no_server: Sequence[str], tmp_path: Path
) -> None:
    filled(tmp_path / "kv", 2)
    assert sluice(*arguments, *no_server)[0] == 2


def test_a_url_where_nobody_or_somebody_else_answers_is_exit_code_3(
    sluice: Sluice, no_server: Sequence[str], tmp_path: Path
) -> None:
    filled(tmp_path / "kv", 2)
    port = no_server[1].partition("=")[2]
    for url in (f"http://127.0.0.1:{port}", "ftp://127.0.0.1", "nonsense"):
        code, _, error = sluice("stat", "--url", url, *no_server)
        assert code == 3, "a given URL is not given up for the store"
        assert url in error


def test_the_oldest_leave_first_but_children_before_their_parents() -> None:
    """a ← b ← d, and c by itself, written in this order."""
    a, b, c, d = (
        Place(name, parent=parent) for name, parent in ((b"a", b""), (b"b", b"a"), (b"c", b""), (b"d", b"b"))
    )
    places = [a, b, c, d]
    assert oldest(places, 0) == []
    assert oldest(places, 1) == [b"c"]
    assert oldest(places, 3) == [b"c", b"d", b"b"]
    assert oldest(places, 9) == [b"c", b"d", b"b", b"a"]


# --- beside a server ------------------------------------------------------------------------------------------------


async def beside(server: Served, sluice: Sluice, *arguments: str) -> tuple[int, str, str]:
    url = str(server.http._base_url)
    return await asyncio.to_thread(sluice, *arguments, "--url", url)


async def test_a_server_is_shown_verified_pruned_and_cleared(sluice: Sluice, tmp_path: Path) -> None:
    async with served(configuration(tmp_path / "kv", host_bytes=4 * 2**20)) as server:
        await server.asked(prompt=PROMPT)
        await written_down(server)
        code, out, _ = await beside(server, sluice, "stat", "--json")
        stat = json.loads(out)
        host, disk = stat["tiers"][HOST], stat["tiers"][DISK]
        assert code == 0
        assert (
            host["used_blocks"] == disk["used_blocks"] == len(server.engine.core.scheduler.residency.disk) > 3
        )
        assert disk["used_bytes"] == disk["written_bytes"] == disk["used_blocks"] * stat["block_bytes"]
        assert {(copy["source"], copy["target"]) for copy in stat["copies"]} == {
            ("device", HOST),
            (HOST, DISK),
        }
        assert (await beside(server, sluice, "stat"))[0] == 0

        code, out, _ = await beside(server, sluice, "verify")
        assert (code, out) == (0, f"{disk['used_blocks']} records read, 0 of them corrupt.\n")
        code, out, _ = await beside(
            server, sluice, "prune", "--bytes", str(2 * stat["block_bytes"]), "--json"
        )
        assert (code, json.loads(out)["tiers"][DISK]["used_blocks"]) == (0, 2)
        code, out, _ = await beside(server, sluice, "clear", "--json")
        left = json.loads(out)["tiers"]
        assert (code, {tier: each["used_blocks"] for tier, each in left.items()}) == (
            0,
            {"device": 0, HOST: 0, DISK: 0},
        )
        assert (await server.cached(prompt=PROMPT))[1] == 0


async def test_corrupt_records_of_a_server_are_found_and_then_computed_again(
    sluice: Sluice, tmp_path: Path
) -> None:
    async with served(configuration(tmp_path / "kv")) as server:
        truth = await server.asked(prompt=PROMPT)
        await written_down(server)
        blocks = len(server.engine.core.scheduler.residency.disk)
        await asyncio.to_thread(spoil, tmp_path / "kv" / "data.mdb", blocks)
        code, out, error = await beside(server, sluice, "verify", "--json")
        assert (code, json.loads(out)["corrupt"], error) == (1, blocks, "")
        await beside(server, sluice, "clear", "--tier", "device")
        again, cached = await server.cached(prompt=PROMPT)
        assert (again.tokens, cached) == (truth.tokens, 0)
        _, out, _ = await beside(server, sluice, "stat", "--json")
        lost = json.loads(out)["tiers"][DISK]["lost_blocks"]["corrupt"]
        assert await server.metric("sluice:kv_tier_errors_total", tier=DISK, kind="corrupt") == lost >= blocks
        await written_down(server)
        _, out, _ = await beside(server, sluice, "verify", "--json")
        assert json.loads(out)["corrupt"] == 0
        await beside(server, sluice, "clear", "--tier", "device")
        again, cached = await server.cached(prompt=PROMPT)
        assert again.tokens == truth.tokens
        assert cached >= 16 * (blocks - 1), "what was written again is found"


async def test_one_verification_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go, verify = Event(), Event(), DiskTier.verify

    def held_up(tier: DiskTier, progress: Callable[[int, int], None]) -> Verification:
        begun.set()
        assert go.wait(20)
        return verify(tier, progress)

    monkeypatch.setattr(DiskTier, "verify", held_up)
    async with served(configuration(tmp_path / "kv")) as server:
        async with server.http.post("/admin/cache/verify") as first:
            assert await asyncio.to_thread(begun.wait, 20)
            async with server.http.post("/admin/cache/verify") as second:
                assert second.status == 409
                assert (await second.json())["error"]["code"] == "already_verifying"
            go.set()
            lines = [json.loads(line) async for line in first.content]
        assert lines[-1] == {"records": 0, "corrupt": 0, "lost": []}
        async with server.http.post("/admin/cache/verify") as third:
            assert third.status == 200
            await third.read()


async def test_a_verification_ends_when_its_client_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = Event()

    def without_end(tier: DiskTier, progress: Callable[[int, int], None]) -> Verification:
        deadline = time.monotonic() + 20
        try:
            while time.monotonic() < deadline:
                progress(0, 1)
        except Stopped:
            ended.set()
            raise
        raise AssertionError("nobody stopped it")

    monkeypatch.setattr(DiskTier, "verify", without_end)
    async with served(configuration(tmp_path / "kv")) as server:
        async with server.http.post("/admin/cache/verify") as answer:
            assert json.loads(await answer.content.readline()) == {"checked": 0, "total": 1}
            answer.close()
        assert await asyncio.to_thread(ended.wait, 20)


async def test_a_second_server_on_the_same_store_serves_and_says_why_its_disk_is_down(
    sluice: Sluice, tmp_path: Path
) -> None:
    holder = await asyncio.to_thread(open_tier, tmp_path / "kv")
    async with served(configuration(tmp_path / "kv")) as server:
        await server.asked(prompt=PROMPT)
        _, out, _ = await beside(server, sluice, "stat", "--json")
        assert "in use by another server" in json.loads(out)["tiers"][DISK]["reason"]
        assert await server.metric("sluice:kv_tier_up", tier=DISK) == 0
        assert await server.metric("sluice:kv_tier_outages_total", tier=DISK) == 1
        code, _, error = await beside(server, sluice, "verify")
        assert code == 3
        assert "in use by another server" in error
        assert error.startswith("sluice: "), "no bar of what was not begun"
    await asyncio.to_thread(holder.close)


async def written_down(server: Served) -> None:
    """Waits until nothing is on its way between tiers."""
    async with asyncio.timeout(20):
        await server.engine._quiet.wait()
