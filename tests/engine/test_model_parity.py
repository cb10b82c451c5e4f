"""The model is the one that transformers computes: same greedy tokens and logits, all shapes and kernels."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.model.config import read_config
from engine.model.rope import Rope, rope_table
from tests.engine.models import KERNELS, SHAPES, driver_for, greedy, load, random_tokens

NEW_TOKENS = 64
CASES = [*((name, kernels) for name in SHAPES for kernels in KERNELS), ("shipped", "cpu")]


@cache
def peer(directory: Path) -> Any:
    """transformers' own model, in fp32 and with the plain attention."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")


@cache
def peer_tokens(directory: Path) -> list[int]:
    """transformers' greedy continuation of the prompt, end-of-sequence ignored."""
    prompt = torch.tensor([prompt_for(directory)])
    with torch.inference_mode():
        out = peer(directory).generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            temperature=None,
            top_p=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    tokens: list[int] = out[0, prompt.shape[1] :].tolist()
    return tokens


def prompt_for(directory: Path) -> list[int]:
    return random_tokens(37, read_config(directory).vocab_size, seed=3)


def peer_logits(directory: Path, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = peer(directory)(torch.tensor([tokens])).logits[0]
    return logits


@pytest.mark.parametrize(("name", "kernels"), CASES)
def test_greedy_tokens_are_those_of_transformers(
    name: str, kernels: str, model_directory: Callable[[str], Path]
) -> None:
    """64 new tokens in fp32, drawn one by one through runner and sampler, equal `generate`'s."""
    directory = model_directory(name)
    ours = greedy(load(directory, kernels, "float32"), prompt_for(directory), NEW_TOKENS)
    assert len(ours) == NEW_TOKENS
    assert ours == peer_tokens(directory)


@pytest.mark.parametrize(("name", "kernels"), CASES)
def test_logits_are_those_of_transformers(
    name: str, kernels: str, model_directory: Callable[[str], Path]
) -> None:
    """Every position's logits, in fp32, differ by less than 1e-4 of the largest.

    Where it takes no time, the context is long enough for windows to leave whole units of attention out.
    """
    directory = model_directory(name)
    loaded = load(directory, kernels, "float32")
    tokens = random_tokens(250 if kernels == "cpu" else 90, loaded.config.vocab_size, seed=4)
    driver = driver_for(loaded)
    driver.run(0, tokens, chunk=50)
    theirs = peer_logits(directory, tokens)
    assert (driver.all_logits(0) - theirs).abs().max() < 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("kernels", KERNELS)
def test_bfloat16_follows_float32(kernels: str, model_directory: Callable[[str], Path]) -> None:
    """bf16 kernels compute the same function: their logits are as near as 8 bits of mantissa let them be."""
    exact = peer_logits(directory := model_directory("gqa"), tokens := random_tokens(60, 512, seed=5))
    driver = driver_for(load(directory, kernels, "bfloat16"))
    driver.run(0, tokens, chunk=60)
    assert (driver.all_logits(0).float() - exact).abs().max() < 0.05 * exact.abs().max()


ROPES = {
    "gqa": "default",
    "llama3": "llama3",
    "rope_parameters": "llama3",
    "linear": "linear",
    "yarn": "yarn",
    "yarn_mscale": "yarn",
    "qwen2_yarn": "yarn",
    "dynamic": "dynamic",
    "phi3_long": "longrope",
}


@pytest.mark.parametrize("name", ROPES)
def test_the_rotary_table_is_that_of_transformers(name: str, model_directory: Callable[[str], Path]) -> None:
    """Cosines and sines, bit for bit, at all positions that are served."""
    config = read_config(directory := model_directory(name))
    embedding = peer(directory).model.rotary_emb
    with torch.inference_mode():
        cos, sin = embedding(torch.zeros(1), torch.arange(config.max_positions)[None])
    ours = rope_table(config.rope, config.head_dim, config.max_positions)
    half = config.head_dim // 2
    assert torch.equal(ours[:, 0], cos[0, :, :half])
    assert torch.equal(ours[:, 1], sin[0, :, :half])
    assert config.rope.kind == ROPES[name]
    plain = rope_table(Rope(config.rope.theta), config.head_dim, config.max_positions)
    assert torch.equal(ours, plain) == (ROPES[name] in ("default", "dynamic"))
