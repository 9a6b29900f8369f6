"""Strict settings for every test: 8 simulated CPU devices, no silent dtype or rank promotion, shapes checked at run time."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

from jaxtyping import install_import_hook

install_import_hook("dreamer_jax", "beartype.beartype")

import jax  # noqa: E402  (the environment and the import hook come first)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
