"""Loading: every supported layout gives the same model; all else is refused, at once and by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.kernels.protocol import UnsupportedDevice
from engine.kernels.select import choose_dtype
from engine.model.config import ModelConfig, parse_config, read_config
from engine.model.decoder import wanted_tensors
from engine.model.errors import BrokenCheckpoint, ModelError, UnsupportedModel
from engine.model.families import FAMILIES
from engine.model.generation import parse_generation, read_generation
from engine.model.loading import load_model
from engine.model.random_weights import llama_config, random_tensors, write_random_llama
from engine.model.weights import Checkpoint, Weights
from tests.engine.models import CPU, KERNELS, SHAPES, driver_for, load, write_shape

LLAMA_3_1: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "eos_token_id": [128001, 128008, 128009],
    "torch_dtype": "bfloat16",
    "pretraining_tp": 1,
}

TRAITS = ("attention_bias", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
ROPE_KINDS = ("linear", "llama3", "yarn", "dynamic", "longrope")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A whole model directory of this test's own."""
    return write_shape("gqa", tmp_path / "model")


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrites the weights as `change` leaves them."""
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


class TestConfig:
    def test_a_published_config_is_read(self) -> None:
        """Llama 3.1 8B: grouped queries, derived head size, stretched positions, three ends of sequence."""
        config = parse_config(LLAMA_3_1)
        assert (config.heads, config.kv_heads, config.head_dim, config.tied) == (32, 8, 128, False)
        assert (config.rope.kind, config.rope.theta, config.rope.factor) == ("llama3", 500000.0, 8.0)
        assert config.rope.original_max_positions == 8192
        assert config.eos_token_ids == (128001, 128008, 128009)

    def test_both_spellings_of_rope_are_the_same(self) -> None:
        """`rope_parameters` of transformers 5 reads as `rope_scaling` and `rope_theta` of before."""
        scaling: dict[str, Any] = LLAMA_3_1["rope_scaling"]
        old_style = {name: value for name, value in scaling.items() if name != "rope_type"} | {
            "type": "llama3"
        }
        new = LLAMA_3_1 | {"rope_scaling": None, "rope_theta": None}
        new |= {"rope_parameters": scaling | {"rope_theta": 500000.0}}
        expected = parse_config(LLAMA_3_1)
        assert parse_config(new) == expected
        assert parse_config(LLAMA_3_1 | {"rope_scaling": old_style}) == expected

    def test_all_that_is_unsupported_is_listed_at_once(self) -> None:
        """One error names every field, what it says, and what is supported."""
        with pytest.raises(UnsupportedModel) as caught:
            parse_config(
                LLAMA_3_1
                | {
                    "architectures": ["MixtralForCausalLM"],
                    "hidden_act": "gelu",
                    "rope_scaling": {"type": "mrope"},
                    "quantization_config": {"bits": 4},
                    "sliding_window": 4096,
                    "num_hidden_layers": "many",
                    "hidden_size": None,
                    "rms_norm_eps": float("nan"),
                }
            )
        lines = str(caught.value).splitlines()[1:]
        for word in (
            "Mixtral",
            "gelu",
            "mrope",
            "quantization",
            "sliding",
            "many",
            "hidden_size",
            "rms_norm_eps",
        ):
            assert sum(word in line for line in lines) == 1, word
        assert len(lines) == 8
        assert all("supported: " in line for line in lines)

    @pytest.mark.parametrize(
        ("changes", "word"),
        [
            ({"num_key_value_heads": 3}, "multiple"),
            ({"head_dim": 17}, "head_dim"),
            ({"rope_scaling": LLAMA_3_1["rope_scaling"] | {"low_freq_factor": 9.0}}, "low_freq"),
        ],
    )
    def test_numbers_that_cannot_go_together_are_refused(self, changes: dict[str, Any], word: str) -> None:
        with pytest.raises(UnsupportedModel, match=word):
            parse_config(LLAMA_3_1 | changes)

    @given(
        st.dictionaries(
            st.sampled_from([*LLAMA_3_1, "head_dim", "rope_parameters", "hidden_act", *TRAITS]),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                lambda inner: (
                    st.lists(inner, max_size=2)
                    | st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "rope_theta"]), inner)
                    | st.fixed_dictionaries(
                        {"rope_type": st.sampled_from(ROPE_KINDS), "factor": st.just(2.0)}
                    )
                ),
                max_leaves=4,
            ),
        ),
        st.sampled_from(list(FAMILIES)),
    )
    @settings(max_examples=300)
    def test_any_config_is_read_or_refused(self, changes: dict[str, Any], architecture: str) -> None:
        """Whatever a file says, the answer is a config or an UnsupportedModel, never another exception."""
        try:
            config = parse_config(LLAMA_3_1 | {"architectures": [architecture]} | changes)
        except UnsupportedModel:
            return
        assert isinstance(config, ModelConfig)
        assert config.heads % config.kv_heads == 0

    @pytest.mark.parametrize("content", ["", "[1, 2]", "{", "\x00"])
    def test_a_file_that_is_no_object_is_refused(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(BrokenCheckpoint, match=r"config\.json"):
            read_config(tmp_path)

    def test_a_directory_without_a_model_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"model\.path"):
            read_config(tmp_path)


class TestGeneration:
    CONFIG = parse_config(LLAMA_3_1)

    def test_defaults_are_read(self) -> None:
        raw = {
            "temperature": 0.6,
            "top_p": 0.9,
            "top_k": 50,
            "min_p": 0.05,
            "repetition_penalty": 1.05,
            "eos_token_id": 7,
            "do_sample": True,
        }
        found = parse_generation(raw, self.CONFIG)
        assert (found.temperature, found.top_p, found.top_k, found.min_p) == (0.6, 0.9, 50, 0.05)
        assert found.repetition_penalty == 1.05
        assert found.eos_token_ids == (7,)
        assert found.ignored == ()

    def test_without_a_file_the_config_says_where_sequences_end(self, tmp_path: Path) -> None:
        found = read_generation(tmp_path, self.CONFIG)
        assert found.eos_token_ids == self.CONFIG.eos_token_ids
        assert (found.temperature, found.top_p, found.top_k, found.min_p) == (None, None, None, None)

    def test_what_cannot_be_honoured_is_reported(self, directory: Path) -> None:
        """Beams are not searched, and loading says so; a typical_p of 1.0 does nothing anyway."""
        path = directory / "generation_config.json"
        path.write_text(json.dumps({"num_beams": 4, "typical_p": 1.0}))
        assert [fact for fact in load(directory, "reference", "float32").facts if "num_beams = 4" in fact]

    def test_values_out_of_range_are_listed_at_once(self) -> None:
        with pytest.raises(UnsupportedModel) as caught:
            parse_generation(
                {"temperature": -1, "top_p": 2.0, "eos_token_id": "end", "repetition_penalty": 0}, self.CONFIG
            )
        assert [
            word
            for word in ("temperature", "top_p", "eos_token_id", "repetition_penalty")
            if word not in str(caught.value)
        ] == []


class TestWeights:
    def test_shards_load_as_one_file_does(self, tmp_path: Path) -> None:
        """Weights spread over three files behind an index are the same tensors, in the same names."""
        one = write_shape("gqa", tmp_path / "one")
        three = write_shape("gqa", tmp_path / "three", shards=3)
        assert len(list(three.glob("*.safetensors"))) == 3
        with Checkpoint(one) as left, Checkpoint(three) as right:
            assert left.names() == right.names()
            assert all(torch.equal(left.take(name), right.take(name)) for name in left.names())

    def test_a_taken_tensor_is_a_view_of_its_file(self, directory: Path) -> None:
        """No copy is made of a weight whose dtype fits; one that is kept is a copy."""
        with Checkpoint(directory) as checkpoint:
            wanted = {name: checkpoint.shape(name) for name in checkpoint.names()}
            weights = Weights(checkpoint, wanted, device=CPU, dtype=torch.float32)
            name = "model.norm.weight"
            mapped = {checkpoint.take(name).data_ptr(), weights.take(name).data_ptr()}
            assert weights.own(name).data_ptr() not in mapped

    def test_all_misfits_are_listed_at_once(self, directory: Path) -> None:
        """Missing, unexpected and misshapen tensors come in one error."""

        def spoil(tensors: dict[str, Tensor]) -> None:
            del tensors["model.norm.weight"], tensors["lm_head.weight"]
            tensors["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(4)
            tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(2, 2)

        change_weights(directory, spoil)
        with pytest.raises(BrokenCheckpoint) as caught:
            load(directory, "reference", "float32")
        lines = str(caught.value).splitlines()[1:]
        assert sorted(lines) == [
            "  - lm_head.weight is missing",
            "  - model.layers.0.self_attn.q_norm.weight is unexpected",
            "  - model.layers.1.mlp.up_proj.weight has shape [2, 2], expected [128, 64]",
            "  - model.norm.weight is missing",
        ]

    def test_what_old_and_tied_checkpoints_carry_besides_is_not_read(self, directory: Path) -> None:
        """`inv_freq` buffers, and an `lm_head` beside tied embeddings, do no harm."""

        def add(tensors: dict[str, Tensor]) -> None:
            tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

        change_config(directory, tie_word_embeddings=True)
        change_weights(directory, add)
        assert load(directory, "reference", "float32").config.tied

    @pytest.mark.parametrize("kept", [0, 4, 100, 40_000])
    def test_a_truncated_file_is_named(self, directory: Path, kept: int) -> None:
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors is damaged"):
            load(directory, "reference", "float32")

    def test_a_file_of_noise_is_named(self, directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(bytes(range(256)) * 64)
        with pytest.raises(BrokenCheckpoint, match=r"model\.safetensors is damaged"):
            load(directory, "reference", "float32")

    def test_missing_and_damaged_shards_are_listed_at_once(self, tmp_path: Path) -> None:
        directory = write_shape("gqa", tmp_path, shards=4)
        first, second, third, _ = sorted(directory.glob("model-*.safetensors"))
        first.unlink()
        second.write_bytes(second.read_bytes()[:50])
        save_file({"other": torch.zeros(1)}, third)
        with pytest.raises(BrokenCheckpoint) as caught:
            Checkpoint(directory)
        text = str(caught.value)
        assert f"{first.name} is missing" in text
        assert f"{second.name} is damaged" in text
        assert f"is not in {third.name}" in text

    @pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", 3])
    def test_an_index_leads_nowhere_else(self, directory: Path, file: Any) -> None:
        """A shard's name is a plain file name, or the checkpoint is refused."""
        (directory / "model.safetensors").unlink()
        index = {"weight_map": {"model.norm.weight": file}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(BrokenCheckpoint, match="plain file name"):
            Checkpoint(directory)

    def test_other_formats_are_refused_with_the_supported_one(self, directory: Path) -> None:
        (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
        with pytest.raises(ModelError, match="supported are safetensors"):
            Checkpoint(directory)

    def test_integers_are_refused_as_quantised(self, directory: Path) -> None:
        def quantise(tensors: dict[str, Tensor]) -> None:
            name = "model.layers.0.mlp.up_proj.weight"
            tensors[name] = tensors[name].to(torch.int8)

        change_weights(directory, quantise)
        with pytest.raises(UnsupportedModel, match=r"up_proj\.weight is stored as I8"):
            load(directory, "reference", "float32")


class TestDtypes:
    @pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
    def test_a_checkpoint_is_converted_and_says_so(self, tmp_path: Path, stored: torch.dtype) -> None:
        directory = write_shape("gqa", tmp_path, dtype=stored)
        loaded = load(directory, "reference", "float32")
        name = str(stored).removeprefix("torch.")
        expected = () if stored == torch.float32 else (f"weights converted from {name} to float32",)
        assert loaded.dtype == torch.float32
        assert loaded.facts == expected

    def test_auto_on_a_cpu_is_never_float16(self) -> None:
        assert choose_dtype("auto", CPU, torch.float16).dtype in (torch.float32, torch.bfloat16)

    @pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
    def test_auto_on_cuda_is_the_checkpoints(self, stored: torch.dtype) -> None:
        choice = choose_dtype("auto", torch.device("cuda"), stored)
        assert (choice.dtype, choice.facts) == (stored, ())

    def test_float16_on_a_cpu_is_refused(self, directory: Path) -> None:
        with pytest.raises(UnsupportedDevice, match="bfloat16 or float32"):
            load_model(directory, device=CPU, dtype="float16")

    def test_an_unknown_dtype_is_refused(self) -> None:
        with pytest.raises(UnsupportedDevice, match="supported: auto, float32"):
            choose_dtype("int4", CPU, torch.float32)


class TestRandomWeights:
    @pytest.mark.parametrize("name", SHAPES)
    def test_a_written_model_has_the_tensors_of_its_shape(self, name: str) -> None:
        config = parse_config(llama_config(**SHAPES[name]))
        tensors = random_tensors(config, seed=1, dtype=torch.float32)
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == wanted_tensors(config)

    def test_a_seed_is_a_model(self) -> None:
        config = parse_config(llama_config())
        one, same, other = (random_tensors(config, seed, torch.float32) for seed in (1, 1, 2))
        name = "model.layers.1.mlp.down_proj.weight"
        assert torch.equal(one[name], same[name])
        assert not torch.equal(one[name], other[name])

    def test_the_tokenizer_covers_every_id(self, tmp_path: Path) -> None:
        """Each id of the vocabulary has a token of its own; bytes come first, the special tokens last."""
        from tokenizers import Tokenizer

        write_random_llama(tmp_path, llama_config(vocab_size=1000))
        tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert tokenizer.get_vocab_size() == 1000
        assert len({tokenizer.id_to_token(i) for i in range(1000)}) == 1000
        assert tokenizer.id_to_token(997) == "<|endoftext|>"
        text = "Once upon a time, ünïcode."
        assert tokenizer.decode(tokenizer.encode(text).ids) == text

    def test_a_given_tokenizer_is_copied(self, tmp_path: Path, directory: Path) -> None:
        source = directory / "tokenizer.json"
        written = write_random_llama(tmp_path / "copy", llama_config(), tokenizer=source)
        assert (written / "tokenizer.json").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("kernels", KERNELS)
def test_nothing_served_is_read_from_the_files(directory: Path, kernels: str) -> None:
    """Weights overwritten in place while their model serves change no bit of it."""
    loaded = load(directory, kernels, "float32")
    before, after = driver_for(loaded), driver_for(loaded)
    before.run(0, range(20), chunk=20)
    path = directory / "model.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    after.run(0, range(20), chunk=20)
    assert torch.equal(before.all_logits(0), after.all_logits(0))
