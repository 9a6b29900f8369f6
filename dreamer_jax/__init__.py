"""Dreamer: depth-recurrent attention mixtures in JAX (arXiv 2601.21582).

    import dreamer_jax as dj

    lm = dj.load("runs/tiny")  # a run, one of its checkpoints, or an export
    lm.answer("What is 2 + 3?")
    lm.inspect("2 + 3 = 5").capture.depth_attention

Everything here is imported when it is first used, so that importing the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dreamer_jax.config import Config, ModelConfig
    from dreamer_jax.kernels.compute import Compute
    from dreamer_jax.language_model import LanguageModel, build, load

_HOMES = {
    **dict.fromkeys(("LanguageModel", "build", "load"), "dreamer_jax.language_model"),
    **dict.fromkeys(("Config", "ModelConfig"), "dreamer_jax.config"),
    "Compute": "dreamer_jax.kernels.compute",
}

__all__ = ["Compute", "Config", "LanguageModel", "ModelConfig", "build", "load"]


def __getattr__(name: str) -> Any:
    """Import a public name from where it stands."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dreamer_jax' has no attribute '{name}'; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, *globals()]
