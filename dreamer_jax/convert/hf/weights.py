"""The exported model's weights: their names and layout in transformers, safetensors files of them, and the way back.

transformers applies a matrix as x @ W.T, so each one is turned; the gate and up projections of an expert lie in one.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import ml_dtypes
import numpy as np

from dreamer_jax.config import ModelConfig
from dreamer_jax.convert.names import WeightError, check_names, expected_shapes

Dtype = Literal["float32", "bfloat16"]
DTYPES: dict[Dtype, tuple[str, Any]] = {
    "float32": ("F32", np.dtype(np.float32)),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
}
"""What safetensors calls them, and what NumPy does."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = 5 * 10**9
"""Bytes of a file's weights: transformers' own limit."""


class Target(NamedTuple):
    """One tensor of the exported model."""

    name: str
    sources: tuple[str, ...]
    """Exchange names; of two, the gate and the up projections of experts."""
    shape: tuple[int, ...]
    dtype: Dtype
    turned: bool
    """Whether the last two axes change places."""
    part: tuple[int | slice, ...] = ()
    """Where it lies in its source, before it is turned; empty for the whole."""

    @property
    def bytes(self) -> int:
        """Its size in a file."""
        return int(np.prod(self.shape)) * DTYPES[self.dtype][1].itemsize


def targets(config: ModelConfig, dtype: Dtype, *, merged: bool) -> list[Target]:
    """All tensors of the exported model. Router biases stay float32."""
    shapes = expected_shapes(config, merged=merged)
    found = []
    for name, shape in shapes.items():
        if name.endswith("ea.w_up"):
            continue  # comes with the gate
        sources: tuple[str, ...] = (name,)
        turned = _is_matrix(name)
        if name.endswith("ea.w_gate"):
            sources, shape = (name, name.replace("w_gate", "w_up")), (*shape[:-1], 2 * shape[-1])
        shape = (*shape[:-2], shape[-1], shape[-2]) if turned else shape
        found.append(Target(_hf_name(name), sources, shape, "float32" if name.endswith(".bias") else dtype, turned))
    return found


_OUTER = {
    "embed": "model.embed_tokens.weight",
    "lm_head": "lm_head.weight",
    "residual_norm": "model.norm.weight",
    "final_norm": "model.norm.weight",
}
_INNER = {
    "norm": "norm.weight",
    "q_norm": "q_norm.weight",
    "k_norm": "k_norm.weight",
    "w_qkv": "qkv_proj.weight",
    "w_qkv_shared": "qkv_proj.shared",
    "w_o": "o_proj.weight",
    "w_o_shared": "o_proj.shared",
    "router.w_q": "router.w_q",
    "router.keys": "router.keys",
    "router.bias": "router.bias",
    "router.q_norm": "router.q_norm.weight",
    "router.k_norm": "router.k_norm.weight",
    "w_gate": "experts.gate_up_proj",
    "w_down": "experts.down_proj",
}


def _hf_name(name: str) -> str:
    """The name in transformers: "layer.sa.w_o" is "model.layers.0.sa.o_proj.weight"."""
    if name in _OUTER:
        return _OUTER[name]
    parts = name.split(".")
    place = ["0", *parts[1:]] if parts[0] == "layer" else parts[1:]
    return f"model.layers.{place[0]}.{place[1]}.{_INNER['.'.join(place[2:])]}"


def _is_matrix(name: str) -> bool:
    """Whether a token's row is multiplied with it; router keys and the embedding are rows already."""
    return name.rsplit(".", 1)[-1].startswith(("w_", "lm_head"))


def write_weights(
    folder: Path,
    config: ModelConfig,
    arrays: Mapping[str, Any],
    *,
    merged: bool,
    dtype: Dtype = "float32",
    shard: int = SHARD,
    wrote: Callable[[int], object] = lambda size: None,
) -> int:
    """Write the weights into one file, or into several and an index; one array is on the host at a time.

    They lie in the order of `arrays`.

    Args:
        folder: where; it must be there.
        config: of the model.
        arrays: by exchange names.
        merged: whether they are merged (Eq. 8).
        dtype: of the files.
        shard: bytes of weights in a file; a larger tensor has one of its own.
        wrote: is told the bytes of each piece that has been written.

    Returns:
        How many numbers there are.

    Raises:
        WeightError: a missing, extra or misshapen array, or one with numbers that are not finite, named.
    """
    check_names(arrays, expected_shapes(config, merged=merged))
    order = {name: i for i, name in enumerate(arrays)}  # so each array of a checkpoint is read once
    every = sorted(targets(config, dtype, merged=merged), key=lambda target: order[target.sources[0]])
    return write_targets(folder, every, arrays, shard=shard, wrote=wrote)


def write_targets(
    folder: Path, every: list[Target], arrays: Mapping[str, Any], *, shard: int, wrote: Callable[[int], object]
) -> int:
    """Write these tensors in this order, as `write_weights` does.

    Raises:
        WeightError: an array has numbers that are not finite.
    """
    shards = _sharded(every, shard)
    files = [WEIGHTS] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    for file, inside in zip(files, shards, strict=True):
        with (folder / file).open("wb") as out:
            _write_file(out, inside, arrays, wrote)
    if len(shards) > 1:
        places = {target.name: file for file, inside in zip(files, shards, strict=True) for target in inside}
        total = {"total_size": sum(target.bytes for target in every)}
        (folder / INDEX).write_text(json.dumps({"metadata": total, "weight_map": places}, indent=2) + "\n")
    return sum(int(np.prod(target.shape)) for target in every)


def _shard_name(i: int, count: int) -> str:
    stem, _, ending = WEIGHTS.partition(".")
    return f"{stem}-{i + 1:05d}-of-{count:05d}.{ending}"


def _sharded(every: list[Target], limit: int) -> list[list[Target]]:
    """The tensors in order, in parts of at most `limit` bytes."""
    shards: list[list[Target]] = [[]]
    size = 0
    for target in every:
        if shards[-1] and size + target.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(target)
        size += target.bytes
    return shards


def _write_file(out: BinaryIO, inside: list[Target], arrays: Mapping[str, Any], wrote: Callable[[int], object]) -> None:
    """The safetensors format: the header's length in 8 bytes, the header in JSON, the tensors' bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for target in inside:
        start, end = end, end + target.bytes
        name = DTYPES[target.dtype][0]
        header[target.name] = {"dtype": name, "shape": list(target.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the bytes of the tensors are aligned
    out.write(len(text).to_bytes(8, "little") + text)
    for target in inside:
        for piece in _pieces(target, arrays):
            out.write(piece.data)
            wrote(piece.nbytes)


def _pieces(target: Target, arrays: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """The tensor's bytes in order: one expert after another, so that no second whole array is made."""
    sources = [np.asarray(arrays[name])[target.part] for name in target.sources]
    experts = sources[0].shape[0] if len(target.shape) == 3 else None
    for expert in [...] if experts is None else range(experts):
        parts = [source[expert] for source in sources]
        for name, part in zip(target.sources, parts, strict=True):
            _check_finite(name, part)
        whole = np.concatenate([part.T if target.turned else part for part in parts])
        yield np.ascontiguousarray(whole, DTYPES[target.dtype][1]).reshape(-1).view(np.uint8)


def _check_finite(name: str, array: np.ndarray) -> None:
    if not np.isfinite(array).all():
        raise WeightError(f"{name} has numbers that are not finite (nan or inf): these weights are of no use")


def exchanged(config: ModelConfig, tensors: Mapping[str, np.ndarray], *, merged: bool) -> dict[str, np.ndarray]:
    """The exported model's tensors as arrays by exchange names, in float32.

    Args:
        config: of the model.
        tensors: by their names in transformers, of any floating-point type.
        merged: whether they are merged (Eq. 8).

    Raises:
        WeightError: a missing, extra or misshapen tensor, or one with numbers that are not finite, named.
    """
    every = targets(config, "float32", merged=merged)
    check_names(tensors, {target.name: target.shape for target in every})
    arrays: dict[str, np.ndarray] = {}
    for target in every:
        tensor = tensors[target.name]
        _check_finite(target.name, tensor)
        rows = tensor.swapaxes(-1, -2) if target.turned else tensor
        parts = np.split(rows, len(target.sources), axis=-1)
        arrays |= {name: np.array(part, np.float32) for name, part in zip(target.sources, parts, strict=True)}
    return arrays
