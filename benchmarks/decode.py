"""How fast is a decoded token, beside another implementation and the memory's limit?

    python benchmarks/decode.py [--size small] [--batches 1 8 64] [--rounds 5] [--steps 20] [--out FILE]

A prompt of 128 tokens for every row, then a token of each row a step, greedily, weights as initialised. Where PyTorch
and transformers are installed, Qwen3's mixture of experts with LA's shape decodes beside ours, in turns.

    floor    what a step reads (weights of as many different experts as the batch may choose, and the whole cache) at
             the speed of a large copy, measured in the same run; its share of the time shows what is left to gain
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from contestant import Contestant
from sizes import SIZES
from train_step import peers_installed, start, write_rows

PROMPT = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=SIZES)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    specs: dict[str, dict] = {name: {"name": name} for name in ("LA", "DR", "DR+DA")}
    if peers_installed():
        specs |= {f"Qwen3Moe {e}": {"name": "Qwen3Moe", "experts": e} for e in ("eager", "grouped_mm")}
    lines = [
        "| batch | implementation | ms a step (range of turns) | tokens/s | floor / time |",
        "|---" * 5 + "|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        rows = write_rows(Path(folder) / "rows.npy", args.size, 1)
        for batch in args.batches:
            longest = PROMPT + 2 + args.rounds * args.steps
            common = {"size": args.size, "rows": rows, "batch": batch, "prompt": PROMPT, "longest": longest}
            lines += measured(batch, {label: common | spec for label, spec in specs.items()}, args)
    text = "\n".join(lines)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


def measured(batch: int, specs: dict[str, dict], args: argparse.Namespace) -> list[str]:
    """The rows of the table for one batch size."""
    found = {label: start(label, spec) for label, spec in specs.items()}
    running: dict[str, Contestant] = {label: contestant for label, contestant in found.items() if contestant}
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


if __name__ == "__main__":
    main()
