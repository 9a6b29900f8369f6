"""The table of the operations by the C++ kernels."""

from dreamer_jax.kernels.interface import Implementation
from dreamer_jax.kernels.native import attention, experts, heads, routing

NATIVE = Implementation(
    name="native",
    norm_and_rotate=heads.norm_and_rotate,
    fused_heads=heads.fused_heads,
    route=routing.route,
    order=routing.order,
    linear=experts.linear,
    swiglu=experts.swiglu,
    sorted_swiglu=experts.sorted_swiglu,
    attend_sequence=attention.attend_sequence,
    attend_newest=attention.attend_newest,
    attend_depths=attention.attend_depths,
)
