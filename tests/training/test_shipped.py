"""The model folder inside the package: tokenizer, template, configuration and weights belong together."""

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer

import app
from training import corpus
from training.corpus import Message
from training.evaluate import load_model
from training.model import Llama, hf_config, shape_from

TALES = Path(app.__file__).parent / "shipped" / "tales"
TOKENIZER = Tokenizer.from_file(str(TALES / "tokenizer.json"))
FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def read(name: str) -> dict[str, Any]:
    """One of the JSON files."""
    values: dict[str, Any] = json.loads((TALES / name).read_text())
    return values


def test_the_folder_holds_what_it_should_and_is_small() -> None:
    assert {path.name for path in TALES.iterdir()} == FILES
    assert sum(path.stat().st_size for path in TALES.iterdir()) < 25e6


@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= i < 4096 for i in ids)


@pytest.mark.parametrize("generate", [False, True])
def test_the_template_renders_what_training_read(generate: bool) -> None:
    turns = [Message("system", "Be brief."), Message("user", "Hello"), Message("assistant", "Hello!")]
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    template = jinja2.Environment(autoescape=True).from_string(
        "{% autoescape false %}" + read("tokenizer_config.json")["chat_template"] + "{% endautoescape %}"
    )
    rendered = template.render(messages=messages, add_generation_prompt=generate)
    assert rendered == corpus.render(turns, generate)


def test_the_markers_are_single_tokens_and_end_a_turn() -> None:
    eos = read("generation_config.json")["eos_token_id"]
    assert [TOKENIZER.id_to_token(i) for i in eos] == ["<|im_end|>", "<|endoftext|>"]
    assert read("tokenizer_config.json")["eos_token"] == "<|im_end|>"
    for marker in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        assert len(TOKENIZER.encode(marker).ids) == 1


def test_the_configuration_is_the_one_that_training_writes() -> None:
    shape, eos = shape_from(TALES / "config.json"), read("generation_config.json")["eos_token_id"]
    assert read("config.json") == hf_config(shape, eos)
    assert shape.vocab_size == TOKENIZER.get_vocab_size() == 4096
    assert shape.max_position_embeddings == 2048


def test_the_weights_fit_the_configuration() -> None:
    stored = load_file(TALES / "model.safetensors")
    expected = Llama(shape_from(TALES / "config.json")).state_dict()
    assert {name: w.shape for name, w in stored.items()} == {name: w.shape for name, w in expected.items()}
    assert {w.dtype for w in stored.values()} == {torch.bfloat16}
    assert 5e6 < sum(w.numel() for w in stored.values()) < 10e6


def test_the_weights_are_trained() -> None:
    text = "Once upon a time there was a king who had three sons. The youngest was called"
    ids = torch.tensor([TOKENIZER.encode(text).ids])
    logits = load_model(TALES, torch.device("cpu"))(ids[:, :-1])
    nats = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:]).item()
    assert nats < 4.0
