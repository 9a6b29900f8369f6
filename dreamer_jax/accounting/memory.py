"""Bytes on each device: in training by category, policy and mesh, and in generation (Table 1).

What lies between steps (parameters, moments) is exact. What a step needs beside it is an estimate: saved activations
are counted array by array; the working set of one depth, whose arrays XLA places as it likes, is taken as what
`train.remat = "none"` would save of that depth and the cotangents of its experts' rows. `plan --topology` gives XLA's
own figure, and benchmarks/memory.py compares the two.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from dreamer_jax.accounting.params import attention_weights, parameters
from dreamer_jax.config import Config, ModelConfig

SINGLE = {"data": 1, "fsdp": 1, "expert": 1}
"""Mesh of one device."""
FLOAT, INT = 4, 4
LOGIT_CHUNK = 2**28
"""Bytes of float32 logits that the loss holds at a time (training/loss.py)."""
EXCHANGE_SLACK = 2
"""Rows that the expert exchange holds at most, in multiples of an even share (model/expert_parallel.py)."""
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
    """Of the weights at work, and with several microbatches their float32 sum."""
    activations: int
    """Saved for the backward pass at every depth, by train.remat."""
    depth_cache: int
    """Keys and values of DA at all depths, and their gradients."""
    layer: int
    """Working set of the depth that is being differentiated."""
    exchange: int
    """Buffers that tokens travel in to the devices of their experts."""
    logits: int
    """The loss's chunk of the vocabulary's logits, where it outweighs the working set of a depth."""

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
    shared_out = mesh["fsdp"] * mesh["expert"]
    count = parameters(model)
    whole = count.norms + _router_keys(model)
    rest = FLOAT * (math.ceil((count.total - whole) / shared_out) + whole)

    layer, head, embedding = weights_at_work(model, mesh, platform), count.lm_head, count.embedding
    # Of the depth being differentiated, and of all of them: in LA stacked, which XLA holds twice. Native kernels add a
    # depth's to those of all in place, which XLA's figures show to save half of the former.
    native = platform == "cpu" and size == FLOAT
    recurrent = 2 * layer - layer // 2 if native else 2 * layer
    weight_gradients = recurrent if model.depth_recurrent else 2 * layer + layer // model.depth
    gathered = shared_out > 1
    copied = layer if gathered or size < FLOAT else (count.sa_projections + count.da_projections) * _routed(model)
    working = size * copied
    working += (size * head if gathered or size < FLOAT else 0) + (FLOAT * embedding if gathered else 0)
    sums = FLOAT * (layer + head + embedding) if config.train.microbatches > 1 else 0
    head_gradient = FLOAT * head + (size * head if size < FLOAT else 0)

    tokens = tokens_per_device(config, mesh)
    activations = model.depth * tokens * saved_bytes(model, size, config.train.remat, native=native)
    cache = model.depth * tokens * 2 * size * _da_cache(model)
    # A CPU computes in float32 whatever the compute type.
    inner = FLOAT if platform == "cpu" else size
    # Native kernels need no sorted rows, and EA's residuals are gone before those of attention are made again.
    rows = (-1 if native else 1 + _routed(model)) * model.active_experts * model.width * inner
    if platform != "cpu":  # kernels hold the inner activations of all rows: gate and up, their product, all gradients
        slots = EXCHANGE_SLACK if mesh["expert"] > 1 else 1
        rows += slots * model.active_experts * 6 * _kernel_width(model) * size
    depth = tokens * (saved_bytes(model, inner, "none", native=native) + rows)
    exchange = _exchange_bytes(model, tokens, size) if mesh["expert"] > 1 else 0
    in_layer = size * weight_gradients + depth + exchange
    chunk = min(tokens, max(64, LOGIT_CHUNK // (FLOAT * model.vocab)))
    in_loss = chunk * model.vocab * (FLOAT + size)  # logits in float32 and their gradient
    in_loss_alone = max(0, in_loss - in_layer)
    return TrainingMemory(
        parameters=rest,
        optimizer=2 * rest,
        working_weights=working,
        gradients=size * weight_gradients + head_gradient + sums,
        activations=activations,
        depth_cache=cache,
        layer=depth,
        exchange=exchange,
        logits=in_loss_alone,
    )


def compute_bytes(config: Config) -> int:
    """Bytes of a number in the compute type."""
    return 2 if config.train.dtype == "bfloat16" else FLOAT


def tokens_per_device(config: Config, mesh: Mapping[str, int]) -> int:
    """Tokens of a microbatch on one device."""
    devices = math.prod(mesh.values())
    return math.ceil(config.train.batch / (config.train.microbatches * devices)) * config.data.context


def weights_at_work(model: ModelConfig, mesh: Mapping[str, int] = SINGLE, platform: str = "tpu") -> int:
    """Numbers in the layers' matrices as one device's depth loop reads them: experts shared out, all else whole."""
    layers = 1 if model.depth_recurrent else model.depth
    count = parameters(model)
    width = model.expert_width if platform == "cpu" else _kernel_width(model)
    experts = math.ceil(model.experts / mesh["expert"]) * 3 * model.width * width
    rest = count.sa_projections + count.da_projections + count.shared_experts + count.attention_routers
    return rest + count.ea_router + layers * experts


def saved_bytes(model: ModelConfig, size: int, remat: str, *, native: bool = False) -> int:
    """Bytes that one depth keeps of one token for its backward pass, with numbers of `size` bytes.

    "full": the residual stream and the routing. "selective": also SA's output and log-sum-exp, and with `native` DA's
    output. "products": also what matrix products gave. "none": everything; counted on the residuals of `jax.vjp`
    (tests/accounting/test_memory.py).
    `native`: with the kernels for CPUs, which keep no sorted copies.
    """
    recurrent, depth_attention = int(model.depth_recurrent), int(model.depth_attention)
    routers = recurrent * (1 + depth_attention)
    decisions = INT * (3 + native) * (model.active_experts + routers)  # with native kernels the scores, too
    stream, sa = size * model.width, model.query_heads * model.head_size
    if remat == "full":
        return stream + decisions
    da = depth_attention * model.da_heads * model.da_head_size
    selective = stream + decisions + size * (sa + da * native) + FLOAT * model.query_heads
    if remat == "selective":
        return selective
    kv, da_kv = model.kv_heads * model.head_size, _da_cache(model) // 2
    if remat == "products":
        projections = sa + 2 * kv + da + 2 * da_kv + (1 + depth_attention) * model.width
        experts = 2 * model.active_experts * model.expert_width
        return selective + size * (projections + experts) + FLOAT * (1 + routers) * model.router_size
    if native:  # kernels keep what goes into them, and gather and turn it themselves
        in_type = (8 + 4 * recurrent + 4 * depth_attention) * model.width + 4 * (sa + kv) + 3 * da + 4 * da_kv
        in_type += 2 * model.active_experts * model.expert_width
        in_float = (4 + 2 * routers) * model.router_size + model.query_heads
        return FLOAT * in_float + size * in_type + decisions
    # Norms, RoPE and routers compute in float32, and keep it.
    in_float = (6 + 3 * recurrent + 3 * depth_attention) * model.width + 3 * (sa + kv + da + da_kv)
    in_float += 5 * (1 + routers) * model.router_size + depth_attention * model.depth * model.da_heads
    rows = 2 + depth_attention + 3 * recurrent * (1 + depth_attention)
    in_type = rows * model.width + 3 * sa + 2 * (kv + da + da_kv)
    in_type += recurrent * 2 * (sa + kv + da + da_kv)
    in_type += model.active_experts * model.width
    return FLOAT * in_float + size * in_type + decisions


def _kernel_width(model: ModelConfig) -> int:
    return math.ceil(model.expert_width / KERNEL_TILE) * KERNEL_TILE


def _routed(model: ModelConfig) -> int:
    return int(model.routed_attention)


def _router_keys(model: ModelConfig) -> int:
    layers = 1 if model.depth_recurrent else model.depth
    attention = len(attention_weights(model)) * model.linear_experts * _routed(model)
    return layers * (model.experts + attention) * model.router_size


def _da_cache(model: ModelConfig) -> int:
    """Numbers of one token's keys and values at one depth."""
    return 2 * model.da_kv_heads * model.da_head_size * model.depth_attention


def _exchange_bytes(model: ModelConfig, tokens: int, size: int) -> int:
    """Rows and cotangents, sent and received, in rounds of twice an even share."""
    rows = EXCHANGE_SLACK * tokens * model.active_experts
    return 4 * rows * model.width * size


# Generation


CONSTANT = 2.4088e9
"""Bytes that Table 1 counts beside weights and cache: the same for all six models."""


def table_1_memory(model: ModelConfig, length: int = 1024) -> float:
    """Bytes of Table 1: bfloat16 parameters, the cache of SA averaged over a generation, and a constant."""
    return 2 * parameters(model).total + sequence_cache_bytes(model, (length + 1) / 2, size=2) + CONSTANT


def sequence_cache_bytes(model: ModelConfig, tokens: float, *, size: int) -> float:
    """Keys and values of SA at all depths for so many tokens; that of DA is made anew for each token."""
    return tokens * model.depth * 2 * model.kv_heads * model.head_size * size


def generation_memory(model: ModelConfig, *, batch: int, length: int, size: int) -> dict[str, int]:
    """Bytes by category while `batch` sequences of `length` tokens are generated; shared experts are merged away."""
    count = parameters(model)
    return {
        "weights": size * (count.total - count.shared_experts),
        "sequence_cache": round(batch * sequence_cache_bytes(model, float(length), size=size)),
        "depth_cache": batch * model.depth * _da_cache(model) * size,
        "logits": batch * model.vocab * FLOAT,
    }
