"""Tenants: who finds whose prefixes, by API key and by `cache_salt`. Over restarts: test_restart.py."""

from itertools import product

from app.config import KVStoreSection
from app.salt import salt_of
from tests.app.rig import Rig, rig

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"
PROMPT = "p" * 50  # three full blocks
HIT = 48
A, B = "Bearer key-of-a", "Bearer key-of-b"


async def cached(server: Rig, key: str | None = None, **more: object) -> int:
    """How many tokens of the prompt were cached."""
    headers = {"Authorization": key} if key else {}
    body = {"prompt": PROMPT, "max_tokens": 1} | more
    async with server.client.post(TEXT, json=body, headers=headers) as response:
        found: int = (await response.json())["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found


async def test_a_prefix_is_found_by_the_key_that_sent_it_and_by_no_other() -> None:
    async with rig() as server:
        assert await cached(server, A) == 0
        assert await cached(server, B) == 0
        assert await cached(server) == 0, "who has no key finds nobody's"
        for key in (A, B, None):
            assert await cached(server, key) == HIT


async def test_what_comes_without_a_key_is_no_keys() -> None:
    async with rig() as server:
        assert await cached(server) == 0
        assert await cached(server, A) == 0


async def test_keys_share_when_the_operator_says_so_but_salts_still_separate() -> None:
    async with rig(kvstore=KVStoreSection(share_across_keys=True)) as server:
        assert await cached(server, A) == 0
        assert await cached(server, B) == await cached(server) == HIT
        assert await cached(server, A, cache_salt="x") == 0
        assert await cached(server, B, cache_salt="x") == HIT


async def test_a_cache_salt_separates_within_a_key() -> None:
    async with rig() as server:
        assert await cached(server, A, cache_salt="x") == 0
        assert await cached(server, A, cache_salt="y") == 0
        assert await cached(server, A) == 0
        assert await cached(server, B, cache_salt="x") == 0
        assert await cached(server, A, cache_salt="x") == HIT


async def test_chats_are_separated_as_texts_are() -> None:
    async with rig() as server:
        found = []
        for key in (A, B, A):
            body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 1}
            async with server.client.post(CHAT, json=body, headers={"Authorization": key}) as response:
                found.append((await response.json())["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert found == [0, 0, 64]


async def test_a_key_that_is_no_text_is_a_key() -> None:
    async with rig() as server:
        assert await cached(server, b"Bearer \xff".decode(errors="surrogateescape")) == 0
        assert await cached(server, A) == 0


def test_no_two_pairs_of_key_and_salt_are_the_same_tenant() -> None:
    keys = ["", A, B, "Bearer " + "0" * 64, "Basic key-of-a"]
    salts = ["", "/", "x", "x/y", salt_of({"Authorization": A}, None, share_across_keys=False)]
    found = {
        salt_of({"Authorization": key}, salt, share_across_keys=False) for key, salt in product(keys, salts)
    }
    assert len(found) == len(keys) * len(salts)


def test_the_key_itself_is_not_in_the_salt_and_how_it_is_written_does_not_count() -> None:
    salt = salt_of({"Authorization": A}, None, share_across_keys=False)
    assert "key-of-a" not in salt
    assert salt == salt_of({"Authorization": "bearer  key-of-a "}, "", share_across_keys=False)
    assert salt_of({"Authorization": "Bearer"}, None, share_across_keys=False) == "/"
