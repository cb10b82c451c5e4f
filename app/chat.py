"""`POST /v1/chat/completions`: the words of its answers, whole and in chunks."""

import json
from typing import Any

from app.served import Model
from app.sse import frame
from app.wire import Choice, Heading, finite, says_something, token_text, usage_json
from engine.plan import Logprob
from engine.request import Delta, Usage


class ChatWire:
    """Nearly all chunks are plain text; these are glued from parts made once."""

    def __init__(self, heading: Heading, model: Model) -> None:
        self._heading = heading
        self._model = model
        self._fields = {
            "id": heading.id,
            "object": "chat.completion.chunk",
            "created": heading.created,
            "model": heading.model,
        }
        head = json.dumps(self._fields, separators=(",", ":"))[:-1]
        self._before_index = f'data: {head},"choices":[{{"index":'
        self._before_text = ',"delta":{"content":'
        tail = ',"usage":null' if heading.include_usage else ""
        self._after_text = f'}},"logprobs":null,"finish_reason":null}}]{tail}}}\n\n'
        self._plain = not (heading.logprobs or heading.return_token_ids)

    def opening(self, index: int) -> bytes:
        return self._frame({"index": index, "delta": {"role": "assistant", "content": ""}})

    def chunk(self, index: int, delta: Delta) -> bytes:
        if self._plain and delta.finish_reason is None:
            return self._text_chunk(index, delta.text) if delta.text else b""
        return self._full_chunk(index, delta) if says_something(self._heading, delta) else b""

    def _text_chunk(self, index: int, text: str) -> bytes:
        return f"{self._before_index}{index}{self._before_text}{json.dumps(text)}{self._after_text}".encode()

    def _full_chunk(self, index: int, delta: Delta) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta": {"content": delta.text} if delta.text else {}}
        if self._heading.logprobs:
            choice["logprobs"] = self._logprobs(delta.token_ids, delta.logprobs)
        if delta.finish_reason is not None:
            choice |= {"finish_reason": delta.finish_reason.value, "stop_reason": delta.stop_reason}
        if self._heading.return_token_ids:
            choice["token_ids"] = delta.token_ids
        return self._frame(choice)

    def _frame(self, choice: dict[str, Any]) -> bytes:
        usage = {"usage": None} if self._heading.include_usage else {}
        return frame(self._fields | {"choices": [{"logprobs": None, "finish_reason": None} | choice]} | usage)

    def usage(self, usage: Usage) -> bytes:
        return frame(self._fields | {"choices": [], "usage": usage_json(usage)})

    def whole(self, choices: list[Choice], usage: Usage) -> dict[str, Any]:
        return self._fields | {
            "object": "chat.completion",
            "choices": [self._whole_choice(choice) for choice in choices],
            "usage": usage_json(usage),
        }

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        ids = {"token_ids": choice.token_ids} if self._heading.return_token_ids else {}
        logprobs = self._logprobs(choice.token_ids, choice.logprobs) if self._heading.logprobs else None
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        } | ids

    def _logprobs(
        self, tokens: tuple[int, ...] | list[int], logprobs: tuple[Logprob, ...] | list[Logprob]
    ) -> Any:
        entries = zip(tokens, logprobs, strict=True)
        return {
            "content": [
                self._entry(token, each.logprob) | {"top_logprobs": [self._entry(*top) for top in each.top]}
                for token, each in entries
            ]
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text, exact = token_text(self._model, token)
        return {"token": text, "logprob": finite(logprob), "bytes": exact}
