"""A trained model as a folder that transformers loads: weights, config, code, tokenizer and model card."""

import contextlib
import json
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamer_jax.config import Config, ModelConfig, to_json
from dreamer_jax.convert.hf.card import Score, model_card
from dreamer_jax.convert.hf.tokenizer import exported
from dreamer_jax.convert.hf.weights import SHARD, Dtype, write_weights
from dreamer_jax.convert.safetensors import RUN_CONFIG
from dreamer_jax.data.unfinished import unfinished
from dreamer_jax.errors import DreamerError

CODE = Path(__file__).parent / "exported"
"""The configuration and the model for transformers."""
LICENCE = "# SPDX-License-Identifier: Apache-2.0\n"
"""What these files begin with where they stand alone."""
PACKAGE = "from dreamer_jax.convert.hf.exported."
"""How these files import each other here; in the exported folder they stand alone, beside each other."""
KNOWN = ("sa", "da", "ea")
"""Dimensions that the exported code computes."""
MODEL_TYPE = "dreamer"
SHAPE = {
    "vocab_size": "vocab",
    "hidden_size": "width",
    "trained_depth": "depth",
    "depth_recurrent": "depth_recurrent",
    "mixture": "mixture",
    "num_attention_heads": "sa.query_heads",
    "num_key_value_heads": "sa.kv_heads",
    "head_dim": "sa.head_size",
    "rope_theta": "sa.rope_base",
    "depth_attention_heads": "da.query_heads",
    "depth_key_value_heads": "da.kv_heads",
    "depth_head_dim": "da.head_size",
    "depth_window": "da.window",
    "depth_dilation": "da.dilation",
    "depth_rope_theta": "depth_rope_base",
    "depth_rope_reversed": "depth_rope_reversed",
    "depth_rope_scaling": "depth_rope_scaling",
    "router_size": "router.size",
    "num_attention_experts": "linear_experts",
    "num_experts": "ea.experts",
    "num_experts_per_tok": "ea.active_experts",
    "moe_intermediate_size": "ea.expert_width",
    "rms_norm_eps": "norm_epsilon",
}
"""The model's shape: by transformers' names, where it stands in our config."""
FIXED = {"norm_topk_prob": True, "hidden_act": "silu"}
"""What every Dreamer model has, by names that transformers looks for."""


class ExportError(DreamerError, ValueError):
    """A model or a folder that cannot be exported to or as is."""


def export_hf(
    config: Config,
    arrays: Mapping[str, Any],
    tokenizer_path: Path | None,
    out: Path,
    *,
    merged: bool,
    dtype: Dtype = "float32",
    step: int | None = None,
    shard: int = SHARD,
    scores: Sequence[Score] = (),
    wrote: Callable[[int], object] = lambda size: None,
    check: Callable[[Path], object] = lambda draft: None,
) -> int:
    """Write a folder for AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True), whole or not at all.

    Args:
        config: of the run.
        arrays: by exchange names; each is fetched when its turn comes.
        tokenizer_path: the run's tokenizer; None leaves it out.
        out: the folder; it must be absent or empty.
        merged: whether the arrays are merged (Eq. 8).
        dtype: of the weights; router biases are float32 in either case.
        step: of the checkpoint, for the model card.
        shard: bytes of weights in one file.
        scores: of evaluations, for the model card.
        wrote: is told the bytes of each piece of weights that has been written.
        check: is given the whole folder before it takes its place; what it raises leaves no folder.

    Returns:
        How many numbers there are.

    Raises:
        ExportError: the exported code does not compute this model, or the folder is not empty.
        TokenizerError: the tokenizer cannot be converted so that ids are equal.
        WeightError: a missing, extra or misshapen array, or one with numbers that are not finite, named.
    """
    check_model(config.model)
    with appearing(out) as draft:
        ends = write_tokenizer(draft, config, tokenizer_path)
        for source in sorted(CODE.glob("*.py")):
            text = source.read_text(encoding="utf-8")
            (draft / source.name).write_text(LICENCE + text.replace(PACKAGE, "from ."), encoding="utf-8")
        fields = config_fields(config.model, config.data.context, merged=merged) | {"dtype": dtype} | ends
        write_configs(draft, fields, ends)
        (draft / RUN_CONFIG).write_text(to_json(config), encoding="utf-8")  # for the way back
        numbers = write_weights(draft, config.model, arrays, merged=merged, dtype=dtype, shard=shard, wrote=wrote)
        card = model_card(config, numbers, step=step, merged=merged, scores=scores)
        (draft / "README.md").write_text(card, encoding="utf-8")
        check(draft)
    return numbers


def check_model(model: ModelConfig) -> None:
    """Raise ExportError unless the exported code computes this model."""
    more = [name for name in model.dimensions if name not in KNOWN]
    if more:
        raise ExportError(
            f"--to hf knows the dimensions {', '.join(KNOWN)}, not {', '.join(more)}; use --to safetensors"
        )
    if "sa" not in model.dimensions:
        raise ExportError("--to hf exports language models, which have sa in model.mixture; use --to safetensors")
    if "da" in model.dimensions and model.da.form != "softmax":
        raise ExportError(f"--to hf does not know model.da.form = '{model.da.form}'; use --to safetensors")


@contextlib.contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A folder that takes the place of `out` at the end; an error or an interruption leaves no `out`.

    Raises:
        ExportError: something is there already.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ExportError(f"--out '{out}' is a file or a link; give a folder")
    if out.is_dir() and any(out.iterdir()):
        raise ExportError(f"--out '{out}' is not empty; choose another --out, or delete it")
    with unfinished(out) as draft:
        yield draft
        for file in draft.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        os.replace(draft, out)


def config_fields(model: ModelConfig, context: int, *, merged: bool) -> dict[str, Any]:
    """config.json: the model's shape by transformers' names."""
    shape = {name: operator.attrgetter(place)(model) for name, place in SHAPE.items()}
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["DreamerForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_dreamer.DreamerConfig",
            "AutoModel": "modeling_dreamer.DreamerModel",
            "AutoModelForCausalLM": "modeling_dreamer.DreamerForCausalLM",
        },
        **shape,
        "mixture": list(model.mixture),
        "num_hidden_layers": model.depth,
        "merged": merged,
        **FIXED,
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
    }


def write_tokenizer(folder: Path, config: Config, tokenizer_path: Path | None) -> dict[str, int]:
    """Write the run's tokenizer; returns the ids of its special tokens by transformers' names, none without a path.

    Raises:
        TokenizerError: the tokenizer cannot be converted so that ids are equal.
    """
    if tokenizer_path is None:
        return {}
    templates = config.data.prompt_template, config.data.response_template
    tokenizer = exported(tokenizer_path, config.data.special_tokens, *templates, config.data.context)
    for name, text in tokenizer.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.eos}


def write_configs(folder: Path, fields: Mapping[str, Any], ends: Mapping[str, int]) -> None:
    """Write config.json and generation_config.json; `ends` are the ids of special tokens."""
    files = {"config.json": fields, "generation_config.json": {"do_sample": False, **ends}}
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")
