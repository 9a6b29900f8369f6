"""How fast is a decoded token, or a queue of requests, beside other implementations and the memory's limit?

    python benchmarks/decode.py [--size small] [--batches 1 8 64] [--rounds 5] [--steps 20] [--out FILE]
    python benchmarks/decode.py --queue [FILE --tokenizer FILE] [--slots 8 64] [--size small] [--rounds 5] [--out FILE]

By batches: a prompt of 128 tokens for every row, then a token of each row a step, greedily, weights as initialised.

    floor    what a step reads (weights of as many different experts as the batch may choose, and the whole cache) at
             the speed of a large copy, measured in the same run; its share of the time shows what is left to gain

By a queue: 64 requests, whose prompts and answers are as long as GSM8K's questions and answers in --queue (its
test.jsonl, or one like it) by --tokenizer; without FILE the lengths are drawn from two log-normal distributions fitted
to those. Which tokens they are is drawn: the models are random, and an answer ends when it is as long as the real one.
It is answered in slots that are refilled, and in batches that wait for their longest answer.

    occupancy    the share of slots x steps that made a token that was asked for; where prompts are read in steps of
                 their own, without those steps and the tokens they make
    speed        how many times as fast as the first row, turn by turn
    processor s  of all threads: other work on the machine disturbs it less; waiting without sleeping counts, too
    warm-up      seconds for the same queue with answers of two tokens when nothing was compiled yet; in no other column

Beside ours, in turns, runs what the --peers Python has: Qwen3's mixture of experts with LA's shape in transformers
(pip install torch transformers) and, for the queue, in llama.cpp (pip install xllamacpp gguf). That Python needs this
project, too. On a machine where other work runs, set OMP_WAIT_POLICY=passive: threads of OpenMP that wait for one
another without sleeping take the cores from those they wait for.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from contestant import Contestant, say
from sizes import SIZES, configs
from train_step import HERE, write_rows

from dreamer_jax.data.template import DEFAULT_TEMPLATE
from dreamer_jax.data.tokenizer import load_tokenizer
from dreamer_jax.kernels.native.huge_pages import with_huge_pages

Request = tuple[list[int], int]
"""The tokens of a prompt, and how many its answer has."""
Way = Callable[[list[Request]], float]
"""Answers all requests; the share of slot-steps that made a token that was asked for."""
Specs = dict[str, dict[str, Any]]
"""By label, what a process is told."""
PROMPT = 128
REQUESTS = 64
SCRIPTS = {"Qwen3Moe": "peer.py", "llama.cpp": "llama_cpp.py"}
"""Of the peers."""
FITTED = {"prompt": (4.08, 0.33), "answer": (4.54, 0.42)}
"""Mean and standard deviation of the logarithm of GSM8K's lengths in tokens of Llama 3."""
DRAWN = Path()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--queue", type=Path, nargs="?", const=DRAWN, help="JSON lines with question and answer")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json or tokenizer.model")
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, help="cores that each process may use; all by default")
    parser.add_argument("--peers", default=sys.executable, help="a Python with the other implementations")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.queue not in (None, DRAWN) and not args.tokenizer:
        parser.error("--queue FILE needs --tokenizer FILE to know how many tokens its texts have")
    if args.threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    with tempfile.TemporaryDirectory() as folder:
        lines = (by_batches if args.queue is None else by_queue)(args, Path(folder))
    text = "\n".join(lines)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


def threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def by_batches(args: argparse.Namespace, folder: Path) -> list[str]:
    """The table of steps, for each batch size."""
    specs: Specs = {name: {"name": name} for name in ("LA", "DR", "DR+DA")}
    if installed(args.peers, "torch", "transformers"):
        specs |= {f"Qwen3Moe {e}": {"name": "Qwen3Moe", "experts": e} for e in ("eager", "grouped_mm")}
    lines = [
        "| batch | implementation | ms a step (range of turns) | tokens/s | floor / time |",
        "|---" * 5 + "|",
    ]
    rows = write_rows(folder / "rows.npy", args.size, 1)
    for batch in args.batches:
        longest = PROMPT + 2 + args.rounds * args.steps
        common = {"size": args.size, "rows": rows, "batch": batch, "prompt": PROMPT, "longest": longest}
        lines += measured(batch, {label: common | spec for label, spec in specs.items()}, args)
    return lines


def measured(batch: int, specs: Specs, args: argparse.Namespace) -> list[str]:
    """The rows of the table for one batch size."""
    running = started(specs, args.peers)
    for _ in range(args.rounds):
        for contestant in running.values():
            contestant.run(args.steps)
    lines = []
    for label, contestant in running.items():
        contestant.end()
        seconds, about = contestant.seconds, contestant.about
        turns = [statistics.median(seconds[i : i + args.steps]) for i in range(0, len(seconds), args.steps)]
        middle = statistics.median(seconds)
        share = ""
        if "weight_bytes" in about:
            share = f"{(about['weight_bytes'] + about['cache_bytes']) / about['copy'] / middle:.0%}"
        lines.append(
            f"| {batch} | {label} | {middle * 1e3:.2f} ({min(turns) * 1e3:.2f} to {max(turns) * 1e3:.2f}) | "
            f"{batch / middle:,.0f} | {share} |"
        )
    return lines


def by_queue(args: argparse.Namespace, folder: Path) -> list[str]:
    """The table of ways to answer the queue, the first of which is what the others are compared with."""
    lengths = drawn_lengths() if args.queue == DRAWN else real_lengths(args.queue, args.tokenizer)
    queue = folder / "queue.json"
    queue.write_text(json.dumps(made_up(lengths, configs(args.size)["LA"].model.vocab)))
    specs: Specs = {name: {"name": name} for name in ("LA", "DR+DA")}
    if installed(args.peers, "torch", "transformers"):
        peer = {"name": "Qwen3Moe", "experts": "grouped_mm"}
        specs |= {"Qwen3Moe generate": peer | {"refilled": False}, "Qwen3Moe continuous": peer | {"refilled": True}}
    if installed(args.peers, "xllamacpp", "gguf"):
        specs |= {f"llama.cpp {dtype}": {"name": "llama.cpp", "dtype": dtype} for dtype in ("float32", "float16")}
    common = {"size": args.size, "queue": str(queue), "slots": args.slots}
    running = started({label: common | spec for label, spec in specs.items()}, args.peers)
    for _ in range(args.rounds):
        for contestant in running.values():
            contestant.run(1)
    for contestant in running.values():
        contestant.end()
    return queue_table(running, lengths, args)


def real_lengths(path: Path, tokenizer_path: Path) -> list[tuple[int, int]]:
    """(prompt, answer) in tokens, of rows at even distances in the file."""
    tokenizer = load_tokenizer(tokenizer_path)
    lines = path.read_text().splitlines()
    rows = [json.loads(lines[number]) for number in np.linspace(0, len(lines) - 1, REQUESTS).astype(int)]
    texts = [(DEFAULT_TEMPLATE.asked(row["question"]), DEFAULT_TEMPLATE.answered(row["answer"])) for row in rows]
    return [(len(tokenizer.encode(prompt)), len(tokenizer.encode(answer))) for prompt, answer in texts]


def drawn_lengths() -> list[tuple[int, int]]:
    """(prompt, answer) in tokens, drawn as FITTED says."""
    random = np.random.default_rng(0)
    prompts, answers = (random.lognormal(*FITTED[part], REQUESTS).astype(int) + 1 for part in ("prompt", "answer"))
    return list(zip(prompts.tolist(), answers.tolist(), strict=True))


def made_up(lengths: list[tuple[int, int]], vocab: int) -> list[Request]:
    """Requests of these lengths."""
    random = np.random.default_rng(0)
    return [(random.integers(vocab, size=prompt).tolist(), answer) for prompt, answer in lengths]


def queue_table(running: dict[str, Contestant], lengths: list[tuple[int, int]], args: argparse.Namespace) -> list[str]:
    prompts, answers = zip(*lengths, strict=True)
    lines = [
        f"size {args.size}, {threads()} threads, {args.rounds} rounds; {len(lengths)} requests with prompts of "
        f"{min(prompts)} to {max(prompts)} tokens (mean {statistics.mean(prompts):.0f}) and answers of {min(answers)} "
        f"to {max(answers)} (mean {statistics.mean(answers):.0f}), {sum(answers):,} tokens to make",
        "",
        "| implementation | slots | | seconds (range) | tokens/s | speed (range) | processor s | speed by it "
        "| occupancy | warm-up |",
        "|---" * 10 + "|",
    ]
    base = turns_of(next(iter(running.values())), 0)
    for label, contestant in running.items():
        about = contestant.about
        for number, way in enumerate(about["ways"]):
            turns, (slots, how) = turns_of(contestant, number), way.split(" ", 1)
            seconds, speed = [turn[0] for turn in turns], [a[0] / b[0] for a, b in zip(base, turns, strict=True)]
            used, by_use = [turn[1] for turn in turns], [a[1] / b[1] for a, b in zip(base, turns, strict=True)]
            middle = statistics.median(seconds)
            lines.append(
                f"| {label} | {slots} | {how} | {middle:.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | "
                f"{sum(answers) / middle:,.0f} | {statistics.median(speed):.2f} ({min(speed):.2f} to {max(speed):.2f}) "
                f"| {statistics.median(used):.2f} | {statistics.median(by_use):.2f} | "
                f"{about['occupancy'][number]:.0%} | {about['warm'][number]:.1f} s |"
            )
    return lines


def turns_of(contestant: Contestant, number: int) -> list[tuple[float, float]]:
    """(seconds, processor seconds) of each turn of one of its ways."""
    turns: list[Any] = contestant.seconds
    return turns[number :: len(contestant.about["ways"])]


def installed(python: str, *packages: str) -> bool:
    """Whether a Python has all these packages; said if not."""
    code = f"import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, {packages!r})))"
    found = subprocess.run([python, "-c", code], check=False).returncode == 0
    if not found:
        print(f"left out: {python} -m pip install {' '.join(packages)}", file=sys.stderr)
    return found


def started(specs: Specs, peers: str) -> dict[str, Contestant]:
    """The processes, warm; without those that cannot run here, of which is said why."""
    found = {}
    for label, spec in specs.items():
        print(f"{label}: starting", file=sys.stderr, flush=True)
        script = SCRIPTS.get(spec["name"], "ours.py")
        python = peers if spec["name"] in SCRIPTS else sys.executable
        # As the trainer runs; for the peers too, which gain less.
        environment = with_huge_pages(os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
        try:
            found[label] = Contestant([python, str(HERE / script)], spec, environment)
        except RuntimeError as error:
            print(f"{label}: left out, {error}", file=sys.stderr)
    return found


def in_batches(requests: list[Any], size: int) -> list[list[Any]]:
    """One after the other, `size` of them at a time."""
    return [requests[i : i + size] for i in range(0, len(requests), size)]


def serve_ways(ways: dict[str, Way], requests: list[Request]) -> None:
    """The child's end of a queue, which it answers in all ways for every number on its standard input.

    First once with answers of two tokens, which compiles all that the long ones need.
    """
    warm = [timed(way, [(tokens, 2) for tokens, _ in requests])[0] for way in ways.values()]
    say({"ways": list(ways), "warm": warm})
    for _ in sys.stdin:
        seconds, processor, occupancy = zip(*(timed(way, requests) for way in ways.values()), strict=True)
        say({"seconds": [*zip(seconds, processor, strict=True)], "occupancy": occupancy})


def timed(way: Way, requests: list[Request]) -> tuple[float, float, float]:
    """(seconds, seconds of all the process's threads, occupancy)."""
    begun, used = time.perf_counter(), time.process_time()
    occupancy = way(requests)
    return time.perf_counter() - begun, time.process_time() - used, occupancy


if __name__ == "__main__":
    main()
