"""`POST /tokenize` and `POST /detokenize`: what a prompt is in tokens, and the reverse. Shapes as vLLM has them."""

from functools import partial
from typing import Annotated, Self

from aiohttp import web
from pydantic import Field, model_validator
from pydantic_core import to_json

from app.bodies import read_body
from app.schema import Lenient, Messages, TokenId, contradiction
from app.served import SERVED, Model
from app.threads import aside
from app.translation import chat_tokens, check_model_name, checked_ids, size_of
from app.wire import token_text

MAX_TOKENS = 2**18
"""Of one call to /detokenize."""


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
            raise contradiction("prompt", "give either prompt or messages")
        return self


class DetokenizeCall(Lenient):
    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS, fail_fast=True)]


async def tokenize(http: web.Request) -> web.Response:
    served = http.app[SERVED]
    call = TokenizeCall.model_validate_json(await read_body(http))
    check_model_name(call.model, served.model)
    size = len(call.prompt or "") + size_of(call.messages or ())
    return _json(await aside(partial(_tokenized, call, served.model, served.context), size))


def _tokenized(call: TokenizeCall, model: Model, context: int) -> bytes:
    if call.prompt is None:
        tokens = chat_tokens(call.messages or (), model)
    else:
        tokens = model.tokenizer.encode(call.prompt, add_special_tokens=call.add_special_tokens)
    strings = [token_text(model, token)[0] for token in tokens] if call.return_token_strs else None
    return to_json({"count": len(tokens), "max_model_len": context, "tokens": tokens, "token_strs": strings})


async def detokenize(http: web.Request) -> web.Response:
    """Special tokens are written as the model writes them."""
    served = http.app[SERVED]
    call = DetokenizeCall.model_validate_json(await read_body(http))
    check_model_name(call.model, served.model)
    return _json(await aside(partial(_detokenized, call.tokens, served.model), len(call.tokens)))


def _detokenized(tokens: list[int], model: Model) -> bytes:
    known = checked_ids(tokens, len(model.vocabulary), "tokens")
    exact = b"".join(
        model.vocabulary[token] or model.special_tokens.get(token, "").encode() for token in known
    )
    return to_json({"prompt": exact.decode(errors="replace")})


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json", charset="utf-8")
