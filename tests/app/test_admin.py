"""What operators do to requests and to the cache, on a server without tiers. With tiers: test_cache_command.py."""

import asyncio

import pytest

from tests.app.rig import rig

TEXT = "/v1/completions"


async def test_a_preempted_request_comes_back_and_says_what_it_would_have_said() -> None:
    async with rig() as server:
        _, truth = await server.post(TEXT, prompt="a" * 40, max_tokens=50)
        server.worker.gate.clear()
        call = asyncio.ensure_future(server.post(TEXT, prompt="a" * 40, max_tokens=50))
        await server.until(running=1)
        (request,) = server.engine.requests()
        status, answer = await server.post(f"/admin/requests/{request['id']}/preempt")
        assert (status, answer) == (200, {"id": request["id"], "state": "preempted"})
        server.worker.gate.set()
        _, again = await call
        assert server.engine.state()["preemptions"] == 1
    assert again["choices"] == truth["choices"]


async def test_figures_of_a_request_do_not_fall_when_one_of_its_choices_ends() -> None:
    """The first one ends before the other has begun to run."""
    async with rig(max_sequences=1) as server:
        call = asyncio.ensure_future(server.post(TEXT, prompt="a" * 40, max_tokens=20, n=2))
        seen = []
        async with asyncio.timeout(5):
            while not call.done():
                seen += server.engine.requests()
                await asyncio.sleep(0)
        _, answer = await call
        seen.append(await server.get(f"/admin/requests/{answer['id']}"))
    assert {each["choices"] for each in seen} == {2}
    output = [int(str(each["output_tokens"])) for each in seen]
    assert output == sorted(output)
    assert (output[-1], {each["cached_tokens"] for each in seen}) == (40, {0})


@pytest.mark.parametrize("path", ["requests/x/cancel", "requests/x/preempt", "cache/verify"])
async def test_another_web_page_cannot_make_a_browser_ask_for_what_needs_no_body(path: str) -> None:
    """It can send no JSON that says so without asking first."""
    json, text = {"Content-Type": "application/json"}, {"Content-Type": "text/plain"}
    page = {"Origin": "http://elsewhere.example"}
    async with rig() as server:

        async def status(body: bytes | None, **headers: str) -> int:
            async with server.client.post(f"/admin/{path}", data=body, headers=headers) as response:
                return response.status

        assert [await status(None, **page), await status(b"{}", **page, **text)] == [415, 415]
        assert await status(b"nonsense", **json) == 400
        understood = {await status(None), await status(b"{}", **json), await status(b"{}", **page, **json)}
    assert len(understood) == 1
    assert understood <= {404, 409}, "there is no such request, and no disk"


async def test_only_what_runs_can_be_preempted() -> None:
    async with rig(max_sequences=1) as server:
        server.worker.gate.clear()
        calls = [asyncio.ensure_future(server.post(TEXT, prompt="a" * 40, max_tokens=2)) for _ in range(2)]
        await server.until(running=2)
        waiting = next(each["id"] for each in server.engine.requests() if each["state"] == "waiting")
        status, answer = await server.post(f"/admin/requests/{waiting}/preempt")
        assert (status, answer["error"]["code"]) == (409, "request_not_running")
        status, answer = await server.post("/admin/requests/nobody/preempt")
        assert (status, answer["error"]["code"]) == (404, "request_not_found")
        assert "'nobody'" in answer["error"]["message"]
        server.worker.gate.set()
        await asyncio.gather(*calls)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("prune", b"", None),
        ("prune", b"[]", None),
        ("prune", b'{"tier": "disk"}', "bytes"),
        ("prune", b'{"tier": "disk", "bytes": -1}', "bytes"),
        ("prune", b'{"tier": "disk", "bytes": "1"}', "bytes"),
        ("prune", b'{"tier": "tape", "bytes": 1}', "tier"),
        ("clear", b"{}", "tier"),
        ("clear", b'{"tier": "disk", "bytes": 1}', "bytes"),
    ],
)
async def test_a_bad_body_is_refused_and_names_the_field(path: str, body: bytes, param: str | None) -> None:
    async with rig() as server:
        headers = {"Content-Type": "application/json"}
        async with server.client.post(f"/admin/cache/{path}", data=body, headers=headers) as response:
            assert response.status == 400
            error = (await response.json())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param


async def test_a_form_of_another_web_page_clears_nothing() -> None:
    """A browser sends text/plain anywhere without asking."""
    async with rig() as server, server.client.post("/admin/cache/clear", data='{"tier": "all"}') as response:
        assert response.status == 415


async def test_tiers_that_are_not_in_use_say_why_and_refuse() -> None:
    async with rig() as server:
        async with server.client.get("/admin/cache/stat") as response:
            tiers = (await response.json())["tiers"]
        status, answer = await server.post("/admin/cache/clear", tier="disk")
        verify_status, verified = await server.post("/admin/cache/verify")
    assert tiers["disk"]["reason"] == "turned off: kvstore.disk.bytes is 0"
    assert (status, answer["error"]["code"]) == (409, "tier_not_in_use")
    assert (verify_status, verified["error"]["code"]) == (409, "tier_not_in_use")


async def test_clearing_the_device_forgets_what_is_idle_and_spares_who_runs() -> None:
    async with rig() as server:
        await server.post(TEXT, prompt="a" * 40, max_tokens=1)
        server.worker.gate.clear()
        call = asyncio.ensure_future(server.post(TEXT, prompt="b" * 40, max_tokens=5))
        await server.until(running=1)
        status, answer = await server.post("/admin/cache/clear", tier="all")
        assert (status, answer["tiers"]) == (
            200,
            {"device": {"dropped_blocks": 2, "used_blocks": 3, "used_bytes": None}},
        )
        server.worker.gate.set()
        assert (await call)[0] == 200
        _, again = await server.post(TEXT, prompt="a" * 40, max_tokens=1)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
