"""Accelerators: peaks that MFU divides by, and memory that a run must fit into. From the makers' data sheets."""

import os
from dataclasses import dataclass

from dreamer_jax.config import ConfigError

GIB = 2.0**30


@dataclass(frozen=True)
class Hardware:
    """One device."""

    name: str
    """As `plan --device` and `--topology` spell it."""
    kinds: tuple[str, ...]
    """Parts of what JAX calls it."""
    platform: str
    """"gpu", "tpu" or "cpu"."""
    peak: float
    """Dense bfloat16 FLOP/s (half of the figure where the data sheet quotes sparse ones); 0 where unknown."""
    memory: float
    """Bytes that a program can use."""


# The first match of a JAX device kind counts: special models stand before the general name.
_ALL = (
    Hardware("h100-pcie", ("H100 PCIe",), "gpu", 756e12, 79 * GIB),
    Hardware("h100-nvl", ("H100 NVL",), "gpu", 835e12, 93 * GIB),
    Hardware("h200-nvl", ("H200 NVL",), "gpu", 835e12, 139 * GIB),
    Hardware("a100", ("A100",), "gpu", 312e12, 79 * GIB),
    Hardware("h100", ("H100",), "gpu", 989e12, 79 * GIB),
    Hardware("h200", ("H200",), "gpu", 989e12, 139 * GIB),
    Hardware("b200", ("B200",), "gpu", 2250e12, 178 * GIB),
    Hardware("v4", ("TPU v4",), "tpu", 275e12, 31.75 * GIB),
    Hardware("v5e", ("TPU v5 lite", "TPU v5e"), "tpu", 197e12, 15.75 * GIB),
    Hardware("v5p", ("TPU v5",), "tpu", 459e12, 95.74 * GIB),
    Hardware("v6e", ("TPU v6 lite", "TPU v6e"), "tpu", 918e12, 31.25 * GIB),
)
NAMES = tuple(hardware.name for hardware in _ALL)


def hardware(name: str) -> Hardware:
    """By the name of a command line.

    Raises:
        ConfigError: an unknown one; the known are named.
    """
    found = [device for device in _ALL if device.name == name.lower()]
    if not found:
        raise ConfigError(f"unknown device '{name}'; known: {', '.join(NAMES)}")
    return found[0]


def this_machine() -> Hardware:
    """The CPU at hand, with its memory."""
    return Hardware("this machine", (), "cpu", 0.0, float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")))


def hardware_of(device_kind: str) -> Hardware | None:
    """By `jax.Device.device_kind`; None if unknown, such as for CPUs."""
    # A slice of a GPU has the whole one's name, and an unknown part of its peak. GB200 and TPU v4 lite are other chips.
    if any(word in device_kind for word in ("MIG", "GB200", "v4 lite")):
        return None
    return next((device for device in _ALL for kind in device.kinds if kind in device_kind), None)


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of a device by its `jax.Device.device_kind`; None if unknown."""
    found = hardware_of(device_kind)
    return found.peak if found else None
