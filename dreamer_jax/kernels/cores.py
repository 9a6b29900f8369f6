"""How many devices JAX makes of a CPU's cores."""

import os
from typing import Any

import jax

from dreamer_jax.config import Config, MeshConfig
from dreamer_jax.kernels.native import library

MOST_CPU_DEVICES = 8


def cpu_devices(mesh: MeshConfig, rows: int, cores: int) -> int:
    """Devices to make of so many parts of a CPU: one of each, because XLA runs a program's loops on one thread.

    Fewer where the `rows` of a microbatch do not divide, at most MOST_CPU_DEVICES because each holds the weights, and
    what the mesh asks for where it leaves no axis free.
    """
    given = 1
    for size in (mesh.data, mesh.fsdp, mesh.expert):
        given *= max(size, 1)
    if -1 not in (mesh.data, mesh.fsdp, mesh.expert):
        return given
    fitting = [n for n in range(given, min(cores, MOST_CPU_DEVICES) + 1, given) if rows % n == 0]
    return max(fitting, default=given)


def use_cores(config: Config) -> None:
    """Let JAX see `cpu_devices` CPU devices, unless the user has said how many; before it first looks for devices.

    A device has one core, or two where native kernels share their work out over threads: copies of the weights and sums
    of gradients then cost more than threads that wait.
    """
    told: Any = jax.config  # its flags are not in its type
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "") or told.jax_num_cpu_devices > 0:
        return
    rows = config.train.batch // config.train.microbatches
    # Where the system can tell, the cores that are ours: a container or a scheduler may grant fewer than there are.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    native = config.train.dtype == "float32" and config.kernels.implementation in ("auto", "native")
    threads = 2 if native and library.missing() is None else 1
    jax.config.update("jax_num_cpu_devices", cpu_devices(config.mesh, rows, max(1, cores // threads)))
