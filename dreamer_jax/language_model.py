"""A model to hold in your hand, in a notebook: load it, call it, look inside, write it back."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dreamer_jax import convert
from dreamer_jax.config import Config, ModelConfig
from dreamer_jax.convert.safetensors import CONFIG, WEIGHTS
from dreamer_jax.data.template import DEFAULT_TEMPLATE, Template
from dreamer_jax.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from dreamer_jax.inference import engine
from dreamer_jax.inference.decoder import make_decoder
from dreamer_jax.inference.sample import Sampling
from dreamer_jax.kernels.compute import Compute
from dreamer_jax.model.dreamer import Dreamer, check_tokens
from dreamer_jax.training.checkpoint import load_model, save_model

Text = str | Sequence[int] | Int[np.ndarray | Array, "..."]
"""Text, the ids of one sequence, or ids [B, T]."""


@dataclass(frozen=True)
class LanguageModel:
    """A model, how it is computed and, if it is known, its tokenizer."""

    model: Dreamer
    compute: Compute
    tokenizer: Tokenizer | None = None
    tokenizer_file: Path | None = None
    run: Config | None = None
    """The config of the run that it comes from."""

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.model.config

    @property
    def weights(self) -> dict[str, Array]:
        """All parameters and router biases by their names in the exchange format."""
        return convert.named_arrays(self.model)

    def tokens(self, text: Text) -> Int[np.ndarray, "B T"]:
        """The ids of a text, after the token that begins a document; or the ids given, as [B, T].

        Raises:
            ValueError: text without a tokenizer, or ids outside of the vocabulary.
        """
        if isinstance(text, str):
            tokenizer = self._known_tokenizer()
            text = [tokenizer.bos, *tokenizer.encode(text)]
        tokens = np.atleast_2d(np.asarray(text, np.int32))
        check_tokens(tokens, self.config.vocab)
        return tokens

    def logits(self, text: Text, *, depth: int | None = None) -> Float[Array, "B T V"]:
        """The logits after every token, float32; `depth`: how many depths run."""
        graph, state = nnx.split(self.model)
        return _logits(graph, self.compute, depth, state, jnp.asarray(self.tokens(text)))

    def inspect(self, text: Text, **options: Any) -> convert.Inspection:
        """Everything that the model computes on a text, one document a row; options as of `convert.inspect`."""
        return convert.inspect(self.model, self.tokens(text), **{"compute": self.compute, **options})

    def generate(
        self,
        prompts: Text | Sequence[str],
        *,
        max_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        depth: int | None = None,
    ) -> list[str] | list[list[int]]:
        """Continue prompts in one batch, each as it stands: texts give texts, ids give ids.

        A text ends before the token that ends documents, or after `max_tokens`.
        """
        given: Any = [prompts] if isinstance(prompts, str) else prompts
        as_text = len(given) > 0 and isinstance(given[0], str)
        rows = [self.tokens(text)[0] for text in given] if as_text else self.tokens(given)
        stop = () if self.tokenizer is None else (self.tokenizer.eos,)
        decoder = make_decoder(self.model, self.compute, depth=depth)
        tokens, sampling = [row.tolist() for row in rows], Sampling(temperature, top_p)
        found = engine.complete(decoder, tokens, sampling, max_tokens=max_tokens, seed=seed, stop_ids=stop)
        return [self._known_tokenizer().decode(row) for row in found] if as_text else found

    def answer(self, question: str, **options: Any) -> str:
        """The answer to a question, put as the training documents put theirs; options as of `generate`."""
        template = Template.of(self.run.data) if self.run else DEFAULT_TEMPLATE
        [text] = self.generate(template.asked(question), **options)
        return str(text).strip()

    def save(self, folder: str | Path, run: Config | None = None) -> Path:
        """Write a run folder with these weights at step 0, from which training, generation and conversion start.

        `run` is the config of the training to come, without one that of the run that the model comes from; its model
        section becomes that of this model. Train on with the same config, --name and --out.

        Raises:
            ValueError: a merged model, which cannot be trained.
            CheckpointError: the folder has checkpoints already.
        """
        if self.model.is_merged:
            raise ValueError("a merged model (Eq. 8) cannot be trained: its shared experts are gone; save the original")
        folder = Path(folder)
        run = run or self.run or Config(name=folder.name)
        config = replace(run, name=folder.name, out=str(folder.parent), model=self.config)
        save_model(folder, config, self.model, self.tokenizer_file)
        return folder

    def _known_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: give token ids, or `tokenizer=FILE` where it is made")
        return self.tokenizer


def load(folder: str | Path, *, dtype: DTypeLike = jnp.float32, tokenizer: str | Path | None = None) -> LanguageModel:
    """The model of a run folder, of one of its checkpoints, or of an export.

    Args:
        folder: runs/NAME, runs/NAME/checkpoints/STEP, or a folder with model.safetensors and config.json.
        dtype: compute type of logits and generation.
        tokenizer: the tokenizer's file where the folder has none.

    Raises:
        CheckpointError, WeightError: no whole model there, or one that does not fit its config.
    """
    folder = Path(folder).expanduser()
    if (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file():
        config, arrays, merged = convert.load_safetensors(folder)
        file = Path(tokenizer) if tokenizer else find_tokenizer(folder)
        run = convert.run_of_export(folder)
        return _held(convert.build(config, arrays, merged=merged), dtype, file, run)
    loaded = load_model(folder)
    return _held(loaded.model, dtype, Path(tokenizer) if tokenizer else loaded.tokenizer_path, loaded.config)


def build(
    config: ModelConfig,
    arrays: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    merged: bool = False,
    dtype: DTypeLike = jnp.float32,
    tokenizer: str | Path | None = None,
) -> LanguageModel:
    """A new model of this shape; with `arrays` one with these weights, by their names in the exchange format.

    Raises:
        WeightError: a missing, extra or misshapen array, named.
    """
    model = Dreamer(config, nnx.Rngs(seed)) if arrays is None else convert.build(config, arrays, merged=merged)
    return _held(model, dtype, Path(tokenizer) if tokenizer else None, None)


def _held(model: Dreamer, dtype: DTypeLike, tokenizer: Path | None, run: Config | None) -> LanguageModel:
    names = run.data.special_tokens if run else ()
    read = None if tokenizer is None else load_tokenizer(tokenizer, names)
    return LanguageModel(model, Compute.fastest(dtype), read, tokenizer, run)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _logits(
    graph: Any, compute: Compute, depth: int | None, state: nnx.State, tokens: Int[Array, "B T"]
) -> Float[Array, "B T V"]:
    model, (rows, length) = nnx.merge(graph, state), tokens.shape
    positions = jnp.broadcast_to(jnp.arange(length)[None], (rows, length))
    hidden = model(tokens, positions, jnp.ones_like(tokens), compute, depth=depth).hidden
    return model.logits(hidden, compute)
