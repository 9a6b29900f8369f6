"""LA as GLM-4 MoE, an architecture that transformers has in stock: no code of ours has to run. An approximation.

Attention and experts are the same there; the router is not. Ours divides a token's query by its root mean square (RMS)
and selects by logit + b. The stock router has one matrix, the gate, and selects by sigmoid(logit) + b'. All of our
router but that division is linear, so it folds into the gate. What is left is fitted to sample tokens, layer by layer:
a scale that stands for the division, and b'. How far the two routers then are apart is measured, and limited.

With b = 0 the selection is the same: a positive factor of each token leaves the order of its logits as it is.

Letters: L depth, S sample tokens, D width, R router size, E experts, A active experts.
"""

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dreamer_jax.config import Config, ModelConfig
from dreamer_jax.convert.hf.card import Score, evaluation, training_facts, usage
from dreamer_jax.convert.hf.export import appearing, write_configs, write_tokenizer
from dreamer_jax.convert.hf.weights import SHARD, Dtype, Target, write_targets
from dreamer_jax.convert.model import named_arrays
from dreamer_jax.convert.names import check_names, expected_shapes
from dreamer_jax.errors import DreamerError
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.model.dreamer import Dreamer, Glimpse, check_tokens, made_ready
from dreamer_jax.model.rope import depth_rotation

LIMIT = 0.01
"""Share of tokens and layers in which the stock router may select other experts."""
SHAPE = {
    "vocab_size": "vocab",
    "hidden_size": "width",
    "intermediate_size": "ea.expert_width",  # of dense layers, of which there are none
    "num_hidden_layers": "depth",
    "num_attention_heads": "sa.query_heads",
    "num_key_value_heads": "sa.kv_heads",
    "head_dim": "sa.head_size",
    "n_routed_experts": "ea.experts",
    "num_experts_per_tok": "ea.active_experts",
    "moe_intermediate_size": "ea.expert_width",
    "rms_norm_eps": "norm_epsilon",
}
"""The model's shape: by transformers' names, where it stands in our config."""
FIXED = {
    "model_type": "glm4_moe",
    "architectures": ["Glm4MoeForCausalLM"],
    "hidden_act": "silu",
    "attention_bias": False,
    "use_qk_norm": True,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 0,
    "first_k_dense_replace": 0,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
}
"""What makes GLM-4 MoE an LA."""
TINY = 1e-30
"""Keeps quotients finite where a router's keys are all zero."""


class StockError(DreamerError, ValueError):
    """A model that no stock architecture computes, or not closely enough."""


def check_stock(config: ModelConfig) -> None:
    """Raise StockError unless the model can go out as GLM-4 MoE."""
    reason = _obstacle(config)
    if reason is not None:
        raise StockError(f"--stock exports LA alone, layers of sa, then ea; {reason}; leave --stock out")


def _obstacle(config: ModelConfig) -> str | None:
    """Why no stock architecture computes this model; None if one does."""
    more = [name for name in config.dimensions if name not in ("sa", "ea")]
    if more:
        return f"this model has {', '.join(more)} in model.mixture"
    if config.depth_recurrent:
        return "this model iterates one layer (model.depth_recurrent)"
    if [[member.name for member in group] for group in config.groups] != [["sa"], ["ea"]]:
        return f"this model's mixture is {', then '.join(config.mixture)}"
    if any(len(config.depths_of(name)) < config.depth for name in ("sa", "ea")):
        return f"this model's mixture, {', then '.join(config.mixture)}, leaves depths out"
    if config.ea.experts < 2:
        return "GLM-4 MoE wants two experts or more (model.ea.experts)"
    return None


def stock_fields(config: ModelConfig, context: int) -> dict[str, Any]:
    """config.json: the model's shape as GLM-4 MoE's."""
    shape = {name: operator.attrgetter(place)(config) for name, place in SHAPE.items()}
    rope = {"rope_type": "default", "rope_theta": config.sa.rope_base, "partial_rotary_factor": 1.0}
    # Releases differ in where they look for the factor, which is a half if absent.
    whole = {"rope_parameters": rope, "partial_rotary_factor": 1.0}
    return {**FIXED, **shape, **whole, "max_position_embeddings": context}


# The routers.


class Change(NamedTuple):
    """What the stock routers do otherwise than the model's."""

    selection: float
    """Share of tokens and layers in which the selected experts differ."""
    moved: float
    """Mean share of a token's weight that lies on other experts than before: half the sum of the differences."""
    most: float
    """The largest such share."""

    def __str__(self) -> str:
        """In words."""
        return (
            f"the stock routers select other experts in {self.selection:.2%} of tokens and layers, and move "
            f"{self.moved:.2%} of the experts' weight (at most {self.most:.1%} of a token's)"
        )


class Calibration(NamedTuple):
    """The stock routers of a model, fitted to sample tokens."""

    gates: Float[np.ndarray, "L E D"]
    biases: Float[np.ndarray, "L E"]
    """What GLM-4 MoE calls `e_score_correction_bias`: b'."""
    change: Change
    """Measured on other tokens than those that they were fitted to."""


class Routed(NamedTuple):
    """What the routers of a model read and decided."""

    stream: Float[np.ndarray, "L S D"]
    """The residual stream, before EA's norm."""
    logits: Float[np.ndarray, "L S E"]
    weights: Float[np.ndarray, "L S E"]
    """Of the experts' outputs; 0 for those that are not selected."""


class Fit(NamedTuple):
    """One layer's stock router, less what folds without loss."""

    scale: float
    """Of the folded router: it stands for one over the RMS of a token's query."""
    bias: Float[np.ndarray, "E"]


def calibrate(model: Dreamer, tokens: Int[np.ndarray, "B T"]) -> Calibration:
    """Fit the stock routers of LA to every other row, and measure on the rest what changes.

    Args:
        model: an LA.
        tokens: text as the model will see it, two rows or more that are one document each, without padding; hundreds
            of tokens at least.

    Raises:
        StockError: the model is no LA, or differs from it.
        TokenError: an id outside of the vocabulary.
    """
    config = model.config
    check_stock(config)
    check_tokens(tokens, config.vocab)
    arrays, (given, held_out) = named_arrays(model), (_routed(model, tokens[i::2]) for i in (0, 1))
    layers = [_stock_router(config, arrays, given, held_out, l) for l in range(config.depth)]
    gates, biases, weights = (np.stack(parts) for parts in zip(*layers, strict=True))
    return Calibration(gates, biases, selection_change(held_out.weights, weights))


def _stock_router(
    config: ModelConfig, arrays: Mapping[str, Any], given: Routed, held_out: Routed, l: int
) -> tuple[Float[np.ndarray, "E D"], Float[np.ndarray, "E"], Float[np.ndarray, "S E"]]:
    """Layer l's gate and its b', and the weights that these give to the experts on held-out rows, in float32."""
    norm, b = (np.asarray(arrays[f"layers.{l}.ea.{name}"]) for name in ("norm", "router.bias"))
    inputs, others = (normalised(rows.stream[l], config.norm_epsilon) * norm for rows in (given, held_out))
    folded, active = folded_router(config, arrays, l), config.ea.active_experts
    fit = fitted(inputs @ folded.T, given.logits[l], b, given.weights[l], active)
    gate, bias = (fit.scale * folded).astype(np.float32), fit.bias.astype(np.float32)
    return gate, bias, stock_weights(others @ gate.T, bias, active)


def _routed(model: Dreamer, tokens: Int[np.ndarray, "B T"]) -> Routed:
    """Run the model in float32 and look at its routers."""
    graph, state = nnx.split(model)
    seen = _run(graph, Compute.fastest(), state, jnp.asarray(tokens, jnp.int32))
    stream, logits, ids, scores = (np.asarray(array) for array in seen)
    weights = np.zeros_like(logits)
    np.put_along_axis(weights, ids, scores, -1)
    return Routed(stream.reshape(*logits.shape[:2], -1), logits, weights)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(graph: Any, compute: Compute, state: nnx.State, tokens: Int[Array, "B T"]) -> Any:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    ready = made_ready(nnx.merge(graph, state), compute)
    return ready.forward(tokens, positions, jnp.ones_like(tokens), compute, look=_router).seen


def _router(at: Glimpse) -> tuple[Array, ...]:
    """What EA reads at a depth, and its router's logits, experts and their weights."""
    routing = at.updates["ea"].routing
    assert routing is not None
    assert routing.logits is not None
    return at.x + at.updates["sa"].residual, routing.logits, routing.ids, routing.scores


def normalised(x: np.ndarray, epsilon: float) -> np.ndarray:
    """RMSNorm without its weight, over the last axis."""
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + epsilon)


def folded_router(config: ModelConfig, arrays: Mapping[str, Any], l: int) -> Float[np.ndarray, "E D"]:
    """Layer l's router as one matrix, in float64: its products are the logits times the RMS of the query.

    The keys are turned back by the depth's rotation instead of turning the query.
    """
    w_q, keys, q_norm, k_norm = (
        np.asarray(arrays[f"layers.{l}.ea.router.{name}"], np.float64) for name in ("w_q", "keys", "q_norm", "k_norm")
    )
    rotation = depth_rotation(config, jnp.int32(l), config.depth, config.router.size)
    cos, sin = np.asarray(rotation.cos, np.float64), np.asarray(rotation.sin, np.float64)
    first, second = np.split(normalised(keys, config.norm_epsilon) * k_norm, 2, axis=-1)
    back = np.concatenate([first * cos + second * sin, second * cos - first * sin], axis=-1)
    return (back * q_norm) @ w_q.T / config.router.size**0.5


PARTS = (1.0, 0.7, 0.5, 0.35, 0.25)
"""Of the scale that fits the logits best. Where the sigmoid's argument is smaller, the sigmoid is straighter: a bias
added to it then acts on all tokens alike, but the weights become more even."""


def fitted(
    products: Float[np.ndarray, "S E"],
    logits: Float[np.ndarray, "S E"],
    bias: Float[np.ndarray, "E"],
    weights: Float[np.ndarray, "S E"],
    active: int,
) -> Fit:
    """The stock router that moves the least weight, of those with a part of the least-squares scale.

    Args:
        products: of the tokens with the folded router.
        logits: of the model's router.
        bias: b.
        weights: of the model's router, 0 for experts that are not selected.
        active: A.
    """
    closest = float(np.sum(products * logits) / max(np.sum(np.square(products)), TINY))
    fits = [Fit(part * closest, stock_bias(logits, part * closest * products, bias, active)) for part in PARTS]
    return min(fits, key=lambda fit: np.abs(stock_weights(fit.scale * products, fit.bias, active) - weights).sum())


def stock_bias(
    logits: Float[np.ndarray, "S E"], scaled: Float[np.ndarray, "S E"], bias: Float[np.ndarray, "E"], active: int
) -> Float[np.ndarray, "E"]:
    """The bias b' with which an expert is selected from the same logit on as with b, on the average over tokens.

    A token has a threshold t: it selects the experts with logit + b > t, that is from a logit of t - b on. So b' is to
    be sigmoid(t) - sigmoid(t - b), which is about b times the sigmoid's slope at t. 0 where b is.

    Args:
        logits: of the model's router.
        scaled: the stock router's: the same, but for a factor of each token.
        bias: b.
        active: A.
    """
    if active == logits.shape[1]:
        return np.zeros_like(bias)
    preferences = np.sort(logits + bias, axis=-1)
    threshold = (preferences[:, -active] + preferences[:, -active - 1])[:, None] / 2
    factor = np.sum(scaled * logits, -1, keepdims=True) / np.maximum(np.sum(np.square(logits), -1, keepdims=True), TINY)
    moved: np.ndarray = sigmoid(factor * threshold) - sigmoid(factor * (threshold - bias))
    return moved.mean(axis=0)


def stock_weights(
    logits: Float[np.ndarray, "S E"], bias: Float[np.ndarray, "E"], active: int
) -> Float[np.ndarray, "S E"]:
    """What GLM-4 MoE's router makes of logits: the experts' weights, 0 for those that are not selected."""
    scores = sigmoid(logits)
    ids = np.argsort(-(scores + bias), axis=-1, kind="stable")[:, :active]
    selected = np.zeros_like(scores)
    np.put_along_axis(selected, ids, np.take_along_axis(scores, ids, -1), -1)
    weights: np.ndarray = selected / selected.sum(-1, keepdims=True)
    return weights


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    y: np.ndarray = np.exp(np.minimum(x, 0)) / (1 + np.exp(-np.abs(x)))
    return y


def selection_change(expected: Float[np.ndarray, "*tokens E"], actual: Float[np.ndarray, "*tokens E"]) -> Change:
    """How far apart two routers' decisions are: weights of experts, 0 for those that are not selected."""
    differs = np.any((expected > 0) != (actual > 0), axis=-1)
    moved = np.abs(expected - actual).sum(-1) / 2
    return Change(float(differs.mean()), float(moved.mean()), float(moved.max()))


def check_change(change: Change, limit: float) -> None:
    """Raise StockError if the stock routers select other experts too often."""
    if not change.selection <= limit:
        raise StockError(f"{change}; the limit is {limit:.2%} of selections; leave --stock out, or raise --stock-limit")


# The tensors.

_OUTER = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "lm_head": "lm_head.weight"}
_INNER = {
    "sa.norm": "input_layernorm.weight",
    "sa.q_norm": "self_attn.q_norm.weight",
    "sa.k_norm": "self_attn.k_norm.weight",
    "sa.w_o": "self_attn.o_proj.weight",
    "ea.norm": "post_attention_layernorm.weight",
    "ea.router.gate": "mlp.gate.weight",
    "ea.router.bias": "mlp.gate.e_score_correction_bias",
    "ea.shared.w_gate": "mlp.shared_experts.gate_proj.weight",
    "ea.shared.w_up": "mlp.shared_experts.up_proj.weight",
    "ea.shared.w_down": "mlp.shared_experts.down_proj.weight",
}
_EXPERTS = {"ea.w_gate": "gate_proj", "ea.w_up": "up_proj", "ea.w_down": "down_proj"}
_FOLDED = tuple(f"ea.router.{name}" for name in ("w_q", "keys", "q_norm", "k_norm"))
"""What the gate stands for."""


def stock_arrays(config: ModelConfig, arrays: Mapping[str, Any], calibration: Calibration) -> dict[str, Any]:
    """The arrays with the stock routers in place of the model's; an array is fetched when its turn comes.

    GLM-4 MoE has shared experts even if there are none: they are 0 wide.
    """
    stock = {name: arrays[name] for name in arrays if not name.endswith(_FOLDED)}
    narrow = {"w_gate": (config.width, 0), "w_up": (config.width, 0), "w_down": (0, config.width)}
    for l in range(config.depth):
        place = f"layers.{l}.ea"
        stock |= {f"{place}.router.gate": calibration.gates[l], f"{place}.router.bias": calibration.biases[l]}
        stock |= {f"{place}.shared.{name}": np.zeros(shape, np.float32) for name, shape in narrow.items()}
    return stock


def stock_targets(config: ModelConfig, arrays: Mapping[str, Any], dtype: Dtype) -> list[Target]:
    """The tensors of GLM-4 MoE, in the order of `stock_arrays`. What routers add up stays float32."""
    return [target for name in arrays for target in _targets(config, name, tuple(arrays[name].shape), dtype)]


def _targets(config: ModelConfig, name: str, shape: tuple[int, ...], dtype: Dtype) -> Iterator[Target]:
    """The tensors that an array becomes: w_qkv three, the experts' one each, all others one."""
    if name in _OUTER:
        yield _target(_OUTER[name], name, shape, dtype, turned=name == "lm_head")
        return
    _, l, inner = name.split(".", 2)
    place = f"model.layers.{l}"
    if inner == "sa.w_qkv":
        heads = {"q": config.sa.query_heads, "k": config.sa.kv_heads, "v": config.sa.kv_heads}
        start = 0
        for letter, count in heads.items():
            size = count * config.sa.head_size
            part = slice(None), slice(start, start + size)
            target = f"{place}.self_attn.{letter}_proj.weight"
            yield _target(target, name, (shape[0], size), dtype, turned=True, part=part)
            start += size
    elif inner in _EXPERTS:
        for e in range(shape[0]):
            target = f"{place}.mlp.experts.{e}.{_EXPERTS[inner]}.weight"
            yield _target(target, name, shape[1:], dtype, turned=True, part=(e,))
    else:
        kind: Dtype = "float32" if ".router." in inner else dtype
        turned = inner.rsplit(".", 1)[-1].startswith("w_")
        yield _target(f"{place}.{_INNER[inner]}", name, shape, kind, turned=turned)


def _target(
    name: str,
    source: str,
    shape: tuple[int, ...],
    dtype: Dtype,
    *,
    turned: bool,
    part: tuple[int | slice, ...] = (),
) -> Target:
    return Target(name, (source,), shape[::-1] if turned else shape, dtype, turned, part)


# The folder.


def export_stock(
    config: Config,
    arrays: Mapping[str, Any],
    calibration: Calibration,
    tokenizer_path: Path | None,
    out: Path,
    *,
    limit: float = LIMIT,
    dtype: Dtype = "float32",
    step: int | None = None,
    shard: int = SHARD,
    scores: Sequence[Score] = (),
    wrote: Callable[[int], object] = lambda size: None,
    check: Callable[[Path], object] = lambda draft: None,
) -> int:
    """Write a folder for AutoModelForCausalLM.from_pretrained(out), without remote code; whole or not at all.

    Args:
        config: of the run.
        arrays: by exchange names; each is fetched when its turn comes.
        calibration: the model's, by `calibrate`.
        tokenizer_path: the run's tokenizer; None leaves it out.
        out: the folder; it must be absent or empty.
        limit: share of tokens and layers in which other experts may be selected.
        dtype: of the weights; those of routers are float32 in either case.
        step: of the checkpoint, for the model card.
        shard: bytes of weights in one file.
        scores: of evaluations of the checkpoint, for the model card.
        wrote: is told the bytes of each piece of weights that has been written.
        check: is given the whole folder before it takes its place; what it raises leaves no folder.

    Returns:
        How many numbers there are.

    Raises:
        StockError: no stock architecture computes this model, or not closely enough.
        ExportError: the folder is not empty.
        TokenizerError: the tokenizer cannot be converted so that ids are equal.
        WeightError: a missing, extra or misshapen array, or one with numbers that are not finite, named.
    """
    check_stock(config.model)
    check_change(calibration.change, limit)
    check_names(arrays, expected_shapes(config.model))
    stock = stock_arrays(config.model, arrays, calibration)
    with appearing(out) as draft:
        ends = write_tokenizer(draft, config, tokenizer_path)
        write_configs(draft, stock_fields(config.model, config.data.context) | {"dtype": dtype} | ends, ends)
        every = stock_targets(config.model, stock, dtype)
        numbers = write_targets(draft, every, stock, shard=shard, wrote=wrote)
        card = stock_card(config, numbers, calibration.change, step=step, scores=scores)
        (draft / "README.md").write_text(card, encoding="utf-8")
        check(draft)
    return numbers


def stock_card(
    config: Config, numbers: int, change: Change, *, step: int | None = None, scores: Sequence[Score] = ()
) -> str:
    """README.md of the folder, with the metadata that model hubs read; it says what is approximate.

    Args:
        config: of the run.
        numbers: weights in the folder.
        change: of the routers.
        step: optimizer steps that the weights have seen; None if unknown.
        scores: of the checkpoint.
    """
    model = config.model
    facts = {
        "Variant": model.variant,
        "Depth": model.depth,
        "Width": model.width,
        "Vocabulary": model.vocab,
        "Experts": f"{model.ea.experts}, {model.ea.active_experts} active",
        "Weights": f"{numbers:,}",
        **training_facts(config, step),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return CARD.format(
        name=config.name, table=table, change=change, evaluation=evaluation(scores), use=usage(remote_code=False)
    )


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- dreamer
- mixture-of-experts
---

# {name}

A language model with classic layers (the LA of [arXiv 2601.21582](https://arxiv.org/abs/2601.21582)), trained with
Dreamer JAX and written as GLM-4 MoE.

| | |
|---|---|
{table}

## An approximation

GLM-4 MoE routes tokens to experts by another rule than the model was trained with. On sample tokens
{change}. All else is the same.
{evaluation}
{use}
## Licence

The weights and the tokenizer are under the terms of whoever trained them, and of the data.
"""
