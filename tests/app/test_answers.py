"""Both completion calls: streamed and whole answers agree, and have the API's shape."""

import json
import threading
from collections import defaultdict
from itertools import pairwise
from math import inf
from typing import Any

import pytest
from pydantic_core import to_json

from app import answer, tokens
from app.chat import ChatWire
from app.completions import CompletionWire
from app.wire import Choice, Heading
from engine.model.generation import GenerationDefaults
from engine.plan import Logprob
from engine.request import Delta, Request, Usage
from engine.stream import Stream
from tests.app.rig import EOS, STORY, Rig, rig
from tests.app.test_serving import MODEL
from tests.fakes import hashed, saying

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
MESSAGES = [{"role": "user", "content": "hello"}]
TELL = STORY.decode()


def joined(frames: list[dict[str, Any]]) -> dict[int, str]:
    """The text of each choice."""
    texts: defaultdict[int, str] = defaultdict(str)
    for frame in frames:
        for choice in frame["choices"]:
            texts[choice["index"]] += (
                choice["text"] if "text" in choice else choice["delta"].get("content", "")
            )
    return dict(texts)


def whole(answer: dict[str, Any]) -> dict[int, str]:
    return {c["index"]: c["text"] if "text" in c else c["message"]["content"] for c in answer["choices"]}


def watched(server: Rig) -> list[Request]:
    """What the engine is given from now on."""
    given: list[Request] = []
    submit = server.engine.submit

    def noted(request: Request) -> Stream:
        given.append(request)
        return submit(request)

    server.engine.submit = noted  # type: ignore[method-assign] # the only way to see what the engine is given
    return given


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": MESSAGES, "max_tokens": 60}),
        (CHAT, {"messages": MESSAGES, "max_tokens": 40, "n": 3, "seed": 5}),
        (CHAT, {"messages": MESSAGES, "max_tokens": 40, "logprobs": True, "return_token_ids": True}),
        (TEXT, {"prompt": "hello", "max_tokens": 60}),
        (TEXT, {"prompt": ["hello", "good bye"], "max_tokens": 40, "n": 2}),
        (TEXT, {"prompt": [[1, 2], [3]], "max_tokens": 40, "logprobs": 2, "return_token_ids": True}),
        (TEXT, {"prompt": [1, 2, 3], "max_tokens": 12, "stop": ["otter"]}),
    ],
)
async def test_concatenated_chunks_equal_the_whole_answer(path: str, body: dict[str, Any]) -> None:
    """Some hundred tokens of hashed bytes: text, split code points, ids and logprobs alike."""
    async with rig(hashed(256)) as server:
        status, answer = await server.post(path, **body | {"seed": 7})
        frames = await server.stream(path, **body | {"seed": 7})
        assert status == 200
        assert joined(frames) == whole(answer)
        last = {c["index"]: c for frame in frames for c in frame["choices"]}
        for choice in answer["choices"]:
            assert last[choice["index"]]["finish_reason"] == choice["finish_reason"]
            for name in ("token_ids", "logprobs"):
                parts = [
                    c[name]
                    for f in frames
                    for c in f["choices"]
                    if c["index"] == choice["index"] and c.get(name)
                ]
                assert _added(parts) == choice.get(name), name


def _added(parts: list[Any]) -> Any:
    """Lists end to end; dicts of lists, list by list."""
    if not parts:
        return None
    if isinstance(parts[0], dict):
        return {name: [item for part in parts for item in part[name]] for name in parts[0]}
    return [item for part in parts for item in part]


async def test_a_streamed_chat_has_the_apis_frames() -> None:
    """Role first, constant id, created and model, one finish_reason on the last choice, then usage."""
    async with rig() as server:
        frames = await server.stream(
            CHAT, messages=MESSAGES, max_tokens=20, stream_options={"include_usage": True}
        )
    first, *content, last, usage = frames
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {(frame["id"], frame["created"], frame["model"], frame["object"]) for frame in frames} == {
        (first["id"], first["created"], "otter", "chat.completion.chunk")
    }
    assert first["id"].startswith("chatcmpl-")
    assert {frame["choices"][0]["finish_reason"] for frame in [first, *content]} == {None}
    assert last["choices"][0]["finish_reason"] == "length"
    assert all(frame["usage"] is None for frame in [first, *content, last])
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 20
    assert usage["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


async def test_usage_comes_unasked_only_with_whole_answers() -> None:
    async with rig() as server:
        frames = await server.stream(TEXT, prompt="hi", max_tokens=3)
        assert not any("usage" in frame for frame in frames)
        _, answer = await server.post(TEXT, prompt="hi", max_tokens=3)
        assert answer["usage"] | {"prompt_tokens_details": 0} == {
            "prompt_tokens": 2,
            "completion_tokens": 3,
            "total_tokens": 5,
            "prompt_tokens_details": 0,
        }


async def test_cached_tokens_are_told() -> None:
    async with rig() as server:
        await server.post(TEXT, prompt="a" * 50, max_tokens=1)
        _, answer = await server.post(TEXT, prompt="a" * 50, max_tokens=1)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 48


async def test_no_chunk_is_empty_unless_ids_are_asked_for() -> None:
    """A code point of several tokens is one chunk; with return_token_ids, each token is told as it comes."""
    otter = saying("🦦".encode())
    async with rig(otter) as server:
        frames = await server.stream(TEXT, prompt="abcd", max_tokens=8)
        assert [frame["choices"][0]["text"] for frame in frames] == ["🦦", "🦦"]
        frames = await server.stream(TEXT, prompt="abcd", max_tokens=8, return_token_ids=True)
        assert [t for frame in frames for t in frame["choices"][0]["token_ids"]] == list("🦦🦦".encode())


async def test_prompts_times_choices_are_counted_as_the_api_does() -> None:
    """Choice 0 … n-1 belong to the first prompt, the next n to the second; ids of prompts are told apart."""
    async with rig(hashed(256)) as server:
        given = watched(server)
        _, answer = await server.post(TEXT, prompt=["hello", [1, 2, 3]], n=2, max_tokens=4)
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert [request.prompt for request in given] == [tuple(b"hello"), (1, 2, 3)]
        assert [request.id for request in given] == [answer["id"] + "-0", answer["id"] + "-1"]


async def test_the_default_max_tokens_is_what_is_left_of_the_context() -> None:
    async with rig(context=64) as server:
        _, answer = await server.post(TEXT, prompt="x" * 50)
        assert answer["usage"]["completion_tokens"] == 14
        assert answer["choices"][0]["finish_reason"] == "length"


async def test_max_completion_tokens_goes_before_max_tokens() -> None:
    async with rig() as server:
        _, answer = await server.post(CHAT, messages=MESSAGES, max_tokens=9, max_completion_tokens=4)
        assert answer["usage"]["completion_tokens"] == 4


async def test_stops_end_an_answer_and_say_why() -> None:
    async with rig() as server:
        _, by_string = await server.post(TEXT, prompt=[0] * len(STORY), stop="time")
        assert (by_string["choices"][0]["text"], by_string["choices"][0]["stop_reason"]) == (
            "Once upon a ",
            "time",
        )
        _, by_token = await server.post(TEXT, prompt=[0] * len(STORY), stop_token_ids=[ord("u")])
        assert (by_token["choices"][0]["text"], by_token["choices"][0]["stop_reason"]) == ("Once ", ord("u"))
        assert by_token["choices"][0]["finish_reason"] == "stop"


async def test_end_of_sequence_ends_an_answer_unless_ignored() -> None:
    async with rig(saying([65, EOS])) as server:
        _, answer = await server.post(TEXT, prompt=[0, 0], max_tokens=7)
        assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("A", "stop")
        _, answer = await server.post(TEXT, prompt=[0, 0], max_tokens=7, ignore_eos=True)
        assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("AAAA", "length")


async def test_a_chats_logprobs_have_text_and_bytes_for_each_token() -> None:
    async with rig(saying([65, EOS])) as server:
        _, answer = await server.post(
            CHAT,
            messages=MESSAGES,
            max_tokens=2,
            ignore_eos=True,
            logprobs=True,
            top_logprobs=2,
            min_tokens=0,
        )
        entries = answer["choices"][0]["logprobs"]["content"]
        assert {entry["token"]: entry["bytes"] for entry in entries} == {"A": [65], "<eos>": list(b"<eos>")}
        assert all(entry["logprob"] == -1.0 and entry["top_logprobs"] == [] for entry in entries)


async def test_offsets_of_completion_logprobs_count_the_tokens_before() -> None:
    async with rig() as server:
        frames = await server.stream(TEXT, prompt="hi", max_tokens=9, logprobs=0)
        offsets = [o for frame in frames for o in frame["choices"][0]["logprobs"]["text_offset"]]
        assert all(later - earlier == 1 for earlier, later in pairwise(offsets))
        assert len(offsets) == 9


async def test_the_token_drawn_is_among_the_likeliest_of_a_completion() -> None:
    """The scripted runner names none: here the one drawn is never among them."""
    async with rig(saying([65, EOS])) as server:
        for most in (0, 2):
            _, answer = await server.post(TEXT, prompt="x", max_tokens=2, ignore_eos=True, logprobs=most)
            found = answer["choices"][0]["logprobs"]
            assert found["top_logprobs"] == [{token: -1.0} for token in found["tokens"]]


@pytest.mark.parametrize("kind", [ChatWire, CompletionWire])
def test_a_log_probability_of_minus_infinity_is_null_in_every_answer(
    kind: type[ChatWire | CompletionWire],
) -> None:
    """JSON has no word for it, and `-Infinity` is none."""
    heading, choice = Heading("an id", 1, "otter", logprobs=True), Choice(0)
    delta = Delta(0, "A", (65,), (Logprob(-inf, ((66, -inf),)),))
    choice.add(delta)
    frame = json.loads(
        kind(heading, MODEL).chunk(0, delta).removeprefix(b"data: "), parse_constant=pytest.fail
    )
    whole = json.loads(json.dumps(kind(heading, MODEL).whole([choice], Usage(1, 1, 0)), allow_nan=False))
    assert frame["choices"][0]["logprobs"] == whole["choices"][0]["logprobs"]
    assert "null" in json.dumps(frame["choices"][0]["logprobs"])


async def test_the_models_defaults_hold_where_the_client_says_nothing() -> None:
    defaults = GenerationDefaults((EOS,), temperature=0.7, top_p=0.9, top_k=40)
    async with rig(defaults=defaults) as server:
        given = watched(server)
        await server.post(CHAT, messages=MESSAGES, max_tokens=1)
        await server.post(
            CHAT, messages=MESSAGES, max_tokens=1, temperature=0, top_p=1, top_k=-1, min_p=0.1, seed=-1
        )
    drawn = [(s.temperature, s.top_p, s.top_k, s.min_p) for s in (request.sampling for request in given)]
    assert drawn == [(0.7, 0.9, 40, 0.0), (0.0, 1.0, 0, 0.1)]
    assert given[1].sampling.seed == 2**64 - 1


async def test_a_request_without_a_seed_gets_one_of_its_own() -> None:
    async with rig() as server:
        given = watched(server)
        for _ in range(2):
            await server.post(CHAT, messages=MESSAGES, max_tokens=1)
    assert given[0].sampling.seed != given[1].sampling.seed


async def test_every_parameter_reaches_the_engine() -> None:
    async with rig() as server:
        given = watched(server)
        await server.post(
            TEXT,
            prompt="x",
            max_tokens=9,
            min_tokens=2,
            stop=["a", "b"],
            stop_token_ids=[3],
            ignore_eos=True,
            include_stop_str_in_output=True,
            n=2,
            priority=-4,
            cache_salt="pepper",
            logprobs=3,
        )
    (request,) = given
    stopping = request.stopping
    assert (stopping.max_tokens, stopping.min_tokens, stopping.stop, stopping.stop_token_ids) == (
        9,
        2,
        ("a", "b"),
        (3,),
    )
    assert stopping.ignore_eos
    assert stopping.include_stop_str
    assert (request.n, request.priority, request.salt, request.sampling.logprobs) == (2, -4, "/pepper", 3)


async def test_message_content_may_be_text_parts() -> None:
    async with rig() as server:
        given = watched(server)
        parts = [{"type": "text", "text": "good "}, {"type": "text", "text": "day"}]
        await server.post(
            CHAT, messages=[{"role": "user", "content": parts}, {"role": "assistant"}], max_tokens=1
        )
    assert bytes(given[0].prompt) == b"user: good day\nassistant: \nassistant: "


@pytest.mark.parametrize(
    ("path", "body", "here"),
    [
        (TEXT, {"prompt": "x" * 10}, True),
        (TEXT, {"prompt": "x" * 5000}, False),
        (TEXT, {"prompt": ["x" * 300] * 8}, False),
        (CHAT, {"messages": MESSAGES}, True),
        (CHAT, {"messages": [MESSAGES[0] | {"content": "x" * 5000}]}, False),
        (CHAT, {"messages": [MESSAGES[0] | {"content": ""}] * 100}, False),
        ("/tokenize", {"prompt": "x" * 5000}, False),
        ("/tokenize", {"messages": [MESSAGES[0] | {"content": ""}] * 100}, False),
    ],
)
async def test_a_call_that_is_long_is_tokenised_off_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], here: bool
) -> None:
    """In one piece or in many. The tokenizer notes its thread: the loop's own for a short one, another for others."""
    threads: set[threading.Thread] = set()

    async with rig(context=8000, blocks=512) as server:
        encode = server.served.model.tokenizer.encode

        def noted(text: str, add_special_tokens: bool = True) -> list[int]:
            threads.add(threading.current_thread())
            return encode(text, add_special_tokens)

        monkeypatch.setattr(server.served.model.tokenizer, "encode", noted)
        assert (await server.post(path, **body, max_tokens=1))[0] == 200
    assert {thread is threading.current_thread() for thread in threads} == {here}


@pytest.mark.parametrize(
    ("path", "body", "here"),
    [
        ("/detokenize", {"tokens": [65] * 10}, True),
        ("/detokenize", {"tokens": [65] * 5000}, False),
        (CHAT, {"messages": MESSAGES, "max_tokens": 20, "logprobs": True}, True),
        (CHAT, {"messages": MESSAGES, "max_tokens": 800, "n": 3, "logprobs": True}, False),
        (TEXT, {"prompt": ["x"] * 3, "max_tokens": 800, "logprobs": 0}, False),
    ],
)
async def test_an_answer_that_is_long_is_written_off_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], here: bool
) -> None:
    threads: list[threading.Thread] = []

    def noted(value: object, **options: Any) -> bytes:
        threads.append(threading.current_thread())
        return to_json(value, **options)

    for module in (answer, tokens):
        monkeypatch.setattr(module, "to_json", noted)
    async with rig(context=1000, blocks=512) as server:
        assert (await server.post(path, **body))[0] == 200
    assert [thread is threading.current_thread() for thread in threads] == [here]
