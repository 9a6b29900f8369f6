"""Checkpoints of a run: asynchronous, atomic, self-contained, and strict about what they restore.

<run>/config.json            the resolved config
<run>/tokenizer/             the tokenizer's file
<run>/checkpoints/<step>/    Orbax: model (parameters, router biases), training (optimizer, counters), meta (config,
                             position in the data, a checksum of each array)
"""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import nnx
from orbax.checkpoint import checkpoint_managers as managers
from orbax.checkpoint.path import step as step_names

from dreamer_jax.config import CheckpointConfig, Config, TrainConfig, from_json, to_json
from dreamer_jax.data.tokenizer import find_tokenizer
from dreamer_jax.errors import DreamerError
from dreamer_jax.files import write_whole
from dreamer_jax.model.dreamer import Dreamer
from dreamer_jax.model.parameters import taken_apart
from dreamer_jax.training.checksums import checksums, damaged, looked_for_damage
from dreamer_jax.training.optimizer import adamw
from dreamer_jax.training.step import TrainState

Leaves = dict[str, Any]
"""Arrays by their path in the state, such as "params.layer.ea.w_down"."""


ITEMS = ("model", "training")
"""What holds arrays."""


CHUNK_BYTES = 2**27
"""Of an array on disk, at most."""


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


class Damage(CheckpointError):
    """A checkpoint whose files are missing, cut or changed; the message names what."""


class Position(NamedTuple):
    """Where a checkpoint stands in the run, beside its arrays."""

    rows: int
    """Rows of the mixture that training has taken."""
    data: str | None
    """Name of the prepared data; None in checkpoints of 0.1."""


class _WholeSteps:
    """How Orbax finds checkpoints: as by default, but without what others leave beside them (an empty folder `77`)."""

    def __init__(self) -> None:
        self._standard: Any = step_names.standard_name_format()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._standard, name)

    def build_name(self, step: int) -> str:
        return self._standard.build_name(step)

    def find_all(self, base_path: Any) -> Any:
        return (found for found in self._standard.find_all(base_path) if _has_content(Path(found.path)))

    def find_step(self, base_path: Any, step: int) -> Any:
        return self._standard.find_step(base_path, step)


def _has_content(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _kept(policy: CheckpointConfig) -> Any:
    newest = managers.LatestN(policy.keep + 1)
    return (
        managers.AnyPreservationPolicy([newest, managers.EveryNSteps(policy.keep_every)])
        if policy.keep_every
        else newest
    )


class Checkpoints:
    """The checkpoints of one run folder.

    The newest is not yet known to be good: the next step's loss shows what its weights are worth. So training keeps
    one more than `checkpoint.keep`, until the run ends well and `prune` is called.
    """

    def __init__(self, run_dir: Path, policy: CheckpointConfig | None = None):
        """Open the folder; with a `policy` for writing, otherwise for reading."""
        self.directory = (run_dir / "checkpoints").absolute()
        self._policy = policy
        self._comparison: tuple[int, Future[list[str]]] | None = None
        """Of the state that was restored, until it is confirmed."""
        options = ocp.CheckpointManagerOptions(
            step_name_format=_WholeSteps(),  # type: ignore[arg-type]  # Orbax's protocol has no public name
            preservation_policy=_kept(policy) if policy else None,
            cleanup_tmp_directories=policy is not None,
            create=policy is not None,
        )
        handlers = {name: ocp.StandardCheckpointHandler() for name in ITEMS}
        handlers["meta"] = ocp.JsonCheckpointHandler()
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Finish the save in progress; not after an error among many processes, which may never join in."""
        if error is None:
            self._written(self._manager.close)
        elif jax.process_count() == 1:
            with contextlib.suppress(Exception):  # the first error is the one to show
                self._manager.close()

    @property
    def latest(self) -> int | None:
        """The newest checkpoint."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """All checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, config: Config, state: TrainState, step: int, position: Position) -> None:
        """Start writing the state after `step` steps; returns as soon as the state may be donated."""
        if step == self.latest:
            return
        model, training = _split(state)
        meta = {
            "step": step,
            "config": json.loads(to_json(config)),
            "checksums": checksums(model | training),
            **position._asdict(),
        }
        items = {
            "model": ocp.args.StandardSave(model, _in_chunks(model)),
            "training": ocp.args.StandardSave(training, _in_chunks(training)),
            "meta": ocp.args.JsonSave(meta),
        }
        self._written(lambda: self._manager.save(step, args=ocp.args.Composite(**items)))

    def wait(self) -> None:
        """Return when what was saved is on disk.

        Raises:
            CheckpointError: it cannot be written; so do `save` and the end, of what is still being written then.
        """
        self._written(self._manager.wait_until_finished)

    def _written(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:  # Orbax and TensorStore raise many kinds
            words = " ".join(str(error).split())[-300:]  # the cause stands last
            raise CheckpointError(
                f"a checkpoint cannot be written to '{self.directory}': {type(error).__name__}: {words}\nfree some "
                f"space there, or see to its rights; the same command goes on from the newest whole checkpoint"
            ) from error

    def prune(self) -> None:
        """Leave the newest `checkpoint.keep`, and those of every `checkpoint.keep_every` steps."""
        assert self._policy
        self.wait()
        for step in self.steps[: -self._policy.keep]:
            if not (self._policy.keep_every and step % self._policy.keep_every == 0):
                self._manager.delete(step)

    def drop(self, step: int) -> None:
        """Delete one checkpoint."""
        self.wait()
        self._manager.delete(step)

    def restore(self, state: TrainState, step: int) -> TrainState:
        """The checkpoint's arrays in the structure, dtypes and shardings of `state`; see `confirm`.

        Raises:
            CheckpointError: a missing, extra or misshapen array, named.
            Damage: files that are damaged.
        """
        model, training = _split(state)
        self._check_shapes({"model": model, "training": training}, step)
        leaves = self._read_leaves("model", model, step) | self._read_leaves("training", training, step)
        self._comparison = step, looked_for_damage(leaves, self._checksums(step))
        return _joined(state, leaves)

    def confirm(self) -> None:
        """Make sure that what was restored is what was saved, before it is used or given away.

        The comparison begins in `restore`, and costs nothing where other work, such as compiling, is done before this.

        Raises:
            Damage: an array that is not what was saved, named.
        """
        if self._comparison:
            (step, wrong), self._comparison = self._comparison, None
            self._refuse(step, wrong.result())

    def restore_model(self, leaves: Leaves, step: int) -> Leaves:
        """Parameters and router biases alone."""
        return self._checked_leaves("model", leaves, step)

    def check_model(self, leaves: Leaves, step: int) -> None:
        """Raise CheckpointError unless the model's arrays have these names and shapes."""
        self._check_shapes({"model": leaves}, step)

    def restore_one(self, name: str, step: int) -> np.ndarray:
        """One of the model's arrays, in the host's memory, of which little more is needed than the array takes."""
        array: np.ndarray = self._read(step, lambda: _read_array(self.directory / str(step) / "model", name))
        self._refuse(step, damaged({name: array}, self._checksums(step)))
        return array

    def config(self, step: int) -> Config:
        """The config that the checkpoint was written with."""
        return from_json(json.dumps(self._meta(step)["config"]))

    def position(self, step: int) -> Position:
        """Where the checkpoint stands in the run."""
        meta = self._meta(step)
        batch = meta["config"]["train"].get("batch", TrainConfig().batch)
        return Position(meta.get("rows", step * batch), meta.get("data"))

    def newest_whole(self, before: int) -> int | None:
        """The newest checkpoint older than `before` whose files are there and whose arrays are what was saved."""
        return next((step for step in reversed(self.steps) if step < before and self._is_whole(step)), None)

    def _is_whole(self, step: int) -> bool:
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        try:
            for item, saved in self._arrays(step).items():
                leaves = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for name, a in saved.items()}
                self._checked_leaves(item, leaves, step)
        except CheckpointError:
            return False
        return True

    def _arrays(self, step: int) -> dict[str, Leaves]:
        """What Orbax knows of the arrays of a checkpoint, by item: shapes and types."""

        def known() -> dict[str, Leaves]:
            items = self._manager.item_metadata(step)
            return {item: dict(items[item]) for item in ITEMS}

        found: dict[str, Leaves] = self._read(step, known)
        return found

    def _meta(self, step: int) -> dict[str, Any]:
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = self._read(step, lambda: self._manager.restore(step, args=args)["meta"])
        if not isinstance(meta, dict) or not isinstance(meta.get("config"), dict):
            raise Damage(f"checkpoint {step} of '{self.directory}': 'meta/metadata' holds no config")
        return meta

    def _checksums(self, step: int) -> dict[str, str]:
        """Empty in checkpoints of 0.1."""
        found: dict[str, str] = self._meta(step).get("checksums", {})
        return found

    def _checked_leaves(self, item: str, leaves: Leaves, step: int) -> Leaves:
        self._check_shapes({item: leaves}, step)
        restored = self._read_leaves(item, leaves, step)
        self._refuse(step, damaged(restored, self._checksums(step)))
        return restored

    def _refuse(self, step: int, wrong: list[str]) -> None:
        """Raise Damage if there are arrays that are not what was saved."""
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise Damage(f"checkpoint {step} of '{self.directory}': the array {wrong[0]}{more} is not what was saved")

    def _check_shapes(self, items: dict[str, Leaves], step: int) -> None:
        saved = self._arrays(step)
        for item, leaves in items.items():
            _check(self.directory / str(step) / item, _shapes(saved[item]), _shapes(leaves))

    def _read_leaves(self, item: str, leaves: Leaves, step: int) -> Leaves:
        target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), leaves)
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(target)})
        restored: Leaves = self._read(step, lambda: self._manager.restore(step, args=args)[item])
        return restored

    def _read(self, step: int, read: Callable[[], Any]) -> Any:
        """What `read()` gives of a checkpoint; any error of it names the file that is missing or cut, if there is one.

        Raises:
            Damage: it cannot be read.
        """
        if faults := _file_faults(self.directory / str(step)):
            raise Damage(f"checkpoint {step} of '{self.directory}': {faults[0]}")
        try:
            return read()
        except Exception as error:  # Orbax and TensorStore raise many kinds
            words = " ".join(str(error).split())[:300]
            raise Damage(
                f"checkpoint {step} of '{self.directory}' cannot be read: {type(error).__name__}: {words}"
            ) from error


def _file_faults(folder: Path) -> list[str]:
    """The files that a checkpoint must have and that are missing or empty."""
    names = ["_CHECKPOINT_METADATA", "meta/metadata"]
    names += [f"{item}/{name}" for item in ITEMS for name in ("_METADATA", "manifest.ocdbt")]
    faults = [f"'{folder / name}' is missing" for name in names if not (folder / name).is_file()]
    for item in ITEMS:
        if (folder / item).is_dir() and not any((folder / item).rglob("d/*")):
            faults.append(f"'{folder / item}' has no data files")
    return faults + [f"'{folder / name}' is empty" for name in names if _is_empty(folder / name)]


def _is_empty(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0


def _shapes(leaves: Leaves) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in leaves.items()}


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


def _read_array(item: Path, name: str) -> np.ndarray:
    """An array that Orbax wrote, one chunk after another: Orbax itself has all chunks in memory beside the array."""
    kvstore = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{item}/"}, "path": f"{name}/"}
    stored = tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True, read=True).result()
    array = np.empty(stored.shape, stored.dtype.numpy_dtype)
    chunk: Any = stored.chunk_layout.read_chunk.shape
    for corner in itertools.product(*(range(0, *ends) for ends in zip(array.shape, chunk, strict=True))):
        part = tuple(slice(at, at + size) for at, size in zip(corner, chunk, strict=True))
        array[part] = stored[part].read().result()
    return array


def _in_chunks(leaves: Leaves) -> dict[str, Any]:
    """How arrays are stored, so that one can be read without twice its room."""
    return {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in leaves}


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
        write_whole(run_dir / "tokenizer" / tokenizer_path.name, tokenizer_path.read_bytes())
    write_whole(run_dir / "config.json", to_json(config))


def check_tokenizer(run_dir: Path, tokenizer_path: Path) -> None:
    """A run goes on with the tokenizer that it began with.

    Raises:
        CheckpointError: the run folder holds another one.
    """
    kept = find_tokenizer(run_dir / "tokenizer")
    if kept and kept.read_bytes() != tokenizer_path.read_bytes():
        raise CheckpointError(
            f"{run_dir} was trained with another tokenizer; give --data.tokenizer {kept}, or the run another --name"
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


class Saved:
    """One checkpoint of a run folder, of which no array has been read."""

    def __init__(self, checkpoints: Checkpoints, step: int, tokenizer_path: Path | None):
        """Read what describes the arrays."""
        self._checkpoints = checkpoints
        self.step, self.tokenizer_path = step, tokenizer_path
        self.config = checkpoints.config(step)

    def model(self) -> Dreamer:
        """The whole model, on one device.

        Raises:
            CheckpointError: the arrays do not fit the config, or are damaged.
        """
        graph, like = self.abstract()
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for n, a in _leaves(like).items()}
        leaves = self._checkpoints.restore_model(target, self.step)
        restored = jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in _leaves(like)])
        return nnx.merge(graph, restored["params"], restored["biases"])

    def abstract(self) -> tuple[Any, dict[str, nnx.State]]:
        """The model without its numbers: (graph definition, shapes of `params` and `biases`)."""
        graph, params, biases = taken_apart(nnx.eval_shape(lambda: Dreamer(self.config.model, nnx.Rngs(0))))
        return graph, {"params": params, "biases": biases}

    def check(self) -> None:
        """Raise CheckpointError unless all arrays are there and fit the config."""
        self._checkpoints.check_model(_leaves(self.abstract()[1]), self.step)

    def leaf(self, name: str) -> np.ndarray:
        """One array by its path, such as "params.layer.ea.w_down".

        Raises:
            CheckpointError: it is damaged.
        """
        return self._checkpoints.restore_one(name, self.step)


@contextlib.contextmanager
def saved(directory: Path, step: int | None = None) -> Iterator[Saved]:
    """The newest checkpoint of a run folder, or one of the checkpoints in it.

    Raises:
        CheckpointError: there is no checkpoint, it does not fit its config, or it is damaged, as far as it is read;
            then the message names the newest that is whole.
    """
    directory = directory.expanduser()
    if directory.name.isdigit() and directory.parent.name == "checkpoints":
        directory, step = directory.parent.parent, int(directory.name)
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"'{directory}' is not a run folder: it has no config.json (train writes runs/<name>)")
    tokenizer = find_tokenizer(directory / "tokenizer")
    with Checkpoints(directory) as checkpoints:
        step = checkpoints.latest if step is None else step
        if step is None or step not in checkpoints.steps:
            found = ", ".join(map(str, checkpoints.steps)) or "none"
            raise CheckpointError(
                f"'{directory}' has no whole checkpoint{'' if step is None else f' {step}'} (found: {found})"
            )
        try:
            yield Saved(checkpoints, step, tokenizer)
        except Damage as damage:
            whole = checkpoints.newest_whole(step)
            way = f"give --checkpoint {checkpoints.directory / str(whole)}" if whole is not None else "none is whole"
            raise CheckpointError(f"{damage}\nbefore it: {way}") from damage


def load_model(directory: Path, step: int | None = None) -> Loaded:
    """The model of a run folder, or of one of the checkpoints in it.

    Raises:
        CheckpointError: as `saved`.
    """
    with saved(directory, step) as found:
        return Loaded(found.config, found.model(), found.tokenizer_path, found.step)


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
        checkpoints.save(config, state, 0, Position(rows=0, data=None))
    write_run_files(run_dir, config, tokenizer_path)
