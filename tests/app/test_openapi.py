"""`/openapi.json` describes this server: made-up calls are answered as it says. A longer run: bench/fuzz.py."""

import asyncio

import pytest

from app.openapi import STREAMED, document
from app.openapi_answers import ChatCompletion, Completion
from app.server import ROUTES
from bench.fuzz import fuzz
from tests.app.rig import rig
from tests.fakes import hashed

EXAMPLES = 12


async def test_made_up_calls_are_answered_as_described_and_never_with_a_5xx() -> None:
    async with rig(hashed(256), context=64) as server:
        counts, problems = await asyncio.to_thread(fuzz, server.url, EXAMPLES, repeatable=True)
    assert not problems, "\n\n".join(problems)
    assert not [status for _, _, status in counts if status >= 500]
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        assert counts[f"POST {path}", "negative", 400] > 0
    assert sum(count for (_, _, status), count in counts.items() if status == 200) > EXAMPLES


@pytest.mark.parametrize(
    ("path", "kind", "body"),
    [
        ("/v1/chat/completions", ChatCompletion, {"messages": [{"role": "user", "content": "hi"}]}),
        (
            "/v1/chat/completions",
            ChatCompletion,
            {
                "messages": [{"role": "user", "content": "hi"}],
                "logprobs": True,
                "top_logprobs": 2,
                "return_token_ids": True,
            },
        ),
        ("/v1/completions", Completion, {"prompt": "hi"}),
        ("/v1/completions", Completion, {"prompt": "hi", "logprobs": 2, "n": 2, "return_token_ids": True}),
    ],
)
async def test_answers_have_what_is_described_and_nothing_else(
    path: str, kind: type[ChatCompletion | Completion], body: dict[str, object]
) -> None:
    async with rig() as server, server.client.post(path, json=body | {"max_tokens": 9}) as response:
        answer = await response.json()
    described = kind.model_validate(answer)  # refuses what it does not know
    assert described.choices
    assert described.model_dump(mode="json", exclude_unset=True) == answer


def test_every_call_outside_admin_is_described() -> None:
    described = {
        (method.upper(), path) for path, methods in document()["paths"].items() for method in methods
    }
    served = {
        (route.method, route.path.replace("{name:.+}", "{name}"))
        for route in ROUTES
        if not route.path.startswith("/admin/")
    }
    assert described == served - {("GET", "/openapi.json")}
    assert {path for _, path in served} > STREAMED
