"""Inputs that have failed, run through the doors as a user would: `python -m tests.cases FOLDER [NAME ...]`.

FOLDER has a folder for each case, beside `small.py`, the config that they use, and `rows`, its documents. Ends with the
number of wrong ones, which is the exit code, too.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CASES: dict[str, Callable[["Bench"], None]] = {}


class Wrong(Exception):
    """What is not as it should be."""


class Bench:
    """The doors, with folders of their own."""

    def __init__(self, cases: Path, folder: Path):
        self.cases, self.folder = cases, folder

    def run(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """One command, `python -m dreamer_jax.<first> ...`, from within the scratch folder."""
        known = {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(self.folder.parent / "compiled")}
        command = [sys.executable, "-m", f"dreamer_jax.{arguments[0]}", *map(str, arguments[1:])]
        return self.command(command, **known, **environment)

    def command(self, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, capture_output=True, text=True, cwd=self.folder, env=os.environ | environment, timeout=280
        )

    def train(
        self, *more: object, rows: str = "rows", config: str = "small.py", out: object = None, **environment: str
    ):
        return self.run(
            "train", "--config", self.cases / config, "--data.root", self.cases / rows, "--data.prepared",
            self.folder / "prepared", "--out", out or self.folder / "o", *more, **environment,
        )  # fmt: skip


def case(function: Callable[[Bench], None]) -> Callable[[Bench], None]:
    """Register a case under its folder's name."""
    CASES[function.__name__.replace("_", "-")] = function
    return function


def check(holds: bool, what: object) -> None:
    if not holds:
        raise Wrong(str(what)[-1500:])


def succeeds(done: subprocess.CompletedProcess[str]) -> str:
    check(done.returncode == 0, f"exit code {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def is_refused(done: subprocess.CompletedProcess[str], *words: str) -> str:
    text = done.stdout + done.stderr
    check(done.returncode not in (0, None) and done.returncode > 0, f"exit code {done.returncode}: {text}")
    check("Traceback" not in text, f"a traceback: {text}")
    for word in words:
        check(word in text, f"no '{word}' in: {text}")
    return text


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["train/loss"] for record in records if "train/loss" in record]


def documents(output: str, split: str = "train") -> int:
    [line] = [line for line in output.splitlines() if f" {split}:" in line and "documents" in line]
    return int(line.split(f"{split}:")[1].split()[0].replace(",", ""))


@case
def bool_override(b: Bench) -> None:
    for spelling in (["--model.depth_recurrent", "False"], ["--model.depth_recurrent=false"]):
        check("trained LA" in succeeds(b.train("--name", "la", *spelling)), "not LA")
    succeeds(b.train("--name", "board", "--log.tensorboard", "True"))
    check((b.folder / "o/board/tensorboard").is_dir(), "no tensorboard")
    done = b.run("plan", "--config", b.cases / "small.py", "--train.steps", "1e4")
    check(done.returncode == 0 or "train.steps" in done.stderr, done.stderr)


@case
def brackets_in_path(b: Bench) -> None:
    for name in ("sweep[lr=1e-3]", "a*b", "what?"):
        is_refused(b.train(out=b.folder / name), "out", name)
    spaces = b.folder / "with space"
    succeeds(b.train(out=spaces))
    succeeds(b.run("generate", "--checkpoint", spaces / "small", "--prompt", "hi", "--max-tokens", 4))


@case
def byte_order_mark(b: Bench) -> None:
    output = succeeds(b.train(rows="byte-order-mark"))
    check(documents(output) == 200 and "skipped" not in output, output)


@case
def clip_zero(b: Bench) -> None:
    found = {}
    for clip in ("0", "1"):
        succeeds(b.train("--name", f"clip{clip}", "--optimizer.gradient_clip", clip, "--train.steps", 40))
        found[clip] = losses(b.folder / f"o/clip{clip}")[-1]
    check(abs(found["0"] - found["1"]) < 0.4 and found["0"] < 4, found)
    is_refused(b.train("--optimizer.gradient_clip", "-1"), "optimizer.gradient_clip")
    is_refused(b.train("--optimizer.learning_rate", "nan"), "optimizer.learning_rate")
    is_refused(b.run("plan", "--config", b.cases / "small.py", "--mfu", 0), "mfu")


@case
def divergence(b: Bench) -> None:
    every = ["--checkpoint.every", 2, "--checkpoint.keep", 1]
    succeeds(b.train(*every, "--train.steps", 4))
    longer = [*every, "--train.steps", 20, "--train.max_bad_steps", 6]
    text = is_refused(b.train(*longer, "--optimizer.learning_rate", "1e20"), "last good checkpoint is step 4")
    check("4" in os.listdir(b.folder / "o/small/checkpoints"), text)
    output = succeeds(b.train(*longer))
    check("resuming from step 4" in output and "step 20" in output, output)


@case
def eos_not_special(b: Bench) -> None:
    given = ["--data.tokenizer", b.cases / "eos-not-special/tokenizer.json", "--model.vocab", 512]
    given += ["--data.context", 128]  # spelt out, the token makes the last row longer than 64
    output = succeeds(b.train(*given, rows="eos-not-special"))
    check(documents(output) == 201, output)


@case
def float_steps(b: Bench) -> None:
    done = b.train(config="float-steps/config.py")
    if done.returncode:
        is_refused(done, "steps", "whole number")
        return
    [run] = (b.folder / "o").iterdir()
    succeeds(b.run("generate", "--checkpoint", run, "--prompt", "hi", "--max-tokens", 4))
    succeeds(b.run("convert", "--checkpoint", run, "--to", "safetensors", "--out", b.folder / "export"))
    succeeds(b.train(config="float-steps/config.py"))


@case
def huge_integer(b: Bench) -> None:
    done = b.train(rows="huge-integer")
    if done.returncode == 0:
        check(documents(done.stdout) == 201, done.stdout)
        return
    is_refused(done, "train.jsonl, line 201")
    check(documents(succeeds(b.train("--data.bad_rows", "skip", rows="huge-integer"))) == 200, "not 200")


@case
def proxy(b: Bench) -> None:
    refusing = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    command = [sys.executable, str(ROOT / "launch/local.py"), "--processes", "2", "--"]
    command += ["--config", str(b.cases / "small.py"), "--data.root", str(b.cases / "rows")]
    command += ["--data.prepared", str(b.folder / "prepared"), "--out", str(b.folder / "o")]
    succeeds(b.command(command, PYTHONPATH=str(ROOT), **refusing))


@case
def special_names(b: Bench) -> None:
    for name in ("deepseek.json", "bos-only.json"):
        given = ["--data.tokenizer", b.cases / "special-names" / name, "--model.vocab", 512, "--name", name[:4]]
        done = b.train(*given)
        if done.returncode:
            is_refused(done, "data.special_tokens")
            continue
        run = b.folder / "o" / name[:4]
        succeeds(b.run("generate", "--checkpoint", run, "--prompt", "hi", "--max-tokens", 4))


@case
def stray_file(b: Bench) -> None:
    succeeds(b.train())
    run = b.folder / "o/small"
    for name in (".DS_Store", "._tokenizer.model", ".nfs0001"):
        (run / "tokenizer" / name).write_text("stranger")
    succeeds(b.run("generate", "--checkpoint", run, "--prompt", "hi", "--max-tokens", 4))
    succeeds(b.run("convert", "--checkpoint", run, "--to", "safetensors", "--out", b.folder / "export"))
    check("resuming from step 6" in succeeds(b.train("--train.steps", 8)), "not resumed")


@case
def stream_space(b: Bench) -> None:
    succeeds(b.command([sys.executable, str(b.cases / "stream-space/check.py")], PYTHONPATH=str(ROOT)))


@case
def tilde(b: Bench) -> None:
    home = {"HOME": str(b.folder / "home")}
    (b.folder / "home").mkdir()
    succeeds(b.train(out=b.folder / "home/runs", **home))
    shutil.copy(b.cases / "small.py", b.folder / "home/x.py")
    shutil.copy(b.cases / "small.py", b.folder / "home/y.py")
    succeeds(b.run("generate", "--checkpoint=~/runs/small", "--prompt", "hi", "--max-tokens", 4, **home))
    there = ["--checkpoint=~/runs/small", "--to", "safetensors", "--out=~/export"]
    succeeds(b.run("convert", *there, **home))
    succeeds(b.run("convert", "--from=safetensors", "--source=~/export", "--out=~/runs/back", **home))
    succeeds(b.run("plan", "--config=~/x.py", "--match=~/y.py", "--out=~/z.py", **home))
    check((b.folder / "home/z.py").is_file(), "no ~/z.py")
    check(not list(b.folder.glob("~*")), "a folder named ~")


@case
def unknown_character(b: Bench) -> None:
    given = ["--data.tokenizer", b.cases / "unknown-character/tokenizer.json", "--model.vocab", 512]
    given += ["--data.context", 128]  # the last row is longer than 64
    done = b.train(*given, rows="unknown-character")
    if done.returncode == 0:
        check(documents(done.stdout) == 201 and "unknown" in done.stdout, done.stdout)
        return
    is_refused(done, "character")
    succeeds(b.train(*given, "--data.bad_rows", "skip", rows="unknown-character"))


@case
def unwritable(b: Bench) -> None:
    if os.geteuid() == 0:  # root may write everywhere: a file in the way refuses as well
        (b.folder / "file").write_text("")
        is_refused(b.train("--data.prepared", b.folder / "file"), "data.prepared")
        is_refused(b.train(out=b.folder / "file"), str(b.folder / "file"))
        is_refused(b.train(out="/proc/nowhere"), "/proc/nowhere")
        succeeds(b.train())
        there = ["--checkpoint", b.folder / "o/small", "--to", "safetensors", "--out"]
        is_refused(b.run("convert", *there, "/proc/nowhere"), "/proc/nowhere")
        return
    for key in ("prepared", "o"):
        (b.folder / key).mkdir(mode=0o500)
        is_refused(b.train(), str(b.folder / key))
        (b.folder / key).chmod(0o700)


@case
def x64(b: Bench) -> None:
    done = b.train("--name", "wide", JAX_ENABLE_X64="1")
    if done.returncode:
        is_refused(done, "JAX_ENABLE_X64")
        return
    succeeds(b.train("--name", "plain"))
    pairs = zip(losses(b.folder / "o/wide"), losses(b.folder / "o/plain"), strict=True)
    check(all(abs(wide - plain) < 1e-4 for wide, plain in pairs), "other losses")
    run = b.folder / "o/wide"
    succeeds(b.run("generate", "--checkpoint", run, "--prompt", "hi", "--max-tokens", 4, JAX_ENABLE_X64="1"))


def main() -> int:
    folder, *names = sys.argv[1:]
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name, run in CASES.items():
            if names and name not in names:
                continue
            place = Path(scratch) / name
            place.mkdir()
            try:
                run(Bench(Path(folder).resolve(), place))
                print(f"{name}: right", flush=True)
            except (Wrong, subprocess.TimeoutExpired, ValueError, OSError) as error:
                wrong += 1
                print(f"{name}: WRONG\n  {error}".replace("\n", "\n  "), flush=True)
    print(f"{wrong} wrong")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
