"""Whatever a client sends, it gets the API's error object, never a 5xx."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from app.config import ServerSection
from app.errors import as_api_error
from app.schema import ChatCall, CompletionCall
from app.tokens import DetokenizeCall, TokenizeCall
from tests.app.rig import EOS, rig

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
PROMPT: dict[str, Any] = {"prompt": "hello", "max_tokens": 1}


def chat(**fields: object) -> bytes:
    return json.dumps(HELLO | fields).encode()


def text(**fields: object) -> bytes:
    return json.dumps(PROMPT | fields).encode()


def said(content: object) -> bytes:
    return chat(messages=[{"role": "user", "content": content}])


BAD_BODIES: list[tuple[str, bytes, str | None]] = [
    (CHAT, b"", None),
    (CHAT, b"{", None),
    (CHAT, b"[]", None),
    (CHAT, b"null", None),
    (CHAT, b'"\xff\xfe"', None),
    (CHAT, b'{"messages": [{"role": "user", "content": "\\ud800"}]}', None),
    (CHAT, b'{"messages": ' + b"[" * 50_000, None),
    (CHAT, b'{"x": ' + b'{"x": ' * 10_000 + b"1" + b"}" * 10_001, None),
    (CHAT, chat(temperature=float("nan")), "temperature"),
    (CHAT, chat(temperature=float("inf")), "temperature"),
    (CHAT, chat(temperature=-0.1), "temperature"),
    (CHAT, chat(temperature="hot"), "temperature"),
    (CHAT, chat(top_p=0), "top_p"),
    (CHAT, chat(top_p=1.01), "top_p"),
    (CHAT, chat(min_p=2), "min_p"),
    (CHAT, chat(top_k=-2), "top_k"),
    (CHAT, chat(seed=10**4000), "seed"),
    (CHAT, chat(seed=1.5), "seed"),
    (CHAT, chat(n=0), "n"),
    (CHAT, chat(n=129), "n"),
    (CHAT, chat(n=True), "n"),
    (CHAT, chat(n=9), "n"),  # more than the queue of the rig ever takes
    (CHAT, chat(max_tokens=0), "max_tokens"),
    (CHAT, chat(max_tokens=-1), "max_tokens"),
    (CHAT, chat(max_tokens=10**30), "max_tokens"),
    (CHAT, chat(max_tokens=2.5), "max_tokens"),
    (CHAT, chat(min_tokens=2), "min_tokens"),
    (CHAT, chat(stop=""), "stop"),
    (CHAT, chat(stop=["a", ""]), "stop.1"),
    (CHAT, chat(stop=["a"] * 17), "stop"),
    (CHAT, chat(stop="a" * 513), "stop"),
    (CHAT, chat(stop=[1]), "stop.0"),
    (CHAT, chat(stop_token_ids=[-1]), "stop_token_ids.0"),
    (CHAT, chat(stop_token_ids=[257]), "stop_token_ids"),
    (CHAT, chat(logprobs=3), "logprobs"),
    (CHAT, chat(top_logprobs=3), "top_logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (CHAT, chat(stream_options={"include_usage": True}), "stream_options"),
    (CHAT, chat(stream="yes"), "stream"),
    (CHAT, chat(priority=2**40), "priority"),
    (CHAT, chat(cache_salt="s" * 257), "cache_salt"),
    (CHAT, chat(expected_output_tokens=0), "expected_output_tokens"),
    (CHAT, chat(session_id=5), "session_id"),
    (CHAT, chat(messages=[]), "messages"),
    (CHAT, chat(messages="hi"), "messages"),
    (CHAT, chat(messages=[{"role": "user"}, 5]), "messages.1"),
    (CHAT, chat(messages=[{"role": "wizard", "content": "x"}]), "messages.0.role"),
    (CHAT, said(5), "messages.0.content"),
    (CHAT, said("forbidden"), "messages"),
    (CHAT, said([{"type": "image_url", "image_url": {"url": "http://x"}}]), "messages.0.content.0.type"),
    (CHAT, chat(tools=[{"type": "function"}]), "tools"),
    (CHAT, chat(tool_choice="required"), "tool_choice"),
    (CHAT, chat(function_call={"name": "f"}), "function_call"),
    (CHAT, chat(modalities=["text", "audio"]), "modalities"),
    (CHAT, chat(web_search_options={}), "web_search_options"),
    (CHAT, chat(guided_json={"type": "object"}), "guided_json"),
    (CHAT, chat(skip_special_tokens=False), "skip_special_tokens"),
    (TEXT, text(use_beam_search=True), "use_beam_search"),
    (
        CHAT,
        chat(messages=[{"role": "user"}, {"role": "assistant", "tool_calls": [{"id": "1"}]}]),
        "messages.1.tool_calls",
    ),
    (
        CHAT,
        chat(messages=[{"role": "assistant", "function_call": {"name": "f"}}]),
        "messages.0.function_call",
    ),
    (CHAT, chat(logit_bias={"1": 100.5}), "logit_bias"),
    (CHAT, chat(logit_bias={"one": 5}), "logit_bias.one"),
    (CHAT, chat(logit_bias={"-1": 5}), "logit_bias"),
    (CHAT, chat(logit_bias={"257": 5}), "logit_bias"),
    (CHAT, chat(logit_bias={str(token): 1 for token in range(1025)}), "logit_bias"),
    (CHAT, chat(logit_bias=[5]), "logit_bias"),
    (CHAT, chat(presence_penalty=2.5), "presence_penalty"),
    (CHAT, chat(frequency_penalty=-2.1), "frequency_penalty"),
    (CHAT, chat(repetition_penalty=0), "repetition_penalty"),
    (CHAT, chat(repetition_penalty="1"), "repetition_penalty"),
    (CHAT, chat(response_format={"type": "json_object"}), "response_format"),
    (TEXT, b"{}", "prompt"),
    (TEXT, text(prompt=None), "prompt"),
    (TEXT, text(prompt=""), "prompt"),
    (TEXT, text(prompt=[]), "prompt"),
    (TEXT, text(prompt=[[]]), "prompt"),
    (TEXT, text(prompt=[1, "a"]), "prompt"),
    (TEXT, text(prompt=["a", 1]), "prompt"),
    (TEXT, text(prompt=[[1], "a", [[2]]]), "prompt"),
    (TEXT, text(prompt=[True]), "prompt"),
    (TEXT, text(prompt=[1.0]), "prompt"),
    (TEXT, text(prompt=[-1]), "prompt"),
    (TEXT, text(prompt=[257]), "prompt"),
    (TEXT, text(prompt=[10**30]), "prompt"),
    (TEXT, text(prompt={"a": 1}), "prompt"),
    (TEXT, text(prompt=["a"] * 129), "prompt"),
    (TEXT, text(echo=True), "echo"),
    (TEXT, text(suffix="x"), "suffix"),
    (TEXT, text(best_of=2), "best_of"),
    (TEXT, text(logprobs=21), "logprobs"),
    (TEXT, text(logprobs=True), "logprobs"),
]


async def test_bad_bodies_are_answered_with_400_and_name_the_field() -> None:
    """One server answers them all, and still answers a good one."""
    async with rig() as server:
        for path, body, param in BAD_BODIES:
            async with server.client.post(path, data=body) as response:
                answer = await response.json()
                assert response.status == 400, (body[:100], answer)
                assert set(answer) == {"error"}
                assert set(answer["error"]) == {"message", "type", "param", "code"}
                assert answer["error"]["type"] == "invalid_request_error"
                assert answer["error"]["param"] == param, (body[:100], answer)
                assert answer["error"]["message"]
                assert answer["error"]["code"]
        assert (await server.post(CHAT, **HELLO))[0] == 200


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        (ChatCall, said([{}] * 10_000), "messages.0.content.0.type"),
        (
            ChatCall,
            chat(messages=[{"role": "user", "content": [{}] * 10}] * 1000),
            "messages.0.content.0.type",
        ),
        (ChatCall, chat(messages=[{}] * 4096), "messages.0.role"),
        (ChatCall, chat(logit_bias={str(-token): "" for token in range(10_000)}), "logit_bias"),
        (CompletionCall, text(stop=[1] * 10_000), "stop"),
        (CompletionCall, text(stop_token_ids=[-1] * 10_000), "stop_token_ids"),
        (TokenizeCall, chat(messages=[{}] * 4096), "messages.0.role"),
        (DetokenizeCall, json.dumps({"tokens": [-1] * 10_000}).encode(), "tokens.0"),
    ],
)
def test_a_body_full_of_mistakes_is_refused_for_the_first_few(
    kind: type[BaseModel], body: bytes, param: str
) -> None:
    """Pydantic keeps a record of each that it looks at: 4 MiB of them took gigabytes, and half a minute."""
    with pytest.raises(ValidationError) as refusal:
        kind.model_validate_json(body)
    assert refusal.value.error_count() <= 300
    assert as_api_error(refusal.value).param == param


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (TEXT, text(prompt=[1, 128]), "prompt"),
        (TEXT, text(prompt="a bär"), "prompt"),
        (CHAT, said("a bär"), "messages"),
        (CHAT, chat(logit_bias={"128": 1}), "logit_bias"),
        (TEXT, text(stop_token_ids=[128], min_tokens=1), "stop_token_ids"),
    ],
)
async def test_tokens_that_the_tokenizer_knows_and_the_model_does_not_are_refused(
    path: str, body: bytes, param: str
) -> None:
    """As of fine-tunes that have added a token. Of those there would be no row of the embedding."""
    async with rig(token_ids=128) as server:
        async with server.client.post(path, data=body) as response:
            assert (response.status, (await response.json())["error"]["param"]) == (400, param)
        assert (await server.post(TEXT, prompt=[127], logit_bias={"127": 1}, max_tokens=1))[0] == 200
        assert (await server.post("/detokenize", tokens=[65, 255, EOS]))[0] == 200


async def test_more_log_probabilities_than_an_answer_may_have_are_refused() -> None:
    async with rig(context=4096, blocks=512, max_queue=64) as server:
        status, answer = await server.post(TEXT, prompt="x", max_tokens=1000, n=32, logprobs=10)
        assert (status, answer["error"]["param"]) == (400, "logprobs")


async def test_unknown_fields_and_neutral_ones_are_taken() -> None:
    neutral = {
        "presence_penalty": 0,
        "logit_bias": {},
        "best_of": 1,
        "echo": False,
        "suffix": None,
        "tools": [],
        "tool_choice": "auto",
        "modalities": ["text"],
        "skip_special_tokens": True,
    }
    later = {"session_id": "s", "expected_output_tokens": 5, "priority": -3, "cache_salt": "x", "user": "me"}
    async with rig() as server:
        for path, body in ((CHAT, HELLO), (TEXT, PROMPT)):
            status, answer = await server.post(path, **body, **neutral, **later, no_such_field={"deep": [1]})
            assert status == 200, answer
        said = {"role": "assistant", "content": "x", "tool_calls": None, "refusal": None, "audio": None}
        assert (await server.post(CHAT, messages=[said], max_tokens=1))[0] == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "x" * 600}]}),
        (CHAT, HELLO | {"max_tokens": 600}),
        (CHAT, HELLO | {"max_tokens": 2**31 - 1}),
        (TEXT, {"prompt": "x" * 600}),
        (TEXT, {"prompt": "x" * 512}),
        (TEXT, {"prompt": [1] * 600}),
        (TEXT, PROMPT | {"max_tokens": 600}),
    ],
)
async def test_more_than_the_context_is_context_length_exceeded(path: str, body: dict[str, Any]) -> None:
    async with rig() as server:
        status, answer = await server.post(path, **body)
        assert status == 400
        error = answer["error"]
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == ("messages" if path == CHAT else "prompt")
        assert "512" in error["message"]


async def test_a_wrong_path_method_model_or_size_is_a_nested_error_too() -> None:
    async with rig() as server:
        for method, path, body, status, code in (
            ("GET", "/v1/nothing", None, 404, "not_found"),
            ("GET", CHAT, None, 405, "method_not_allowed"),
            ("POST", "/livez", None, 405, "method_not_allowed"),
            ("GET", "/v1/models/who", None, 404, "model_not_found"),
            ("POST", CHAT, chat(model="who"), 404, "model_not_found"),
            ("POST", "/admin/requests/who/cancel", None, 404, "request_not_found"),
            ("POST", CHAT, b" " * 100_001, 413, "body_too_large"),
            ("PUT", "/admin/policies", b" " * 20_000, 413, "body_too_large"),
        ):
            headers = {"Content-Type": "application/json"}
            async with server.client.request(method, path, data=body, headers=headers) as response:
                answer = await response.json()
                assert (response.status, answer["error"]["code"]) == (status, code)
                assert response.headers["x-request-id"]
                assert ("Allow" in response.headers) == (status == 405)


async def test_a_full_queue_is_a_429_with_retry_after() -> None:
    """One runs, one waits in a queue of one; the next is sent away, and nothing of it stays."""
    async with rig(max_queue=1, max_sequences=1) as server:
        server.worker.gate.clear()
        first = [asyncio.ensure_future(server.post(CHAT, **HELLO)) for _ in range(2)]
        await server.until(running=2)
        async with server.client.post(CHAT, json=HELLO) as response:
            answer = await response.json()
            assert (response.status, answer["error"]["code"]) == (429, "queue_full")
            assert answer["error"]["type"] == "rate_limit_error"
            assert int(response.headers["Retry-After"]) >= 1
        server.worker.gate.set()
        assert [status for status, _ in await asyncio.gather(*first)] == [200, 200]


async def test_a_body_that_does_not_arrive_is_a_408() -> None:
    async with rig(server=ServerSection(read_timeout_seconds=0.01)) as server:

        async def never() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.Event().wait()

        async with server.client.post(CHAT, data=never()) as response:
            assert response.status == 408
            assert (await response.json())["error"]["code"] == "slow_body"


async def test_a_sane_request_id_is_honoured_and_another_replaced() -> None:
    async with rig() as server:
        for said_id, kept in (
            ("trace-1:a/b", True),
            ("no spaces please", False),
            ("x" * 129, False),
            ("", False),
        ):
            async with server.client.post(CHAT, json=HELLO, headers={"x-request-id": said_id}) as response:
                assert (response.headers["x-request-id"] == said_id) == kept
