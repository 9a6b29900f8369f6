"""Bytes on each device: in training by category, policy and mesh, and in generation (Table 1).

What lies between steps (parameters, moments) is exact. What a step needs beside it is an estimate, made of arrays that
have names: the weights that the depth loop reads, what `Dimension.saved` lists of each depth, and the arrays of the
moment at which most is needed at once. That is the backward pass of a depth, or the loss. `plan --topology` gives XLA's
own figure, and benchmarks/memory.py compares the two.
"""

import dataclasses
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dreamer_jax.accounting.params import most_exchanged, parameters, stored_weights
from dreamer_jax.config import Config, ModelConfig
from dreamer_jax.dimensions.base import KernelKind, Saved, Weight, mean_context

SINGLE = {"data": 1, "fsdp": 1, "expert": 1}
"""Mesh of one device."""
FLOAT, INT = 4, 4
LOGIT_CHUNK = 2**28
"""Bytes of float32 logits that the loss holds at a time (training/loss.py)."""
LOGIT_ROWS = 64
"""Tokens of which it holds the logits at least."""
EXCHANGE_SLACK = 2
"""Rows that the expert exchange holds at most, in multiples of an even share (kernels/exchange.py)."""
KERNEL_TILE = 128
"""GPU and TPU kernels widen experts to a multiple of this."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on one device at the peak of a step. The first two lie there between steps, too."""

    parameters: int
    """Float32."""
    optimizer: int
    """Two float32 moments of each parameter."""
    working_weights: int
    """What the depth loop reads: gathered, merged and cast."""
    gradients: int
    """Of the weights at work, and with several microbatches their float32 sum. On CPUs XLA lays them over the moments,
    of which it keeps a copy from the start of the step."""
    activations: int
    """Saved for the backward pass at every depth, by train.remat."""
    depth_cache: int
    """What depths remember for later ones, and its gradients."""
    layer: int
    """Working set of the depth that is being differentiated."""
    exchange: int
    """Buffers that tokens travel in to the devices of their experts."""
    logits: int
    """Of the loss, where it needs more than the backward pass of a depth, which comes after it: what it needs more."""

    @property
    def at_rest(self) -> int:
        """What lies there between steps."""
        return self.parameters + self.optimizer

    @property
    def temporary(self) -> int:
        """What a step adds."""
        return self.total - self.at_rest

    @property
    def total(self) -> int:
        """All categories."""
        return sum(self.by_component().values())

    def by_component(self) -> dict[str, int]:
        """The rows of a table; they add up to the total."""
        return dataclasses.asdict(self)


def training_memory(config: Config, mesh: Mapping[str, int] = SINGLE, platform: str = "tpu") -> TrainingMemory:
    """A training step's bytes on each device of a mesh {"data": ., "fsdp": ., "expert": .}.

    Args:
        config: its train and data sections give rows, microbatches, context, dtype and remat.
        mesh: devices along each axis.
        platform: "cpu", "gpu" or "tpu"; kernels of the last two widen the experts.
    """
    model, size = config.model, compute_bytes(config)
    # XLA's CPU backend computes in float32 and turns whole arrays of a smaller type into it.
    held = FLOAT if platform == "cpu" else size
    tokens, kernels, tile = tokens_per_device(config, mesh), _kernels(platform, size), _tile(platform)
    rest, kept = _parameter_bytes(model, mesh), _kept(model, config.train.remat, kernels, size, tile)
    activations = [model.depth * tokens * bytes_of(saved, held) for saved in kept]
    layer = [tokens * b for b in _layer_bytes(model, config.train.remat, kernels, size, tile)]
    loss = _loss_arrays(model, tokens, size, held, gathered=mesh["fsdp"] * mesh["expert"] > 1)
    sums = _gradient_arrays(config, mesh, platform)
    fresh = _fresh_gradients(model, mesh, platform, size)
    cache = model.depth * tokens * held * sum(d.depth_memory for d in model.dimensions.values())
    exchange = _exchange_bytes(model, tokens, size) if mesh["expert"] > 1 else 0
    copies = hosted = hosted_in_loss = 0
    if platform == "cpu":
        copies, places = 2 * rest, _moments(model, mesh)
        hosted = _hosted(places, [*sums, *activations, cache, cache, *layer])
        hosted_in_loss = _hosted(places, [*sums, *activations, cache, *loss])
    differentiating = fresh + sum(layer) + exchange + cache - hosted
    return TrainingMemory(
        parameters=rest,
        optimizer=2 * rest,
        working_weights=_working_bytes(model, mesh, platform, size, held),
        gradients=copies + sum(sums) + fresh - hosted,
        activations=sum(activations),
        depth_cache=2 * cache,
        layer=sum(layer),
        exchange=exchange,
        logits=max(0, sum(loss) - hosted_in_loss - differentiating),
    )


def compute_bytes(config: Config) -> int:
    """Bytes of a number in the compute type."""
    return 2 if config.train.dtype == "bfloat16" else FLOAT


def tokens_per_device(config: Config, mesh: Mapping[str, int]) -> int:
    """Tokens of a microbatch on one device."""
    devices = math.prod(mesh.values())
    return math.ceil(config.train.batch / (config.train.microbatches * devices)) * config.data.context


def _kernels(platform: str, size: int) -> KernelKind:
    return "device" if platform != "cpu" else "native" if size == FLOAT else "plain"


def _tile(platform: str) -> int:
    return 1 if platform == "cpu" else KERNEL_TILE


# Weights


def _parameter_bytes(model: ModelConfig, mesh: Mapping[str, int]) -> int:
    """Float32 parameters of one device; those without an "embed" axis are whole on each."""
    shared_out = mesh["fsdp"] * mesh["expert"]
    stored = [(weight, layers) for weight, layers in stored_weights(model) if weight.trained]
    whole = sum(layers * weight.size for weight, layers in stored if "embed" not in weight.axes)
    return FLOAT * (math.ceil((parameters(model).total - whole) / shared_out) + whole)


def weights_at_work(model: ModelConfig, mesh: Mapping[str, int] = SINGLE, platform: str = "tpu") -> int:
    """Numbers in the layers' matrices as one device's depth loop reads them: experts shared out, all else whole."""
    return sum(_size_at_work(weight, mesh, _tile(platform)) * layers for weight, layers in _layer_matrices(model))


def _layer_matrices(model: ModelConfig) -> Iterator[tuple[Weight, int]]:
    """Matrices of the layers, and of how many layers the depth loop reads them: in LA of all, also where none runs."""
    layers = 1 if model.depth_recurrent else model.depth
    for dimension in model.dimensions.values():
        yield from ((w, layers) for w in dimension.weights(model) if w.trained and w.kind != "norm")


def _size_at_work(weight: Weight, mesh: Mapping[str, int], tile: int) -> int:
    if "expert" not in weight.axes:
        return weight.size
    sizes = dict(zip(weight.axes, weight.shape, strict=True))
    sizes["expert"] = math.ceil(sizes["expert"] / mesh["expert"])
    sizes["mlp"] = math.ceil(sizes["mlp"] / tile) * tile
    return math.prod(sizes.values())


def _working_bytes(model: ModelConfig, mesh: Mapping[str, int], platform: str, size: int, held: int) -> int:
    """Weights as the depth loop reads them, where they are not the parameters themselves."""
    gathered = mesh["fsdp"] * mesh["expert"] > 1
    if gathered or size < FLOAT:
        embedding = next(weight.size for weight in model.outer_weights() if weight.axes[0] == "vocab")
        return held * weights_at_work(model, mesh, platform) + FLOAT * embedding * gathered
    # In float32 on one device only what is computed is new: the sums of Eq. 8, and LA's layers spread over all depths.
    spread = [] if model.depth_recurrent else [n for n in model.dimensions if len(model.depths_of(n)) < model.depth]
    new = sum(weight.size for weight, _ in _layer_matrices(model) if "attention_expert" in weight.axes)
    weights = (weight for name in spread for weight in model.dimensions[name].weights(model) if weight.kind != "norm")
    return FLOAT * (new + model.depth * sum(weight.size for weight in weights if weight.trained))


def _gradient_arrays(config: Config, mesh: Mapping[str, int], platform: str) -> list[int]:
    """Bytes of the gradients that all depths, or the loss, add to; with several microbatches of their sums, too."""
    size, tile, model = compute_bytes(config), _tile(platform), config.model
    layers = _joined((weight, n * _size_at_work(weight, mesh, tile)) for weight, n in _layer_matrices(model))
    embedding, head = (weight.size for weight in model.outer_weights() if "vocab" in weight.axes)
    gradients = [size * numbers for numbers in layers] + [FLOAT * head]
    if config.train.microbatches == 1:
        return gradients
    return gradients + [FLOAT * numbers for numbers in (*layers, embedding, head)]


def _fresh_gradients(model: ModelConfig, mesh: Mapping[str, int], platform: str, size: int) -> int:
    """Bytes of the gradient of the layer that is being differentiated, before it joins those of other depths.

    Native kernels add to these in place. A CPU reads a copy of the layer's weights where it is one of several.
    """
    layer = weights_at_work(model, mesh, platform) // (1 if model.depth_recurrent else model.depth)
    in_place = _kernels(platform, size) == "native" and model.depth_recurrent
    copied = platform == "cpu" and not model.depth_recurrent
    return layer * (size * (not in_place) + FLOAT * copied)


def _moments(model: ModelConfig, mesh: Mapping[str, int]) -> list[int]:
    """Bytes of each array of the optimizer's moments on one device."""
    shared_out = mesh["fsdp"] * mesh["expert"]
    stored = ((weight, layers * weight.size) for weight, layers in stored_weights(model) if weight.trained)
    return 2 * _joined((w, FLOAT * numbers // (shared_out if "embed" in w.axes else 1)) for w, numbers in stored)


def _joined(sizes: Iterable[tuple[Weight, int]]) -> list[int]:
    """Bytes of each array, from those of each weight: gate and up, of one component and with the same axes, are one."""
    arrays: dict[Any, int] = {}
    for weight, size in sizes:
        key = weight.name if weight.kind == "norm" else (weight.component, weight.axes)
        arrays[key] = arrays.get(key, 0) + size
    return list(arrays.values())


def _hosted(places: list[int], arrays: list[int]) -> int:
    """Bytes of the arrays that lie in given places, one in each: the largest first, each in the smallest that holds it.

    XLA's CPU backend copies both moments at the start of the step, and uses their places until the update.
    """
    free, hosted = sorted(places), 0
    for array in sorted(arrays, reverse=True):
        at = bisect_left(free, array)
        if at < len(free):
            hosted += array
            del free[at]
    return hosted


def _loss_arrays(model: ModelConfig, tokens: int, size: int, held: int, *, gathered: bool) -> list[int]:
    """Bytes of what the loss needs beside what lies there anyway.

    The LM head as it is multiplied, its input and that input's gradient, and of a chunk of tokens the float32 logits
    with their gradient: in a smaller type it lies beside them, in float32 over them.
    """
    chunk = min(tokens, max(LOGIT_ROWS, LOGIT_CHUNK // (FLOAT * model.vocab)))
    head = model.width * model.vocab * held if gathered or size < FLOAT else 0
    gradient = chunk * model.vocab * size if size < FLOAT else 0
    return [head, *2 * [tokens * model.width * held], chunk * model.vocab * FLOAT, gradient]


# Activations


def saved_bytes(model: ModelConfig, size: int, remat: str, kernels: KernelKind = "plain", tile: int = 1) -> int:
    """Bytes that one depth keeps of one token for its backward pass, with numbers of `size` bytes.

    These are the residuals of `jax.vjp` of a depth (tests/accounting/test_memory.py). A loop over depths keeps them at
    every depth, also those of a dimension that does not run there.
    """
    return sum(bytes_of(saved, size) for saved in _kept(model, remat, kernels, size, tile))


def saved_arrays(model: ModelConfig, size: int, tile: int = 1) -> tuple[Saved, ...]:
    """Every array of a depth that any policy keeps or the backward pass makes."""
    dimensions = (saved for dimension in model.dimensions.values() for saved in dimension.saved(model, tile))
    return (*_saved_stream(model, size), *dimensions)


def _kept(model: ModelConfig, remat: str, kernels: KernelKind, size: int, tile: int) -> list[Saved]:
    return [saved for saved in saved_arrays(model, size, tile) if saved.kept(remat, kernels)]


def bytes_of(saved: Saved, size: int) -> int:
    """Bytes of one token in it."""
    return saved.numbers * {"compute": size, "float32": FLOAT, "int32": INT}[saved.dtype]


def _saved_stream(model: ModelConfig, size: int) -> tuple[Saved, ...]:
    """The residual stream: what a depth reads, and in float32, in which norms compute, what its dimensions read."""
    width, readers = model.width, sum(len(group) for group in model.groups)
    # In float32 no cast sets the inputs of the dimensions of one group apart.
    inputs = len(model.groups) if size == FLOAT else readers
    saved = (Saved("x", width, "compute", "full", "products"), Saved("inputs", inputs * width, "float32", "none"))
    if not model.depth_recurrent:
        return saved
    return (
        *saved,
        Saved("y", width, "float32", "none"),
        Saved("y, normalised", width, "float32", "none"),
        Saved("y, weight", width, "float32", "none", view=True),
        Saved("y, scale", 2, "float32", "none"),
    )


def _layer_bytes(model: ModelConfig, remat: str, kernels: KernelKind, size: int, tile: int) -> list[int]:
    """Bytes of one token in each array of a depth's backward pass: what it makes again, and gradients.

    On CPUs all that "none" keeps lies there, copied for the kernels if it is kept, and in float32. Elsewhere kept
    arrays are read in place, and XLA makes the float32 arrays that only "none" keeps within what reads them.
    """
    arrays = [saved for saved in saved_arrays(model, size, tile) if kernels in saved.kernels and not saved.view]
    if kernels != "device":
        return [bytes_of(saved, FLOAT) for saved in arrays if saved.until == "never"]
    made = (saved for saved in arrays if not saved.kept(remat, kernels))
    return [bytes_of(saved, size) for saved in made if (saved.dtype, saved.since) != ("float32", "none")]


def _exchange_bytes(model: ModelConfig, tokens: int, size: int) -> int:
    """Rows and cotangents, sent and received, in rounds of twice an even share."""
    return 4 * EXCHANGE_SLACK * tokens * most_exchanged(model) * model.width * size


# Generation


CONSTANT = 2.4088e9
"""Bytes that Table 1 counts beside weights and cache: the same for all six models."""


def table_1_memory(model: ModelConfig, length: int = 1024) -> float:
    """Bytes of Table 1: bfloat16 parameters, the sequence cache averaged over a generation, and a constant."""
    return 2 * parameters(model).total + sequence_cache_bytes(model, mean_context(length), size=2) + CONSTANT


def sequence_cache_bytes(model: ModelConfig, tokens: float, *, size: int) -> float:
    """What generation keeps of so many tokens, at every depth; the depth cache is made anew for each token."""
    return tokens * model.depth * size * sum(d.sequence_memory for d in model.dimensions.values())


def generation_memory(model: ModelConfig, *, batch: int, length: int, size: int) -> dict[str, int]:
    """Bytes by category while `batch` sequences of `length` tokens are generated; shared experts are merged away."""
    merged = parameters(model).total - parameters(model).by_component().get("shared_experts", 0)
    depth_cache = model.depth * sum(d.depth_memory for d in model.dimensions.values())
    return {
        "weights": size * merged,
        "sequence_cache": round(batch * sequence_cache_bytes(model, float(length), size=size)),
        "depth_cache": batch * depth_cache * size,
        "logits": batch * model.vocab * FLOAT,
    }
