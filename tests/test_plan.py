"""The plan door, called as a user would."""

import json
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "unknown device 'abacus'; known: "),
        (["--mesh", "pipeline=2"], "'pipeline=2' is not data=N, fsdp=N or expert=N"),
        (["--mesh", "data=3"], "256 rows do not divide into 3 devices"),
        (["--topology", "h200"], "topology 'h200': give a TPU slice such as"),
    ],
)
def test_bad_input_is_refused_with_the_fix(capsys, arguments, message) -> None:
    code, _, err = run(capsys, "--config", BIG, *arguments)
    assert code == 1
    assert message in err


def test_mesh_sizes_that_are_not_named_are_one() -> None:
    assert plan.parse_mesh("data=8,expert=4") == {"data": 8, "fsdp": 1, "expert": 4}
    assert plan.parse_mesh("fsdp=2") == {"data": 1, "fsdp": 2, "expert": 1}
