"""Dreamer for transformers: attention over the sequence (SA), over depths (DA) and over experts (EA), mixed.

A depth-recurrent model iterates one layer; without depth recurrence each depth has a layer of its own. The cache is a
stock one. It holds the keys and values of SA, with a slot for each depth; those of DA live within one forward pass.

Letters: B batch, T query position, S key position, D width, N query heads, K key/value heads, H head size,
E experts, A active experts, F expert width, M attention experts, R router size.
"""

import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from dreamer_jax.convert.hf.exported.configuration_dreamer import DreamerConfig

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""What this release of transformers calls the cache; 5.24 renamed it."""


class Rotation(NamedTuple):
    """The cosines and sines of RoPE's angles, one for each pair."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Turn the pairs (x_j, x_{j + H/2}) of the last axis."""
        first, second = x.chunk(2, -1)
        return torch.cat([first * self.cos - second * self.sin, second * self.cos + first * self.sin], -1)


class Route(NamedTuple):
    """A decision of a router for each token."""

    ids: Tensor
    """[B, T, A], best first."""
    scores: Tensor
    """[B, T, A]: sigmoid of the logit, float32, not normalised."""


class Step(NamedTuple):
    """What a layer is told of the depth at which it runs."""

    depth: int
    over_sequence: Rotation
    """Of the tokens' positions, [B, T, 1, H/2]."""
    in_router: Rotation
    """Of the depth, [R/2]."""
    over_depth: Rotation
    """Of the depth, for DA's heads, [H/2]."""
    mask: Any
    slot: "DreamerAttentionSlot | None"
    cache: Cache | None


class DreamerNorm(nn.Module):
    """RMSNorm, computed in float32."""

    def __init__(self, size: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.epsilon)
        return (y * self.weight.float()).to(x.dtype)


class DreamerTurningNorm(DreamerNorm):
    """RMSNorm of queries and keys, which stays float32, with RoPE after it.

    vLLM replaces norms that it recognises by its own, which rounds to the dtype of the weight. It does not recognise
    this one, because of its second argument; that keeps routing in float32.
    """

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        """Normalise the last axis, and turn it if there is a rotation."""
        y = super().forward(x.float())
        return y if rotation is None else rotation(y)


class DreamerRouter(nn.Module):
    """Attention over learned keys of experts: selects by logit + bias, in float32; ties go to the lower index."""

    def __init__(self, config: DreamerConfig, experts: int, active: int):
        super().__init__()
        self.active = active
        self.w_q = nn.Parameter(torch.empty(config.router_size, config.hidden_size))
        self.keys = nn.Parameter(torch.empty(experts, config.router_size))
        self.bias = nn.Parameter(torch.zeros(experts, dtype=torch.float32), requires_grad=False)
        self.q_norm = DreamerTurningNorm(config.router_size, config.rms_norm_eps)
        self.k_norm = DreamerTurningNorm(config.router_size, config.rms_norm_eps)

    def train(self, mode: bool = True) -> "DreamerRouter":
        """No gradient moves the bias; loading in another dtype makes a new parameter, which would ask for one."""
        self.bias.requires_grad_(False)
        return super().train(mode)

    def forward(self, x: Tensor, rotation: Rotation) -> Route:
        """Select experts for each token of x [B, T, D]; the rotation is that of the depth."""
        with torch.autocast(x.device.type, enabled=False):
            query = self.q_norm(functional.linear(x.float(), self.w_q.float()), rotation)
            keys = self.k_norm(self.keys)
            logits = functional.linear(query, keys) / math.sqrt(keys.shape[-1])
            ids = best(logits.detach() + self.bias.float(), self.active)
            return Route(ids, logits.sigmoid().gather(-1, ids))


def best(preference: Tensor, count: int) -> Tensor:
    """The indices of the largest entries of the last axis, largest first; of equal ones, the lower index."""
    if count == 1:
        return preference.argmax(-1, keepdim=True)  # the first of equal ones, as its documentation says
    return torch.sort(preference, dim=-1, descending=True, stable=True).indices[..., :count]


class DreamerLinearExperts(nn.Module):
    """A mixture of linear experts, one of which a token selects, and of a shared one that may be merged into them."""

    def __init__(self, config: DreamerConfig, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_attention_experts, outputs, inputs))
        self.shared = None if config.merged else nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor, route: Route) -> Tensor:
        """Project x [B, T, in] to [B, T, out]: score * (x W_e + x W_shared), Eq. 7."""
        rows = selected_linear(x.flatten(0, -2), self.weight, route.ids.flatten())
        scores = route.scores.to(x.dtype)
        y = scores * rows.unflatten(0, x.shape[:-1])
        # The score learns from the routed expert alone.
        return y if self.shared is None else y + scores.detach() * functional.linear(x, self.shared)


def selected_linear(x: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Multiply each row with the matrix that it selects: [rows, in], [M, out, in] and [rows] to [rows, out]."""
    experts = weight.shape[0]
    if grouped_mm_takes(x, weight):
        order = ids.argsort(stable=True)
        ends = (ids[:, None] == torch.arange(experts, device=ids.device)).sum(0).cumsum(0)
        grouped = functional.grouped_mm(x[order], weight.transpose(1, 2), offs=ends.to(torch.int32))
        return torch.zeros_like(grouped).index_copy(0, order, grouped)
    if torch.compiler.is_compiling():  # a graph has no shapes that depend on the data
        chosen = [functional.linear(x * (ids == expert)[:, None], weight[expert]) for expert in range(experts)]
        return torch.stack(chosen).sum(0)
    order = ids.argsort(stable=True)
    groups = x[order].split(torch.bincount(ids, minlength=experts).tolist())
    rows = torch.cat([functional.linear(group, matrix) for group, matrix in zip(groups, weight, strict=True)])
    return torch.zeros_like(rows).index_copy(0, order, rows)


def grouped_mm_takes(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's grouped product computes this: it wants bfloat16, and rows of whole 16 bytes."""
    aligned = weight.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0
    return hasattr(functional, "grouped_mm") and x.dtype == weight.dtype == torch.bfloat16 and aligned


class DreamerProjections(nn.Module):
    """What SA and DA have in common: x to queries, keys and values, and the attention's output to an update of x."""

    def __init__(self, config: DreamerConfig, heads: int, kv_heads: int, head_dim: int):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        width, fused = config.hidden_size, (heads + 2 * kv_heads) * head_dim
        self.norm = DreamerNorm(width, config.rms_norm_eps)
        self.q_norm = DreamerTurningNorm(head_dim, config.rms_norm_eps)
        self.k_norm = DreamerTurningNorm(head_dim, config.rms_norm_eps)
        self.router = None
        if config.depth_recurrent:
            self.router = DreamerRouter(config, config.num_attention_experts, 1)
            self.qkv_proj = DreamerLinearExperts(config, width, fused)
            self.o_proj = DreamerLinearExperts(config, heads * head_dim, width)
        else:
            self.qkv_proj = nn.Linear(width, fused, bias=False)
            self.o_proj = nn.Linear(heads * head_dim, width, bias=False)
        self.o_proj.updates_residual = True  # for initialisation

    def project(self, projection: nn.Module, x: Tensor, route: Route | None) -> Tensor:
        """Both projections go through the expert that the one router selected."""
        return projection(x) if route is None else projection(x, route)

    def queries_keys_values(
        self, x: Tensor, step: Step, rotation: Rotation
    ) -> tuple[Tensor, Tensor, Tensor, Route | None]:
        """Of x [B, T, D]: q [B, T, N, H], k and v [B, T, K, H], q and k rotated; and the route, for the output."""
        x = self.norm(x)
        route = None if self.router is None else self.router(x, step.in_router)
        heads = self.project(self.qkv_proj, x, route).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], -2)
        return self.q_norm(q, rotation).to(x.dtype), self.k_norm(k, rotation).to(x.dtype), v, route


class DreamerSequenceAttention(DreamerProjections):
    """SA: causal attention over the sequence."""

    def __init__(self, config: DreamerConfig):
        super().__init__(config, config.num_attention_heads, config.num_key_value_heads, config.head_dim)

    def forward(self, x: Tensor, step: Step, **kwargs: Any) -> Tensor:
        """Compute the update of x [B, T, D]; what else there is goes to the attention's implementation."""
        assert step.slot is not None  # there is one for each depth of SA
        q, k, v, route = self.queries_keys_values(x, step, step.over_sequence)
        y = step.slot(*(a.transpose(1, 2) for a in (q, k, v)), step.mask, step.cache, **kwargs)
        return self.project(self.o_proj, y.reshape(*x.shape[:-1], -1), route)


class DreamerAttentionSlot(nn.Module):
    """One depth's place in the cache, and the attention that reads it; it has no parameters."""

    is_causal = True

    def __init__(self, config: DreamerConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, cache: Cache | None, **kwargs: Any) -> Tensor:
        """Of q [B, N, T, H] and the newest k and v [B, K, T, H]: [B, T, N, H], or with the heads side by side."""
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        return attend(self, q, k, v, mask, scaling=self.scaling, dropout=0.0, **kwargs)[0]


def eager_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Attention with all probabilities at hand: [B, T, N, H] and [B, N, T, S]."""
    k, v = (a.repeat_interleave(module.num_key_value_groups, 1) for a in (k, v))
    scores = q @ k.transpose(2, 3) * scaling
    scores = scores if mask is None else scores + mask
    probabilities = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return (probabilities @ v).transpose(1, 2).contiguous(), probabilities


class DreamerDepthAttention(DreamerProjections):
    """DA: attention of each token to its own depths, up to the current one."""

    def __init__(self, config: DreamerConfig):
        super().__init__(config, config.depth_attention_heads, config.depth_key_value_heads, config.depth_head_dim)
        self.config = config

    def forward(self, x: Tensor, step: Step, earlier: dict[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, Any]:
        """The update, and the keys and values of this depth for the later ones."""
        q, k, v, route = self.queries_keys_values(x, step, step.over_depth)
        reached = [pair for depth, pair in earlier.items() if self.config.reaches(step.depth, depth)] + [(k, v)]
        keys, values = (torch.stack(parts, 2) for parts in zip(*reached, strict=True))  # [B, T, depths, K, H]
        q = q.unflatten(2, (self.kv_heads, -1))
        scores = torch.einsum("btkgh,btlkh->btkgl", q, keys) * self.head_dim**-0.5
        probabilities = scores.softmax(-1, dtype=torch.float32).to(x.dtype)
        y = torch.einsum("btkgl,btlkh->btkgh", probabilities, values).flatten(2)
        return self.project(self.o_proj, y, route), (k, v)


@use_experts_implementation
class DreamerExperts(nn.Module):
    """The SwiGLU experts of EA, side by side."""

    def __init__(self, config: DreamerConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim, self.intermediate_dim = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Of rows [rows, D] and the experts of each [rows, A] with their weights: their weighted sum [rows, D]."""
        y = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            row, place = torch.where(top_k_index == expert)
            gate, up = functional.linear(hidden_states[row], self.gate_up_proj[expert]).chunk(2, -1)
            update = functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            y = y.index_add(0, row, (update * top_k_weights[row, place, None]).to(y.dtype))
        return y


class DreamerExpertAttention(nn.Module):
    """EA: a sparse mixture of SwiGLU experts."""

    def __init__(self, config: DreamerConfig):
        super().__init__()
        self.norm = DreamerNorm(config.hidden_size, config.rms_norm_eps)
        self.router = DreamerRouter(config, config.num_experts, config.num_experts_per_tok)
        self.experts = DreamerExperts(config)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Compute the update of x [B, T, D]."""
        x = self.norm(x)
        route = self.router(x, step.in_router)
        weights = (route.scores / route.scores.sum(-1, keepdim=True)).to(x.dtype)
        y = self.experts(x.flatten(0, -2), route.ids.flatten(0, -2), weights.flatten(0, -2))
        return y.view_as(x)


class DreamerLayer(GradientCheckpointingLayer):
    """One depth: the mixture of attentions."""

    def __init__(self, config: DreamerConfig, index: int):
        """The layer of all depths, or of the depth `index` alone."""
        super().__init__()
        self.config = config
        kinds = {"sa": DreamerSequenceAttention, "da": DreamerDepthAttention, "ea": DreamerExpertAttention}
        for name, kind in kinds.items():
            if index in config.depths_of(name) or (config.depth_recurrent and config.has(name)):
                setattr(self, name, kind(config))

    def forward(
        self, x: Tensor, step: Step, earlier: dict[int, tuple[Tensor, Tensor]], **kwargs: Any
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Compute x after this depth, and DA's keys and values of it for the later depths."""
        pair = None
        for group in self.config.groups:
            source = x  # of all members of the group
            for name, _ in group:
                if step.depth not in self.config.depths_of(name):
                    continue
                if name == "sa":
                    x = x + self.sa(source, step, **kwargs)
                elif name == "da":
                    update, pair = self.da(source, step, earlier)
                    x = x + update
                else:
                    x = x + self.ea(source, step)
        return x, pair


class DreamerPreTrainedModel(PreTrainedModel):
    """What transformers wants to know of these models."""

    config_class = DreamerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DreamerLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _keep_in_fp32_modules_strict = ["router.bias"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Unless one is asked for, the library's choice; but its grouped products take multiples of 8 numbers only."""
        takes = self.config.hidden_size % 8 == 0 and self.config.moe_intermediate_size % 8 == 0
        return super().get_correct_experts_implementation(requested_experts or (None if takes else "eager"))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the paper's Table 3 has it: smaller for what adds to the residual stream."""
        config = self.config
        std = math.sqrt(1 / (5 * config.hidden_size))
        updates = sum(config.has(name) for name in ("sa", "da", "ea"))
        std_of_updates = math.sqrt(1 / (2.5 * config.hidden_size * config.trained_depth * updates))
        if isinstance(module, DreamerNorm):
            init.ones_(module.weight)
        elif isinstance(module, DreamerRouter):
            init.normal_(module.w_q, std=std)
            init.normal_(module.keys, std=std)
            init.zeros_(module.bias)
        elif isinstance(module, DreamerExperts):
            init.normal_(module.gate_up_proj, std=std)
            init.normal_(module.down_proj, std=std_of_updates)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, nn.Linear | DreamerLinearExperts):
            for weight in (module.weight, getattr(module, "shared", None)):
                if weight is not None:
                    init.normal_(weight, std=std_of_updates if hasattr(module, "updates_residual") else std)


class DreamerModel(DreamerPreTrainedModel):
    """The model without the head over the vocabulary."""

    def __init__(self, config: DreamerConfig):
        """Raise ValueError for a depth other than that of the weights, where each depth has a layer of its own."""
        super().__init__(config)
        depth = config.num_hidden_layers
        if not config.depth_recurrent and depth != config.trained_depth:
            raise ValueError(f"depth is {depth}, but this model has {config.trained_depth} layers of its own; leave it")
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DreamerLayer(config, i) for i in range(1 if config.depth_recurrent else depth))
        # Those beyond the depths of SA are not used; but vLLM asks for one for each depth.
        self.slots = nn.ModuleList(DreamerAttentionSlot(config, i) for i in range(depth))
        self.norm = DreamerNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Of tokens [B, T]: the residual stream [B, T, D] after the last depth.

        The cache goes by either of two names: `past_key_values`, and `cache` from transformers 5.24 on.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if self.training and torch.is_grad_enabled() and self.layers[0].gradient_checkpointing:
            cache = None  # layers that run again in the backward pass would write it twice
        elif cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        mask = self._mask(x, attention_mask, position_ids, cache)
        if position_ids is None:
            position_ids = positions_of(attention_mask, 0 if cache is None else cache.get_seq_length(), x)

        config, recurrent = self.config, self.config.depth_recurrent
        over_sequence = sequence_rotation(position_ids, config.head_dim, config.rope_theta)
        in_router = depth_rotations(config, config.router_size, x.device)
        over_depth = depth_rotations(config, config.depth_head_dim, x.device)
        slots = dict(zip(config.depths_of("sa"), self.slots, strict=False))
        earlier: dict[int, tuple[Tensor, Tensor]] = {}
        hidden = [x]
        for depth in range(config.num_hidden_layers):
            layer = self.layers[0 if recurrent else depth]
            rotations = over_sequence, in_router[depth], over_depth[depth]
            step = Step(depth, *rotations, mask, slots.get(depth), cache)
            x, pair = layer(x, step, earlier, **kwargs)
            x = self.norm(x) if recurrent else x
            earlier = earlier if pair is None else {**earlier, depth: pair}
            hidden.append(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x if recurrent else self.norm(x),
            hidden_states=tuple(hidden) if output_hidden_states else None,
            **{CACHE: cache},
        )

    def _mask(self, x: Tensor, attention_mask: Any, position_ids: Tensor | None, cache: Cache | None) -> Any:
        """What SA may look at, in the form that the chosen attention takes."""
        return create_causal_mask(
            config=self.config,
            inputs_embeds=x,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
        )


def positions_of(attention_mask: Any, seen: Any, x: Tensor) -> Tensor:
    """The position of each token of x [B, T, D], counted from the first one that is no padding."""
    newest = torch.arange(x.shape[1], device=x.device)[None] + seen
    if attention_mask is None or attention_mask.ndim != 2:
        return newest
    counted = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return counted.gather(1, newest.expand(len(counted), -1))


def frequencies(size: int, base: float, device: torch.device) -> Tensor:
    """Radians per position of the pairs: [size/2]."""
    return base ** (-torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)


def sequence_rotation(positions: Tensor, size: int, base: float) -> Rotation:
    """RoPE over positions [B, T]."""
    angles = positions[:, :, None, None].float() * frequencies(size, base, positions.device)
    return Rotation(angles.cos(), angles.sin())


def depth_rotations(config: DreamerConfig, size: int, device: torch.device) -> list[Rotation]:
    """RoPE over depths, for each depth: half of the pairs turn by the depths passed, half by those to come."""
    depth = config.num_hidden_layers
    passed = torch.arange(depth, device=device, dtype=torch.float32)[:, None]
    upper = depth - 1 - passed if config.depth_rope_reversed else passed
    stretch = config.trained_depth / depth if config.depth_rope_scaling else 1.0
    turns = torch.cat([passed.expand(-1, size // 4), upper.expand(-1, size // 4)], -1)
    angles = turns * stretch * frequencies(size, config.depth_rope_theta, device)
    return [Rotation(row.cos(), row.sin()) for row in angles]


class DreamerForCausalLM(DreamerPreTrainedModel, GenerationMixin):
    """The language model."""

    def __init__(self, config: DreamerConfig):
        super().__init__(config)
        self.model = DreamerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V], or of the last `logits_to_keep` tokens; with labels [B, T], the loss of predicting them.

        Labels are the tokens themselves, not shifted, with -100 where there is nothing to learn.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            count = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **count)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE: getattr(outputs, CACHE)},
        )
