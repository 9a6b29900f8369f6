"""How a model is executed: the compute type, what is recomputed, whose kernels, and how experts are shared out."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from dreamer_jax.config import Config, ConfigError
from dreamer_jax.kernels.exchange import SLACK, Exchange, Transport, default_transport
from dreamer_jax.kernels.interface import Implementation
from dreamer_jax.kernels.native import library

Remat = Literal["none", "full", "selective", "products"]
"""What the backward pass recomputes; see `train.remat`."""

KernelsName = Literal["plain", "reference", "native", "gpu", "tpu"]


@dataclass(frozen=True)
class Compute:
    """It changes speed, memory and rounding, not the model."""

    dtype: DTypeLike = jnp.float32
    remat: Remat = "none"
    kernels: KernelsName = "plain"
    exchange: Exchange | None = None
    """For a mesh that shares out the experts; inside shard_map."""

    @property
    def implementation(self) -> Implementation:
        """The operations, as `kernels` computes them."""
        return implementation(self.kernels)

    @staticmethod
    def of(config: Config, mesh: Mesh | None = None) -> "Compute":
        """The config's choices, with 'auto' resolved for the mesh's platform (without one: the first device's).

        Raises:
            ConfigError: 'native' is asked for and cannot compute this here.
            ValueError: 'auto' on a platform that has no implementation.
        """
        device = mesh.devices.flat[0] if mesh else jax.devices()[0]
        dtype = jnp.dtype(config.train.dtype)
        return Compute(
            dtype=dtype,
            remat=config.train.remat,
            kernels=choose(config.kernels.implementation, device.platform, dtype),
            exchange=_exchange(config.kernels.expert_exchange, mesh),
        )

    @staticmethod
    def fastest(dtype: DTypeLike = jnp.float32) -> "Compute":
        """What is fastest on the first device, without recomputation."""
        return Compute(dtype=jnp.dtype(dtype), kernels=choose("auto", jax.devices()[0].platform, dtype))


def implementation(name: KernelsName) -> Implementation:
    """The implementation of this name, whose libraries are imported now."""
    match name:
        case "plain":
            from dreamer_jax.kernels.plain.implementation import PLAIN

            return PLAIN
        case "reference":
            from dreamer_jax.kernels.reference import REFERENCE

            return REFERENCE
        case "native":
            from dreamer_jax.kernels.native.implementation import NATIVE

            return NATIVE
        case "gpu":
            from dreamer_jax.kernels.gpu import GPU

            return GPU
        case "tpu":
            from dreamer_jax.kernels.tpu import TPU

            return TPU


def choose(choice: Literal["auto"] | KernelsName, platform: str, dtype: DTypeLike) -> KernelsName:
    """The choice, checked; or the fastest implementation of a JAX platform for a compute type."""
    if jax.config.read("jax_enable_x64"):
        raise ConfigError("JAX_ENABLE_X64 is set: models compute in float32 or bfloat16, unset it")
    if choice == "native" and (reason := _not_native(platform, dtype)):
        raise ConfigError(f"kernels.implementation = 'native': {reason}")
    if choice != "auto":
        return choice
    match platform:
        case "cpu":
            return "plain" if _not_native(platform, dtype) else "native"
        case "gpu" | "cuda":
            return "gpu"
        case "tpu":
            return "tpu"
    raise ValueError(f"no kernels for platform {platform!r}; known: cpu, gpu, cuda, tpu")


def _not_native(platform: str, dtype: DTypeLike) -> str | None:
    """Why the kernels for CPUs cannot compute in this type here, and what to do; None if they can."""
    if platform != "cpu":
        return f"these kernels are for CPUs, not for {platform!r}: use 'auto'"
    if jnp.dtype(dtype) != jnp.float32:
        return (
            f"these kernels compute in float32, not in {jnp.dtype(dtype)}: set train.dtype to 'float32' or use 'auto'"
        )
    if reason := library.missing():
        return f"{reason}\nInstall g++ 12, clang 11 or newer, or use 'plain'."
    return None


def _exchange(choice: Literal["auto"] | Transport, mesh: Mesh | None) -> Exchange | None:
    if mesh is None or mesh.shape["expert"] == 1:
        return None
    device = mesh.devices.flat[0]
    transport = default_transport(device.platform, device.device_kind) if choice == "auto" else choice
    return Exchange("expert", mesh.shape["expert"], transport, SLACK[transport])
