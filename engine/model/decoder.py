"""The decoder of all families: its tensors' names and its forward pass, spoken through `Kernels` alone.

Attention may be multi-head, grouped or multi-query; the output head may be the embedding; what else differs is the
config's `Traits`. Not here: what a family is (family.py), the KV pool and batches (engine/runner.py), how anything is
computed (engine/kernels).
"""

from copy import copy

import torch
from torch import Tensor

from engine.kernels.protocol import AttentionShape, Batch, Kernels, KVShape, Linear
from engine.model.config import ModelConfig
from engine.model.rope import rope_table
from engine.model.weights import Weights

IGNORED = (".rotary_emb.inv_freq",)  # old checkpoints carry what config.json says already

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
FUSED_QKV, FUSED_GATE_UP = ("self_attn.qkv_proj",), ("mlp.gate_up_proj",)
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


def wanted_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, name -> shape."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in (f"model.layers.{i}." for i in range(config.layers)):
        for part, (shape, bias) in _linears(config).items():
            shapes |= {f"{layer}{part}.weight": shape} | ({f"{layer}{part}.bias": shape[:1]} if bias else {})
        shapes |= {
            layer + "input_layernorm.weight": (hidden,),
            layer + "post_attention_layernorm.weight": (hidden,),
        }
        if config.traits.head_norm:
            shapes |= {f"{layer}{name}.weight": (config.head_dim,) for name in HEAD_NORMS}
    return shapes if config.tied else shapes | {"lm_head.weight": (config.vocab_size, hidden)}


def _linears(config: ModelConfig) -> dict[str, tuple[tuple[int, int], bool]]:
    """A layer's linears, name -> shape of the weight, and whether there is a bias."""
    traits, hidden, inter = config.traits, config.hidden_size, config.intermediate_size
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    qkv, gate_up = dict(zip(QKV, (q, kv, kv), strict=True)), dict.fromkeys(GATE_UP, inter)
    if traits.fused:
        qkv, gate_up = dict.fromkeys(FUSED_QKV, q + 2 * kv), dict.fromkeys(FUSED_GATE_UP, 2 * inter)
    return {
        **{name: ((rows, hidden), traits.qkv_bias) for name, rows in qkv.items()},
        "self_attn.o_proj": ((hidden, q), traits.out_bias),
        **{name: ((rows, hidden), traits.mlp_bias) for name, rows in gate_up.items()},
        "mlp.down_proj": ((hidden, inter), traits.mlp_bias),
    }


def ignored_tensors(config: ModelConfig) -> tuple[str, ...]:
    """Endings of names that a checkpoint may hold and that are not read."""
    return (*IGNORED, "lm_head.weight") if config.tied else IGNORED


def _windows(config: ModelConfig) -> tuple[int, ...]:
    """By layer; one as long as the context is none."""
    windows = config.traits.windows or (0,) * config.layers
    return tuple(window if window < config.max_positions else 0 for window in windows)


class Layer:
    """One decoder layer: packed weights, and norms' gains."""

    __slots__ = ("attention_norm", "down", "gate_up", "head_norm", "mlp_norm", "out", "qkv", "shape")

    def __init__(
        self, prefix: str, config: ModelConfig, window: int, weights: Weights, kernels: Kernels
    ) -> None:
        linears = _linears(config)

        def pack(*parts: str) -> Linear:
            weight = weights.take(*(f"{prefix}{part}.weight" for part in parts))
            biased = linears[parts[0]][1]
            bias = weights.take(*(f"{prefix}{part}.bias" for part in parts)) if biased else None
            return kernels.linear(weight, bias)

        self.shape = AttentionShape(
            config.heads, config.kv_heads, config.head_dim, config.head_dim**-0.5, window
        )
        self.attention_norm = weights.own(f"{prefix}input_layernorm.weight")
        self.qkv = pack(*(FUSED_QKV if config.traits.fused else QKV))
        self.head_norm: Tensor | None = None  # [2, head_dim]: of q's heads, and of k's
        if config.traits.head_norm:
            self.head_norm = torch.stack([weights.own(f"{prefix}{name}.weight") for name in HEAD_NORMS])
        self.out = pack("self_attn.o_proj")
        self.mlp_norm = weights.own(f"{prefix}post_attention_layernorm.weight")
        self.gate_up = pack(*(FUSED_GATE_UP if config.traits.fused else GATE_UP))
        self.down = pack("mlp.down_proj")

    def twin(self, kernels: Kernels) -> "Layer":
        twin = copy(self)
        twin.qkv, twin.out = kernels.bound(self.qkv), kernels.bound(self.out)
        twin.gate_up, twin.down = kernels.bound(self.gate_up), kernels.bound(self.down)
        return twin


class Decoder:
    """A model on its device. Holds weights and the rotary table, no state of any sequence.

    For one thread at a time, as its kernels are; another takes a `twin`.
    """

    def __init__(self, config: ModelConfig, weights: Weights, kernels: Kernels) -> None:
        self.config = config
        self.kernels = kernels
        self._embedding = weights.own("model.embed_tokens.weight")
        self._rope = rope_table(config.rope, config.head_dim, config.max_positions).to(self._embedding.device)
        self._layers = [
            Layer(f"model.layers.{index}.", config, window, weights, kernels)
            for index, window in enumerate(_windows(config))
        ]
        self._norm = weights.own("model.norm.weight")
        self._head = kernels.linear(self._embedding if config.tied else weights.take("lm_head.weight"), None)

    def twin(self) -> "Decoder":
        """The same model for another thread: the weights are shared, the kernels are its own (`Kernels.twin`)."""
        twin = copy(self)
        twin.kernels = self.kernels.twin()
        twin._layers = [layer.twin(twin.kernels) for layer in self._layers]
        twin._head = twin.kernels.bound(self._head)
        return twin

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    def kv_shape(self, block_size: int) -> KVShape:
        """What one block of `block_size` tokens holds."""
        return KVShape(self.config.layers, self.config.kv_heads, block_size, self.config.head_dim)

    def forward(self, batch: Batch, pool: Tensor, sampled: Tensor | None = None) -> Tensor:
        """Writes the KV of every token of the batch to the pool; returns the logits of some.

        sampled: int64 [S], which of the batch's T tokens want logits; None is all of them. Returns
        [S, vocab_size] in the model's dtype. After the last attention only these tokens are carried on.
        """
        kernels, eps = self.kernels, self.config.norm_eps
        residual = kernels.embed(self._embedding, batch.tokens)
        delta: Tensor | None = None
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(kernels.add_norm(residual, delta, layer.attention_norm, eps))
            if layer.head_norm is not None:
                kernels.head_norm(qkv, layer.head_norm, layer.shape, eps)
            mixed = kernels.attend(pool, index, qkv, self._rope, layer.shape, batch)
            if index == last and sampled is not None:
                if not len(sampled):
                    return mixed.new_empty((0, self.config.vocab_size))
                residual, mixed = residual.index_select(0, sampled), mixed.index_select(0, sampled)
            normed = kernels.add_norm(residual, layer.out(mixed), layer.mlp_norm, eps)
            delta = layer.down(kernels.silu_mul(layer.gate_up(normed)))
        return self._head(kernels.add_norm(residual, delta, self._norm, eps))
