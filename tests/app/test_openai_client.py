"""The official client, over a real socket: synchronous and not, streaming and not."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.app.rig import Rig, rig

HELLO: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Rig, AsyncOpenAI]]:
    async with (
        rig(max_queue=2, max_sequences=2) as server,
        AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        yield server, client


async def test_a_chat_whole_and_streamed() -> None:
    async with connected() as (_, client):
        whole = await client.chat.completions.create(model="otter", messages=HELLO, max_tokens=30)
        assert whole.usage is not None
        assert whole.usage.prompt_tokens_details is not None
        assert whole.usage.completion_tokens == 30
        text, usage = "", None
        async for chunk in await client.chat.completions.create(
            model="otter", messages=HELLO, max_tokens=30, stream=True, stream_options={"include_usage": True}
        ):
            usage = chunk.usage or usage
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
        assert text == whole.choices[0].message.content
        assert usage is not None
        assert usage.completion_tokens == 30


async def test_the_stream_helper() -> None:
    async with connected() as (_, client):
        async with client.chat.completions.stream(model="otter", messages=HELLO, stop="otter") as stream:
            deltas = [event.delta async for event in stream if event.type == "content.delta"]
            final = await stream.get_final_completion()
        assert "".join(deltas) == final.choices[0].message.content != ""
        assert final.choices[0].finish_reason == "stop"


async def test_text_completions_with_extras() -> None:
    async with connected() as (_, client):
        answer = await client.completions.create(
            model="otter",
            prompt=[1, 2, 3],
            max_tokens=5,
            logprobs=1,
            extra_body={"return_token_ids": True, "top_k": 3},
        )
        choice = answer.choices[0]
        assert choice.logprobs is not None
        assert choice.logprobs.tokens is not None
        assert len(choice.logprobs.tokens) == 5
        assert choice.model_extra is not None
        assert len(choice.model_extra["token_ids"]) == 5


async def test_models() -> None:
    async with connected() as (_, client):
        assert [model.id async for model in client.models.list()] == ["otter"]
        assert (await client.models.retrieve("otter")).id == "otter"


async def test_errors_have_the_clients_own_types() -> None:
    async with connected() as (server, client):
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="who", messages=HELLO)
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError) as long:
            await client.chat.completions.create(model="otter", messages=HELLO, max_tokens=10_000)
        assert long.value.code == "context_length_exceeded"
        server.worker.gate.clear()
        calls = [
            asyncio.ensure_future(client.chat.completions.create(model="otter", messages=HELLO, max_tokens=9))
            for _ in range(3)  # one is in the step that waits, two fill the queue
        ]
        await server.until(running=3)
        with pytest.raises(openai.RateLimitError):
            await client.chat.completions.create(model="otter", messages=HELLO, max_tokens=9)
        server.worker.gate.set()
        await asyncio.gather(*calls)


async def test_an_engine_that_dies_in_mid_stream_raises_in_the_client() -> None:
    async with connected() as (server, client):
        stream = await client.chat.completions.create(model="otter", messages=HELLO, stream=True)
        await anext(stream)
        server.worker.explode()
        with pytest.raises(openai.APIError, match="the engine has died"):
            _ = [chunk async for chunk in stream]


async def test_the_synchronous_client() -> None:
    """It blocks, so it runs on a thread."""
    async with rig() as server:

        def talk() -> Iterator[str]:
            with OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
                answer = client.chat.completions.create(model="otter", messages=HELLO, max_tokens=30)
                yield answer.choices[0].message.content or ""
                chunks = client.chat.completions.create(
                    model="otter", messages=HELLO, max_tokens=30, stream=True
                )
                yield "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

        whole, streamed = await asyncio.to_thread(lambda: list(talk()))
        assert whole == streamed != ""
