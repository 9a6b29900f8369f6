"""One run: train, ask some tests along the way, and at the end all of them at many depths."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from benchmarks.evidence.accuracy import Question, Score, Tests, asked, documents_of, first, questions_of
from benchmarks.evidence.findings import FINAL
from benchmarks.evidence.setup import Run, Setup, config_of
from dreamer_jax.accounting.flops import generated_flops, training_flops
from dreamer_jax.accounting.params import parameters
from dreamer_jax.config import Config
from dreamer_jax.data.template import Template
from dreamer_jax.data.tokenizer import load_tokenizer
from dreamer_jax.evaluation.checkpoints import with_depth_rope_scaling
from dreamer_jax.files import write_whole
from dreamer_jax.inference.decoder import make_decoder
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.kernels.cores import use_cores
from dreamer_jax.model.dreamer import Dreamer
from dreamer_jax.training.checkpoint import Loaded
from dreamer_jax.training.loop import Snapshot, Summary, train
from dreamer_jax.training.metrics import Record

INTERRUPTED = 75
"""Exit code of a run that a signal ended; the same command goes on."""
ROWS = 16
"""Rows of tests that are read at a time."""


def carried_out(setup: Setup, run: Run, out: Path) -> int:
    """Train to the end, from where the run is, and write final.json; returns the exit code."""
    config, tests = config_of(setup, run, out), documents_of(setup)
    use_cores(config)
    summary = train(config, look=Look(first(tests, setup.along_documents, setup.along)))
    if summary.stopped_by:
        return INTERRUPTED
    found = evaluated(setup, run, summary, tests)
    write_whole(config.run_dir / FINAL, json.dumps(found, indent=1) + "\n")
    return 0


@dataclass(frozen=True)
class Look:
    """Asks tests along a training: accuracy/<test>, and accuracy/<test>/none of the answers that there is none."""

    tests: Tests

    def __call__(self, snapshot: Snapshot) -> Record:
        """The figures of a snapshot."""
        config = snapshot.config
        compute = replace(Compute.of(config, snapshot.mesh), remat="none")
        decoder = make_decoder(snapshot.model, compute, mesh=snapshot.mesh)
        record: Record = {}
        questions = _questions(self.tests, config, snapshot.tokenizer)
        for name, score in asked(decoder, questions, config.data.context, ROWS).items():
            record[f"accuracy/{name}"] = score.accuracy
            if score.none_asked:
                record[f"accuracy/{name}/none"] = score.none_right / score.none_asked
        return record


def _questions(tests: Tests, config: Config, tokenizer: Path) -> list[Question]:
    return questions_of(tests, load_tokenizer(tokenizer), Template.of(config.data))


def evaluated(setup: Setup, run: Run, summary: Summary, tests: Tests) -> dict[str, Any]:
    """All tests at the trained depth, fewer documents of each at other depths, and what the run cost; for JSON."""
    started, config = time.monotonic(), summary.config
    everything = _questions(first(tests, setup.final_documents), config, summary.prepared.tokenizer)
    some = _questions(first(tests, setup.swept_documents), config, summary.prepared.tokenizer)
    depth = config.model.depth
    trained = _at_depth(summary, summary.model, depth, everything)
    swept = _swept(summary, some) if config.model.depth_recurrent and run.rate is None else []
    return {
        **cost_of(run, summary),
        "trained_depth": depth,
        "trained": trained,
        "swept": swept,
        "evaluation_seconds": time.monotonic() - started,
    }


def cost_of(run: Run, summary: Summary) -> dict[str, Any]:
    """What a run was and took; for JSON."""
    config = summary.config
    return {
        **run._asdict(),
        "steps": summary.step,
        "tokens": summary.step * config.tokens_per_step,
        "parameters": parameters(config.model).total,
        "flops_generated": generated_flops(config.model, config.data.context).total,
        "flops_trained": training_flops(config.model, config.data.context).total,
        "device": jax.devices()[0].device_kind,
    }


def _swept(summary: Summary, questions: Sequence[Question]) -> list[dict[str, Any]]:
    """At each depth as it is, and with depth positions stretched to the trained range where that differs."""
    loaded = Loaded(summary.config, summary.model, summary.prepared.tokenizer, summary.step)
    trained, stretched = summary.config.model.depth, with_depth_rope_scaling(loaded, True).model
    depths = swept_depths(trained)
    return [
        *({"scaled": False} | _at_depth(summary, summary.model, depth, questions) for depth in depths),
        *({"scaled": True} | _at_depth(summary, stretched, depth, questions) for depth in depths if depth != trained),
    ]


def swept_depths(trained: int) -> list[int]:
    """1, 2, ... up to the trained depth, and then in quarters of it up to twice as many."""
    return [*range(1, trained), *range(trained, 2 * trained + 1, max(1, trained // 4))]


def _at_depth(summary: Summary, model: Dreamer, depth: int, questions: Sequence[Question]) -> dict[str, Any]:
    decoder = make_decoder(model, Compute.fastest(summary.config.train.dtype), depth=depth)
    found: Mapping[str, Score] = asked(decoder, questions, summary.config.data.context, ROWS)
    return {"depth": depth, "tests": {name: score._asdict() for name, score in found.items()}}
