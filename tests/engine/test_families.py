"""What a config of each family asks for: as transformers reads it, and all that is not served refused by name."""

from typing import Any

import pytest

from engine.model.config import parse_config
from engine.model.errors import UnsupportedModel
from engine.model.family import Traits
from engine.model.random_weights import llama_config
from tests.engine.models import DYNAMIC, LINEAR, LONGROPE, YARN, mistral, phi3, qwen2, qwen3


def read(shape: dict[str, Any], **more: Any) -> Any:
    return parse_config(llama_config(**shape | more))


def test_an_unknown_architecture_is_refused_with_those_that_are_served() -> None:
    with pytest.raises(UnsupportedModel, match=r"Gemma2ForCausalLM.*supported: .*Llama.*Qwen2"):
        read({}, architectures=["Gemma2ForCausalLM"])


def test_qwen2_has_biases_of_q_k_and_v_and_no_others() -> None:
    """Whatever the config says of biases: transformers' Qwen2 does not ask it."""
    found = read(qwen2(), attention_bias=False).traits
    assert (found.qkv_bias, found.out_bias, found.mlp_bias) == (True, False, False)


@pytest.mark.parametrize(
    ("said", "windows"),
    [
        ({}, ()),
        ({"sliding_window": 8}, ()),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, (0, 8)),
        ({"use_sliding_window": True, "sliding_window": 8}, ()),  # from layer 28 on: there is none
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, ()),
        ({"use_sliding_window": True, "max_window_layers": 0}, (4096, 4096)),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (8, 0),
        ),
    ],
)
def test_qwen2s_window_is_in_the_upper_layers_and_only_when_used(
    said: dict[str, Any], windows: tuple[int, ...]
) -> None:
    assert read(qwen2(), **said).traits.windows == windows
    assert read(qwen3(), **said).traits.windows == windows


@pytest.mark.parametrize(
    "said",
    [
        {"layer_types": ["full_attention"]},
        {"layer_types": ["full_attention", "linear_attention"]},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"layer_types": "full_attention"},
    ],
)
def test_layer_types_that_do_not_fit_are_refused(said: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match="layer_types"):
        read(qwen2(), **said)


def test_qwen3_norms_heads_of_a_size_of_its_own() -> None:
    """128 where the config is silent; biases where it asks."""
    raw = llama_config(**qwen3())
    del raw["head_dim"]
    found = parse_config(raw)
    assert (found.head_dim, found.traits.head_norm, found.traits.qkv_bias) == (128, True, False)
    assert read(qwen3(), attention_bias=True).traits.out_bias


@pytest.mark.parametrize(
    ("said", "windows"), [({"sliding_window": None}, ()), ({}, (4096,) * 2), ({"sliding_window": 7}, (7, 7))]
)
def test_mistrals_window_is_in_all_layers(said: dict[str, Any], windows: tuple[int, ...]) -> None:
    """null is none; not to speak of it is 4,096, as transformers takes it."""
    assert read(mistral(), **said).traits.windows == windows


@pytest.mark.parametrize("window", [0, -1, "all", 2.5])
def test_a_window_that_is_none_is_refused(window: object) -> None:
    with pytest.raises(UnsupportedModel, match="sliding_window"):
        read(mistral(), sliding_window=window)


def test_mistral_with_windows_by_layer_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="layer_types"):
        read(mistral(), layer_types=["full_attention", "sliding_attention"])


def test_phi3s_tensors_are_fused_and_its_longrope_ends_with_the_first_context() -> None:
    """By any of its names; the model's own number of first positions goes before its table's."""
    assert read(phi3()).traits == Traits(fused=True)
    for name in ("longrope", "su", "yarn"):
        scaling = LONGROPE | {"type": name, "original_max_position_embeddings": 77}
        found = read(phi3(), rope_scaling=scaling, max_position_embeddings=1024)
        assert (found.rope.kind, found.max_positions, found.rope.factor) == ("longrope", 256, 4.0)
        assert "longrope is served up to its first context of 256" in found.facts[0]


def test_a_longrope_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="short_factor has 3 numbers"):
        read(phi3(), rope_scaling=LONGROPE | {"short_factor": [1, 2, 3]})
    with pytest.raises(UnsupportedModel, match="short_factor"):
        read(phi3(), rope_scaling=LONGROPE | {"short_factor": [1] * 7 + ["x"]})


def test_llama_with_a_window_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="sliding_window is 64; supported: attention over the whole"):
        read({}, sliding_window=64)


def test_what_a_config_leaves_out_is_what_transformers_takes() -> None:
    """Of Qwen2: 32 KV heads and a context of 32,768; null, unlike absence, is one KV head a head."""
    raw = llama_config(**qwen2(num_attention_heads=64, hidden_size=1024))
    for name in ("num_key_value_heads", "max_position_embeddings"):
        del raw[name]
    found = parse_config(raw)
    assert (found.kv_heads, found.max_positions, found.head_dim) == (32, 32768, 16)
    assert parse_config(raw | {"num_key_value_heads": None}).kv_heads == 64


@pytest.mark.parametrize(
    ("scaling", "context"), [(None, 512), (LINEAR, 512), (YARN, 512), (YARN | {"factor": 10.0}, 640)]
)
def test_yarn_stretches_the_context(scaling: dict[str, Any] | None, context: int) -> None:
    """To factor × the first one, as Qwen's instructions count on; other kinds leave it to the config."""
    assert read({}, rope_scaling=scaling).max_positions == context


def test_dynamic_rope_is_served_where_it_is_fixed_and_says_so() -> None:
    found = read({}, rope_scaling=DYNAMIC)
    assert found.max_positions == 512
    assert "dynamic is served up to its first context of 512" in found.facts[0]
    assert read({}).facts == ()


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"rope_scaling": {"rope_type": "mrope"}}, "mrope"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": LINEAR, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta"),
        ({"rope_scaling": DYNAMIC, "head_dim": 2}, "head_dim is 2"),
    ],
)
def test_positions_that_cannot_be_computed_are_refused(more: dict[str, Any], word: str) -> None:
    with pytest.raises(UnsupportedModel, match=word):
        read({}, **more)
