"""From what a client sent to what the engine takes: prompts become token ids, fields become parameters.

Types and bounds were checked by `app/schema.py`; here are the checks that need the model. A call that is long, in one
piece or in many, is tokenised and checked on a worker thread, so that the event loop goes on serving everyone else.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from app.errors import ApiError, bad_request
from app.salt import session_of
from app.schema import MAX_CHOICES, MAX_LOGPROBS, ChatCall, CommonCall, CompletionCall, Message
from app.served import Model, Served
from app.threads import aside
from app.wire import token_text
from engine.plan import Sampling
from engine.request import Request, ServiceClass, Stopping

MESSAGE_CHARACTERS = 64
"""To render a message takes as long as so many characters of it. Chosen, not measured."""

Prompt = tuple[int, ...]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `tenant`, `salt`: see app/salt.py."""

    tenant: str
    salt: str
    service: ServiceClass


async def chat_prompt(call: ChatCall, model: Model) -> Prompt:
    """Renders the messages by the model's chat template, and tokenises."""

    def prompt() -> Prompt:
        return _taken(chat_tokens(call.messages, model), model, "messages")

    return await aside(prompt, size_of(call.messages))


def size_of(messages: Sequence[Message]) -> int:
    """How much work they are, in characters."""
    return sum(len(message.text) + MESSAGE_CHARACTERS for message in messages)


def chat_tokens(messages: Sequence[Message], model: Model) -> list[int]:
    """As the chat template has them, which writes special tokens itself."""
    asked = [{"role": message.role, "content": message.text} for message in messages]
    return model.tokenizer.encode(model.tokenizer.render_chat(asked), add_special_tokens=False)


async def completion_prompts(call: CompletionCall, model: Model, context: int) -> list[Prompt]:
    """One prompt per text or list of ids."""
    prompts = (
        [call.prompt] if isinstance(call.prompt, str) or isinstance(call.prompt[0], int) else call.prompt
    )
    if len(prompts) > MAX_CHOICES:
        raise bad_request(f"prompt: at most {MAX_CHOICES} prompts a call, not {len(prompts)}", "prompt")
    size = sum(len(prompt) for prompt in prompts if isinstance(prompt, str | list))
    return await aside(lambda: [_completion_prompt(prompt, model, context) for prompt in prompts], size)


def _completion_prompt(prompt: object, model: Model, context: int) -> Prompt:
    if isinstance(prompt, str):
        return _taken(model.tokenizer.encode(prompt), model, "prompt")
    if not isinstance(prompt, list):
        raise bad_request(
            "prompt: expected a text, a list of texts, token ids, or lists of token ids", "prompt"
        )
    if len(prompt) > context:  # before looking at each
        raise too_long(len(prompt), context, "prompt")
    return _not_empty(checked_ids(prompt, model.token_ids, "prompt"), "prompt")


def checked_ids(ids: list[Any], count: int, param: str) -> list[int]:
    """Raises ApiError unless all are token ids below `count`."""
    if not all(type(token) is int and 0 <= token < count for token in ids):
        raise bad_request(f"{param}: token ids are whole numbers from 0 to {count - 1}", param)
    return ids


def _taken(tokens: list[int], model: Model, param: str) -> Prompt:
    """Raises ApiError for what the tokenizer makes and the model does not take."""
    if max(tokens, default=0) >= model.token_ids:
        text, _ = token_text(model, max(tokens))
        raise bad_request(f"{param}: the tokenizer has a token for {text!r}, the model has none", param)
    return _not_empty(tokens, param)


def _not_empty(tokens: list[int], param: str) -> Prompt:
    if not tokens:
        raise bad_request(f"{param}: there is not one token in it", param)
    return tuple(tokens)


def too_long(prompt_tokens: int, context: int, param: str, max_tokens: int = 0) -> ApiError:
    """Worded so that clients that look for "maximum context length" know what to do."""
    asked = f"{prompt_tokens} in the prompt" + (f" and {max_tokens} to generate" if max_tokens else "")
    message = f"The maximum context length is {context} tokens here, but there are {asked}. Ask for less."
    return bad_request(message, param, code="context_length_exceeded")


def check_model_name(name: str | None, model: Model) -> None:
    """Raises ApiError for another model than the one that is served."""
    if name not in (None, "", model.name):
        message = f"The model {name!r} does not exist here; this server has {model.name!r}."
        raise ApiError(404, message, code="model_not_found", param="model")


def engine_requests(
    call: CommonCall,
    prompts: Sequence[Prompt],
    logprobs: int | None,
    max_tokens: int | None,
    answer_id: str,
    caller: Caller,
    served: Served,
) -> list[Request]:
    """One engine request a prompt, with ids that begin with the answer's."""
    n = call.n or 1
    most = min(MAX_CHOICES, served.engine.fleet.cores[0].config.max_queue)
    if n * len(prompts) > most:
        raise bad_request(f"n: {len(prompts)} prompts of {n} choices are more than the {most} allowed", "n")
    sampling = sampling_of(call, logprobs, served.model)
    param = "messages" if isinstance(call, ChatCall) else "prompt"
    requests = [
        Request(
            id=answer_id if len(prompts) == 1 else f"{answer_id}-{index}",
            prompt=prompt,
            sampling=sampling,
            stopping=_stopping(
                call, _max_tokens(max_tokens, len(prompt), served.context, param), served.model
            ),
            n=n,
            priority=call.priority or 0,
            salt=caller.salt,
            tenant=caller.tenant,
            service=caller.service,
            expected_output_tokens=call.expected_output_tokens,
            session=session_of(caller.tenant, call.session_id),
        )
        for index, prompt in enumerate(prompts)
    ]
    _check_logprobs(requests)
    return requests


def _check_logprobs(requests: Sequence[Request]) -> None:
    """Log-probabilities are most of an answer's bytes: this is what bounds its size."""
    entries = sum(
        request.n * request.stopping.max_tokens * (request.sampling.logprobs + 1)
        for request in requests
        if request.sampling.logprobs is not None
    )
    if entries > MAX_LOGPROBS:
        message = f"logprobs: {entries} numbers are more than the {MAX_LOGPROBS} a call may ask for; lower "
        raise bad_request(message + "max_tokens, n or the number of top logprobs", "logprobs")


def _max_tokens(said: int | None, prompt_tokens: int, context: int, param: str) -> int:
    """What the client said, else all that is left of the context. An impossible request is refused here."""
    room = context - prompt_tokens
    if room < 1 or (said or 0) > room:
        raise too_long(prompt_tokens, context, param, said or 0)
    return said or room


def sampling_of(call: CommonCall, logprobs: int | None, model: Model) -> Sampling:
    """The client's word, else the model's, else the API's."""
    defaults = model.defaults
    return Sampling(
        temperature=_first(call.temperature, defaults.temperature, 1.0),
        top_p=_first(call.top_p, defaults.top_p, 1.0),
        top_k=max(0, _first(call.top_k, defaults.top_k, 0)),
        min_p=_first(call.min_p, defaults.min_p, 0.0),
        seed=secrets.randbits(64) if call.seed is None else call.seed % 2**64,
        logprobs=logprobs,
        repetition_penalty=_first(call.repetition_penalty, defaults.repetition_penalty, 1.0),
        frequency_penalty=call.frequency_penalty or 0.0,
        presence_penalty=call.presence_penalty or 0.0,
        logit_bias=_logit_bias(call, model),
    )


def _logit_bias(call: CommonCall, model: Model) -> tuple[tuple[int, float], ...]:
    """By token id, those that do nothing left out."""
    biases = sorted((int(token), bias) for token, bias in (call.logit_bias or {}).items())
    if biases and biases[-1][0] >= model.token_ids:
        raise bad_request(f"logit_bias: token ids go up to {model.token_ids - 1}", "logit_bias")
    return tuple((token, bias) for token, bias in biases if bias)


def _first(said: T | None, default: T | None, neutral: T) -> T:
    return next((value for value in (said, default) if value is not None), neutral)


def _stopping(call: CommonCall, max_tokens: int, model: Model) -> Stopping:
    stop_token_ids = tuple(call.stop_token_ids or ())
    if any(token >= model.token_ids for token in stop_token_ids):
        raise bad_request(f"stop_token_ids: ids go up to {model.token_ids - 1}", "stop_token_ids")
    min_tokens = call.min_tokens or 0
    if min_tokens > max_tokens:
        raise bad_request(
            f"min_tokens: {min_tokens} is more than the {max_tokens} there is room for", "min_tokens"
        )
    stop = (call.stop,) if isinstance(call.stop, str) else tuple(call.stop or ())
    return Stopping(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop=stop,
        stop_token_ids=stop_token_ids,
        ignore_eos=bool(call.ignore_eos),
        include_stop_str=bool(call.include_stop_str_in_output),
    )
