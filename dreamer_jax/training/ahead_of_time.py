"""The real train step, compiled for hardware that is not present: does it compile, does it fit, what does it send?

XLA needs a description of the devices, not the devices: of TPU slices libtpu has it (`pip install 'dreamer-jax[tpu]'`),
of NVIDIA GPUs it is given here (their compiler comes with `pip install 'dreamer-jax[gpu]'`).
"""

import os
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from dreamer_jax import sharding
from dreamer_jax.accounting.hardware import GIB, hardware
from dreamer_jax.config import Config, ConfigError
from dreamer_jax.data.batch import Batch
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.training.collectives import Collective, collectives
from dreamer_jax.training.step import abstract_state, make_train_step

_HOPPER = """
gpu_device_info {{
  name: "{name}" device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a"
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 threads_per_warp: 32 threads_per_block_limit: 1024
  threads_per_core_limit: 2048 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800 memory_bandwidth: {bandwidth} device_memory_size: {memory} device_address_bits: 64
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""
_GPUS = {"h100": ("NVIDIA H100", 3_350_000_000_000), "h200": ("NVIDIA H200", 4_800_000_000_000)}


class CompiledStep(NamedTuple):
    """What XLA says of the step on one device."""

    devices: int
    device_kind: str
    mesh: dict[str, int]
    seconds: float
    """To lower and compile."""
    arguments: int
    """Bytes of parameters, optimizer state and batch; updated in place."""
    temporaries: int
    code: int
    flops: float
    """XLA's count, in which the body of a loop (microbatches, depths) counts once."""
    collectives: list[Collective]


def compile_step(config: Config, topology: str) -> CompiledStep:
    """Compile the train step of a config for a topology such as "v5e:16x16" or "h200:8".

    Raises:
        ConfigError: an unknown topology, a missing compiler, or a step that does not fit or compile; XLA's words.
    """
    mesh = sharding.make_mesh(config.mesh, topology_devices(topology))
    sharding.check_batch(config.train.batch, config.train.microbatches, mesh)
    graph, state = abstract_state(config, mesh)
    device = mesh.devices.flat[0]
    started = time.monotonic()
    try:
        with jax.default_device(device):  # kernels ask it for their platform
            step = make_train_step(config, Compute.of(config, mesh), mesh, graph)
            compiled = jax.jit(step, donate_argnums=0).lower(state, abstract_batch(config, mesh)).compile()
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"XLA cannot compile the step for {topology}: {_first_lines(error)}") from error
    memory: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis() or {}  # of programs for absent GPUs there is none
    return CompiledStep(
        devices=mesh.size,
        device_kind=device.device_kind,
        mesh=dict(mesh.shape),
        seconds=time.monotonic() - started,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        flops=float(cost.get("flops", 0.0)),
        collectives=collectives(compiled.as_text() or ""),
    )


def abstract_batch(config: Config, mesh: Mesh) -> Batch:
    """Shapes and places of a batch."""
    place, shape = sharding.batch_sharding(mesh), (config.train.batch, config.data.context)
    kinds = Batch(tokens=jnp.int32, positions=jnp.int32, segment_ids=jnp.int32, response_mask=jnp.bool_)
    return jax.tree.map(lambda kind: jax.ShapeDtypeStruct(shape, kind, sharding=place), kinds)


def topology_devices(topology: str) -> list[Any]:
    """Descriptions of the devices of a topology.

    Raises:
        ConfigError: it is unknown, or its compiler is not installed.
    """
    name, _, shape = topology.partition(":")
    device = hardware(name)
    try:
        if device.platform == "tpu":
            return list(topologies.get_topology_desc(topology, "tpu").devices)
        if name in _GPUS and shape.isdigit():
            kind, bandwidth = _GPUS[name]
            target = _HOPPER.format(name=kind, bandwidth=bandwidth, memory=int(device.memory + GIB))
            # Autotuning runs kernels, for which there is no device.
            os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"
            described = topologies.get_topology_desc(
                "", platform="cuda", target_config=target, topology=f"1x1x{int(shape)}"
            )
            return list(described.devices)
    except Exception as error:  # the compilers' libraries raise many kinds
        fix = f"pip install 'dreamer-jax[{device.platform}]'"
        raise ConfigError(
            f"no compiler for topology '{topology}' ({_first_lines(error)}); a shape such as v5e:4x4 or h200:8, and "
            f"{fix}, are needed"
        ) from error
    raise ConfigError(f"topology '{topology}': give a TPU slice such as v5e:16x16 or v5p:4x4x4, or h100:8, h200:8")


def _first_lines(error: BaseException) -> str:
    return "\n".join(str(error).splitlines()[:6])
