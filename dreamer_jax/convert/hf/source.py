"""The way back from transformers, without PyTorch: a folder of --to hf, or of save_pretrained after fine-tuning."""

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import tokenizers
from safetensors import SafetensorError, safe_open

from dreamer_jax.config import Config, ConfigError, DataConfig, ModelConfig, model_from_dict
from dreamer_jax.convert.hf.export import FIXED, MODEL_TYPE, SHAPE
from dreamer_jax.convert.hf.tokenizer import SAMPLES, difference, templates_of
from dreamer_jax.convert.hf.weights import INDEX, WEIGHTS, exchanged
from dreamer_jax.convert.safetensors import run_of_export
from dreamer_jax.data.files import BOM, DataError
from dreamer_jax.data.tokenizer import Tokenizer, UnknownCharacter, load_tokenizer
from dreamer_jax.errors import DreamerError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOATS: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
"""Types of weights by safetensors' names."""


class SourceError(DreamerError, ValueError):
    """A folder that is not a Dreamer model for transformers, or a damaged one."""


class Source(NamedTuple):
    """A model that came back from transformers."""

    config: Config
    """Of the run that was exported; where the folder does not have it, the defaults around the model."""
    arrays: dict[str, np.ndarray]
    """By exchange names, float32."""
    merged: bool
    tokenizer: Path | None
    notes: list[str]
    """What the user should know, a line each."""


def load_hf(folder: Path) -> Source:
    """Read a folder that `export_hf` wrote, or save_pretrained of the model that was loaded from it.

    Raises:
        SourceError: another kind of model or folder; a file that is absent or damaged, named.
        WeightError: a missing, extra or misshapen tensor, or one with numbers that are not finite, named.
        ConfigError: run.json cannot be read.
        DataError: the tokenizer cannot be read.
    """
    fields = _fields(folder)
    run = run_of_export(folder)
    model, merged = _model(fields, folder, run), _flag(fields, "merged", folder)
    tied = _flag(fields, "tie_word_embeddings", folder)
    tensors = _untied(_tensors(folder, tied), folder) if tied else _tensors(folder, tied)
    arrays = exchanged(model, tensors, merged=merged)
    notes = [*_shape_notes(fields, model, tied), *_rounding_notes(tensors)]
    if run is None:
        data, said = _data(fields, folder)
        config, notes = Config(name="from-hf", model=model, data=data), notes + said
    else:
        config = dataclasses.replace(run, model=model)
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        return Source(config, arrays, merged, None, notes)
    special, said = _special_tokens(tokenizer, fields, config)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, special_tokens=special))
    return Source(config, arrays, merged, tokenizer, notes + said)


# The config.


def _fields(folder: Path) -> dict[str, Any]:
    """config.json, of which all that a model needs is there."""
    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        raise SourceError(
            f"'{folder}' holds an adapter of PEFT, which is a part of a model; merge it first: "
            f"model.merge_and_unload().save_pretrained(DIR)"
        )
    if not path.is_file():
        raise SourceError(f"'{folder}' has no config.json: give a folder that --to hf or save_pretrained wrote")
    fields = _json(path)
    kind = fields.get("model_type")
    if kind != MODEL_TYPE:
        found = "names no model_type" if kind is None else f"has the model_type {kind!r}"
        raise SourceError(f"'{path}' {found}; --from hf reads '{MODEL_TYPE}' alone, the models that --to hf writes")
    # Earlier exports have no depth_rope_reversed; the code beside them reversed it always.
    fields = {"trained_depth": fields.get("num_hidden_layers"), "depth_rope_reversed": True, **fields}
    absent = [name for name in (*SHAPE, "merged") if fields.get(name) is None]
    if absent:
        raise SourceError(f"'{path}' lacks {', '.join(absent)}; take these from the config.json that --to hf wrote")
    other = [f"{name} = {fields[name]!r}" for name in FIXED if fields.get(name, FIXED[name]) != FIXED[name]]
    if other:
        raise SourceError(f"'{path}' has {', '.join(other)}, which Dreamer does not compute")
    return fields


def _json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"'{path}' is not JSON: {type(error).__name__}: {error}") from error
    if not isinstance(fields, dict):
        raise SourceError(f"'{path}' is damaged: it is no JSON object")
    return fields


def _flag(fields: Mapping[str, Any], name: str, folder: Path) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise SourceError(f"'{folder / 'config.json'}': {name} must be true or false, not {value!r}")
    return value


def _model(fields: Mapping[str, Any], folder: Path, run: Config | None) -> ModelConfig:
    """The run's model with the shape of config.json, which fine-tuning may have changed: tokens were added, say."""
    values = dataclasses.asdict(ModelConfig() if run is None else run.model)
    for name, place in SHAPE.items():
        section, _, key = place.rpartition(".")
        (values[section] if section else values)[key] = fields[name]
    experts, router = values.pop("linear_experts"), values["router"]
    if experts != (router["attention_experts"] or values["depth"]):
        router["attention_experts"] = experts
    try:
        return model_from_dict(values)
    except ConfigError as error:
        raise SourceError(f"'{folder / 'config.json'}': {error}") from error


def _shape_notes(fields: Mapping[str, Any], model: ModelConfig, tied: bool) -> list[str]:
    notes = []
    depth = fields.get("num_hidden_layers", model.depth)
    if depth != model.depth and model.depth_recurrent:
        notes.append(
            f"it was saved at depth {depth}; the checkpoint has the trained depth, model.depth = {model.depth}"
        )
    if tied:
        notes.append("the embedding and lm_head were tied; from here on they are two arrays, which begin as equals")
    return notes


def _data(fields: Mapping[str, Any], folder: Path) -> tuple[DataConfig, list[str]]:
    """Context and templates where the run's config is gone, and what to say of it."""
    notes = ["there is no run.json: training's own keys are the defaults"]
    data = DataConfig()
    context = fields.get("max_position_embeddings")
    if isinstance(context, int) and context > 1:
        data = dataclasses.replace(data, context=context)
    chat = _chat_template(folder)
    templates = None if chat is None else templates_of(chat)
    if templates is None:
        reason = "no chat template" if chat is None else "a chat template that --to hf did not write"
        return data, [*notes, f"there is {reason}: data.prompt_template and data.response_template are the defaults"]
    prompt, response = templates
    return dataclasses.replace(data, prompt_template=prompt, response_template=response), notes


def _chat_template(folder: Path) -> str | None:
    """The template where older and newer releases of transformers put it."""
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        return alone.read_text(encoding="utf-8", errors="replace")  # what is no text is no template of ours
    chat = _tokenizer_fields(folder).get("chat_template")
    return chat if isinstance(chat, str) else None


# The weights.


def _tensors(folder: Path, tied: bool) -> dict[str, np.ndarray]:
    """All tensors of the folder by their names in transformers; they stay on disk until they are used."""
    tensors: dict[str, np.ndarray] = {}
    for path in _files(folder):
        inside = _tensors_of(path, tied)
        twice = sorted(tensors.keys() & inside)
        if twice:
            raise SourceError(f"'{path}' has {', '.join(twice)}, as an earlier file does; save the model again")
        tensors |= inside
    return tensors


def _files(folder: Path) -> list[Path]:
    """The files of weights, in the order in which transformers looks for them."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        found = sorted(folder.glob("*.safetensors"))
        if found:
            return found
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        more = f"; {pickles[0]} is a pickle, which may run code and is not read" if pickles else ""
        raise SourceError(f"'{folder}' has no {WEIGHTS}{more}; save_pretrained writes one")
    places = _json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise SourceError(f"'{folder / INDEX}' has no weight_map that tells tensors' files; save the model again")
    names = sorted(set(places.values()))
    for name in names:
        if "/" in name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
            raise SourceError(f"'{folder / INDEX}' names {name!r}; only .safetensors files beside it are read")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise SourceError(f"'{folder}' lacks {', '.join(absent)}, which {INDEX} names; copy the folder again")
    return [folder / name for name in names]


def _tensors_of(path: Path, tied: bool) -> dict[str, np.ndarray]:
    """The tensors of one file, mapped into memory."""
    try:
        with safe_open(path, "numpy"):  # checks the header and the file's size
            header, start = _header(path)
    except SafetensorError as error:
        if "offset" in str(error).lower():
            _check_spans(path)
        raise SourceError(f"'{path}' is cut off or damaged ({error}); copy it or save it again") from error
    # save_model of safetensors notes under which name a tensor that has two is in the file.
    second = {name: first for name, first in (header.pop("__metadata__", None) or {}).items() if first in header}
    for name, first in second.items():
        if not (tied and {name, first} == {HEAD, EMBEDDING}):
            raise SourceError(f"'{path}': {_together(name, first)}")
    tensors = {name: _tensor(path, start, name, fields) for name, fields in header.items()}
    return tensors | {name: tensors[first] for name, first in second.items()}


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where the tensors' bytes begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def _check_spans(path: Path) -> None:
    """Raise SourceError for two tensors that lie on the same bytes."""
    header, _ = _header(path)
    spans = sorted((fields["data_offsets"], name) for name, fields in header.items() if name != "__metadata__")
    for ((_, end), first), ((begin, _), second) in itertools.pairwise(spans):
        if begin < end:
            raise SourceError(f"'{path}': {_together(first, second)}")


def _together(first: str, second: str) -> str:
    return (
        f"{first} and {second} share their storage, but are two tensors in this model; save it with each of its own "
        f"(tensor.clone())"
    )


def _tensor(path: Path, start: int, name: str, fields: Mapping[str, Any]) -> np.ndarray:
    kind = fields["dtype"]
    if kind not in FLOATS:
        raise SourceError(f"'{path}': {name} is of type {kind}; weights are {', '.join(FLOATS)}, not quantized")
    begin, end = fields["data_offsets"]
    mapped = np.memmap(path, np.uint8, "r", offset=start + begin, shape=(end - begin,))
    return mapped.view(FLOATS[kind]).reshape(fields["shape"])


def _untied(tensors: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """The tensors with the embedding as lm_head, too, if that is not there."""
    if EMBEDDING in tensors and HEAD not in tensors:
        return {**tensors, HEAD: tensors[EMBEDDING]}
    if EMBEDDING in tensors and not np.array_equal(tensors[HEAD], tensors[EMBEDDING]):
        raise SourceError(
            f"'{folder / 'config.json'}' ties {HEAD} to {EMBEDDING}, yet they differ; set tie_word_embeddings to "
            f"false there to keep both"
        )
    return tensors


def _rounding_notes(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """What to say of router biases that were float32 once."""
    rounded = sum(name.endswith("router.bias") and array.dtype != np.float32 for name, array in tensors.items())
    return [f"router biases that are not float32 in the files: {rounded}; other experts may win"] if rounded else []


# The tokenizer.


def _tokenizer_fields(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return _json(path) if path.is_file() else {}


def _special_tokens(path: Path, fields: Mapping[str, Any], config: Config) -> tuple[tuple[str, ...], list[str]]:
    """Names of the tokens that begin and end a document, where they are uncommon ones; and what to say of the rest."""
    named = _tokenizer_fields(path.parent)
    bos, eos = (_content(named.get(f"{end}_token")) for end in ("bos", "eos"))
    kept = config.data.special_tokens
    names = kept if eos is None else (bos or eos, eos)
    tokenizer = load_tokenizer(path, names)
    if tokenizer.vocab_size > config.model.vocab:
        raise SourceError(
            f"'{path}' has {tokenizer.vocab_size} entries and the model {config.model.vocab}; "
            f"resize_token_embeddings, or give the tokenizer that belongs to the model"
        )
    for end, i in (("bos", tokenizer.bos), ("eos", tokenizer.eos)):
        said = fields.get(f"{end}_token_id")
        if said is not None and i not in (said if isinstance(said, list) else [said]):
            raise SourceError(
                f"'{path}' has {i} as {end}_token_id and config.json {said}; give the files that belong together"
            )
    return (kept if _has_ends(path, kept, tokenizer) else names), _differences(path, tokenizer)


def _content(token: Any) -> str | None:
    """A token's name, which older files describe with more."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _has_ends(path: Path, names: tuple[str, ...], tokenizer: Tokenizer) -> bool:
    """Whether these names give the same beginning and end."""
    try:
        other = load_tokenizer(path, names)
    except DataError:
        return False
    return (other.bos, other.eos) == (tokenizer.bos, tokenizer.eos)


def _differences(path: Path, tokenizer: Tokenizer) -> list[str]:
    """What to say where training would make other ids of a text than transformers."""
    stock = tokenizers.Tokenizer.from_buffer(path.read_bytes().removeprefix(BOM))
    stock.no_truncation()
    stock.no_padding()
    try:
        different = difference(stock, tokenizer, SAMPLES)
    except UnknownCharacter as error:
        return [f"training refuses texts that transformers takes: {error}"]
    if different is None:
        return []
    text, ours, theirs = different
    return [f"of {text!r} training makes the ids {ours[:12]}, and transformers {theirs[:12]}"]
