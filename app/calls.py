"""The handlers of both completion calls: body → validated call → engine requests → answer."""

import time
from typing import TypeVar

from aiohttp import web

from app.answer import stream_answer, whole_answer
from app.bodies import read_body
from app.chat import ChatWire
from app.completions import CompletionWire
from app.errors import draining
from app.ids import new_id
from app.salt import salt_of, tenant_of
from app.schema import ChatCall, CommonCall, CompletionCall
from app.served import SERVED, Served
from app.translation import Caller, chat_prompt, check_model_name, completion_prompts, engine_requests
from app.turns import Turns
from app.wire import Heading

TURNS: web.AppKey[Turns] = web.AppKey("turns", Turns)

Call = TypeVar("Call", bound=CommonCall)


async def chat_completions(http: web.Request) -> web.StreamResponse:
    served = http.app[SERVED]
    call = await _read(http, served, ChatCall)
    prompt = await chat_prompt(call, served.model)
    logprobs = (call.top_logprobs or 0) if call.logprobs else None
    heading = _heading("chatcmpl", call, served, logprobs)
    max_tokens = call.max_completion_tokens or call.max_tokens
    caller = _caller(http, call, served)
    requests = engine_requests(call, [prompt], logprobs, max_tokens, heading.id, caller, served)
    wire = ChatWire(heading, served.model)
    if call.stream:
        return await stream_answer(http, served, requests, wire, heading.include_usage)
    return await whole_answer(http, served, requests, wire)


async def completions(http: web.Request) -> web.StreamResponse:
    served = http.app[SERVED]
    call = await _read(http, served, CompletionCall)
    prompts = await completion_prompts(call, served.model, served.context)
    heading = _heading("cmpl", call, served, call.logprobs)
    caller = _caller(http, call, served)
    requests = engine_requests(call, prompts, call.logprobs, call.max_tokens, heading.id, caller, served)
    wire = CompletionWire(heading, served.model)
    if call.stream:
        return await stream_answer(http, served, requests, wire, heading.include_usage)
    return await whole_answer(http, served, requests, wire)


async def _read(http: web.Request, served: Served, kind: type[Call]) -> Call:
    """The body as a call for this server. Raises ApiError, ValidationError, or aiohttp's own 413."""
    if served.engine.draining:
        raise draining()
    body = await read_body(http)
    await http.app[TURNS].take()
    call = kind.model_validate_json(body)
    check_model_name(call.model, served.model)
    served.unknown_fields.note(call.unknown_fields)
    return call


def _caller(http: web.Request, call: CommonCall, served: Served) -> Caller:
    tenant = tenant_of(http.headers)
    shared = served.kvstore.share_across_keys
    return Caller(
        tenant=tenant,
        salt=salt_of(http.headers, call.cache_salt, share_across_keys=shared),
        service=served.classes.of(tenant, call.priority or 0),
    )


def _heading(prefix: str, call: CommonCall, served: Served, logprobs: int | None) -> Heading:
    return Heading(
        id=new_id(prefix),
        created=int(time.time()),
        model=served.model.name,
        include_usage=bool(call.stream and call.stream_options and call.stream_options.include_usage),
        return_token_ids=bool(call.return_token_ids),
        logprobs=logprobs is not None,
    )
