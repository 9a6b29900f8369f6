"""Checkpoints of a run: asynchronous, atomic, self-contained, and strict about what they restore.

<run>/config.json            the resolved config
<run>/tokenizer/             the tokenizer's file
<run>/checkpoints/<step>/    Orbax: model (parameters, router biases), training (optimizer, counters), meta (config)
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint import checkpoint_managers as managers

from dreamer_jax.config import CheckpointConfig, Config, from_dict, to_json
from dreamer_jax.errors import DreamerError
from dreamer_jax.model.dreamer import Dreamer
from dreamer_jax.model.parameters import taken_apart
from dreamer_jax.training.optimizer import adamw
from dreamer_jax.training.step import TrainState

Leaves = dict[str, Any]
"""Arrays by their path in the state, such as "params.layer.ea.w_down"."""


class CheckpointError(DreamerError, RuntimeError):
    """A checkpoint that is absent or does not fit; the message names what is wrong."""


class Loaded(NamedTuple):
    """A trained model with everything that belongs to it."""

    config: Config
    model: Dreamer
    tokenizer_path: Path | None
    """None in a folder that was written from arrays alone."""
    step: int

    @property
    def known_tokenizer(self) -> Path:
        """The tokenizer's file.

        Raises:
            CheckpointError: there is none.
        """
        if self.tokenizer_path is None:
            raise CheckpointError(f"the run '{self.config.name}' has no tokenizer: put one into its folder tokenizer/")
        return self.tokenizer_path


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, run_dir: Path, policy: CheckpointConfig | None = None):
        """Open the folder; with a `policy` for writing, otherwise for reading."""
        self.directory = (run_dir / "checkpoints").absolute()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.LatestN(policy.keep) if policy else None,
            cleanup_tmp_directories=policy is not None,
            create=policy is not None,
        )
        handlers = {name: ocp.StandardCheckpointHandler() for name in ("model", "training")}
        handlers["meta"] = ocp.JsonCheckpointHandler()
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Finish the save in progress; not after an error among many processes, which may never join in."""
        if error is None or jax.process_count() == 1:
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """The newest whole checkpoint."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """All whole checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, config: Config, state: TrainState, step: int) -> None:
        """Start writing the state after `step` steps; returns as soon as the state may be donated."""
        if step == self.latest:
            return
        model, training = _split(state)
        items = {
            "model": ocp.args.StandardSave(model),
            "training": ocp.args.StandardSave(training),
            "meta": ocp.args.JsonSave({"step": step, "config": json.loads(to_json(config))}),
        }
        self._manager.save(step, args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Return when what was saved is on disk."""
        self._manager.wait_until_finished()

    def restore(self, state: TrainState, step: int) -> TrainState:
        """The checkpoint's arrays in the structure, dtypes and shardings of `state`.

        Raises:
            CheckpointError: a missing, extra or misshapen array, named.
        """
        model, training = _split(state)
        return _joined(
            state, self._restore_leaves("model", model, step) | self._restore_leaves("training", training, step)
        )

    def restore_model(self, leaves: Leaves, step: int) -> Leaves:
        """Parameters and router biases alone."""
        return self._restore_leaves("model", leaves, step)

    def config(self, step: int) -> Config:
        """The config that the checkpoint was written with."""
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        return from_dict(Config, meta["config"])

    def _restore_leaves(self, item: str, leaves: Leaves, step: int) -> Leaves:
        metadata = self._manager.item_metadata(step)[item]
        saved = {name: tuple(array.shape) for name, array in dict(metadata).items()}
        _check(self.directory / str(step) / item, saved, {name: tuple(array.shape) for name, array in leaves.items()})
        target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), leaves)
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(target)})
        return self._manager.restore(step, args=args)[item]


def _check(where: Path, saved: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    faults = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in saved]
    faults += [f"not in this model: {name} {shape}" for name, shape in saved.items() if name not in expected]
    faults += [
        f"misshapen: {name} is {saved[name]}, the config asks for {shape}"
        for name, shape in expected.items()
        if name in saved and saved[name] != shape
    ]
    if faults:
        raise CheckpointError(f"{where} does not fit the config:\n  " + "\n  ".join(faults))


def _leaves(tree: Any) -> Leaves:
    def name(path: tuple[Any, ...]) -> str:
        return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path)

    return {name(path).removesuffix(".value"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _split(state: TrainState) -> tuple[Leaves, Leaves]:
    """(arrays of the model, arrays that only training needs)."""
    model = {"params": state.params, "biases": state.biases}
    training = {name: value for name, value in state._asdict().items() if name not in model}
    return _leaves(model), _leaves(training)


def _joined(like: TrainState, leaves: Leaves) -> TrainState:
    structure = jax.tree.structure(like)
    return jax.tree.unflatten(structure, [leaves[name] for name in _leaves(like)])


def write_run_files(run_dir: Path, config: Config, tokenizer_path: Path | None) -> None:
    """Put the config and the tokenizer into the run folder, so that it needs nothing else."""
    (run_dir / "tokenizer").mkdir(parents=True, exist_ok=True)
    if tokenizer_path is not None:
        target = run_dir / "tokenizer" / tokenizer_path.name
        if tokenizer_path.resolve() != target.resolve():
            shutil.copyfile(tokenizer_path, target)
    draft = run_dir / "config.json.tmp"
    draft.write_text(to_json(config))
    draft.replace(run_dir / "config.json")


def check_tokenizer(run_dir: Path, tokenizer_path: Path) -> None:
    """A run goes on with the tokenizer that it began with.

    Raises:
        CheckpointError: the run folder holds another one.
    """
    kept = sorted((run_dir / "tokenizer").glob("*"))
    if kept and kept[0].read_bytes() != tokenizer_path.read_bytes():
        raise CheckpointError(
            f"{run_dir} was trained with another tokenizer; give --data.tokenizer {kept[0]}, or the run another --name"
        )


def changed_keys(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted names of the keys in which two configs differ."""
    names: list[str] = []
    for f in dataclasses.fields(new):
        a, b = getattr(old, f.name), getattr(new, f.name)
        if dataclasses.is_dataclass(a):
            names += changed_keys(a, b, f"{prefix}{f.name}.")
        elif a != b:
            names.append(prefix + f.name)
    return names


def load_model(directory: Path, step: int | None = None) -> Loaded:
    """The model of a run folder, or of one of the checkpoints in it.

    Raises:
        CheckpointError: there is no whole checkpoint, or it does not fit its config.
    """
    if directory.name.isdigit() and directory.parent.name == "checkpoints":
        directory, step = directory.parent.parent, int(directory.name)
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"'{directory}' is not a run folder: it has no config.json (train writes runs/<name>)")
    tokenizers = sorted((directory / "tokenizer").glob("*"))
    if len(tokenizers) > 1:
        raise CheckpointError(f"'{directory}/tokenizer' must hold one file, it holds {len(tokenizers)}")
    with Checkpoints(directory) as checkpoints:
        step = checkpoints.latest if step is None else step
        if step is None or step not in checkpoints.steps:
            found = ", ".join(map(str, checkpoints.steps)) or "none"
            raise CheckpointError(
                f"'{directory}' has no whole checkpoint{'' if step is None else f' {step}'} (found: {found})"
            )
        config = checkpoints.config(step)
        model = _restored_model(checkpoints, config, step)
    return Loaded(config, model, tokenizers[0] if tokenizers else None, step)


def _restored_model(checkpoints: Checkpoints, config: Config, step: int) -> Dreamer:
    graph, params, biases = taken_apart(nnx.eval_shape(lambda: Dreamer(config.model, nnx.Rngs(0))))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {"params": params, "biases": biases}
    target = {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for n, a in _leaves(like).items()}
    leaves = checkpoints.restore_model(target, step)
    restored = jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in _leaves(like)])
    return nnx.merge(graph, restored["params"], restored["biases"])


def save_model(run_dir: Path, config: Config, model: Dreamer, tokenizer_path: Path | None) -> None:
    """Write a run folder at step 0 from a model: training, generation and conversion start from it.

    Without a tokenizer, training puts the one of its data there.

    Raises:
        CheckpointError: the folder has checkpoints already.
    """
    _, params, biases = taken_apart(model)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, params, biases, adamw(config.optimizer).init(params), zero, zero)
    with Checkpoints(run_dir, config.checkpoint) as checkpoints:
        if checkpoints.latest is not None:
            raise CheckpointError(f"'{run_dir}' has checkpoints already; choose another --out")
        checkpoints.save(config, state, 0)
    write_run_files(run_dir, config, tokenizer_path)
