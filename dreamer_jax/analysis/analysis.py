"""From a checkpoint and sequences to captures: one pass for the sums, then removals, saturation and trajectories."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dreamer_jax.accounting.params import parameters
from dreamer_jax.analysis.captures import About, AnalysisError, Captures
from dreamer_jax.analysis.measure import Sums, added, measure
from dreamer_jax.analysis.readouts import THRESHOLDS, thresholds
from dreamer_jax.analysis.removals import count, removals
from dreamer_jax.analysis.saturation import saturation
from dreamer_jax.analysis.sequences import First, Sequences, held_out, of_files, usable
from dreamer_jax.analysis.trajectories import evenly, plane, trajectories
from dreamer_jax.data.batch import Batch
from dreamer_jax.data.tokenizer import Tokenizer
from dreamer_jax.dimensions.base import OVER_DEPTHS
from dreamer_jax.evaluation.checkpoints import Candidate, candidate
from dreamer_jax.evaluation.checkpoints import all_checkpoints as kept_checkpoints
from dreamer_jax.inference.decoder import Decoder
from dreamer_jax.model_config import ModelConfig

TRACED = 6
"""Tokens whose trajectories are shown, at most."""

Progress = Callable[[str, int], Callable[[], None]]
"""progress(what, how many): a function to be called after each."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a checkpoint is looked at."""

    batch: int = 8
    """Rows at a time, over all devices."""
    expert_devices: int = 1
    """Devices that share out the experts; all others share out the rows."""
    removal_sequences: int = 32
    """Rows that removals are measured on; 0 for none."""
    trace: str = ""
    """The text whose tokens' trajectories are shown; the first row's first document if empty."""
    seed: int = 0


def look_into(
    checkpoint: Path,
    *,
    data: Sequence[Path] = (),
    most: int = 1000,
    depth: int | None = None,
    all_checkpoints: bool = False,
    settings: Settings | None = None,
    progress: Progress = lambda what, total: lambda: None,
) -> Captures:
    """What a checkpoint does with its depths and experts.

    Args:
        checkpoint: a run folder, whose newest checkpoint counts, or one of its checkpoints.
        data: JSON-lines files of documents; by default the run's held-out rows are read.
        most: packed rows to read, at most.
        depth: how many depths run, the trained number if None.
        all_checkpoints: whether the routers of the run's earlier checkpoints are compared with this one's.
        settings: how.
        progress: shows how far it is.

    Raises:
        AnalysisError: there is nothing to read.
        CheckpointError, DataError, ConfigError, EvaluationError: what is given cannot be used.
    """
    asked = candidate(checkpoint)
    config, kept = asked.loaded.config, kept_checkpoints(asked.folder) if all_checkpoints else []
    paths = [path.expanduser() for path in data]
    sequences = (
        of_files(paths, asked.tokenizer, asked.template, config.data.context, most)
        if paths
        else held_out(config, asked.folder, most)
    )
    earlier = [path for path in kept if int(path.name) < asked.loaded.step]
    return analyze(asked, sequences, settings or Settings(), depth=depth, earlier=earlier, progress=progress)


def analyze(
    asked: Candidate,
    sequences: Sequences,
    settings: Settings,
    *,
    depth: int | None = None,
    earlier: Sequence[Path] = (),
    progress: Progress = lambda what, total: lambda: None,
) -> Captures:
    """What a checkpoint does with its depths and experts on some sequences.

    Args:
        asked: the checkpoint.
        sequences: packed rows.
        settings: how.
        depth: how many depths run, the trained number if None.
        earlier: checkpoints of the same run whose routers are compared with this one's.
        progress: shows how far it is.

    Raises:
        AnalysisError: no token was read.
        ConfigError: the model cannot run at this depth.
    """
    config, decoder = asked.loaded.config, asked.decoder(settings.expert_devices, depth)
    size = -(-min(settings.batch, len(sequences)) // decoder.parts) * decoder.parts
    response_only = config.data.response_only
    sums, tick = None, progress("batches", -(-len(sequences) // size))
    for batch in sequences.batches(size):
        sums = added(sums, measure(decoder, batch, response_only))
        tick()
    if sums is None or not sums["tokens"]:
        raise AnalysisError(f"{sequences.source}: there is no token to look at")
    arrays = means(sums, config.model, decoder.depth)
    few = _first(sequences, settings.removal_sequences, size)
    if few:
        visible = _over_depths(config.model, decoder.depth)
        tick = progress("removals", count(decoder, visible))
        arrays |= removals(decoder, few, response_only, visible, tick)
    if earlier:
        arrays |= _saturations(asked, decoder, earlier, few or _first(sequences, size, size), settings, progress)
    arrays |= _trajectories(decoder, sums, sequences, settings.trace, asked.tokenizer)
    return Captures(dict(sorted(arrays.items())), _about(asked, sequences, settings, decoder))


def means(sums: Sums, model: ModelConfig, depth: int) -> dict[str, np.ndarray]:
    """The captures that a pass over all sequences gives. At depths where a dimension does not run they are NaN."""
    tokens, positions = max(int(sums["tokens"]), 1), max(int(sums["positions"]), 1)
    arrays: dict[str, np.ndarray] = {}
    for name, total in sums.items():
        theme, *words = name.split("/")
        if theme == "moments":
            continue
        if total.dtype.kind == "i":
            arrays[name] = total
        elif theme == "residual" and words[0] != "cosine":
            arrays[name] = np.sqrt(total / tokens)
        else:
            arrays[name] = total / (positions if theme in ("lens", "exit") else tokens)
        of_dimension = theme in ("experts", "attention") or words[:1] == ["update"]
        if of_dimension and arrays[name].dtype.kind == "f":
            dimension = words[1] if words[0] == "update" else words[0]
            arrays[name][np.setdiff1d(np.arange(depth), model.depths_of(dimension, depth))] = np.nan
    for name, section in model.dimensions.items():
        if f"attention/{name}/weight" in arrays:
            arrays[f"attention/{name}/visible"] = np.array(section.visible(model, depth), bool)
    return arrays | {f"exit/{name}/threshold": thresholds(name, depth) for name in (*THRESHOLDS, "stable")}


def _over_depths(model: ModelConfig, depth: int) -> dict[str, np.ndarray]:
    """By dimension that attends to depths, which depth may attend to which."""
    return {
        name: np.array(section.visible(model, depth), bool)
        for name, section in model.dimensions.items()
        if section.entries == OVER_DEPTHS
    }


def _first(sequences: Sequences, most: int, size: int) -> list[Batch]:
    """The batches of the first sequences."""
    return list(dataclasses.replace(sequences, rows=First(sequences.rows, most)).batches(size))


def _saturations(
    asked: Candidate,
    decoder: Decoder,
    earlier: Sequence[Path],
    batches: Sequence[Batch],
    settings: Settings,
    progress: Progress,
) -> dict[str, np.ndarray]:
    """The arrays "saturation/..."; this checkpoint itself is the last of them."""
    tick = progress("checkpoints", (len(earlier) + 1) * len(batches))
    steps, found = [], []
    for path in earlier:
        one = candidate(path)
        found.append(saturation(decoder, one.decoder(settings.expert_devices, decoder.depth), batches, tick))
        steps.append(one.loaded.step)
        del one  # before the next one is loaded
    found.append(saturation(decoder, decoder, batches, tick))
    shares = {f"saturation/share/{name}": np.stack([shared[name] for shared in found]) for name in found[0]}
    return {"saturation/step": np.array([*steps, asked.loaded.step]), **shares} if shares else {}


def _trajectories(
    decoder: Decoder, sums: Sums, sequences: Sequences, trace: str, tokenizer: Tokenizer
) -> dict[str, np.ndarray]:
    if trace and not usable(trace):
        raise AnalysisError("--trace is blank, or no Unicode text: give another one")
    if trace:
        tokens = [tokenizer.bos, *tokenizer.encode(trace)][: sequences.context]
    else:
        row = sequences.rows[0]
        tokens = row["tokens"][row["segment_ids"] == 1].tolist()
    chosen, found = evenly(len(tokens), TRACED), plane(sums, decoder.depth + 1)
    return {
        "trajectory/points": trajectories(decoder, found, tokens, chosen),
        "trajectory/explained": found.explained,
        "trajectory/token": np.array([_label(tokens[i], tokenizer) for i in chosen]),
    }


def _label(token: int, tokenizer: Tokenizer) -> str:
    """The text of a token; a name for those that have none."""
    special, text = {tokenizer.bos: "<bos>", tokenizer.eos: "<eos>"}, tokenizer.decode([token])
    return special.get(token) or (text if text.strip("\ufffd") else f"<{token}>")


def _about(asked: Candidate, sequences: Sequences, settings: Settings, decoder: Decoder) -> About:
    config = asked.loaded.config
    sections = config.model.dimensions
    return About(
        run=config.name,
        variant=config.model.variant,
        step=asked.loaded.step,
        depth=decoder.depth,
        trained_depth=config.model.depth,
        depth_recurrent=config.model.depth_recurrent,
        active={name: n for name, section in sections.items() if (n := section.routers(config.model))},
        parameters=parameters(config.model).total,
        sequences=len(sequences),
        context=sequences.context,
        source=sequences.source,
        removal_sequences=min(settings.removal_sequences, len(sequences)),
        seed=settings.seed,
        config=dataclasses.asdict(config.model),
        entries={name: section.entries for name, section in sections.items() if section.entries},
    )
