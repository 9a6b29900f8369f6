"""Print a fingerprint of the program of a training step: `python -m tests.training.program FOLDER`."""

import dataclasses
import hashlib
import sys
from pathlib import Path

from dreamer_jax.config import MeshConfig
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.sharding import make_mesh
from dreamer_jax.training.ahead_of_time import abstract_batch
from dreamer_jax.training.step import abstract_state, make_train_step
from tests.training.test_step import config_of
from tests.training.toy import REFERENCE

if __name__ == "__main__":
    config = config_of("DR+DA", Path(sys.argv[1]), batch=8)
    config = dataclasses.replace(config, kernels=REFERENCE, mesh=MeshConfig(2, 2, 2))
    mesh = make_mesh(config.mesh)
    graph, state = abstract_state(config, mesh)
    step = make_train_step(config, Compute.of(config, mesh), mesh, graph)
    text = step.lower(state, abstract_batch(config, mesh)).as_text()
    print(hashlib.sha256(text.encode()).hexdigest())
