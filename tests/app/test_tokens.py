"""`/tokenize` and `/detokenize`: there and back; and fields that nobody knows, which the log tells once."""

from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.app.rig import EOS, rig

TALE = "Ein Bär — 🦦."


async def test_a_text_goes_to_tokens_and_back() -> None:
    async with rig() as server:
        status, found = await server.post("/tokenize", prompt=TALE, return_token_strs=True)
        assert (status, found["count"], found["max_model_len"]) == (200, len(TALE.encode()), 512)
        assert found["tokens"] == list(TALE.encode())
        assert found["token_strs"][0] == "E"
        assert await server.post("/detokenize", tokens=found["tokens"]) == (200, {"prompt": TALE})
        assert await server.post("/detokenize", tokens=[65, EOS]) == (200, {"prompt": "A<eos>"})
        assert await server.post("/detokenize", tokens=[]) == (200, {"prompt": ""})


async def test_a_chat_is_tokenised_as_it_would_be_answered() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    async with rig() as server:
        _, found = await server.post("/tokenize", model="otter", messages=messages)
        _, answer = await server.post("/v1/chat/completions", messages=messages, max_tokens=1)
    assert bytes(found["tokens"]) == b"user: hello\nassistant: "
    assert found["token_strs"] is None
    assert answer["usage"]["prompt_tokens"] == found["count"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user"}]}, 400),
        ("/tokenize", {"prompt": 5}, 400),
        ("/tokenize", {"messages": [{"role": "user", "content": "forbidden"}]}, 400),
        ("/tokenize", {"prompt": "x", "model": "who"}, 404),
        ("/detokenize", {"tokens": [257]}, 400),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/detokenize", {"tokens": "x"}, 400),
        ("/detokenize", {"tokens": [1], "model": "who"}, 404),
    ],
)
async def test_what_cannot_be_is_refused(path: str, body: dict[str, Any], status: int) -> None:
    async with rig() as server:
        found, answer = await server.post(path, **body)
        assert (found, set(answer)) == (status, {"error"})


async def test_an_unknown_field_is_logged_once_and_what_is_no_name_never() -> None:
    with capture_logs() as lines:
        async with rig() as server:
            for _ in range(2):
                body = {"prompt": "x", "max_tokens": 1, "best_guess": 1, "echo": False, "my secret is …": 1}
                assert (await server.post("/v1/completions", **body))[0] == 200
            message = {"role": "user", "content": "x", "name": "bob", "tool_calls": []}
            options = {"include_usage": True, "continuous_usage_stats": True}
            await server.stream(
                "/v1/chat/completions", messages=[message], max_tokens=1, stream_options=options
            )
    fields = [line["field"] for line in lines if line["event"] == "unknown_field_ignored"]
    assert (fields[0], sorted(fields[1:])) == ("best_guess", ["continuous_usage_stats", "name"])
