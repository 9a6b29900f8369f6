"""How fast is a training step, beside other implementations and the machine's limit?

    python benchmarks/train_step.py [--size tiny] [--rounds 5] [--steps 3] [--warm 30] [--only LA DR+DA] [--out FILE]

LA, DR and DR+DA at matched budgets (FLOPs per token and parameters), and, where PyTorch and transformers are installed
(pip install torch transformers), the mixtures of experts GLM-4 and Qwen3 with LA's shape. Every implementation runs in
a process of its own, is first trained for --warm steps on generated mathematics, so that its routers have learned what
they send where, and is then timed in turns with the others: forward, backward, clipping, AdamW. One row counts as one
document.

    tokens/s    median over all timed steps, with the range of the rounds' medians
    GFLOP/s     model FLOPs (three times the forward pass's matrix products), nothing for recomputation
    of matmul   that, as a share of the fastest library's large matrix product on this machine, measured in the same run
    peak        bytes of the process beyond its imports (host), or of the device (GPU), while steps run
    busiest     tokens of the busiest expert over the mean

On a GPU the processes run one after the other: two such models do not fit.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from contestant import Contestant
from sizes import SIZES

from dreamer_jax.kernels.native.huge_pages import with_huge_pages

HERE = Path(__file__).resolve().parent
OURS = ("LA", "DR", "DR+DA")
PEERS = ("Qwen3Moe", "Glm4Moe")
EXPERTS = ("grouped_mm", "eager")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size", default="tiny", choices=SIZES, help="tiny, small, layer (CPUs) or 1b (a GPU of 80 GB)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns that each implementation has")
    parser.add_argument("--steps", type=int, default=3, help="steps of a turn")
    parser.add_argument("--warm", type=int, default=30, help="steps of training before")
    parser.add_argument("--only", nargs="+", choices=(*OURS, *PEERS), help="names of implementations")
    parser.add_argument("--experts", nargs="+", default=list(EXPERTS), help="the peers' ways to multiply, fastest wins")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="try torch.compile, too")
    parser.add_argument("--apart", action="store_true", help="one after the other instead of in turns (GPUs)")
    parser.add_argument("--out", type=Path, help="write the table there, too")
    args = parser.parse_args()
    wanted = args.only or [*OURS, *(PEERS if peers_installed() else ())]
    with tempfile.TemporaryDirectory() as folder:
        rows = write_rows(Path(folder) / "rows.npy", args.size, args.warm)
        entries = [entry for name in wanted for entry in entries_of(name, args)]
        specs = {label: {"size": args.size, "rows": rows, **spec} for label, spec in entries}
        results = one_by_one(specs, args) if args.apart else in_turns(specs, args)
    text = report(results, args)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


def peers_installed() -> bool:
    """Whether there is anything to compare with; said if not."""
    found = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    if not found:
        print("no peers: pip install torch transformers", file=sys.stderr)
    return found


def write_rows(path: Path, size: str, steps: int) -> str:
    """Prepare the tokens in a process of their own: the parent must not hold a GPU."""
    code = (
        f"import numpy as np, sizes; c = sizes.configs({size!r})['LA']; "
        f"np.save({str(path)!r}, sizes.learned_rows(c.train.batch, c.data.context, {steps}))"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE, env=environment, stdout=subprocess.DEVNULL)
    return str(path)


def entries_of(name: str, args: argparse.Namespace) -> list[tuple[str, dict]]:
    """(label, what to tell the process) of each way to run an implementation."""
    if name in OURS:
        return [(name, {"name": name})]
    ways = [(experts, compiled) for compiled in (False, True)[: 1 + args.compile] for experts in args.experts]
    return [
        (f"{name} {experts}{', compiled' * compiled}", {"name": name, "experts": experts, "compiled": compiled})
        for experts, compiled in ways
    ]


def start(label: str, spec: dict) -> Contestant | None:
    """The process, warm; None, with a word on why, if it cannot run here."""
    print(f"{label}: starting", file=sys.stderr, flush=True)
    script = HERE / ("ours.py" if spec["name"] in OURS else "peer.py")
    # As the trainer runs; for the peers too, which gain less.
    environment = with_huge_pages(os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
    try:
        return Contestant([sys.executable, str(script)], spec, environment)
    except RuntimeError as error:
        print(f"{label}: left out, {error}", file=sys.stderr)
        return None


def in_turns(specs: dict[str, dict], args: argparse.Namespace) -> dict[str, Contestant]:
    """All processes at once, each waiting for its turn."""
    started = {label: start(label, spec) for label, spec in specs.items()}
    running = {label: contestant for label, contestant in started.items() if contestant}
    for contestant in running.values():
        contestant.run(1)
        contestant.seconds.clear()
    for _ in range(args.rounds):
        for contestant in running.values():
            contestant.run(args.steps)
    for contestant in running.values():
        contestant.end()
    return running


def one_by_one(specs: dict[str, dict], args: argparse.Namespace) -> dict[str, Contestant]:
    """Each process alone with the device."""
    found = {}
    for label, spec in specs.items():
        contestant = start(label, spec)
        if contestant:
            contestant.run(1)
            contestant.seconds.clear()
            contestant.run(args.rounds * args.steps)
            contestant.end()
            found[label] = contestant
    return found


def report(results: dict[str, Contestant], args: argparse.Namespace) -> str:
    """The table in Markdown; of each peer only its fastest way."""
    peak = max(contestant.about["matmul_flops"] for contestant in results.values())
    lines = [
        f"size {args.size}, {args.rounds} rounds of {args.steps} steps after {args.warm} of training; a large matrix "
        f"product: {peak / 1e9:,.1f} GFLOP/s",
        "",
        "| implementation | tokens/s (range) | GFLOP/s | of matmul | peak | compile | busiest | parameters | loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for label in fastest_ways(results):
        about, seconds = results[label].about, results[label].seconds
        turns = [statistics.median(seconds[i : i + args.steps]) for i in range(0, len(seconds), args.steps)]
        speed = about["tokens"] / statistics.median(seconds)
        low, high = about["tokens"] / max(turns), about["tokens"] / min(turns)
        flops = speed * about["flops"]
        lines.append(
            f"| {label} | {speed:,.0f} ({low:,.0f} to {high:,.0f}) | {flops / 1e9:,.1f} | {flops / peak:.0%} | "
            f"{about['peak_bytes'] / 2**20:,.0f} MiB | {about['compile_seconds']:.0f} s | {about['imbalance']:.1f} | "
            f"{about['parameters'] / 1e6:,.2f} M | {about['loss']:.2f} |"
        )
    return "\n".join(lines)


def fastest_ways(results: dict[str, Contestant]) -> list[str]:
    """The labels to show: of several ways to run one implementation, the fastest."""
    best: dict[str, str] = {}
    for label, contestant in results.items():
        name = label.split()[0]
        if name not in best or statistics.median(contestant.seconds) < statistics.median(results[best[name]].seconds):
            best[name] = label
    return list(best.values())


if __name__ == "__main__":
    main()
