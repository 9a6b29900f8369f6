"""The table of the operations in plain JAX."""

from functools import partial

from dreamer_jax.kernels import rows
from dreamer_jax.kernels.interface import Implementation
from dreamer_jax.kernels.plain import attention, depths, experts, heads, linear, routing

PLAIN = Implementation(
    name="plain",
    norm_and_rotate=heads.norm_and_rotate,
    fused_heads=heads.fused_heads,
    route=routing.route,
    order=rows.order,
    linear=partial(linear.routed_linear, experts.grouped_matmul),
    swiglu=partial(rows.routed_swiglu, experts.sorted_swiglu),
    sorted_swiglu=experts.sorted_swiglu,
    attend_sequence=attention.attend_sequence,
    attend_newest=attention.attend_newest,
    attend_depths=depths.attend_depths,
)
