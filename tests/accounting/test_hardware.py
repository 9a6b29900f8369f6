"""Accelerators by the names that people and JAX give them."""

import pytest

from dreamer_jax.accounting.hardware import hardware, peak_flops
from dreamer_jax.config import ConfigError


@pytest.mark.parametrize(
    ("device_kind", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("TPU v4 lite", None),
        ("cpu", None),
    ],
)
def test_peaks_are_known_by_the_names_that_jax_gives(device_kind: str, peak: float | None) -> None:
    assert peak_flops(device_kind) == peak


def test_devices_are_known_by_the_names_of_the_command_line() -> None:
    assert hardware("H200").memory > hardware("h100").memory > hardware("v5e").memory
    with pytest.raises(ConfigError, match=r"unknown device 'abacus'; known: .*v5e"):
        hardware("abacus")
