"""`POST /tokenize` and `POST /detokenize`: what a prompt is in tokens, and the reverse. Shapes as vLLM has them."""

import asyncio
from typing import Annotated, Self

from aiohttp import web
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from app.bodies import read_body
from app.schema import Lenient, Messages, TokenId
from app.served import SERVED, Model
from app.translation import INLINE_CHARACTERS, check_model_name, checked_ids, rendered
from app.wire import token_text

MAX_TOKENS = 2**20
"""Of one call to /detokenize; the body's size bounds it anyway."""


class TokenizeCall(Lenient):
    """A text, or messages as a chat would have them: one of both."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True  # of a text; a chat's template writes its own
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("contradiction", "give either prompt or messages")
        return self


class DetokenizeCall(Lenient):
    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS, fail_fast=True)]


async def tokenize(http: web.Request) -> web.Response:
    served = http.app[SERVED]
    call = TokenizeCall.model_validate_json(await read_body(http))
    check_model_name(call.model, served.model)
    tokens = await _encoded(call, served.model)
    strings = [token_text(served.model, token)[0] for token in tokens] if call.return_token_strs else None
    return web.json_response(
        {"count": len(tokens), "max_model_len": served.context, "tokens": tokens, "token_strs": strings}
    )


async def _encoded(call: TokenizeCall, model: Model) -> list[int]:
    messages = rendered(call.messages or ())
    prompt = call.prompt

    def encode() -> list[int]:
        if prompt is None:
            return model.tokenizer.encode(model.tokenizer.render_chat(messages), add_special_tokens=False)
        return model.tokenizer.encode(prompt, add_special_tokens=call.add_special_tokens)

    characters = len(prompt or "") + sum(len(message["content"]) for message in messages)
    return encode() if characters <= INLINE_CHARACTERS else await asyncio.to_thread(encode)


async def detokenize(http: web.Request) -> web.Response:
    """Special tokens are written as the model writes them."""
    served = http.app[SERVED]
    call = DetokenizeCall.model_validate_json(await read_body(http))
    check_model_name(call.model, served.model)
    exact = b"".join(
        _bytes(served.model, token)
        for token in checked_ids(call.tokens, len(served.model.vocabulary), "tokens")
    )
    return web.json_response({"prompt": exact.decode(errors="replace")})


def _bytes(model: Model, token: int) -> bytes:
    return model.vocabulary[token] or model.special_tokens.get(token, "").encode()
