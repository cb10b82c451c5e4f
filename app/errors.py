"""Errors as clients see them: `{"error": {message, type, param, code}}`, whatever went wrong.

The middleware turns exceptions into answers; `as_api_error` is the whole translation table. Errors in
mid-stream are `app/answer.py`'s.
"""

from collections.abc import Mapping
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler
from pydantic import ValidationError
from structlog.stdlib import get_logger

from app.schema import CONTRADICTION, UNSUPPORTED
from engine.chat_template import ChatTemplateError
from engine.request import EngineDead, QueueFull, Refused

log = get_logger(__name__)

RETRY_AFTER_SECONDS = 1
CANCELLED_STATUS = 499  # not retried by clients; what gRPC's CANCELLED maps to


class ApiError(Exception):
    """An answer that is an error: `status` and what goes into the error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        error = {"message": str(self), "type": _kind(self.status), "param": self.param, "code": self.code}
        return {"error": error}


_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def _kind(status: int) -> str:
    return _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, code=code, param=param)


def draining() -> ApiError:
    return _later("the server is shutting down", "shutting_down")


def _later(message: str, code: str) -> ApiError:
    return ApiError(503, message, code=code, headers={"Retry-After": "5"})


def cancelled() -> ApiError:
    return ApiError(CANCELLED_STATUS, "the request was cancelled on the server", code="request_cancelled")


def replica_lost() -> ApiError:
    message = "the replica that ran the request is lost, and no other has room for it"
    return ApiError(500, message, code="replica_lost")


def as_api_error(error: Exception) -> ApiError:
    """The answer to an exception of ours, of pydantic's or of aiohttp's; anything else is our bug, a 500."""
    match error:
        case ApiError():
            return error
        case QueueFull():
            headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
            return ApiError(429, str(error), code=error.code, param=error.param, headers=headers)
        case Refused(code="no_replica"):
            return _later(str(error), error.code)
        case Refused():
            return ApiError(400, str(error), code=error.code, param=error.param)
        case ChatTemplateError():
            return bad_request(str(error), "messages", code="chat_template_error")
        case EngineDead():
            return ApiError(500, "the engine has died; the server is about to end", code="engine_dead")
        case ValidationError():
            return _invalid(error)
        case web.HTTPException():
            return _of_http(error)
        case web.RequestPayloadError():
            return bad_request("the body is not what its headers say", code="invalid_body")
        case _:
            return ApiError(500, "an internal error; the server's log has the details", code="internal_error")


def _invalid(error: ValidationError) -> ApiError:
    problems = error.errors(include_url=False, include_input=False)
    deepest = max(problems, key=lambda problem: len(problem["loc"]))  # of a union's arms, the one meant
    message, param = deepest["msg"], _param(deepest["loc"])
    if deepest["type"] in (UNSUPPORTED, CONTRADICTION):  # of a whole model: the field is in the context
        code = "unsupported_parameter" if deepest["type"] == UNSUPPORTED else "invalid_value"
        return bad_request(message, _param((*deepest["loc"], deepest["ctx"]["name"])), code=code)
    where = f"{param}: " if param else ""
    return bad_request(where + message, param, code=_CODES.get(deepest["type"], "invalid_value"))


def _param(loc: tuple[int | str, ...]) -> str | None:
    """Pydantic's path as in "messages.0.content": without union arms ("str", "list[…]"), which are ours."""
    named = [str(part) for part in loc if isinstance(part, int) or (part.isidentifier() and part != "str")]
    return ".".join(named) or None


_CODES = {"missing": "missing_required_parameter", "json_invalid": "invalid_json"}
_HTTP_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    413: "body_too_large",
    417: "expectation_failed",
}


def _of_http(error: web.HTTPException) -> ApiError:
    headers = {name: value for name, value in error.headers.items() if name.lower() == "allow"}
    return ApiError(error.status, error.reason, code=_HTTP_CODES.get(error.status), headers=headers)


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except Exception as error:  # the border: whatever it is, the client gets an object, and bugs get logged
        if request.transport is None and isinstance(error, ConnectionError):
            raise  # the client has left, and aiohttp knows
        answer = as_api_error(error)
        if answer.code == "internal_error":
            log.exception("internal_error", method=request.method, path=request.path)
        return answer_to(answer)


def answer_to(error: ApiError) -> web.Response:
    return web.json_response(error.body, status=error.status, headers=error.headers)
