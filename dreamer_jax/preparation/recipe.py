"""The recipe: which raw sets, how each is read, and what all of them go through; `get_config()` of a file gives it.

Recipe(
    sources=(
        RawSource(
            "deepmath",
            hub="zwhe99/DeepMath-103K",
            licence="MIT",
            prompt=("question",),
            response=("r1_solution_1", "r1_solution_2", "r1_solution_3"),
            traces="deepmath",
        ),
    ),
    root="$RAW",
    out="prepared",
)
"""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from dreamer_jax.config import PROMPT_TEMPLATE, RESPONSE_TEMPLATE, SourceName, TextPattern, TextTemplate
from dreamer_jax.values import (
    LIST,
    Count,
    CountOrZero,
    Positive,
    Share,
    Text,
    Texts,
    Word,
    Words,
    require,
    section,
)

NON_COMMERCIAL, GATED = "non-commercial", "gated"
"""What `exclude` takes besides names of sources."""
Part = Annotated[float, Field(gt=0, le=1)]
"""More than nothing of something, and at most all of it."""


@section("sources.keep")
class Keep:
    """Rows are kept if a field has one of these values."""

    field: Word
    """Dotted path of the field. Where it lists as many values as the row has answers, each decides on its answer."""
    values: Texts
    """As JSON writes them: "cot", "true", "3"."""
    drop: bool = False
    """Drop the rows that have one of the values instead, and keep all others."""


@section("sources", label="name")
class RawSource:
    """One raw set: where it is, how its rows are laid out, and what it may be used for."""

    name: SourceName
    """Name of the set in reports, and of its folder in the result."""
    hub: Text = ""
    """Owner and name at the Hugging Face hub."""
    subset: Text = ""
    """Which of its subsets, which the hub calls configs; empty for all."""
    split: Word = "train"
    """Which of its splits."""
    files: Words = ()
    """Patterns of files below the recipe's root: Parquet, JSON lines or JSON arrays, plain, .gz or .zst. If there are
    none, all such files in the folder that is named as the hub names the set, or as `name`."""
    licence: Word = "unknown"
    commercial: bool = True
    """Whether the licence allows commercial use."""
    gated: bool = False
    """Whether one has to ask for access."""

    prompt: Words = ()
    """Dotted paths of the fields whose texts are the question, with blank lines between; empty ones are left out."""
    response: Words = ()
    """Dotted paths of the fields with answers. Each answer of several makes a row of its own."""
    joined: bool = False
    """The texts that a response field lists are parts of one answer, not several answers."""
    turns: Text = ""
    """In place of these two: the field with a conversation, whose first question and answer are taken."""
    text: Text = ""
    """In place of all these: the field with plain text, in which question and answer are not told apart."""
    keep: Annotated[tuple[Keep, ...], LIST] = ()
    """Which rows are kept; all conditions have to hold."""
    traces: Literal["none", "think", "deepmath", "open_thoughts"] = "none"
    """How reasoning traces are marked in the answers (see reasoning)."""
    remove: TextPattern = ""
    """Regular expression; what it matches is taken out of questions and answers."""
    without: TextPattern = ""
    """Regular expression; a row goes if it matches somewhere in the question or in the answer, with its trace."""
    cut_at: CountOrZero = 0
    """Characters at which the source cut its answers; 0 if it did not."""

    share: Part = 1.0
    """Part of the raw rows that is read, drawn at random."""
    cap: CountOrZero = 0
    """Most rows that are left after removing duplicates, drawn at random; 0 for all."""
    repeats: Positive = 1.0
    """How often the set comes in one epoch of the mixture."""
    held_out: Share = 0.002
    """Part of the questions that is held out."""
    benchmark: bool = False
    """The held-out part is a benchmark: rows of other questions that contain one of its questions are dropped."""

    def __post_init__(self) -> None:
        """Exactly one layout."""
        layouts = (bool(self.prompt or self.response), bool(self.turns), bool(self.text))
        require(
            sum(layouts) == 1 and bool(self.prompt) == bool(self.response),
            f"source '{self.name}': give either prompt and response, or turns, or text",
        )
        require(bool(self.hub or self.files), f"source '{self.name}': give its hub id, or patterns of its files")


@section("clean")
class CleanConfig:
    """The longest texts that are kept."""

    prompt: Count = 16_384
    """Characters of a question."""
    response: Count = 32_768
    """Characters of an answer or of plain text."""


@section("duplicates")
class DuplicatesConfig:
    """What counts as said already; see dedup.Rule."""

    near: bool = True
    """Drop near duplicates, beside exact ones."""
    threshold: Part = 0.8
    """Least similarity of near duplicates: of their sets of runs of three words, Jaccard's."""
    answers: Count = 32
    """Most answers to one question, over all sources."""
    keys_at_once: Count = 2_000_000
    """Keys that are matched in one pass, of some 75 bytes of memory each; a row has one, for near duplicates 16. More
    passes give the same result, but each reads all ranks and keys of exact duplicates, so give much for many rows."""
    pairs_at_once: Count = 200_000
    """Pairs of rows whose texts are compared in one pass."""


@section("decontaminate.benchmarks", label="name")
class Benchmark:
    """The questions of a benchmark."""

    name: Word
    files: Words
    """Patterns of files below decontaminate.root: JSON lines, JSON arrays, Parquet or CSV, plain, .gz or .zst. Each of
    them has to match a file."""
    question: Word
    """Field of the question."""
    also: Words = ()
    """Patterns of files that are read if they are there."""
    options: Words = ()
    """Fields of the options of a multiple choice. A question that is hardly one without them is looked for with them,
    too."""
    columns: Words = ()
    """Fields of a CSV file that has no line of names."""


PAPER_BENCHMARKS = (
    Benchmark("gsm8k", ("gsm8k/test.jsonl*",), "question"),
    Benchmark("math", ("math/test.jsonl*",), "problem", also=("math/math500.jsonl*",)),
    Benchmark(
        "mmlu_math",
        ("mmlu_math/*_test.csv*",),
        "question",
        also=("mmlu_math/*_val.csv*", "mmlu_math/*_dev.csv*"),
        options=("A", "B", "C", "D"),
        columns=("question", "A", "B", "C", "D", "answer"),
    ),
    Benchmark("mathqa", ("mathqa/test.json*",), "Problem", also=("mathqa/dev.json*",), options=("options",)),
)
"""Those of Section 4.1, in the files that docs/evaluation.md names. Maths-College is a source with `benchmark`."""


@section("decontaminate")
class DecontaminateConfig:
    """Whose questions no training row may contain."""

    root: Text = ""
    """Folder of the benchmarks' files; may begin with ~ or name an environment variable."""
    benchmarks: Annotated[tuple[Benchmark, ...], LIST] = PAPER_BENCHMARKS
    partial: bool = False
    """Go on if some of a benchmark's files are not there, with those that are."""


@section("tokens")
class TokensConfig:
    """From texts to documents of token ids, packed in rows."""

    tokenizer: Word = "train"
    """'train' (SentencePiece BPE on a sample of all sources), or a path to a SentencePiece .model or a Hugging Face
    tokenizer.json."""
    vocab: Count = 32_000
    """Entries of a tokenizer that is trained."""
    sample: Count = 400_000
    """Rows that it is trained on; each source gives its share of the mixture."""
    special_tokens: Words = ()
    """Names of the tokens that begin and end a document, where a given tokenizer has uncommon ones."""
    prompt_template: TextTemplate = PROMPT_TEMPLATE
    """What is put around a question."""
    response_template: TextTemplate = RESPONSE_TEMPLATE
    """What is put around an answer."""
    context: Annotated[int, Field(ge=2, le=2**24)] = 1024
    """T: tokens in a packed row. Longer documents are left out, and counted."""
    budget: CountOrZero = 0
    """Tokens, in millions, of the training that is planned: the manifest says how often each source comes in it."""


@section("work")
class WorkConfig:
    """How the work is done. Nothing but `shard_rows` changes the result."""

    engine: Literal["local", "ray"] = "local"
    """Processes of this machine, or tasks of a Ray cluster with a shared file system."""
    workers: CountOrZero = 0
    """Processes; 0 for as many as there are cores (with Ray: for as many as it has)."""
    shard_rows: Annotated[int, Field(ge=1, le=2**22)] = 100_000
    """Rows of a shard: what is done at once, and what a killed run loses at most, for each worker."""
    fetch: bool = False
    """Fetch sets from the hub that are not below the root."""


@section("")
class Recipe:
    """Everything about a preparation."""

    sources: Annotated[tuple[RawSource, ...], LIST] = ()
    """In the order of their claim: of duplicates, the one of the earlier source is kept."""
    root: Text = ""
    """Folder of the raw sets; may begin with ~ or name an environment variable ($RAW)."""
    out: Word = "prepared"
    """Folder of the result, which `data.prepared` of a training config then names."""
    exclude: Words = ()
    """Sources that are left out: names, 'non-commercial', 'gated'."""
    clean: CleanConfig = field(default_factory=CleanConfig)
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    work: WorkConfig = field(default_factory=WorkConfig)

    def __post_init__(self) -> None:
        """Check what no single key shows."""
        names = [source.name for source in self.sources]
        require(bool(names), "sources: name at least one raw set")
        require(len(set(names)) == len(names), f"sources: names are not distinct: {names}")
        known = {*names, NON_COMMERCIAL, GATED}
        unknown = [name for name in self.exclude if name not in known]
        require(not unknown, f"exclude: there is no {unknown}; there are {', '.join(sorted(known))}")


def included(recipe: Recipe) -> dict[int, RawSource]:
    """The sources that are used, by their place in the recipe."""

    def is_left_out(source: RawSource) -> bool:
        return (
            source.name in recipe.exclude
            or (NON_COMMERCIAL in recipe.exclude and not source.commercial)
            or (GATED in recipe.exclude and source.gated)
        )

    kept = {place: source for place, source in enumerate(recipe.sources) if not is_left_out(source)}
    require(bool(kept), "exclude: leaves no source")
    return kept


def licences(recipe: Recipe) -> str:
    """The sources, what each may be used for, and which are left out."""
    used = included(recipe).values()
    lines = []
    for source in recipe.sources:
        marks = [
            "" if source.commercial else "no commercial use",
            "access has to be asked for" if source.gated else "",
            "" if source in used else "left out",
        ]
        lines.append("  ".join(filter(None, [f"{source.name:24}  {source.licence:24}", source.hub, *marks])))
    return "\n".join(lines)
