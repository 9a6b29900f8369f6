"""The configuration: frozen dataclasses, checked by their annotations, of a Python file and the command line.

A config file defines `get_config() -> Config`; any key can be overridden as `--section.key value`. The resolved
config is plain JSON inside every checkpoint.
"""

import contextlib
import dataclasses
import inspect
import io
import itertools
import json
import math
import re
import runpy
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, is_dataclass, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro
from pydantic import AfterValidator, Field, model_validator

from dreamer_jax.dimensions.base import DEEPEST
from dreamer_jax.dimensions.base import RouterConfig as RouterConfig
from dreamer_jax.model_config import FLAT_KEYS, ModelConfig
from dreamer_jax.model_config import DepthAttentionConfig as DepthAttentionConfig
from dreamer_jax.model_config import ExpertAttentionConfig as ExpertAttentionConfig
from dreamer_jax.model_config import LatentAttentionConfig as LatentAttentionConfig
from dreamer_jax.model_config import ParameterAttentionConfig as ParameterAttentionConfig
from dreamer_jax.model_config import SequenceAttentionConfig as SequenceAttentionConfig
from dreamer_jax.values import (
    LIST,
    Count,
    CountOrZero,
    Made,
    NonNegative,
    Positive,
    Share,
    Text,
    Word,
    Words,
    allowed,
    annotations,
    bare,
    from_dict,
    keys_of,
    renewed,
    require,
    section,
    shown,
)
from dreamer_jax.values import ConfigError as ConfigError

CALCULATOR_MARKS = r"<<[^<>]*>>"
"""What version 0.1 took out of all documents of files: GSM8K's answers have them."""
TEXT_MARK = "{text}"
"""Where a question or an answer goes in a template."""
PROMPT_TEMPLATE, RESPONSE_TEMPLATE = "Question: {text}\nAnswer:", " {text}"
"""The layout in which evaluation harnesses put GSM8K, so that benchmarks meet the model's own format."""
UNREADABLE = "[]*?"
"""Characters of paths under which checkpoints cannot be read: the library takes the path for a pattern."""
DEPTH_FORMS = {
    "uniform": ("lowest", "highest"),
    "poisson": ("mean", "lowest", "highest"),
    "lognormal_poisson": ("mean", "sigma", "lowest", "highest"),
}
"""What train.depths may be beside fixed, and the numbers of each."""
WIDEST_SIGMA = 3.0
"""Of train.depths: with a wider one almost all depths would be the lowest."""


class RandomDepths(NamedTuple):
    """How train.depths draws the depth of a step: by a form of DEPTH_FORMS, clipped to lowest .. highest."""

    form: str
    lowest: int
    highest: int
    mean: float
    """Before clipping; of lognormal_poisson without the one depth that always runs."""
    sigma: float
    """Of lognormal_poisson: the standard deviation of the rate's logarithm; of the others 0."""


def random_depths(text: str) -> RandomDepths | None:
    """Parse train.depths: None for the trained depth at every step.

    Raises:
        ValueError: it is none of the forms, or a number is out of range; the message says what to write.
    """
    if text.strip() in ("", "fixed"):
        return None
    found = re.fullmatch(r"\s*(\w+)\s*\(([^()]*)\)\s*", text)
    names = DEPTH_FORMS.get(found[1]) if found else None
    given = [_number(part) for part in found[2].split(",")] if found else []
    if found is None or names is None or len(given) != len(names) or not all(map(math.isfinite, given)):
        forms = ", ".join(f"{form}({', '.join(numbers)})" for form, numbers in DEPTH_FORMS.items())
        raise ValueError(f"must be fixed, or one of {forms} with numbers, such as uniform(4, 12)")
    values = {"sigma": 0.0, **dict(zip(names, given, strict=True))}
    lowest, highest, sigma = values["lowest"], values["highest"], values["sigma"]
    mean = values.get("mean", (lowest + highest) / 2)
    if not (lowest.is_integer() and highest.is_integer() and 1 <= lowest <= highest <= DEEPEST):
        raise ValueError(f"lowest and highest must be whole numbers from 1 to {DEEPEST}, lowest first")
    if not lowest <= mean <= highest:
        raise ValueError(f"mean must lie between lowest and highest, {lowest:g} and {highest:g}")
    if not 0 <= sigma <= WIDEST_SIGMA:
        raise ValueError(f"sigma must be a number from 0 to {WIDEST_SIGMA:g}")
    return RandomDepths(found[1], int(lowest), int(highest), mean, sigma)


def _number(text: str) -> float:
    """NaN for what is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _is_depths(text: str) -> str:
    random_depths(text)
    return text


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is no regular expression: {error}") from None
    return pattern


def _is_template(text: str) -> str:
    if text.count(TEXT_MARK) != 1:
        raise ValueError(f"must hold {TEXT_MARK} once, where the text goes")
    return text


def _is_short(name: str) -> str:
    if len(name.encode()) > 255:
        raise ValueError("is longer than file systems allow, which is 255 bytes")
    return name


def _is_axis(size: int) -> int:
    if size == 0:
        raise ValueError  # the field says what is allowed
    return size


RunName = Annotated[
    str,
    Field(
        pattern=r"^[^\x00-\x20\x7f/\[\]*?.-]([^\x00-\x1f\x7f/\[\]*?]{0,198}[^\x00-\x20\x7f/\[\]*?])?$",
        description="a folder name of 1 to 200 characters, none of / [ ] * ?, no - or . in front, no space at the ends",
    ),
    AfterValidator(_is_short),
]
SourceName = Annotated[
    str,
    Field(
        pattern="^[a-z][a-z0-9_]{0,99}$",
        description="a name of small letters, digits and _, with a letter in front, at most 100 characters",
    ),
]
TextPattern = Annotated[Text, AfterValidator(_compiles)]
"""A regular expression, or nothing."""
TextTemplate = Annotated[Text, AfterValidator(_is_template)]
"""What is put around a text, which goes where {text} stands."""
DepthsText = Annotated[Text, AfterValidator(_is_depths)]
"""A distribution of depths, as `random_depths` reads it."""
Rows = Annotated[int, Field(ge=1, le=2**20)]
"""In a step: more than any machine computes, and few enough to try their divisors."""
AxisSize = Annotated[
    int,
    Field(ge=-1, le=2**20, description="a whole number from 1 to 1048576, or -1 for all that are left"),
    AfterValidator(_is_axis),
]


@section("data.sources", label="name")
class Source:
    """One set of documents: files of rows under `data.root`, or generated tasks, which need no files."""

    name: SourceName
    """Name of the set in reports and of its folder among the prepared."""
    weight: Annotated[float, Field(gt=0, le=1e9)] = 1.0
    """Share of the packed rows, hence of the tokens, relative to the other sources."""
    train: Words = ()
    """Files of training documents, relative to data.root: JSON or Parquet (docs/data.md)."""
    validation: Words = ()
    """Files of held-out documents, relative to data.root."""
    prompt_field: Word = "question"
    """Field that holds the prompt; with dots for a field within a field: meta.question."""
    response_field: Word = "answer"
    """Field that holds the response, in the same way."""
    turns_field: Text = ""
    """Field that holds a conversation, whose first question and answer are used in place of these two fields."""
    tasks: Words = ()
    """Tasks to generate, instead of files: our own (docs/data.md) or reasoning-gym's; with settings if need be, as in
    "chain_sum(min_terms=3)"."""
    documents_per_task: CountOrZero = 0
    """Training documents generated for each task; a tenth as many are held out. 0 for all those of two_hop."""
    remove: TextPattern = ""
    """Regular expression; what it matches is taken out of prompts and responses: r"<<[^<>]*>>" for GSM8K's marks."""

    def __post_init__(self) -> None:
        """A source has files or tasks, not both; neither, where data.prepared holds its documents."""
        require(
            not (self.train and self.tasks),
            f"data source '{self.name}': give either train files or tasks",
        )


@section("data")
class DataConfig:
    """Documents, tokenizer and packing."""

    sources: Annotated[tuple[Source, ...], LIST] = ()
    """The mixture; empty for that of data.prepared, where this is prepared data itself. Of such data a source is given
    by its name and weight alone."""
    root: Text = ""
    """Folder of the raw files; may begin with ~ or name an environment variable ($DATA)."""
    prepared: Word = "~/.cache/dreamer_jax"
    """Folder of prepared datasets and trained tokenizers, one sub-folder for each distinct preparation; or prepared
    data itself, a folder with report.json, as dreamer_jax.prepare writes it."""
    tokenizer: Word = "train"
    """'train' (SentencePiece BPE on the training documents, model.vocab entries), 'words' (an entry for each word
    of the training documents), or a path to a SentencePiece .model or a Hugging Face tokenizer.json."""
    special_tokens: Words = ()
    """Names of the tokens that begin and end a document, where a given tokenizer has uncommon ones: two, or one for
    both."""
    prompt_template: TextTemplate = PROMPT_TEMPLATE
    """What is put around a question, in training and wherever the model is asked."""
    response_template: TextTemplate = RESPONSE_TEMPLATE
    """What is put around an answer, which follows at once."""
    context: Annotated[int, Field(ge=2, le=2**24)] = 512
    """T: tokens in a packed row."""
    response_only: bool = False
    """Take the loss on responses alone, not on prompts."""
    bad_rows: Literal["error", "skip"] = "error"
    """A row that is not JSON or lacks a field: stop, or skip it, count it and report the count."""
    long_documents: Literal["error", "skip"] = "skip"
    """A document longer than the context: stop, or skip it, count it and report the count."""
    prefetch: Annotated[int, Field(ge=1, le=1024)] = 4
    """Batches prepared ahead of the step that uses them."""

    @model_validator(mode="before")
    @classmethod
    def _of_older_keys(cls, values: Any) -> Any:
        return renewed(values, _data_of_older_keys)

    def __post_init__(self) -> None:
        """Check what no single key shows."""
        names = [source.name for source in self.sources]
        require(len(set(names)) == len(names), f"data.sources: names are not distinct: {names}")


@section("optimizer")
class OptimizerConfig:
    """AdamW and router balancing (Table 3)."""

    learning_rate: Positive = 4e-4
    """Constant after the warm-up, and until the cooldown if there is one."""
    warmup_steps: CountOrZero = 500
    """Steps of linear warm-up from zero; 0 for none."""
    cooldown_start: CountOrZero = 0
    """The step from which on the learning rate falls."""
    cooldown_steps: CountOrZero = 0
    """Steps over which it falls in a line to zero; 0 for none. The paper has none."""
    beta1: Share = 0.9
    beta2: Share = 0.999
    epsilon: Positive = 1e-8
    weight_decay: NonNegative = 1e-3
    """Decoupled; on matrices only, never on norms or router biases."""
    gradient_clip: NonNegative = 0.5
    """Largest global norm of the gradient; 0 leaves the gradient as it is."""
    expert_bias_rate: NonNegative = 1e-3
    """Eq. 3's rate for EA's router bias."""
    attention_bias_rate: NonNegative = 1e-2
    """Eq. 3's rate for the attention MoEs' router biases."""


@section("train")
class TrainConfig:
    """The run."""

    steps: Count = 1000
    """Optimizer steps."""
    batch: Rows = 32
    """Packed rows in an optimizer step, over all devices and microbatches."""
    microbatches: Rows = 1
    """Parts that a batch is split into; their gradients and expert counts are summed before the one update."""
    seed: CountOrZero = 0
    """Initialisation, data order and random depths."""
    depths: DepthsText = ""
    """How many depths each step runs (docs/depths.md): empty or 'fixed' for model.depth; 'uniform(lowest, highest)',
    'poisson(mean, lowest, highest)' or 'lognormal_poisson(mean, sigma, lowest, highest)' to draw it for each step."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute type. Parameters and optimizer state are float32 in either case."""
    remat: Literal["none", "full", "selective", "products"] = "full"
    """What the backward pass recomputes: 'none': nothing. 'full': every layer, from its input. 'selective': all but
    SA's outputs. 'products': no matrix product either (in plain JAX but those of experts and of the routers' logits).
    Routing decisions are never recomputed."""
    max_bad_steps: Count = 10
    """Consecutive steps with a non-finite loss or gradient (each is skipped and counted) before the run stops."""
    validate_every: CountOrZero = 200
    """Steps between measurements of the held-out loss; 0 for the end of the run only."""
    validation_batches: Count = 8
    """Batches of held-out rows in one measurement."""
    evaluate_every: CountOrZero = 0
    """Steps between evaluations on benchmarks; 0 for none."""
    evaluate_tasks: Text = "gsm8k"
    """Benchmarks of these evaluations, with commas between (docs/evaluation.md)."""
    evaluate_data: Text = ""
    """Folder of the benchmarks' files."""
    evaluate_limit: Count = 64
    """Questions of each part of a benchmark."""

    def __post_init__(self) -> None:
        """Check what no single key shows."""
        require(
            self.batch % self.microbatches == 0,
            f"train.batch = {self.batch} is not a multiple of train.microbatches = {self.microbatches}",
        )
        require(
            not self.evaluate_every or bool(self.evaluate_data),
            f"train.evaluate_every = {self.evaluate_every} needs train.evaluate_data, the folder of the files",
        )


@section("kernels")
class KernelConfig:
    """How operations are computed; 'auto' chooses by platform."""

    implementation: Literal["auto", "native", "plain", "gpu", "tpu", "reference"] = "auto"
    """C++ for CPUs in float32, plain JAX for any platform, kernels for NVIDIA GPUs, kernels for TPUs, or the slow forms
    that tests compare with."""
    expert_exchange: Literal["auto", "all_to_all", "ragged_all_to_all"] = "auto"
    """How rows travel to the devices that hold their experts (mesh.expert > 1)."""

    @model_validator(mode="before")
    @classmethod
    def _of_older_keys(cls, values: Any) -> Any:
        return renewed(values, _kernels_of_older_keys)


@section("mesh")
class MeshConfig:
    """Devices along each mesh axis; -1 takes all that are left."""

    data: AxisSize = -1
    """Copies of the model. Like the other axes, it splits the batch."""
    fsdp: AxisSize = 1
    """Devices that share out parameters and optimizer state between steps, and gather them once per step."""
    expert: AxisSize = 1
    """Devices that share out the experts: tokens travel to them at every depth."""

    def __post_init__(self) -> None:
        """Check what no single key shows."""
        require((self.data, self.fsdp, self.expert).count(-1) <= 1, "mesh: only one axis can be -1")


@section("checkpoint")
class CheckpointConfig:
    """What is kept of a run."""

    every: Count = 200
    """Steps between checkpoints (one is written at the end and on SIGTERM in any case)."""
    keep: Count = 3
    """Newest checkpoints to keep."""
    keep_every: CountOrZero = 0
    """Beside these, those of every so many steps, for evaluations along the training; 0 for none."""

    def __post_init__(self) -> None:
        """Check what no single key shows."""
        require(
            self.keep_every % self.every == 0,
            f"checkpoint.keep_every = {self.keep_every} is not a multiple of checkpoint.every = {self.every}",
        )


@section("log")
class LogConfig:
    """What a run reports, and where."""

    every: Count = 10
    """Steps between records in metrics.jsonl and TensorBoard."""
    tensorboard: bool = True
    wandb: bool = False
    """Also report to Weights & Biases (needs the wandb extra)."""
    project: Word = "dreamer-jax"
    """Weights & Biases project."""
    figures_every: CountOrZero = 0
    """Steps between figures in TensorBoard and Weights & Biases: where depths look, which experts they use; 0 for
    none."""
    sample_prompt: Text = ""
    """Prompt answered at the end of training; empty for the first held-out prompt."""


@section("distributed")
class DistributedConfig:
    """How soon a run of many processes notices that one of them fails."""

    heartbeat_s: Annotated[int, Field(ge=2, le=86_400)] = 10
    """Seconds without a sign of life after which a process counts as dead, and all others end."""
    hang_s: Annotated[int, Field(ge=0, le=10_000_000)] = 600
    """Seconds without a finished step after which a process shows where it is and ends; ten times as many for what
    compiles or writes much (first step, validation, checkpoints). 0 never ends it, for debuggers."""


@section("")
class Config:
    """Everything about a run."""

    name: RunName
    """Name of the run; its folder is out/name."""
    out: Word = "runs"
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

    def __post_init__(self) -> None:
        """Check what no single section shows."""
        _check_depths(self)
        _check_cooldown(self)

    @property
    def run_dir(self) -> Path:
        """The folder of this run."""
        return user_path(self.out, "out") / self.name

    @property
    def tokens_per_step(self) -> int:
        """Token positions in an optimizer step."""
        return self.train.batch * self.data.context


def _check_cooldown(config: Config) -> None:
    """No step is trained at a learning rate of zero."""
    optimizer, start = config.optimizer, config.optimizer.cooldown_start
    require(
        optimizer.cooldown_steps > 0 or start == 0,
        f"optimizer.cooldown_start = {start} needs optimizer.cooldown_steps, over which the learning rate falls",
    )
    end = start + optimizer.cooldown_steps
    require(
        optimizer.cooldown_steps == 0 or config.train.steps <= end,
        f"train.steps = {config.train.steps} is beyond the cooldown, which ends with a learning rate of zero after "
        f"step {end}: give at most as many steps, or a later optimizer.cooldown_start",
    )


def _check_depths(config: Config) -> None:
    """The model runs at every depth that train.depths can draw."""
    model, depths = config.model, random_depths(config.train.depths)
    if depths is None:
        return
    key = f"train.depths = {shown(config.train.depths)}"
    require(
        model.depth_recurrent,
        f"{key}: the layers of LA are its depth; leave the key empty, or set model.depth_recurrent = True",
    )
    # A slice that is empty at some of these depths is empty at the lowest or the highest.
    for name, depth in itertools.product(model.dimensions, (depths.lowest, depths.highest)):
        require(
            bool(model.depths_of(name, depth)),
            f"{key}: at depth {depth}, {name} would run at none of the depths; leave such depths out, or widen the "
            f"slice of {name} in model.mixture",
        )


def user_path(path: str | Path, key: str) -> Path:
    """A path whose ~ is replaced by a home.

    Args:
        path: as a user gives it.
        key: what names it in errors: "out", "--checkpoint".

    Raises:
        ConfigError: there is no such home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{key} {shown(str(path))}: there is no such home folder; write the whole path") from None


def readable_path(path: Path, key: str) -> Path:
    """The path, if checkpoints under it can be read.

    Raises:
        ConfigError: it, or a folder above it, has a character that file patterns use.
    """
    whole = user_path(path, key).absolute()
    wrong = sorted(set(str(whole)) & set(UNREADABLE))
    require(
        not wrong,
        f"{key}: checkpoints under '{whole}' could not be read, for it has {' '.join(wrong)} in it; give another path",
    )
    return path


def check_run_path(config: Config) -> None:
    """Raise ConfigError if checkpoints in the run's folder could not be read."""
    readable_path(config.run_dir, "out")


# Configs of version 0.1


def _kernels_of_older_keys(keys: dict[str, Any], stored: bool) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if key not in ("attention", "grouped_matmul")}


def _data_of_older_keys(keys: dict[str, Any], stored: bool) -> dict[str, Any]:
    if "cache" in keys:
        keys = {"prepared": keys["cache"], **{key: value for key, value in keys.items() if key != "cache"}}
    sources = keys.get("sources", ())
    of_today = isinstance(sources, list | tuple) and any(isinstance(s, dict) and "remove" in s for s in sources)
    if of_today or not isinstance(sources, list | tuple):
        return keys
    # A Python file without the key may be of today; a stored config without it is of the time before the key.
    marks = keys.get("calculator_marks", "drop" if stored else "keep")
    require(marks in ("drop", "keep"), f"data.calculator_marks = {shown(marks)}: must be one of 'drop', 'keep'")
    if marks == "drop":
        keys = {**keys, "sources": [_without_marks(source) for source in sources]}
    return {key: value for key, value in keys.items() if key != "calculator_marks"}


def _without_marks(source: Any) -> Any:
    """A source of version 0.1 whose files' calculator marks are taken out; another one as it is."""
    if isinstance(source, Source):
        return replace(source, remove=CALCULATOR_MARKS) if source.train and not source.remove else source
    return {**source, "remove": CALCULATOR_MARKS} if isinstance(source, dict) and source.get("train") else source


# Files and the command line


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `get_config()` of a Python file, then apply `--section.key value` overrides.

    Raises:
        ConfigError: the file is absent, cannot be run, gives no config, or a value does not fit. One line.
        SystemExit: an override names an unknown key (the nearest is named) or is no value of its type.
    """
    return load_as(Config, path, overrides)


def load_as(kind: type[Made], path: str | Path, overrides: Sequence[str] = ()) -> Made:
    """As `load`, of a file whose get_config() gives another class made by `section`."""
    path = user_path(path, "config file")
    config = _from_file(path, kind)
    return _overridden(config, overrides, f"--config {path}") if overrides else config


def to_json(config: Any) -> str:
    """The resolved config as JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2, allow_nan=False) + "\n"


def from_json(text: str | bytes) -> Config:
    """The config that `to_json` wrote.

    Raises:
        ConfigError: no JSON; an unknown key (the nearest is named), a missing one, or a value that does not fit.
    """
    return _from_json(text, Config)


def _from_json(text: str | bytes, kind: type[Made]) -> Made:
    try:
        decoded = text.decode() if isinstance(text, bytes) else text
        values = json.loads(decoded.removeprefix("\ufeff"), object_pairs_hook=_distinct)
    except ConfigError:
        raise
    except UnicodeDecodeError as error:
        raise ConfigError(f"config: not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise ConfigError("config: nests too deep") from None
    except ValueError as error:
        raise ConfigError(f"config: not JSON: {error}") from None
    return from_dict(kind, values)


def model_from_dict(values: Any) -> ModelConfig:
    """The model section of a stored config.

    Raises:
        ConfigError: as `from_json`.
    """
    return from_dict(ModelConfig, values, "model")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ConfigError(f"config: key {shown(next(key for key in keys if keys.count(key) > 1))} stands twice")
    return values


def _from_file(path: Path, kind: type[Made]) -> Made:
    """What get_config() of a file gives."""
    try:
        require(not path.is_dir(), f"config file '{path}' is a folder; give a file in it")
        require(path.is_file(), f"config file '{path}' does not exist (configs/ holds the ones that ship)")
        before, nul, _ = path.read_bytes().partition(b"\0")
        line = before.count(b"\n") + 1
        require(not nul, f"config file '{path}', line {line}: there is a NUL byte; the file is no text, or damaged")
        namespace = runpy.run_path(str(path))
        require("get_config" in namespace, f"config file '{path}' defines no get_config()")
        config = _called(namespace["get_config"], f"get_config() of '{path}'", kind)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(_fault_of_file(error, path)) from error
    _check_storable(config, f"get_config() of '{path}'")
    return config


def _called(get_config: Any, name: str, kind: type[Made]) -> Made:
    require(callable(get_config), f"{name} is no function, but {shown(get_config)}")
    try:
        inspect.signature(get_config).bind()
    except TypeError as error:
        raise ConfigError(f"{name} is called without arguments: {error}") from None
    config = get_config()
    if type(config) is not kind:
        raise ConfigError(f"{name} returned {type(config).__name__}, not {kind.__name__}")
    return config


def _fault_of_file(error: BaseException, path: Path) -> str:
    """What is wrong with a config file that raised this error, and in which line."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    kind, said = type(error).__name__, str(error)
    if isinstance(error, SystemExit):
        kind, said = "it ends the program", "get_config() must return a Config"
    elif isinstance(error, SyntaxError) and error.filename == str(path):
        lines, said = [error.lineno or 0], error.msg
    line = f", line {lines[-1]}" if lines and lines[-1] else ""
    said = " ".join(said.split())[:300]
    return f"config file '{path}'{line}: {kind}{': ' if said else ''}{said}"


def _check_storable(config: Any, name: str) -> None:
    """A checkpoint would give the same config back."""
    try:
        stored = _from_json(to_json(config), type(config))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: a checkpoint could not hold its config: {error}") from None
    for key, ours, theirs in _differences(config, stored):
        kinds = type(ours).__name__, type(theirs).__name__
        raise ConfigError(f"{name}: {key} is of type {kinds[0]}, and would be of type {kinds[1]} after a checkpoint")


def _differences(ours: Any, theirs: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in annotations(type(theirs)):
        one, other = getattr(ours, key), getattr(theirs, key)
        if is_dataclass(other) and type(one) is type(other):
            yield from _differences(one, other, f"{prefix}{key}.")
        elif one != other:
            yield f"{prefix}{key}", one, other


OLDER_OPTIONS = {
    "data.cache": "data.prepared",
    **{f"model.{key}": f"model.{'.'.join(place)}" for key, place in FLAT_KEYS.items()},
}
"""Keys of version 0.1 on the command line, and what they are now."""


def _overridden(config: Made, overrides: Sequence[str], prog: str) -> Made:
    keys = keys_of(type(config)) | dict(_keys_of_lists(config))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            made = tyro.cli(type(config), default=config, args=_plain_options(overrides, keys), prog=prog)
    except SystemExit as ended:
        _raise_config_error(ended)  # in a line, in place of tyro's box
        sys.stderr.write(said.getvalue())
        raise
    sys.stderr.write(said.getvalue())
    return made


def _keys_of_lists(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys of the sections that are listed in a section, or in one within it: data.sources.0.weight."""
    for key in annotations(type(config)):
        value = getattr(config, key)
        if is_dataclass(value):
            yield from _keys_of_lists(value, f"{prefix}{key}.")
        elif isinstance(value, tuple):
            for i, entry in enumerate(value):
                if is_dataclass(entry):
                    yield from keys_of(type(entry), f"{prefix}{key}.{i}.").items()


def _raise_config_error(ended: BaseException) -> None:
    """Raise the ConfigError for which tyro ended the program, if it is for one."""
    cause = ended.__context__
    while cause is not None:
        if isinstance(cause, ConfigError):
            raise ConfigError(str(cause)) from None
        cause = cause.__context__


def _plain_options(given: Sequence[str], keys: Mapping[str, Any]) -> list[str]:
    """Overrides as tyro takes them: flags without a value, whole numbers in digits, keys of today."""
    plain: list[str] = []
    rest = list(reversed(given))
    while rest:
        option, equals, value = rest.pop().partition("=")
        key = option.removeprefix("--").replace("-", "_") if option.startswith("--") else ""
        if key in OLDER_OPTIONS:
            key = OLDER_OPTIONS[key]
            option = f"--{key}"
        kind, _ = bare(keys.get(key))
        follows = bool(rest) and not equals
        if kind is bool and (equals or (follows and rest[-1].lower() in ("true", "false"))):
            plain.append(_flag(option, key, value if equals else rest.pop()))
        elif kind is int and (equals or follows):
            plain += [option, _digits(key, value if equals else rest.pop(), keys[key])]
        else:
            plain.append(f"{option}{equals}{value}")
    return plain


def _flag(option: str, key: str, value: str) -> str:
    require(value.lower() in ("true", "false"), f"{key} = {shown(value)}: must be True or False")
    where, _, name = option.rpartition(".")
    return option if value.lower() == "true" else f"{where}.no-{name}"


def _digits(key: str, text: str, annotation: Any) -> str:
    """10000 for 1e4; what is no number at all, as it is."""
    try:
        number = Decimal(text)
    except InvalidOperation:
        return text
    whole = number.is_finite() and number.adjusted() < 20 and number == number.to_integral_value()
    require(whole, f"{key} = {text}: must be {allowed(annotation)}")
    return str(int(number))
