"""From the folder of a run to what is evaluated: a model that answers, and what it is."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from flax import nnx

from dreamer_jax.accounting.params import parameters
from dreamer_jax.config import MeshConfig
from dreamer_jax.data.template import Template
from dreamer_jax.data.tokenizer import Tokenizer, load_tokenizer
from dreamer_jax.evaluation.evaluation import Subject
from dreamer_jax.evaluation.requests import EvaluationError
from dreamer_jax.evaluation.respondent import Respondent
from dreamer_jax.inference.decoder import Decoder, make_decoder
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.model.dreamer import Dreamer, checked_depth
from dreamer_jax.model.parameters import taken_apart
from dreamer_jax.sharding import make_mesh
from dreamer_jax.training.checkpoint import Checkpoints, Loaded, load_model
from dreamer_jax.training.checksums import checksums


@dataclass(frozen=True)
class Settings:
    """How a checkpoint is asked."""

    batch: int = 32
    context: int | None = None
    """Tokens that a document may have; None for those of training."""
    stride: int | None = None
    expert_devices: int = 1
    """Devices that share out the experts; all others share out the requests."""
    seed: int = 0


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that is to be evaluated."""

    folder: Path
    """Of the run."""
    loaded: Loaded
    tokens: int
    """Training tokens behind it."""
    weights: str
    depth_rope_scaling: bool | None = None
    """If it is not as in training."""

    def respondent(self, settings: Settings, depth: int | None) -> Respondent:
        """The model at a depth, on all devices."""
        decoder = self.decoder(settings.expert_devices, depth)
        context = settings.context or self.loaded.config.data.context
        return Respondent(decoder, self.tokenizer, context, settings.batch, settings.stride, settings.seed)

    def decoder(self, expert_devices: int, depth: int | None) -> Decoder:
        """The model at a depth, ready to read; of all devices, so many share out the experts."""
        mesh = None
        if jax.device_count() > 1:
            mesh = make_mesh(MeshConfig(data=-1, expert=expert_devices))
        elif expert_devices != 1:
            raise EvaluationError(f"--expert-devices {expert_devices}: there is one device")
        compute = replace(Compute.of(self.loaded.config, mesh), remat="none")
        return make_decoder(self.loaded.model, compute, depth=depth, mesh=mesh)

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's."""
        return load_tokenizer(self.loaded.known_tokenizer, self.loaded.config.data.special_tokens)

    @property
    def template(self) -> Template:
        """The run's."""
        return Template.of(self.loaded.config.data)

    def subject(self, settings: Settings, depth: int | None) -> Subject:
        """What the results are of."""
        config = self.loaded.config
        return Subject(
            run=config.name,
            checkpoint=str(self.folder),
            step=self.loaded.step,
            tokens=self.tokens,
            depth=checked_depth(config.model, depth),
            trained_depth=config.model.depth,
            variant=config.model.variant,
            parameters=parameters(config.model).total,
            weights=self.weights,
            dtype=config.train.dtype,
            context=settings.context or config.data.context,
            stride=settings.stride,
            depth_rope_scaling=self.depth_rope_scaling,
        )

    def results(self, depth: int | None) -> Path:
        """Where results of this checkpoint at this depth stand, if no other place is given."""
        trained = self.loaded.config.model.depth
        suffix = "" if depth in (None, trained) else f"-depth{depth}"
        scaled = {None: "evaluation", True: "evaluation-scaled", False: "evaluation-unscaled"}
        return self.folder / scaled[self.depth_rope_scaling] / f"{self.loaded.step}{suffix}"


def candidate(checkpoint: Path, depth_rope_scaling: bool | None = None) -> Candidate:
    """The newest checkpoint of a run folder, or the one given.

    Args:
        checkpoint: the folder.
        depth_rope_scaling: in place of `model.depth_rope_scaling` of the training; None for that.

    Raises:
        CheckpointError: there is none, it is damaged, or it has no tokenizer.
    """
    loaded = load_model(checkpoint)
    _ = loaded.known_tokenizer  # missing, it is missed now
    folder = run_folder(checkpoint)
    with Checkpoints(folder) as checkpoints:
        rows = checkpoints.position(loaded.step).rows
    tokens, weights = rows * loaded.config.data.context, fingerprint(loaded.model)
    if depth_rope_scaling in (None, loaded.config.model.depth_rope_scaling):
        return Candidate(folder, loaded, tokens, weights)
    return Candidate(folder, with_depth_rope_scaling(loaded, depth_rope_scaling), tokens, weights, depth_rope_scaling)


def with_depth_rope_scaling(loaded: Loaded, scaling: bool) -> Loaded:
    """The same weights in a model whose depth positions are scaled, or are not."""
    config = replace(loaded.config, model=replace(loaded.config.model, depth_rope_scaling=scaling))
    graph = nnx.graphdef(nnx.eval_shape(lambda: Dreamer(config.model, nnx.Rngs(0))))
    _, params, biases = taken_apart(loaded.model)
    return loaded._replace(config=config, model=nnx.merge(graph, params, biases))


def run_folder(checkpoint: Path) -> Path:
    """The run that a checkpoint belongs to; the folder itself if it is one."""
    checkpoint = checkpoint.expanduser()
    inside = checkpoint.name.isdigit() and checkpoint.parent.name == "checkpoints"
    return checkpoint.parent.parent if inside else checkpoint


def all_checkpoints(run: Path) -> list[Path]:
    """Every checkpoint that a run keeps, oldest first."""
    with Checkpoints(run) as checkpoints:
        return [checkpoints.directory / str(step) for step in checkpoints.steps]


def fingerprint(model: Dreamer) -> str:
    """A checksum of all weights and router biases."""
    _, *states = taken_apart(model)
    arrays = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(states)}
    return hashlib.sha256(repr(sorted(checksums(arrays).items())).encode()).hexdigest()[:16]
