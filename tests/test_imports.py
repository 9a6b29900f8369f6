"""Imports go one way, and what need not wait for JAX does not import it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dreamer_jax"
DOORS = ("train", "plan", "prepare", "generate", "evaluate", "analyze", "convert.__main__")
SURFACE = "__init__"
"""The package itself, and what it offers under its own name: dreamer_jax.load."""
ORDER = (
    ("errors", "files"),
    ("door", "values", "gathering", "figures"),
    ("dimensions",),
    ("model_config",),
    ("config",),
    ("distributed", "sharding"),
    ("kernels",),
    ("model",),
    ("training", "inference"),
    ("evaluation", "convert"),
    ("analysis",),
    ("language_model",),
    (SURFACE, *DOORS),
)
"""A module imports its own kind and those of earlier rows. docs/architecture.md gives the same order."""
ASIDE = {
    "accounting": ("errors", "files", "dimensions", "model_config", "config"),
    "data": ("errors", "files", "dimensions", "model_config", "config", "distributed"),
    "preparation": ("errors", "files", "values", "dimensions", "model_config", "config", "distributed", "data"),
}
"""Beside that order: what each imports besides itself. Only those below import it."""
USE_ASIDE = ("training", "evaluation", "convert", "analysis", "language_model", *DOORS)
PLATFORMS = {"native", "tokamax", "splash", "cpu", "gpu", "tpu", "cuda", "mosaic", "triton", "pallas"}
WITHOUT_JAX = """
import importlib, pkgutil, sys
import dreamer_jax, dreamer_jax.accounting, dreamer_jax.config, dreamer_jax.kernels.native.huge_pages
for module in pkgutil.iter_modules(dreamer_jax.accounting.__path__, "dreamer_jax.accounting."):
    importlib.import_module(module.name)
from dreamer_jax import analyze, evaluate, generate, plan, prepare, train
try:
    plan.main(["--help"])
except SystemExit:
    pass
slow = {"jax", "flax", "optax", "orbax", "grain", "tensorflow_datasets"} & set(sys.modules)
sys.exit(", ".join(slow) or 0)
"""


def kind_of(name: str) -> str:
    """Of a module or of something in it, by its name in the package: "kernels.plain.linear" is of "kernels"."""
    for door in DOORS:
        if f"{name}.".startswith(f"{door}."):
            return door
    first = name.split(".")[0] or SURFACE
    return first if (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").is_file() else SURFACE


def kind_of_file(path: Path) -> str:
    return kind_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, kind) of everything that a module imports of this package: in functions and for type checkers, too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.level == 0 else ["dreamer_jax"]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "dreamer_jax":
                yield node.lineno, kind_of(name.removeprefix("dreamer_jax").removeprefix("."))


def allowed(kind: str) -> set[str]:
    """The kinds that a module of this kind may import."""
    if kind in ASIDE:
        return {kind, *ASIDE[kind]}
    row = next(i for i, kinds in enumerate(ORDER) if kind in kinds)
    earlier = {kind for kinds in ORDER[:row] for kind in kinds}
    return {kind} | earlier | set(ASIDE if kind in USE_ASIDE else ())


def words_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, word) of the names and strings of a module, without docstrings and comments."""
    tree = ast.parse(path.read_text())
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) in documentation:
            continue
        for _, value in ast.iter_fields(node):
            if isinstance(value, str):
                line = getattr(node, "lineno", 0)
                yield from ((line, word) for word in re.findall(r"[a-z]+|[A-Z]+[a-z]*", value))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    kind = kind_of_file(path)
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: '{kind}' imports '{other}'; it may import {', '.join(sorted(allowed(kind)))}"
        for line, other in imports(path)
        if other not in allowed(kind)
    ]
    assert not wrong, "\n".join(["imports go one way (docs/architecture.md, Imports)", *wrong])


def test_the_documentation_gives_the_same_order():
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = re.search(r"## Imports\n+They go one way: (.*?) and the doors", text, re.DOTALL)
    assert section, "docs/architecture.md: the section Imports should begin 'They go one way: ... and the doors'"
    assert re.findall(r"`(\w+)`", section[1]) == [kind for kinds in ORDER[:-1] for kind in kinds]


def test_the_model_names_no_platform():
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: '{word}'"
        for path in sorted((PACKAGE / "model").rglob("*.py"))
        for line, word in words_of(path)
        if word.lower() in PLATFORMS
    ]
    assert not wrong, "\n".join(
        ["a model says what is computed; who computes it is chosen in dreamer_jax/kernels", *wrong]
    )


def test_a_module_is_named_for_what_it_holds():
    folders = ("dreamer_jax", "tests", "benchmarks", "launch", "configs")
    found = [str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("util*.py")]
    assert not found, f"a module is named for what it holds, not 'utils': {', '.join(found)}"


def test_configuration_accounting_and_help_do_not_wait_for_jax():
    done = subprocess.run([sys.executable, "-c", WITHOUT_JAX], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"imported, though nothing here needs it: {done.stderr}"
    assert "--device" in done.stdout


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        ("kernels/rows.py", "def f():\n    from dreamer_jax.model import rope", [(2, "model")]),
        ("data/pack.py", "if TYPE_CHECKING:\n    from dreamer_jax import model", [(2, "model")]),
        ("accounting/flops.py", "import dreamer_jax.sharding as s", [(1, "sharding")]),
        ("inference/text.py", "import jax\nfrom dreamer_jax.training.loss import x", [(2, "training")]),
        ("model/rope.py", "from dreamer_jax import config, load", [(1, SURFACE)]),
        ("model/rope.py", "from . import router", [(1, SURFACE)]),
        ("sharding.py", "from dreamer_jax import distributed", [(1, "distributed")]),
        ("training/loop.py", "from dreamer_jax.convert.__main__ import main", [(1, "convert.__main__")]),
        ("convert/model.py", "from dreamer_jax.training.loss import x\nfrom dreamer_jax.data import pack", []),
        ("model_config.py", "from dreamer_jax import config", [(1, "config")]),
    ],
)
def test_an_import_the_wrong_way_is_found(tmp_path, file, source, found):
    path = tmp_path / "module.py"
    path.write_text(source)
    permitted = allowed(kind_of_file(PACKAGE / file))
    assert [(line, kind) for line, kind in imports(path) if kind not in permitted] == found


def test_a_platform_in_code_is_found_and_in_words_about_it_is_not(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        '"""On a gpu."""\nx = 1  # tpu\n"""A cpu."""\nif kernels == "native":\n    use_splash(gpu=f"{x} TPU")\n'
    )
    assert [(line, word) for line, word in words_of(path) if word.lower() in PLATFORMS] == [
        (4, "native"),
        (5, "splash"),
        (5, "gpu"),
        (5, "TPU"),
    ]
