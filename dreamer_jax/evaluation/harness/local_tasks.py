"""Tasks for lm-evaluation-harness over local files of benchmarks: nothing is fetched, and prompts are the harness's.

<out>/<task>.yaml     includes the harness's own task and says where the data is
<out>/data/*.jsonl    copies of the benchmarks' files in the one form that the harness reads: JSON lines
<out>/cache/          what the datasets library makes of them
"""

import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dreamer_jax.data.template import DEFAULT_TEMPLATE, Template
from dreamer_jax.evaluation.benchmarks import gsm8k, hendrycks_math, mathqa, mmlu
from dreamer_jax.evaluation.benchmarks.answers import math_answer
from dreamer_jax.evaluation.benchmarks.rows import Row, first_file, rows_of
from dreamer_jax.evaluation.requests import EvaluationError
from dreamer_jax.files import write_whole

HEADER = "# Written by dreamer-lm-eval write-tasks, with absolute paths: write it again after moving a folder.\n"
Config = dict[str, Any]
"""The content of a YAML file of the harness."""
Copied = tuple[str, Row | None]
"""(what is wrong with a row, its copy): a row without a copy is left out and counted."""


@dataclass(frozen=True)
class Benchmark:
    """A file of a benchmark, and the tasks that ask what is in it."""

    places: tuple[str, ...]
    """Below the folder of all benchmarks; the first that is there is taken."""
    fields: tuple[str, ...]
    copy: Callable[[Row], Copied]
    tasks: dict[str, tuple[str, Config]]
    """By name: (a task's file in the harness, keys that differ from it)."""
    examples: tuple[str, ...] = ()
    """Files with worked examples for few-shot prompts, which need not be there."""
    example_split: str = "train"
    """What the harness calls them."""


@dataclass(frozen=True)
class Written:
    """What `write_tasks` did."""

    tasks: dict[str, str] = field(default_factory=dict)
    """By name, a line about each."""
    missing: list[str] = field(default_factory=list)
    """Lines about what was left out."""


class Data(NamedTuple):
    """The copy of a file."""

    path: Path
    about: str
    """A line: how many rows it has, and of which file."""


def write_tasks(root: Path, out: Path, template: Template = DEFAULT_TEMPLATE) -> Written:
    """Write a task for every benchmark whose file is below `root`, and copies of the files.

    The template is the layout of this project's own tasks; the harness's have theirs.

    Raises:
        EvaluationError: there is no such file, or one is damaged; the message names it.
    """
    written = Written()
    for benchmark in benchmarks(template):
        write_benchmark(benchmark, root, out, written)
    if not written.tasks:
        raise EvaluationError(f"'{root}' has no file of a benchmark, such as gsm8k/test.jsonl (docs/lm_eval.md)")
    for name, members in MMLU_GROUPS.items():
        if all(member in written.tasks for member in members):
            write_yaml(out / f"{name}.yaml", group_config(name, members))
            written.tasks[name] = f"the {len(members)} subjects together"
        else:  # a mean over fewer would not be what its name says
            written.missing.append(f"{name} (not all of its {len(members)} subjects are there)")
    return written


def write_benchmark(benchmark: Benchmark, root: Path, out: Path, written: Written) -> None:
    """Write the tasks of one benchmark, or note that its file is missing."""
    data = copied(root, benchmark.places, benchmark, out)
    if data is None:
        written.missing.append(f"{', '.join(benchmark.tasks)} ('{root}' has no {' or '.join(benchmark.places)})")
        return
    examples = copied(root, benchmark.examples, benchmark, out)
    for name, (included, keys) in benchmark.tasks.items():
        config = task_config(name, included, data, examples, benchmark.example_split, out)
        write_yaml(out / f"{name}.yaml", config | keys)
        written.tasks[name] = data.about if examples else f"{data.about}; there is no file of examples"


# What the tasks are


def benchmarks(template: Template) -> Iterator[Benchmark]:
    """All of them; tasks are named as the harness's, or as this project's own, with `_local` behind it."""
    for task in (gsm8k.Gsm8k(), gsm8k.gsm8k_platinum()):
        yield Benchmark(
            (task.place,),
            ("question", "answer"),
            copy_fields("question", "answer"),
            {f"{task.name}_local": ("gsm8k/gsm8k.yaml", generating(gsm8k.STOPS, task.max_tokens))},
            examples=("gsm8k/train.jsonl",),
        )
    for choosing in (mathqa.MathQa(), mathqa.mathqa_dev()):
        yield Benchmark(
            mathqa_places(choosing.split),
            mathqa.FIELDS,
            copy_of_mathqa,
            {f"{choosing.name}_local": ("mathqa/mathqa.yaml", {"metric_list": CHOICE_METRICS})},
            examples=mathqa_places("train"),
        )
    for split in MMLU_SUFFIXES:
        for subject in mmlu.SUBJECTS:
            yield Benchmark(
                (f"mmlu_math/{subject}_{split}.csv",),
                mmlu.FIELDS,
                copy_of_mmlu,
                {mmlu_task(subject, split): (f"mmlu/default/mmlu_{subject}.yaml", {})},
                examples=(f"mmlu_math/{subject}_dev.csv",),
                example_split="dev",
            )
    for problems in (hendrycks_math.Math(), hendrycks_math.math500()):
        yield Benchmark(
            (problems.place,),
            ("problem", "solution"),
            copy_of_math,
            {
                f"minerva_{problems.name}_local": (MINERVA, {"num_fewshot": 4, "fewshot_split": None}),
                f"hendrycks_{problems.name}_local": ("hendrycks_math/hendrycks_math_algebra.yaml", {}),
                f"{problems.name}_local": (MINERVA, own_layout(problems, template)),
            },
            examples=("math/train.jsonl",),
        )


def mathqa_places(split: str) -> tuple[str, ...]:
    """Where MathQA's files may be."""
    return (f"mathqa/{split}.json", f"mathqa/{split}.jsonl")


def mmlu_task(subject: str, split: str) -> str:
    """The name of a subject's task."""
    return f"mmlu_{subject}{MMLU_SUFFIXES[split]}"


MINERVA = "minerva_math/minerva_math_algebra.yaml"
MMLU_SUFFIXES = {"test": "_local", "val": "_val_local"}
MMLU_GROUPS = {
    f"mmlu_math{suffix}": [mmlu_task(subject, split) for subject in mmlu.SUBJECTS]
    for split, suffix in MMLU_SUFFIXES.items()
}
CHOICE_METRICS = [
    {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm", "acc_bytes")
]


def generating(stops: Iterable[str], max_tokens: int) -> Config:
    """Greedy generation that ends as in this project's own evaluation."""
    return {
        "generation_kwargs": {
            "until": list(stops),
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": max_tokens,
        }
    }


def own_layout(task: hendrycks_math.Math, template: Template) -> Config:
    """The prompts of this project's own evaluation, which are those of training, without the harness's examples."""
    prompt = template.asked("\0").replace("{", "{{'{'}}")  # which begins an expression there
    return {
        "doc_to_text": prompt.replace("\0", "{{problem.strip()}}"),
        "num_fewshot": None,
        "fewshot_split": None,  # the examples are the harness's, as in Minerva's prompts
        **generating(template.stops(hendrycks_math.STOPS), task.max_tokens),
    }


def task_config(name: str, included: str, data: Data, examples: Data | None, split: str, out: Path) -> Config:
    """The task in the harness's file, on local data and out of the harness's tags."""
    files = {"test": str(data.path)} | ({split: str(examples.path)} if examples else {})
    return {
        "include": str(harness_folder() / included),
        "task": name,
        "tag": [],
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(out / "cache")},
        "test_split": "test",
        "validation_split": None,
        "training_split": split if examples else None,
        "fewshot_split": split if examples else None,
        # The harness's 5 of GSM8K are not this project's: none unless --num_fewshot asks for some. It cannot, with 0.
        "num_fewshot": None if examples else 0,
    }


def group_config(name: str, members: list[str]) -> Config:
    """Several tasks with the mean over all their questions."""
    mean = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    return {"group": name, "task": members, "aggregate_metric_list": [mean], "metadata": {"version": 1.0}}


def harness_folder() -> Path:
    """Where the harness keeps its tasks; found without importing it.

    Raises:
        EvaluationError: it is not installed.
    """
    found = importlib.util.find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        raise EvaluationError("lm-eval is not installed; install it with: pip install 'dreamer-jax[eval]'")
    return Path(found.submodule_search_locations[0]) / "tasks"


# Their data


def copied(root: Path, places: tuple[str, ...], benchmark: Benchmark, out: Path) -> Data | None:
    """A copy of the first of these files; None if there is none."""
    source = first_file(root, places) if places else None
    if source is None:
        return None
    odd: Counter[str] = Counter()
    lines = []
    for number, row in enumerate(rows_of(source, benchmark.fields)):
        wrong, copy = benchmark.copy(row)
        if copy is None:
            odd[wrong] += 1
        else:
            lines.append(json.dumps({"id": str(number), **copy}, ensure_ascii=False) + "\n")
    if not lines:
        raise EvaluationError(f"'{source}': no row can be used ({', '.join(odd)}); fetch the file again")
    path = out / "data" / f"{source.parent.name}_{source.name.split('.')[0]}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(lines))
    left_out = "".join(f", {count} left out: {what}" for what, count in odd.items())
    return Data(path, f"{len(lines):,} rows of {source}{left_out}")


def copy_fields(*names: str) -> Callable[[Row], Copied]:
    """These fields as they are."""
    return lambda row: ("", {name: row[name] for name in names})


def copy_of_mathqa(row: Row) -> Copied:
    """With the letter as the harness looks for it."""
    letter = row["correct"].strip().lower()
    if letter not in set(mathqa.LETTERS):
        return "the right option is none of a to e", None
    return "", {"Problem": row["Problem"], "options": row["options"], "correct": letter}


def copy_of_mmlu(row: Row) -> Copied:
    """With the options as a list, and the place of the right one, as on the hub."""
    letters = mmlu.LETTERS[:4]
    answer = row["answer"].strip()
    if answer not in set(letters):
        return f"the answer is none of {letters}", None
    return "", {
        "question": row["question"],
        "choices": [row[letter] for letter in letters],
        "answer": letters.index(answer),
    }


def copy_of_math(row: Row) -> Copied:
    r"""The harness finds answers in a `\boxed{}`, and fails on a solution without one."""
    if r"\boxed" not in row["solution"] or math_answer(row["solution"]) is None:
        return "no boxed answer", None
    return "", {"problem": row["problem"], "solution": row["solution"]}


def write_yaml(path: Path, config: Config) -> None:
    """Write a file of the harness."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, HEADER + yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
