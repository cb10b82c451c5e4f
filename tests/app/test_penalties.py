"""Penalties and logit bias from a call to the engine: the client's word, else the model's, else none."""

from collections.abc import Sequence

import pytest

from engine.model.generation import GenerationDefaults
from engine.plan import Sampling
from tests.app.rig import EOS, rig

HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


async def sampling_of(fields: dict[str, object], defaults: GenerationDefaults | None = None) -> Sampling:
    """What a chat call with these fields is drawn by."""
    seen: list[Sampling] = []

    def script(tokens: Sequence[int], sampling: Sampling) -> int:
        seen.append(sampling)
        return 65

    async with rig(script, defaults=defaults) as server:
        status, answer = await server.post("/v1/chat/completions", **HELLO, **fields)
        assert status == 200, answer
    return seen[-1]


@pytest.mark.parametrize("field", ["presence_penalty", "frequency_penalty"])
@pytest.mark.parametrize("value", [-2, -0.5, 0, 1.5, 2])
async def test_penalties_reach_the_sampler(field: str, value: float) -> None:
    found = await sampling_of({field: value})
    assert getattr(found, field) == value
    assert found.penalises == (value != 0)


async def test_biases_are_by_token_id_and_those_of_nothing_are_left_out() -> None:
    found = await sampling_of({"logit_bias": {"200": -100, "7": 3.5, "9": 0}})
    assert found.logit_bias == ((7, 3.5), (200, -100.0))
    assert not found.penalises


async def test_the_models_repetition_penalty_is_a_default() -> None:
    """A client's own goes before it, 1 included, which turns it off."""
    defaults = GenerationDefaults((EOS,), repetition_penalty=1.05)
    assert (await sampling_of({}, defaults)).repetition_penalty == 1.05
    assert (await sampling_of({"repetition_penalty": 1.5}, defaults)).repetition_penalty == 1.5
    assert not (await sampling_of({"repetition_penalty": 1}, defaults)).penalises
    assert not (await sampling_of({})).penalises
