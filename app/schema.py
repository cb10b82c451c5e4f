"""What clients may send: pydantic models of both completion calls. Types and bounds only.

Unknown fields are ignored, and logged once (`app/unknown_fields.py`). Fields of the OpenAI API that would change the
answer, and that Sluice cannot honour, are refused unless they are neutral. What fields become: `app/translation.py`.

Pydantic makes an object of each mistake: lists stop at their first, and a dict is counted before it is looked into, or
a body of 4 MiB would take gigabytes.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from engine.plan import LEAST_REPETITION, MOST_REPETITION

MAX_CHOICES = 128  # of one call: prompts × n
MAX_TOP_LOGPROBS = 20
MAX_LOGPROBS = 2**18  # of one call: choices × max_tokens × (top_logprobs + 1), each some 100 bytes of JSON
MAX_STOPS = 16
MAX_BIASES = 1024  # tokens of one logit_bias
MAX_MESSAGES = 4096
MAX_PARTS = 1024  # of one message's content
INT32 = 2**31 - 1
UNSUPPORTED = "unsupported"  # the type of the validation error for a field of `NEUTRAL`
CONTRADICTION = "contradiction"  # and for fields that do not go together

Fraction = Annotated[float, Field(ge=0, le=1)]
Tokens = Annotated[int, Field(ge=1, le=INT32)]
TokenId = Annotated[int, Field(ge=0, le=INT32)]
StopString = Annotated[str, Field(min_length=1, max_length=512)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]  # JSON's keys are strings
Identifier = Annotated[str, Field(max_length=256)]

NEUTRAL: dict[str, tuple[object, ...]] = {
    "best_of": (None, 1),
    "suffix": (None, ""),
    "echo": (None, False),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "tool_calls": (None, []),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "web_search_options": (None,),
    # of vLLM's
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "structured_outputs": (None, {}),
    "use_beam_search": (None, False),
    "bad_words": (None, []),
    "allowed_token_ids": (None, []),
    "truncate_prompt_tokens": (None,),
    "prompt_logprobs": (None,),
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "skip_special_tokens": (None, True),
}
"""Known to the API or to vLLM's, not to us, of calls or messages: only values that change nothing are taken."""


def contradiction(name: str, message: str) -> PydanticCustomError:
    """Of a field that does not go with others."""
    return PydanticCustomError(CONTRADICTION, "{message}", {"name": name, "message": message})


def _few(biases: Any) -> Any:
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        raise PydanticCustomError("too_long", "at most {most} tokens", {"most": MAX_BIASES})
    return biases


class Lenient(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class Noting(Lenient):
    """Fields that are not known are kept by name, to be logged."""

    model_config = ConfigDict(extra="allow")

    @property
    def unknown_fields(self) -> set[str]:
        """In all of a call."""
        return set(self.model_extra or ())

    @model_validator(mode="after")
    def _refuse_what_is_not_built(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name in NEUTRAL and value not in NEUTRAL[name]:
                raise PydanticCustomError(UNSUPPORTED, "{name} is not supported", {"name": name})
        return self


class StreamOptions(Noting):
    include_usage: bool | None = None


class CommonCall(Noting):
    """What chat and text completions share."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32)] | None = None  # 0 and -1: off
    min_p: Fraction | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=LEAST_REPETITION, le=MOST_REPETITION)] | None = None
    logit_bias: Annotated[
        dict[TokenKey, Bias] | None, Field(max_length=MAX_BIASES), BeforeValidator(_few)
    ] = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None

    max_tokens: Tokens | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT32)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None

    priority: Annotated[int, Field(ge=-INT32, le=INT32)] | None = None  # lower first
    cache_salt: Identifier | None = None
    expected_output_tokens: Tokens | None = None  # a hint for policies
    session_id: Identifier | None = None  # calls of one session are best served where the last one was

    @property
    def unknown_fields(self) -> set[str]:
        return super().unknown_fields | (self.stream_options.unknown_fields if self.stream_options else set())

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise contradiction("stream_options", "stream_options needs stream = true")
        if self.min_tokens and self.max_tokens and self.min_tokens > self.max_tokens:
            raise contradiction("min_tokens", "min_tokens is larger than max_tokens")
        return self


class TextPart(Lenient):
    type: Literal["text"]
    text: str


class Message(Noting):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None

    @property
    def text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatCall(CommonCall):
    """`POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @property
    def unknown_fields(self) -> set[str]:
        return super().unknown_fields.union(*(message.unknown_fields for message in self.messages))

    @model_validator(mode="after")
    def _refuse_top_without_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise contradiction("top_logprobs", "top_logprobs needs logprobs = true")
        return self


class CompletionCall(CommonCall):
    """`POST /v1/completions`. `prompt` is a text, a list of texts, token ids, or lists of token ids."""

    prompt: str | Annotated[list[Any], Field(min_length=1)]  # the items: app/translation.py, cheaper there
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
