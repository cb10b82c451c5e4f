"""API keys: the file, who is let in where, limits of each, and the names a server goes by."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from app.config import ConfigError, ServerSection
from app.config_sources import Loaded, load
from app.hosts import is_loopback, may_name
from app.keys import MAX_KEYS, Keys, KeyTable, conflicts
from app.salt import tenant_of
from app.service_classes import ClassTable
from tests.app.rig import Rig, rig

TEXT = "/v1/completions"
BODY: dict[str, Any] = {"prompt": "hello", "max_tokens": 3}
USER, ADMIN, LIMITED = (
    {"Authorization": f"Bearer {name}"} for name in ("of-a-user", "of-an-admin", "limited")
)
KEYS = (
    KeyTable(name="user", sha256=tenant_of(USER)),
    KeyTable(name="admin", sha256=tenant_of(ADMIN), role="admin"),
    KeyTable(name="limited", sha256=tenant_of(LIMITED), max_concurrent=1, requests_per_minute=2),
)
FILE = f'[[key]]\nname = "user"\nsha256 = "{tenant_of(USER)}"\n'


# --- the file ---------------------------------------------------------------------------------------------------------


def loaded(directory: Path, keys: str, config: str = "") -> Loaded:
    (directory / "keys.toml").write_text(keys)
    (directory / "config.toml").write_text(config)
    return load([f"server.keys_file={directory / 'keys.toml'}"], {}, directory / "config.toml")


def test_keys_are_read_from_their_file(tmp_path: Path) -> None:
    text = FILE + f'[[key]]\nname = "a"\nsha256 = "{tenant_of(ADMIN)}"\nrole = "admin"\nmax_concurrent = 4\n'
    assert loaded(tmp_path, text).config.keys == [
        KEYS[0],
        KeyTable(name="a", sha256=tenant_of(ADMIN), role="admin", max_concurrent=4),
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "there is no [[key]] in it"),
        ("[[key", "keys.toml"),
        ("keys = 1\n" + FILE, "unknown keys; it holds [[key]] tables"),
        ('[key]\nname = "a"\n', "write [[key]] above each"),
        ('[[key]]\nname = "a"\n', "sha256 is missing"),
        (FILE + 'rôle = "admin"\n', "keys.toml"),
        (FILE + 'roll = "admin"\n', "unknown key roll; did you mean role?"),
        (FILE + 'role = "root"\n', "role"),
        (FILE + "max_concurrent = -1\n", "max_concurrent"),
        (FILE + "requests_per_minute = 0.5\n", "requests_per_minute"),
        (FILE + FILE.replace("user", "other"), "'user' and 'other' are the same key"),
        (FILE + FILE.replace(tenant_of(USER), tenant_of(ADMIN)), "two keys are named 'user'"),
    ],
)
def test_a_bad_file_is_refused_and_says_why(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, text)
    assert any(reason in problem for problem in caught.value.problems)
    assert all("keys.toml" in problem for problem in caught.value.problems)


def test_a_file_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="no/such/file"):
        load(["server.keys_file=no/such/file"], {}, cwd=Path("/nowhere"))


def test_a_key_that_is_no_hash_is_refused_and_not_repeated(tmp_path: Path) -> None:
    """Somebody has put the key itself there."""
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, '[[key]]\nname = "a"\nsha256 = "sk-secret"\n')
    assert "sha256sum" in str(caught.value)
    assert "sk-secret" not in str(caught.value)


def test_a_class_lists_keys_of_the_file_alone(tmp_path: Path) -> None:
    """Otherwise a class has a key that nobody could come in with."""
    table = '[[class]]\nname = "fast"\napi_keys = ["{}"]\n'
    assert loaded(tmp_path, FILE, table.format(tenant_of(USER))).config.classes[0].name == "fast"
    with pytest.raises(ConfigError, match="class 'fast' lists API key"):
        loaded(tmp_path, FILE, table.format(tenant_of(ADMIN)))


def test_too_many_keys_are_refused() -> None:
    tables = [KeyTable(name=f"k{number}", sha256=f"{number:064x}") for number in range(MAX_KEYS + 1)]
    assert "at most 1024" in conflicts(tables)[0]


def test_a_key_is_found_by_its_whole_hash() -> None:
    keys = Keys(KEYS)
    assert [keys.find(table.sha256) for table in KEYS] == list(KEYS)
    for wrong in (
        "",
        tenant_of(USER)[:-1],
        tenant_of(USER) + "0",
        tenant_of({"Authorization": "Basic of-a-user"}),
    ):
        assert keys.find(wrong) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com"])
def test_who_listens_beyond_loopback_says_who_may_come(host: str) -> None:
    with pytest.raises(ConfigError, match="allow_without_keys"):
        load([f"server.host={host}"], {}, cwd=Path("/nowhere"))
    assert load([f"server.host={host}", "server.allow_without_keys=true"], {}, cwd=Path("/nowhere"))
    assert ServerSection(host=host, keys_file="keys.toml").host == host


# --- who is let in ----------------------------------------------------------------------------------------------------

READ = ["/v1/models", "/v1/models/otter", "/health", "/openapi.json"]
ADMINS = ["/metrics", "/admin/state", "/admin/requests", "/admin/policies", "/admin/cache/stat"]


async def status(server: Rig, method: str, path: str, headers: dict[str, str]) -> tuple[int, str | None]:
    asks = method == "POST" and path.startswith("/v1/")
    async with server.client.request(method, path, headers=headers, json=BODY if asks else None) as got:
        error = (await got.json())["error"] if got.status >= 400 else {"code": None}
        return got.status, error["code"]


async def test_without_keys_everybody_is_let_in() -> None:
    async with rig() as server:
        for path in (*READ, *ADMINS):
            assert await status(server, "GET", path, {}) == (200, None), path


async def test_probes_need_no_key_and_everything_else_does() -> None:
    """What does not exist, too: nobody learns what does."""
    async with rig(keys=KEYS) as server:
        assert (
            await status(server, "GET", "/livez", {})
            == await status(server, "GET", "/readyz", {})
            == (200, None)
        )
        for headers in ({}, {"Authorization": "Bearer who"}, {"Authorization": "Basic of-a-user"}):
            for path in (*READ, *ADMINS, "/no/such/path"):
                assert await status(server, "GET", path, headers) == (401, "invalid_api_key"), path
            assert await status(server, "POST", TEXT, headers) == (401, "invalid_api_key")
        async with server.client.get("/v1/models") as response:
            assert response.headers["WWW-Authenticate"] == "Bearer"


async def test_an_inference_key_asks_and_an_admins_does_everything() -> None:
    async with rig(keys=KEYS) as server:
        for path in READ:
            assert await status(server, "GET", path, USER) == (200, None), path
        for path in ADMINS:
            assert await status(server, "GET", path, USER) == (403, "admin_only"), path
            assert await status(server, "GET", path, ADMIN) == (200, None), path
        for key in (USER, ADMIN):
            assert await status(server, "POST", TEXT, key) == (200, None)
        assert await status(server, "POST", "/admin/requests/x/cancel", USER) == (403, "admin_only")
        assert await status(server, "POST", "/admin/requests/x/cancel", ADMIN) == (404, "request_not_found")


async def test_a_keys_tenant_is_the_one_that_classes_list() -> None:
    classes = [ClassTable(name="user", api_keys=[KEYS[0].sha256], ttft_seconds=9.0), ClassTable(name="rest")]
    async with rig(keys=KEYS, classes=classes) as server:
        server.worker.gate.clear()
        calls = [asyncio.ensure_future(status(server, "POST", TEXT, key)) for key in (USER, ADMIN)]
        await server.until(running=2)
        found = {each.request.tenant: each.class_name for (each,) in server.engine.core.sequences.values()}
        assert found == {tenant_of(USER): "user", tenant_of(ADMIN): "rest"}
        server.worker.gate.set()
        assert await asyncio.gather(*calls) == [(200, None)] * 2


async def test_a_key_beyond_its_limits_is_told_when_to_come_back() -> None:
    """One at once, two a minute; others are served all the while, and so are its own calls that cost nothing."""
    async with rig(keys=KEYS) as server:
        server.worker.gate.clear()
        first = asyncio.ensure_future(status(server, "POST", TEXT, LIMITED))
        await server.until(running=1)
        assert await status(server, "POST", TEXT, LIMITED) == (429, "concurrency_limit")
        server.worker.gate.set()
        assert await first == (200, None)
        assert await status(server, "POST", "/v1/chat/completions", LIMITED | {"x": "y"}) == (
            400,
            "missing_required_parameter",
        )
        async with server.client.post(TEXT, json=BODY, headers=LIMITED) as response:
            assert (response.status, (await response.json())["error"]["code"]) == (429, "rate_limit_exceeded")
            assert 1 <= int(response.headers["Retry-After"]) <= 30
        assert await status(server, "GET", "/v1/models", LIMITED) == (200, None)
        assert await status(server, "POST", TEXT, USER) == (200, None)


# --- the names a server goes by ---------------------------------------------------------------------------------------


async def test_a_host_that_is_not_known_is_refused() -> None:
    """A web page whose name was made to mean this machine sends that name."""
    async with rig(server=ServerSection(allowed_hosts=["tales.example"])) as server:
        for host, answer in (
            ("evil.example", (421, "host_not_allowed")),
            ("localhost.evil.example:8000", (421, "host_not_allowed")),
            ("", (421, "host_not_allowed")),
            ("localhost:9", (200, None)),
            ("Tales.Example.:8000", (200, None)),
            ("127.0.0.1", (200, None)),
            ("[::1]:8000", (200, None)),
        ):
            assert await status(server, "GET", "/livez", {"Host": host}) == answer, host


def test_any_name_will_do_when_the_operator_says_so() -> None:
    assert may_name("whatever", "0.0.0.0", ["*"])
    assert may_name(None, "127.0.0.1", [])
    assert may_name("box.lan:80", "box.lan", [])


def test_what_is_loopback() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "host.example", ""))
