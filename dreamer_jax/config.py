"""The configuration: frozen dataclasses, checked across fields, read from a Python file and the command line.

A config file defines `get_config() -> Config`; any key can be overridden as `--section.key value`. The resolved
config is plain JSON inside every checkpoint.
"""

import dataclasses
import difflib
import json
import runpy
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from dreamer_jax.dimensions.base import ConfigError as ConfigError
from dreamer_jax.dimensions.base import RouterConfig as RouterConfig
from dreamer_jax.dimensions.base import require as _require
from dreamer_jax.model_config import DepthAttentionConfig as DepthAttentionConfig
from dreamer_jax.model_config import ExpertAttentionConfig as ExpertAttentionConfig
from dreamer_jax.model_config import LatentAttentionConfig as LatentAttentionConfig
from dreamer_jax.model_config import ModelConfig, migrated
from dreamer_jax.model_config import ParameterAttentionConfig as ParameterAttentionConfig
from dreamer_jax.model_config import SequenceAttentionConfig as SequenceAttentionConfig


@dataclass(frozen=True)
class Source:
    """One set of documents: JSON-lines files under `data.root`, or reasoning-gym tasks, which need no files."""

    name: str
    """Name of the set in reports and of its folder among the prepared."""
    weight: float = 1.0
    """Share of the packed rows, hence of the tokens, relative to the other sources."""
    train: tuple[str, ...] = ()
    """JSON-lines files of training documents, relative to data.root."""
    validation: tuple[str, ...] = ()
    """JSON-lines files of held-out documents, relative to data.root."""
    prompt_field: str = "question"
    """Field that holds the prompt."""
    response_field: str = "answer"
    """Field that holds the response."""
    tasks: tuple[str, ...] = ()
    """reasoning-gym tasks to generate, instead of files."""
    documents_per_task: int = 0
    """Training documents generated for each task; a tenth as many are held out."""
    remove: str = ""
    """Regular expression; what it matches is taken out of prompts and responses: r"<<[^<>]*>>" for GSM8K's marks."""

    def __post_init__(self) -> None:
        """A source has files or tasks, not both."""
        _require(self.weight > 0, f"data source '{self.name}': weight = {self.weight} must be positive")
        _require(
            bool(self.train) != bool(self.tasks),
            f"data source '{self.name}': give either train files or reasoning-gym tasks",
        )
        _require(
            not self.tasks or self.documents_per_task > 0,
            f"data source '{self.name}': documents_per_task must be positive for generated tasks",
        )


@dataclass(frozen=True)
class DataConfig:
    """Documents, tokenizer and packing."""

    sources: tuple[Source, ...] = ()
    """The mixture."""
    root: str = ""
    """Folder of the raw files; may begin with ~ or name an environment variable ($DATA)."""
    prepared: str = "~/.cache/dreamer_jax"
    """Folder of prepared datasets and trained tokenizers, one sub-folder for each distinct preparation."""
    tokenizer: str = "train"
    """'train' (SentencePiece BPE on the training documents, model.vocab entries), or a path to a SentencePiece
    .model or a Hugging Face tokenizer.json."""
    context: int = 512
    """T: tokens in a packed row."""
    response_only: bool = False
    """Take the loss on responses alone, not on prompts."""
    bad_rows: Literal["error", "skip"] = "error"
    """A row that is not JSON or lacks a field: stop, or skip it, count it and report the count."""
    long_documents: Literal["error", "skip"] = "skip"
    """A document longer than the context: stop, or skip it, count it and report the count."""
    prefetch: int = 4
    """Batches prepared ahead of the step that uses them."""

    def __post_init__(self) -> None:
        """Check what no single key shows."""
        _require(self.context >= 2, f"data.context = {self.context}: a row needs at least two tokens")
        names = [source.name for source in self.sources]
        _require(len(set(names)) == len(names), f"data.sources: names are not distinct: {names}")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and router balancing (Table 3)."""

    learning_rate: float = 4e-4
    """Constant after the warm-up."""
    warmup_steps: int = 500
    """Steps of linear warm-up from zero."""
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 1e-3
    """Decoupled; on matrices only, never on norms or router biases."""
    gradient_clip: float = 0.5
    """Largest global norm of the gradient."""
    expert_bias_rate: float = 1e-3
    """Eq. 3's rate for EA's router bias."""
    attention_bias_rate: float = 1e-2
    """Eq. 3's rate for the attention MoEs' router biases."""


@dataclass(frozen=True)
class TrainConfig:
    """The run."""

    steps: int = 1000
    """Optimizer steps."""
    batch: int = 32
    """Packed rows in an optimizer step, over all devices and microbatches."""
    microbatches: int = 1
    """Parts that a batch is split into; their gradients and expert counts are summed before the one update."""
    seed: int = 0
    """Initialisation and data order."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute type. Parameters and optimizer state are float32 in either case."""
    remat: Literal["none", "full", "selective", "products"] = "full"
    """What the backward pass recomputes: 'none': nothing. 'full': every layer, from its input. 'selective': all but
    SA's outputs. 'products': no matrix product either (in plain JAX but those of experts and of the routers' logits).
    Routing decisions are never recomputed."""
    max_bad_steps: int = 10
    """Consecutive steps with a non-finite loss or gradient (each is skipped and counted) before the run stops."""
    validate_every: int = 200
    """Steps between measurements of the held-out loss; 0 for the end of the run only."""
    validation_batches: int = 8
    """Batches of held-out rows in one measurement."""

    def __post_init__(self) -> None:
        """Check what no single key shows."""
        for key in ("steps", "batch", "microbatches", "max_bad_steps", "validation_batches"):
            _require(getattr(self, key) >= 1, f"train.{key} = {getattr(self, key)}: must be at least 1")
        _require(
            self.batch % self.microbatches == 0,
            f"train.batch = {self.batch} is not a multiple of train.microbatches = {self.microbatches}",
        )


@dataclass(frozen=True)
class KernelConfig:
    """How operations are computed; 'auto' chooses by platform."""

    implementation: Literal["auto", "native", "plain", "gpu", "tpu", "reference"] = "auto"
    """C++ for CPUs in float32, plain JAX for any platform, kernels for NVIDIA GPUs, kernels for TPUs, or the slow forms
    that tests compare with."""
    expert_exchange: Literal["auto", "all_to_all", "ragged_all_to_all"] = "auto"
    """How rows travel to the devices that hold their experts (mesh.expert > 1)."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 takes all that are left."""

    data: int = -1
    """Copies of the model. Like the other axes, it splits the batch."""
    fsdp: int = 1
    """Devices that share out parameters and optimizer state between steps, and gather them once per step."""
    expert: int = 1
    """Devices that share out the experts: tokens travel to them at every depth."""

    def __post_init__(self) -> None:
        """Check what no single key shows."""
        sizes = {"data": self.data, "fsdp": self.fsdp, "expert": self.expert}
        for axis, size in sizes.items():
            _require(size == -1 or size >= 1, f"mesh.{axis} = {size}: must be at least 1, or -1 for all that are left")
        _require(list(sizes.values()).count(-1) <= 1, "mesh: only one axis can be -1")


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run."""

    every: int = 200
    """Steps between checkpoints (one is written at the end and on SIGTERM in any case)."""
    keep: int = 3
    """Newest checkpoints to keep."""

    def __post_init__(self) -> None:
        """Check what no single key shows."""
        _require(self.every >= 1 and self.keep >= 1, "checkpoint.every and checkpoint.keep must be at least 1")


@dataclass(frozen=True)
class LogConfig:
    """What a run reports, and where."""

    every: int = 10
    """Steps between records in metrics.jsonl and TensorBoard."""
    tensorboard: bool = True
    wandb: bool = False
    """Also report to Weights & Biases (needs the wandb extra)."""
    project: str = "dreamer-jax"
    """Weights & Biases project."""
    sample_prompt: str = ""
    """Prompt answered at the end of training; empty for the first held-out prompt."""

    def __post_init__(self) -> None:
        """Check what no single key shows."""
        _require(self.every >= 1, f"log.every = {self.every}: must be at least 1")


@dataclass(frozen=True)
class DistributedConfig:
    """How soon a run of many processes notices that one of them fails."""

    heartbeat_s: int = 10
    """Seconds without a sign of life after which a process counts as dead, and all others end."""
    hang_s: int = 600
    """Seconds without a finished step after which a process shows where it is and ends; ten times as many for what
    compiles or writes much (first step, validation, checkpoints). 0 never ends it, for debuggers."""

    def __post_init__(self) -> None:
        """Check what no single key shows."""
        _require(self.heartbeat_s >= 2, f"distributed.heartbeat_s = {self.heartbeat_s}: must be at least 2")
        _require(self.hang_s >= 0, f"distributed.hang_s = {self.hang_s}: must be 0 (never) or more")


@dataclass(frozen=True)
class Config:
    """Everything about a run."""

    name: str
    """Name of the run; its folder is out/name."""
    out: str = "runs"
    """Folder of runs."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    @property
    def run_dir(self) -> Path:
        """The folder of this run."""
        return Path(self.out).expanduser() / self.name

    @property
    def tokens_per_step(self) -> int:
        """Token positions in an optimizer step."""
        return self.train.batch * self.data.context


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `get_config()` of a Python file, then apply `--section.key value` overrides.

    Raises:
        ConfigError: the file is absent, defines no get_config, or holds a value that does not fit.
        SystemExit: an override names an unknown key (the nearest is named) or has the wrong type.
    """
    path = Path(path)
    _require(path.is_file(), f"config file '{path}' does not exist (configs/ holds the ones that ship)")
    namespace = runpy.run_path(str(path))
    _require("get_config" in namespace, f"config file '{path}' defines no get_config()")
    config = namespace["get_config"]()
    _require(isinstance(config, Config), f"get_config() of '{path}' returned {type(config).__name__}, not Config")
    return tyro.cli(Config, default=config, args=list(overrides), prog=f"--config {path}") if overrides else config


def to_json(config: Config) -> str:
    """The resolved config as JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """The config that `to_json` wrote.

    Raises:
        ConfigError: an unknown key (the nearest is named) or a value of the wrong type.
    """
    return from_dict(Config, json.loads(text))


def from_dict(cls: Any, values: dict[str, Any], where: str = "") -> Any:
    """Build dataclass `cls` from nested dicts and lists; `where` prefixes the keys in errors."""
    if cls is ModelConfig:
        values = migrated(values)
    elif cls is KernelConfig:
        values = {key: value for key, value in values.items() if key not in ("attention", "grouped_matmul")}
    elif cls is DataConfig and "cache" in values:
        values = {"prepared": values["cache"], **{key: value for key, value in values.items() if key != "cache"}}
    known = {f.name for f in dataclasses.fields(cls)}
    for key in values:
        nearest = difflib.get_close_matches(key, known, n=1)
        _require(
            key in known, f"unknown key '{where}{key}'" + (f"; did you mean '{where}{nearest[0]}'?" if nearest else "")
        )
    kinds = typing.get_type_hints(cls)
    return cls(**{key: _value(kinds[key], value, where + key) for key, value in values.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    """`value` as `kind`: a nested dataclass, a tuple, a literal or a scalar."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        _require(isinstance(value, dict), f"{where}: expected a section, found {value!r}")
        return from_dict(kind, value, where + ".")
    if origin is tuple:
        _require(isinstance(value, list | tuple), f"{where}: expected a list, found {value!r}")
        return tuple(_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Literal:
        _require(value in args, f"{where} = {value!r}: must be one of {', '.join(map(repr, args))}")
        return value
    if origin is types.UnionType:
        return value if value is None else _value(args[0], value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    fits = isinstance(value, kind) and not (kind is int and isinstance(value, bool))
    _require(fits, f"{where} = {value!r}: expected {kind.__name__}, found {type(value).__name__}")
    return value
