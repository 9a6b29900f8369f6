"""Fine-tune an exported model on questions and answers, with transformers' Trainer, all weights or LoRA adapters.

    python launch/finetune.py --model out/tiny-hf --data gsm8k/train.jsonl --out out/tiny-hf-tuned
    python launch/finetune.py --model out/tiny-hf --data gsm8k/train.jsonl --out out/tiny-hf-lora --lora
    torchrun --nproc-per-node 8 launch/finetune.py ...

It needs torch, transformers, accelerate and, with --lora, peft; neither JAX nor Dreamer JAX. --out is a model for
transformers again, which `python -m dreamer_jax.convert --from hf` reads. LoRA adapters are merged into it, and lie in
its folder adapter/ as well. The loss is that of the answers; questions are only read.

The code in the model's folder is run (trust_remote_code): fine-tune models of people whom you trust.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

LEARNING_RATES = {"full": 1e-4, "lora": 5e-4}
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
"""What this release of transformers calls it; 5.24 renamed it."""
UNLEARNED = -100
"""The label of a token that the loss passes over."""
COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "run.json")
"""Files of the model's folder that fine-tuning leaves as they are; run.json is for the way back to JAX."""
ADAPTER, BIASES = "adapter", "router_biases.safetensors"

Example = dict[str, list[int]]
"""`input_ids` and `labels` of a question with its answer, of the same length."""


class InputError(ValueError):
    """What the user gave cannot be used: a line with the cause and the fix."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Fine-tune; an error that the user can fix is one line."""
    try:
        finetune(parse(arguments))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    files = parser.add_argument_group("files")
    files.add_argument("--model", type=Path, required=True, help="a folder that --to hf, or this script, wrote")
    files.add_argument("--data", type=Path, required=True, help="JSON lines, a question and its answer in each")
    files.add_argument("--out", type=Path, required=True, help="a new folder for the fine-tuned model")
    files.add_argument("--validation", type=Path, help="more such lines, to measure loss and load before and after")
    files.add_argument("--validation-rows", type=positive, help="use the first so many of them only")
    files.add_argument("--question-field", default="question", help="its name (default: question)")
    files.add_argument("--answer-field", default="answer", help="its name (default: answer)")
    rows = parser.add_argument_group("rows")
    rows.add_argument("--context", type=positive, help="most tokens of a row (default: the model's own context)")
    rows.add_argument("--skip-long", action="store_true", help="leave out rows that are longer, instead of failing")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=positive, default=300, help="optimizer steps (default: 300)")
    training.add_argument("--batch", type=positive, default=8, help="rows on a device at once (default: 8)")
    training.add_argument("--accumulate", type=positive, default=1, help="such batches in a step (default: 1)")
    training.add_argument(
        "--learning-rate", type=float, help="rises over 5%% of the steps, then falls to 0 (default: 1e-4, LoRA 5e-4)"
    )
    training.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    training.add_argument("--bf16", action="store_true", help="compute in bfloat16; weights stay float32")
    training.add_argument("--log-every", type=positive, default=20, help="steps between losses (default: 20)")
    training.add_argument("--seed", type=int, default=0, help="of the order of rows, and of new adapters (default: 0)")
    lora = parser.add_argument_group("adapters")
    lora.add_argument("--lora", action="store_true", help="train low-rank adapters; the weights stay as they are")
    lora.add_argument("--lora-rank", type=positive, default=8, help="of each matrix, each expert's too (default: 8)")
    lora.add_argument("--lora-alpha", type=positive, help="scales adapters by alpha / rank (default: twice the rank)")
    balancing = parser.add_argument_group("router biases")
    balancing.add_argument(
        "--biases",
        choices=("keep", "rebalance"),
        default="keep",
        help="keep them, or move them after each step towards equal load of experts (default: keep)",
    )
    balancing.add_argument("--expert-bias-rate", type=float, default=1e-3, help="of expert attention (default: 1e-3)")
    balancing.add_argument("--attention-bias-rate", type=float, default=1e-2, help="of SA and DA (default: 1e-2)")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """A number of at least 1; ValueError otherwise, of which argparse makes a message."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def finetune(asked: argparse.Namespace) -> None:
    """Train, measure, save.

    Raises:
        InputError: a model, data or a package that cannot be used.
    """
    check_folders(asked.model, asked.out)
    set_seed(asked.seed)
    tokenizer = AutoTokenizer.from_pretrained(asked.model, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(asked.model, trust_remote_code=True, dtype=torch.float32)
    training, validation = examples_of(asked, tokenizer, model.config.max_position_embeddings)
    use_cache = model.config.use_cache
    load = RouterLoad(model)
    trained = with_adapters(model, asked.lora_rank, asked.lora_alpha) if asked.lora else model
    report_sizes(trained)
    rates = {"ea": asked.expert_bias_rate, "sa": asked.attention_bias_rate, "da": asked.attention_bias_rate}
    callbacks = [Rebalancing(load, rates)] if asked.biases == "rebalance" else []
    trainer = Trainer(
        model=trained,
        args=training_arguments(asked),
        train_dataset=training,
        eval_dataset=validation or None,
        data_collator=collated,
        callbacks=callbacks,
        preprocess_logits_for_metrics=answer_losses,
        compute_metrics=answer_loss,
    )
    check_devices(trainer.args, asked.biases)
    if validation:
        print(f"before: {measured(trainer, load)}", flush=True)
    trainer.train()
    if validation:
        print(f"after: {measured(trainer, load)}", flush=True)
    model.config.use_cache = use_cache  # Trainer has turned it off
    if trainer.is_world_process_zero():
        save(trained, load, asked)


# What is given.


def check_folders(model: Path, out: Path) -> None:
    """Raise InputError unless `model` is an export with a tokenizer, and `out` is new or empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out '{out}' is there already; choose another one, or delete it")
    if (model / "adapter_config.json").is_file():
        raise InputError(f"--model '{model}' is an adapter; give the whole model, which lies in the folder around it")
    for name in ("config.json", "tokenizer.json"):
        if not (model / name).is_file():
            raise InputError(f"--model '{model}' has no {name}; give a folder that dreamer_jax.convert --to hf wrote")
    try:
        kind = json.loads((model / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise InputError(f"'{model / 'config.json'}' is damaged ({error}); export the model again") from error
    if kind != "dreamer":
        raise InputError(f"--model '{model}' is of the type {kind!r}; this script fine-tunes 'dreamer' models")


def check_devices(args: TrainingArguments, biases: str) -> None:
    """Raise InputError where one process would drive several GPUs: its threads would mix up their counts."""
    if biases == "rebalance" and args.n_gpu > 1:
        raise InputError(
            f"--biases rebalance wants a process for each of the {args.n_gpu} GPUs: "
            f"torchrun --nproc-per-node {args.n_gpu} launch/finetune.py ..."
        )


def examples_of(
    asked: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, context: int
) -> tuple[list[Example], list[Example]]:
    """What to train on, and what to measure with, which may be nothing.

    Raises:
        InputError: a row that cannot be used, or is longer than --context or else the model's `context`.
    """
    fields, length = (asked.question_field, asked.answer_field), asked.context or context
    parts: list[list[Example]] = []
    for path, limit in ((asked.data, None), (asked.validation, asked.validation_rows)):
        rows = [] if path is None else list(read_rows(path, fields))[:limit]
        examples = [example(tokenizer, row.question, row.answer) for row in rows]
        parts.append(fitting(rows, examples, length, skip=asked.skip_long))
    return parts[0], parts[1]


class Row(NamedTuple):
    """A question, its answer, and where they stand."""

    question: str
    answer: str
    place: str


def read_rows(path: Path, fields: tuple[str, str]) -> Iterator[Row]:
    """The rows of a file of JSON lines; `fields` are the names of the question and of the answer.

    Raises:
        InputError: a line that is no JSON object, a field that is absent or no text, a file without rows.
    """
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                empty = False
                place = f"'{path}', line {number}"
                question, answer = (text_of(line, field, place) for field in fields)
                yield Row(question, answer, place)
    if empty:
        raise InputError(f"'{path}' has no rows; give a file of JSON lines")


def text_of(line: bytes, field: str, place: str) -> str:
    """The text in a field of a JSON object; InputError if there is none."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place} is no JSON ({error}); give a file of JSON lines") from error
    if not isinstance(row, dict) or field not in row:
        found = ", ".join(map(repr, row)) if isinstance(row, dict) else "no fields"
        raise InputError(f"{place} has no field {field!r}, but {found}; see --question-field and --answer-field")
    text = row[field]
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{place}: {field!r} is {text!r}; a text is needed, correct the row or take it out")
    return text


def example(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> Example:
    """The tokens of a question and its answer in the layout of the chat template; labels are those of the answer.

    The two are tokenized apart. So was the model trained, and so it reads a question before it answers.

    Raises:
        InputError: the template puts something else before an answered question than before an open one.
    """
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if not whole.startswith(asked):
        raise InputError("the chat template lays out a question in another way once it is answered; give a plain one")
    prompt, response = (ids_of(tokenizer, text) for text in (asked, whole[len(asked) :]))
    return {"input_ids": prompt + response, "labels": [UNLEARNED] * len(prompt) + response}


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that has its special tokens already."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def fitting(rows: list[Row], examples: list[Example], context: int, *, skip: bool) -> list[Example]:
    """The examples of at most `context` tokens.

    Raises:
        InputError: a longer one, unless they are skipped; or all of them are longer.
    """
    kept = [one for one in examples if len(one["input_ids"]) <= context]
    if len(kept) == len(examples):
        return kept
    row, long = next((r, one) for r, one in zip(rows, examples, strict=True) if len(one["input_ids"]) > context)
    told = f"{len(examples) - len(kept)} of {len(examples)} rows have more than {context} tokens"
    if not skip or not kept:
        first = f"the first is {row.place}, with {len(long['input_ids'])}"
        remedy = "" if skip else ", or leave them out with --skip-long"
        raise InputError(f"{told} ({first}); raise --context{remedy}")
    print(f"{told} and are left out", flush=True)
    return kept


def collated(examples: list[Example]) -> dict[str, Tensor]:
    """A batch [B, T], padded at the end; the attention mask is 0 and the label UNLEARNED where it is padding."""
    ids, labels = ([torch.tensor(one[name]) for one in examples] for name in ("input_ids", "labels"))
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=UNLEARNED),
    }


# The training.


def training_arguments(asked: argparse.Namespace) -> TrainingArguments:
    """What Trainer is told."""
    rate = LEARNING_RATES["lora" if asked.lora else "full"] if asked.learning_rate is None else asked.learning_rate
    return TrainingArguments(
        output_dir=str(asked.out),
        max_steps=asked.steps,
        per_device_train_batch_size=asked.batch,
        per_device_eval_batch_size=asked.batch,
        gradient_accumulation_steps=asked.accumulate,
        learning_rate=rate,
        warmup_steps=asked.steps // 20,
        bf16=asked.bf16,
        seed=asked.seed,
        logging_steps=asked.log_every,
        logging_first_step=True,
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        **{CHECKPOINTING: asked.gradient_checkpointing},
    )


def with_adapters(model: PreTrainedModel, rank: int, alpha: int | None) -> Any:
    """The model with LoRA on every projection; routers, norms and the embedding stay as they are.

    Linear layers are targets as modules. Experts, and the experts of DR's attention with the shared one beside them,
    are parameters of modules of their own, and are targets as such: of a 3-D one [E, out, in], each expert gets
    adapters of this rank.

    Raises:
        InputError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise InputError(f"--lora needs PEFT ({error}): pip install peft") from error
    weights = dict(model.named_parameters())
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=sorted({last(name, 1) for name, kind in model.named_modules() if isinstance(kind, nn.Linear)}),
        target_parameters=sorted({last(name, 2) for name in weights if is_of_experts(name, weights[name])}),
    )
    return get_peft_model(model, config)


def is_of_experts(name: str, weight: Tensor) -> bool:
    """Whether a parameter holds experts' matrices, or the shared expert's."""
    return weight.ndim == 3 or last(name, 1) == "shared"


def last(name: str, count: int) -> str:
    """The end of a dotted name."""
    return ".".join(name.split(".")[-count:])


def report_sizes(model: nn.Module) -> None:
    """Print how many numbers are trained."""
    sizes = [(weight.numel(), weight.requires_grad) for weight in model.parameters()]
    trained = sum(size for size, learns in sizes if learns)
    print(f"{trained:,} of {sum(size for size, _ in sizes):,} numbers are trained", flush=True)


class RouterLoad:
    """Counts how many tokens each expert gets, padding apart, in training and in evaluation.

    Attributes:
        routers: the model's routers by name. Depths that share a router add to the same counts.
    """

    def __init__(self, model: PreTrainedModel):
        """Watches the model, through adapters too if it gets any later."""
        self.routers = {name: module for name, module in model.named_modules() if last(name, 1) == "router"}
        self._counts: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}  # by whether in training
        self._mask: Tensor | None = None
        self._passes = False
        model.base_model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.base_model.register_forward_hook(self._end, always_call=True)
        for name, router in self.routers.items():
            router.register_forward_hook(lambda module, _, route, name=name: self._count(name, module, route.ids))

    def taken(self, *, training: bool) -> dict[str, Tensor]:
        """The counts [E] of each router since they were last taken, of all processes together."""
        counts, self._counts[training] = self._counts[training], {}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for sums in counts.values():
                torch.distributed.all_reduce(sums)
        return counts

    def _begin(self, module: nn.Module, _: Any, given: dict[str, Any]) -> None:
        self._mask, self._passes = given.get("attention_mask"), True

    def _end(self, *_: Any) -> None:
        self._passes = False

    def _count(self, name: str, router: nn.Module, ids: Tensor) -> None:
        """Add the selections [B, T, A], unless gradient checkpointing runs a layer again, outside of a pass."""
        if not self._passes:
            return
        kept = ids if self._mask is None else ids[self._mask.bool()]
        counts, sums = torch.bincount(kept.flatten(), minlength=len(router.bias)), self._counts[router.training]
        sums[name] = counts if name not in sums else sums[name] + counts


class Rebalancing(TrainerCallback):
    """After each optimizer step, moves router biases towards equal load of their experts, as pre-training does."""

    def __init__(self, load: RouterLoad, rates: dict[str, float]):
        """`rates` are those of the three kinds of attention: "sa", "da" and "ea"."""
        self.load, self.rates = load, rates

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Of the counts of all batches of the step, apply Eq. 3."""
        for name, counts in self.load.taken(training=True).items():
            self.load.routers[name].bias.data += shift(counts, self.rates[name.split(".")[-2]])


def shift(counts: Tensor, rate: float) -> Tensor:
    """What Eq. 3 adds to the biases [E]: rate * sign(median(N) - N), of an even count the mean of the middle two."""
    ordered, experts = counts.sort().values, len(counts)
    twice_median = ordered[(experts - 1) // 2] + ordered[experts // 2]
    return rate * torch.sign(twice_median - 2 * counts).float()


def measured(trainer: Trainer, load: RouterLoad) -> str:
    """The loss on held-out answers, and how evenly the routers of each kind spread its tokens, in words."""
    load.taken(training=False)
    loss = trainer.evaluate()["eval_answer_loss"]
    counts = load.taken(training=False)
    kinds: dict[str, list[Tensor]] = {}
    for name, router in counts.items():
        kinds.setdefault(name.split(".")[-2], []).append(router.double())
    said = [f"{kind} {mean(map(gini, of))} ({mean(map(busiest, of))})" for kind, of in sorted(kinds.items())]
    return f"loss {loss:.4f}; Gini coefficient of load (busiest expert over mean): {', '.join(said)}"


def answer_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss summed over the answer, and the answer's tokens [B, 2], of logits [B, T, V] and labels [B, T]."""
    asked = labels[:, 1:]
    losses = cross_entropy(logits[:, :-1].mT.float(), asked, ignore_index=UNLEARNED, reduction="none")
    return torch.stack([losses.sum(1), (asked != UNLEARNED).sum(1)], dim=1)


def answer_loss(found: EvalPrediction) -> dict[str, float]:
    """The mean over all answer tokens. Trainer's own is one of batch means, and so depends on the batches."""
    loss, tokens = found.predictions.sum(0)
    return {"answer_loss": float(loss / tokens)}


def mean(values: Any) -> str:
    """The mean of numbers, to print."""
    return f"{torch.stack(list(values)).mean().item():.3f}"


def gini(counts: Tensor) -> Tensor:
    """0 if all experts have the same load [E], (E - 1) / E if one has everything."""
    experts = len(counts)
    rank = 2 * torch.arange(1, experts + 1, dtype=counts.dtype, device=counts.device) - experts - 1
    return (counts.sort().values * rank).sum() / (experts * counts.sum())


def busiest(counts: Tensor) -> Tensor:
    """The largest load [E] over the mean one."""
    return counts.max() / counts.mean()


# The result.


def save(model: Any, load: RouterLoad, asked: argparse.Namespace) -> None:
    """Write the whole model, its tokenizer and run.json; adapters are written alone, too, before they are merged."""
    if asked.lora:
        adapter = asked.out / ADAPTER
        model.save_pretrained(adapter, save_embedding_layers=False)
        if asked.biases == "rebalance":
            save_biases(load, adapter / BIASES)
        model = model.merge_and_unload()
    model.save_pretrained(asked.out)
    for name in COPIED:
        if (asked.model / name).is_file():
            shutil.copyfile(asked.model / name, asked.out / name)
    print(f"wrote {asked.out}{f', and the adapter alone to {adapter}' if asked.lora else ''}")


def save_biases(load: RouterLoad, path: Path) -> None:
    """Router biases are no part of an adapter, but belong to one that was trained while they moved."""
    from safetensors.torch import save_file

    save_file({f"{name}.bias": router.bias.data for name, router in load.routers.items()}, path)


if __name__ == "__main__":
    sys.exit(main())
