"""The model card: what the model is, how it was trained, how to run it."""

from collections.abc import Sequence
from typing import NamedTuple

from dreamer_jax.config import Config


class Score(NamedTuple):
    """A result of an evaluation."""

    task: str
    metric: str
    value: float
    low: float
    """Ends of the 95 % interval."""
    high: float
    questions: int
    """How many, or pieces of text."""


def model_card(config: Config, numbers: int, *, step: int | None, merged: bool, scores: Sequence[Score] = ()) -> str:
    """README.md of the exported folder, with the metadata that model hubs read.

    Args:
        config: of the run.
        numbers: weights in the folder.
        step: optimizer steps that the weights have seen; None if unknown.
        merged: whether shared experts are merged into the routed ones (Eq. 8).
        scores: of this checkpoint.
    """
    model = config.model
    facts = {
        "Variant": model.variant,
        "Mixture": ", then ".join(model.mixture),
        "Depth": model.depth,
        "Width": model.width,
        "Vocabulary": model.vocab,
        "Experts": f"{model.ea.experts}, {model.ea.active_experts} active" if "ea" in model.dimensions else "none",
        "Weights": f"{numbers:,}",
        "Form": "merged, for inference" if merged else "original, for inference and training",
        **training_facts(config, step),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    depth = DEPTH if model.depth_recurrent else ""
    return CARD.format(
        name=config.name, table=table, depth=depth, evaluation=evaluation(scores), use=usage(remote_code=True)
    )


def usage(*, remote_code: bool) -> str:
    """A section that tells how to run the model, by code in its folder or by that of transformers."""
    return USE.format(trust=", trust_remote_code=True" if remote_code else "")


def evaluation(scores: Sequence[Score]) -> str:
    """A section of the scores; nothing where there are none."""
    rows = [
        f"| {s.task} | {s.metric} | {s.value:.4g} | {s.low:.4g} to {s.high:.4g} | {s.questions:,} |" for s in scores
    ]
    return EVALUATION.format(rows="\n".join(rows)) if rows else ""


def training_facts(config: Config, step: int | None) -> dict[str, object]:
    """What was trained on what, as far as the config says."""
    steps = config.train.steps if step is None else step
    optimizer = config.optimizer
    sources = ", ".join(f"{source.name} ({source.weight:g})" for source in config.data.sources)
    return {
        "Optimizer steps": f"{steps:,}",
        "Tokens seen": f"{steps * config.tokens_per_step:,} at most ({config.tokens_per_step:,} a step)",
        "Depths of steps": config.train.depths or config.model.depth,
        "Context": config.data.context,
        "Data": sources or f"prepared, {config.data.prepared}",
        "Loss": "on responses" if config.data.response_only else "on all tokens",
        "Optimizer": f"AdamW, learning rate {optimizer.learning_rate:g}, weight decay {optimizer.weight_decay:g}",
        "Compute type": config.train.dtype,
        "Seed": config.train.seed,
    }


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- dreamer
- depth-recurrence
- mixture-of-experts
- custom_code
---

# {name}

A Dreamer language model ([arXiv 2601.21582](https://arxiv.org/abs/2601.21582)), trained with Dreamer JAX.

| | |
|---|---|
{table}
{evaluation}
{use}{depth}
## Licence

`configuration_dreamer.py` and `modeling_dreamer.py` are part of Dreamer JAX: Apache License 2.0. The weights and the
tokenizer are under the terms of whoever trained them, and of the data.
"""
USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})
model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})
question = [{{"role": "user", "content": "What is 12 plus 30?"}}]
prompt = tokenizer.apply_chat_template(question, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt, max_new_tokens=100)[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
```

It needs transformers 5.19 or newer. The chat template is the layout of the training documents: one question and its
answer. A special token that is spelt out in a text becomes that token, as is usual in transformers; give
`split_special_tokens=True` for texts of strangers.
"""
"""How a folder is used; `trust` is what loads code from it."""
EVALUATION = """
## Evaluation

| Task | Metric | Score | 95 % interval | Questions |
|---|---|---|---|---|
{rows}

Measured on the checkpoint with `python -m dreamer_jax.evaluate`, without examples and greedily.
"""
DEPTH = """
The model iterates one layer. Give `depth=...` to `from_pretrained` for more or fewer iterations than it was trained
with.
"""
