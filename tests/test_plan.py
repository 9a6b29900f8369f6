"""The plan door, called as a user would."""

import json
import time
from pathlib import Path

import pytest

from dreamer_jax import plan
from dreamer_jax.accounting.fit import HEADROOM, changes_that_fit, fits, largest_microbatch
from dreamer_jax.accounting.hardware import hardware
from dreamer_jax.accounting.memory import SINGLE
from dreamer_jax.config import load

CONFIGS = Path(__file__).parents[1] / "configs"
BIG = str(CONFIGS / "dr_da_2b.py")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = plan.main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def test_the_tables_show_costs_fit_and_speed(capsys) -> None:
    code, out, _ = run(capsys, "--config", BIG, "--device", "h200")
    assert code == 0
    for text in (
        "experts 1097, active experts 8, expert width 472",
        "2,078,767,488",
        "1,610.56",
        "fits 1 x h200",
        "6.6335 GB",
        "tokens/s",
        "100B tokens",
    ):
        assert text in out


def test_json_holds_the_same_figures(capsys) -> None:
    _, out, _ = run(capsys, "--config", BIG, "--device", "v5e", "--mesh", "data=32,expert=8", "--json",
                    "--train.microbatches", "1")  # fmt: skip
    record = json.loads(out)
    assert record["devices"] == 256
    assert record["model"] | {"dimensions": {}} == {
        "variant": "DR+DA", "depth": 32, "width": 1024, "experts": 1097, "active_experts": 8, "expert_width": 472,
        "rope_base": 10_000.0, "window": 0, "dilation": 1, "form": "softmax", "dimensions": {},
    }  # fmt: skip
    assert record["model"]["dimensions"]["sa"]["query_heads"] == 16
    assert record["parameters"]["total"] == 2_078_767_488
    assert record["device"]["fits"]
    memory = record["training_memory"]
    assert memory["total"] == sum(size for name, size in memory.items() if name not in ("total", "at_rest"))


def test_what_does_not_fit_comes_with_changes_that_make_it_fit(capsys) -> None:
    code, out, _ = run(capsys, "--config", BIG, "--device", "v5e")
    assert code == 0
    assert "does not fit 1 x v5e" in out
    v5e, config = hardware("v5e"), load(BIG)
    changes = changes_that_fit(config, SINGLE, "tpu", v5e.memory)
    assert changes
    for change in changes:
        words = [word for override in change.overrides for word in override.split()]
        changed = load(BIG, words)
        mesh = {axis: max(1, size) for axis, size in vars(changed.mesh).items()}
        assert fits(changed, mesh, "tpu", v5e.memory)
        assert change.share <= 1 - HEADROOM


def test_the_largest_microbatch_fits_and_twice_as_much_does_not() -> None:
    h200, config = hardware("h200"), load(BIG)
    rows = largest_microbatch(config, SINGLE, "gpu", h200.memory)
    assert rows is not None

    def fits_with(rows: int) -> bool:
        return fits(load(BIG, ["--train.microbatches", str(256 // rows)]), SINGLE, "gpu", h200.memory)

    assert fits_with(rows)
    assert not fits_with(2 * rows)


def test_a_matched_config_is_written_and_loads(capsys, tmp_path) -> None:
    file = tmp_path / "sized.py"
    base = str(CONFIGS / "la_2b.py")
    code, out, _ = run(capsys, "--config", BIG, "--match", base, "--out", str(file), "--model.ea.experts", "64")
    assert code == 0
    assert (load(file).model.ea.expert_width, load(file).model.ea.experts) == (472, 1097)
    assert f"next: python -m dreamer_jax.train --config {file}" in out.replace("\n", "")
    again = run(capsys, "--config", BIG, "--match", base, "--out", str(file))
    assert again[0] == 1
    assert "exists and is not overwritten" in again[2]


def test_without_a_file_for_it_a_matched_config_is_printed_alone(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(CONFIGS.iterdir())
    code, out, err = run(capsys, "--config", BIG, "--match", str(CONFIGS / "la_2b.py"), "--model.ea.experts", "64")
    assert code == 0
    assert "searched over" in err
    assert "fits" in err
    assert (sorted(CONFIGS.iterdir()), list(tmp_path.iterdir())) == (before, [])
    (tmp_path / "kept.py").write_text(out)
    kept = load(tmp_path / "kept.py")
    assert (kept.name, kept.model.ea.experts) == ("dr_da_2b_as_la_2b", 1097)


def test_json_of_a_match_holds_the_text_or_the_file(capsys, tmp_path) -> None:
    words = ("--config", BIG, "--match", str(CONFIGS / "la_2b.py"), "--json")
    printed = json.loads(run(capsys, *words)[1])
    assert "wrote" not in printed
    (tmp_path / "kept.py").write_text(printed["sized"])
    written = json.loads(run(capsys, *words, "--out", str(tmp_path / "sized.py"))[1])
    assert written["wrote"] == str(tmp_path / "sized.py")
    assert "sized" not in written
    assert load(tmp_path / "kept.py").model == load(tmp_path / "sized.py").model


def test_a_home_is_found_in_all_paths(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("dr_da_2b.py", "la_1b.py", "la_2b.py"):
        (tmp_path / name).write_text((CONFIGS / name).read_text())
    code, _, err = run(capsys, "--config", "~/dr_da_2b.py", "--match", "~/la_2b.py", "--out", "~/sized.py")
    assert (code, err) == (0, "")
    assert load(tmp_path / "sized.py").name == "sized"


def test_a_refused_plan_writes_no_file(capsys, tmp_path) -> None:
    file = tmp_path / "sized.py"
    words = ("--config", BIG, "--match", str(CONFIGS / "la_2b.py"), "--out", str(file))
    assert run(capsys, *words, "--mesh", "data=3")[0] == 1
    assert not file.exists()


def test_the_largest_sizes_that_a_config_may_have_are_planned_soon(capsys) -> None:
    largest = {
        "model.depth": 2**12, "model.width": 2**20, "model.vocab": 2**31, "model.ea.experts": 2**20,
        "model.ea.expert-width": 2**20, "data.context": 2**24,
    }  # fmt: skip
    words = [word for key, size in largest.items() for word in (f"--{key}", str(size))]
    started = time.process_time()
    code, out, err = run(capsys, "--config", BIG, *words)
    assert (code, err) == (0, "")
    assert "makes it fit" in out
    assert time.process_time() - started < 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "unknown device 'abacus'; known: "),
        (["--mesh", "pipeline=2"], "'pipeline=2' is not data=N, fsdp=N or expert=N"),
        (["--mesh", "data=0"], "'data=0' is not data=N"),
        (["--mesh", "data=-1"], "'data=-1' is not data=N"),
        (["--mesh", "data=99999999"], "'data=99999999' is not data=N"),
        (["--mesh", "data=²"], "'data=²' is not data=N"),
        (["--mesh", "data=2000000"], "mesh.data = 2000000: must be a whole number from 1 to 1048576"),
        (["--mesh", "data=2,data=4"], "data is given twice"),
        (["--mesh", ""], "'' is not data=N"),
        (["--mfu", "0"], "--mfu 0.0: must be above 0 and at most 1"),
        (["--mfu", "1.5"], "--mfu 1.5: must be above 0 and at most 1"),
        (["--mfu", "nan"], "--mfu nan: must be above 0 and at most 1"),
        (["--match", BIG, "--tolerance", "1"], "--tolerance 1.0: must be at least 0 and below 1"),
        (["--match", BIG, "--tolerance", "-0.1"], "--tolerance -0.1: must be at least 0 and below 1"),
        (["--match", "absent.py"], "config file 'absent.py' does not exist"),
        (["--match", BIG, "--out", "/absent/x.py"], "there is no folder '/absent' for 'x.py'"),
        (["--match", BIG, "--out", "/tmp"], "'/tmp' is a folder"),
        (["--match", BIG, "--out", "/tmp/[x].py"], "name = '[x]': must be a folder name"),
        (["--out", "x.py"], "--out is the file for the config that --match sizes"),
        (["--devise", "h200"], "unknown option '--devise'; did you mean '--device'?"),
        (["--model.depth", "1000000000"], "model.depth = 1000000000: must be a whole number from 1 to 4096"),
        (["--mesh", "data=3"], "256 rows do not divide into 3 devices"),
        (["--topology", "h200"], "topology 'h200': give a TPU slice such as"),
        (["--topology", ""], "unknown device ''; known: "),
        (["--device", ""], "unknown device ''; known: "),
        (["--topology", "nonsense"], "unknown device 'nonsense'; known: "),
    ],
)
def test_bad_input_is_refused_with_the_fix(capsys, arguments, message) -> None:
    code, _, err = run(capsys, "--config", BIG, *arguments)
    assert code == 1
    assert message in err


def test_mesh_sizes_that_are_not_named_are_one() -> None:
    assert plan.parse_mesh("data=8,expert=4") == {"data": 8, "fsdp": 1, "expert": 4}
    assert plan.parse_mesh("fsdp=2") == {"data": 1, "fsdp": 2, "expert": 1}
