"""`POST /v1/completions`: the words of its answers, whole and in chunks."""

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from app.served import Model
from app.sse import frame
from app.wire import Choice, Heading, finite, says_something, token_text, usage_json
from engine.plan import Logprob
from engine.request import Delta, Usage


class CompletionWire:
    def __init__(self, heading: Heading, model: Model) -> None:
        self._heading = heading
        self._model = model
        self._fields = {
            "id": heading.id,
            "object": "text_completion",
            "created": heading.created,
            "model": heading.model,
        }
        self._offsets: defaultdict[int, int] = defaultdict(int)  # by choice: characters of tokens so far
        head = json.dumps(self._fields, separators=(",", ":"))[:-1]
        self._before_index = f'data: {head},"choices":[{{"index":'
        tail = ',"usage":null' if heading.include_usage else ""
        self._after_text = f',"logprobs":null,"finish_reason":null}}]{tail}}}\n\n'
        self._plain = not (heading.logprobs or heading.return_token_ids)

    def opening(self, index: int) -> bytes:
        return b""

    def chunk(self, index: int, delta: Delta) -> bytes:
        if self._plain and delta.finish_reason is None:
            return self._text_chunk(index, delta.text) if delta.text else b""
        return self._full_chunk(index, delta) if says_something(self._heading, delta) else b""

    def _text_chunk(self, index: int, text: str) -> bytes:
        return f'{self._before_index}{index},"text":{json.dumps(text)}{self._after_text}'.encode()

    def _full_chunk(self, index: int, delta: Delta) -> bytes:
        reason = delta.finish_reason and delta.finish_reason.value
        choice = self._choice(index, delta.text, delta.token_ids, delta.logprobs, reason, delta.stop_reason)
        usage = {"usage": None} if self._heading.include_usage else {}
        return frame(self._fields | {"choices": [choice]} | usage)

    def usage(self, usage: Usage) -> bytes:
        return frame(self._fields | {"choices": [], "usage": usage_json(usage)})

    def whole(self, choices: list[Choice], usage: Usage) -> dict[str, Any]:
        return self._fields | {
            "choices": [
                self._choice(c.index, c.text, c.token_ids, c.logprobs, c.finish_reason, c.stop_reason)
                for c in choices
            ],
            "usage": usage_json(usage),
        }

    def _choice(
        self,
        index: int,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[Logprob],
        finish_reason: str | None,
        stop_reason: str | int | None,
    ) -> dict[str, Any]:
        ids = {"token_ids": token_ids} if self._heading.return_token_ids else {}
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, token_ids, logprobs) if self._heading.logprobs else None,
            "finish_reason": finish_reason,
            "stop_reason": stop_reason,
        } | ids

    def _logprobs(self, index: int, tokens: Sequence[int], logprobs: Sequence[Logprob]) -> dict[str, Any]:
        """Four parallel lists. Offsets count the characters of the tokens before, from the beginning.

        The token drawn is among the likeliest, whether it is one of them or not, as in OpenAI's answers.
        """
        texts = [token_text(self._model, token)[0] for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [finite(each.logprob) for each in logprobs],
            "top_logprobs": [
                {token_text(self._model, id_)[0]: finite(logprob) for id_, logprob in each.top}
                | {text: finite(each.logprob)}
                for text, each in zip(texts, logprobs, strict=True)
            ],
            "text_offset": offsets,
        }
