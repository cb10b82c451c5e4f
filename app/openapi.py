"""`GET /openapi.json`: what this server's calls take and give, in OpenAPI 3.1, from the models that check bodies.

What answers look like is written in `app/openapi_answers.py`. /admin is not in it: it is for operators, not for
programs that were made from a description.
"""

from functools import cache
from typing import Any

from aiohttp import web
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from app.openapi_answers import (
    ChatCompletion,
    Completion,
    Detokenized,
    Error,
    ModelCard,
    ModelList,
    Status,
    Tokenized,
)
from app.schema import ChatCall, CompletionCall
from app.tokens import DetokenizeCall, TokenizeCall

REF = "#/components/schemas/{model}"
BEARER = {"bearer": {"type": "http", "scheme": "bearer", "description": "if the server has keys"}}
NEEDS_KEY: list[dict[str, list[str]]] = [{"bearer": []}, {}]

CALLS: tuple[tuple[str, str, type[BaseModel], type[BaseModel]], ...] = (
    ("/v1/chat/completions", "Continue a chat.", ChatCall, ChatCompletion),
    ("/v1/completions", "Continue a text.", CompletionCall, Completion),
    ("/tokenize", "A text or a chat, in tokens.", TokenizeCall, Tokenized),
    ("/detokenize", "Tokens, as text.", DetokenizeCall, Detokenized),
)
"""POST: path, what it does, body, answer."""

EVENT = {
    "type": "object",
    "description": "One event: the JSON of a chunk, or [DONE].",
    "properties": {"data": {"type": "string"}},
    "required": ["data"],
}
STREAMED = frozenset({"/v1/chat/completions", "/v1/completions"})
REFUSALS = {
    "400": "The call cannot be taken as it is; `param` names the field.",
    "401": "An API key is needed.",
    "403": "The API key may not do this.",
    "404": "There is no such thing, or no such model.",
    "405": "Another method is meant.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "415": "The body is compressed.",
    "421": "The server does not go by that name.",
    "429": "Too many requests; `Retry-After` says when to come back.",
    "431": "A header is too long.",
    "499": "An operator has cancelled the request.",
    "500": "The engine has died, or the request was lost with its replica.",
    "503": "The server is shutting down, not ready, or short of replicas.",
}


async def openapi(http: web.Request) -> web.Response:
    return web.json_response(document())


@cache
def document() -> dict[str, Any]:
    """The same in every answer."""
    models: list[type[BaseModel]] = [ModelList, ModelCard, Status, Error]
    for _, _, body, answer in CALLS:
        models += [body, answer]
    _, definitions = models_json_schema([(model, "validation") for model in models], ref_template=REF)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Sluice", "version": "1", "description": "The OpenAI API, and what is beside it."},
        "security": NEEDS_KEY,
        "paths": {path: {"post": _post(path, text, body, answer)} for path, text, body, answer in CALLS}
        | _gets(),
        "components": {"schemas": definitions["$defs"], "securitySchemes": BEARER},
    }


def _post(path: str, text: str, body: type[BaseModel], answer: type[BaseModel]) -> dict[str, Any]:
    content = _json(answer)
    if path in STREAMED:
        content["text/event-stream"] = {"schema": EVENT}
    return {
        "operationId": path.rpartition("/")[2] if path not in STREAMED else path[4:].replace("/", "_"),
        "summary": text,
        "requestBody": {"required": True, "content": _json(body)},
        "responses": {"200": {"description": "The answer.", "content": content}} | _refusals(),
    }


def _gets() -> dict[str, Any]:
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    text = {"text/plain": {"schema": {"type": "string"}}}
    return {
        "/v1/models": _get("models", "The model that is served.", _json(ModelList)),
        "/v1/models/{name}": _get("model", "The model, if it is this one.", _json(ModelCard), name),
        "/livez": _get("livez", "Whether the process works.", _json(Status)),
        "/readyz": _get("readyz", "Whether it takes requests.", _json(Status)),
        "/health": _get("health", "Whether the engine lives.", {}),
        "/metrics": _get("metrics", "Metrics, in Prometheus' text format.", text),
    }


def _get(name: str, text: str, content: dict[str, Any], *parameters: dict[str, Any]) -> dict[str, Any]:
    answer = {"description": "The answer."} | ({"content": content} if content else {})
    return {
        "get": {
            "operationId": name,
            "summary": text,
            "parameters": list(parameters),
            "responses": {"200": answer} | _refusals(),
        }
    }


def _refusals() -> dict[str, Any]:
    return {status: {"description": text, "content": _json(Error)} for status, text in REFUSALS.items()}


def _json(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": REF.format(model=model.__name__)}}}
