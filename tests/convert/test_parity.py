"""The comparison of a converted model with what it was. Needs PyTorch only where transformers computes."""

import json

import numpy as np
import pytest

from dreamer_jax import convert
from dreamer_jax.config import Config
from dreamer_jax.convert.hf.parity import compare_export, form_of, main
from dreamer_jax.convert.parity import LIMITS, Computed, Limits, ParityError, beyond, compare, spoken, write_parity
from dreamer_jax.convert.sample import Form, reference
from dreamer_jax.training.checkpoint import save_model
from tests import oracle
from tests.convert.hf.exports import TOKENS, experts_of, export_of, float32, odd_model, rows
from tests.models import sizes_of, small

LOOSE = Limits(difference=2, kl=0.5, top1=0.5, experts=0.5)  # random weights are no trained ones


def test_equal_models_are_no_distance_apart():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5))
    ids = np.array([[[[0, 1], [2, 3], [4, 5]]]])
    figures = compare(Computed(logits, {"ea": ids}), Computed(logits, {"ea": ids[..., ::-1]}))
    assert figures == {
        "difference": 0, "largest_logit": np.abs(logits).max(), "kl": 0, "top1": 1, "ea_experts": 1
    }  # fmt: skip
    assert beyond(figures, LIMITS["float32"]) == []


def test_each_distance_is_measured():
    expected = Computed(np.log([[[0.5, 0.25, 0.25]]]), {"sa": np.array([[[1]], [[0]]])})
    actual = Computed(np.log([[[0.25, 0.5, 0.25]]]), {"sa": np.array([[[[1]]], [[[2]]]])})
    figures = compare(expected, actual)
    assert figures["difference"] == pytest.approx(np.log(2))
    assert figures["kl"] == pytest.approx(0.25 * np.log(2))
    assert (figures["top1"], figures["sa_experts"]) == (0, 0.5)


def test_each_limit_is_named_and_what_is_no_number_exceeds_it():
    figures = {"difference": 0.5, "largest_logit": 2.0, "kl": float("nan"), "top1": 0.5, "ea_experts": 0.9}
    assert beyond(figures, Limits(difference=0.1, kl=1, top1=0.9, experts=0.95)) == [
        "logits differ by 0.25 of the largest one (limit 0.1)",
        "KL is nan nats (limit 1)",
        "the likeliest token agrees for 50.0% (limit 90.0%)",
        "ea selects the same experts for 90.0% (limit 95.0%)",
    ]


def test_different_models_cannot_be_compared():
    one = Computed(np.zeros((1, 2, 5)), {"ea": np.zeros((3, 1, 2, 4), int)})
    for other in (
        one._replace(experts={}),
        one._replace(experts={"ea": np.zeros((3, 1, 2, 5), int)}),
        one._replace(experts={"ea": np.zeros((1, 1, 2, 4), int)}),
        one._replace(logits=np.zeros((1, 2, 6))),
    ):
        with pytest.raises(ParityError, match="these are different models"):
            compare(one, other)


def test_a_rounded_export_is_held_to_rounded_weights(tmp_path):
    model = convert.build(small("DR+DA"), float32(oracle.random_weights(sizes_of(small("DR+DA")), seed=4)))
    exact, rounded = (reference(model, TOKENS, Form(dtype, merged=True)) for dtype in ("float32", "bfloat16"))
    again = reference(model.merged(), TOKENS, Form("float32"))
    assert beyond(compare(exact, again), LIMITS["float32"]) == []
    assert beyond(compare(exact, rounded), LIMITS["float32"]) != []


def test_the_form_of_an_export_is_read_and_a_stock_one_refused(tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "dreamer", "dtype": "bfloat16", "merged": true}')
    assert form_of(tmp_path) == Form("bfloat16", merged=True)
    for text, message in (
        ('{"model_type": "glm4_moe", "dtype": "float32"}', "is of type 'glm4_moe'"),
        ("[]", "export"),
    ):
        config.write_text(text)
        with pytest.raises(ParityError, match=message):
            form_of(tmp_path)


def test_the_figures_are_written_and_said_even_where_they_are_beyond_a_limit(tmp_path):
    figures = {"bfloat16": {"difference": 0.5, "largest_logit": 2.0, "kl": 0.25, "top1": 0.5, "ea_experts": 0.75}}
    by = {"reference": "the one", "converted": "the other"}
    with pytest.raises(ParityError, match=r"computes: bfloat16: KL is 0.25 nats \(limit 0.05\); bfloat16: the"):
        write_parity(tmp_path, by, figures)
    written = json.loads((tmp_path / "parity.json").read_text())
    assert written["bfloat16"] == figures["bfloat16"]
    assert written["limits"]["bfloat16"] == {"difference": None, "kl": 0.05, "top1": 0.7, "experts": 0.9}
    assert spoken(by, figures).splitlines() == [
        "parity (the other against the one):",
        "  bfloat16  logits 0.5 of 2, KL 0.25, top-1 50.00%, experts ea 75.00%",
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_export_equals_its_checkpoint_and_not_another(tmp_path, capsys):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("transformers", minversion="5.19", reason="transformers is not installed")
    export = export_of(odd_model("DR+DA"))
    passed = oracle.forward(export.weights, export.sizes, *rows(TOKENS))
    expected = Computed(passed.logits, experts_of(passed))
    said = compare_export(export.folder, TOKENS, expected, LIMITS | {"bfloat16": LOOSE})
    written = json.loads((export.folder / "parity.json").read_text())
    assert written["float32"]["difference"] < 1e-4 < written["bfloat16"]["difference"]
    assert [written["float32"][f"{kind}_experts"] for kind in ("sa", "da", "ea")] == [1, 1, 1]
    assert "parity (transformers " in said
    with pytest.raises(ParityError, match="float32: logits differ by"):
        compare_export(export.folder, TOKENS, expected._replace(logits=passed.logits[:, ::-1]))

    other, sample = Config(name="run", out=str(tmp_path), model=odd_model("DR+DA")), str(tmp_path / "sample")
    arrays = float32(oracle.random_weights(sizes_of(other.model), seed=4))
    save_model(other.run_dir, other, convert.build(other.model, arrays), None)
    assert main(["--checkpoint", str(other.run_dir), "--sample", sample]) == 0
    assert main(["--folder", str(export.folder), "--sample", sample]) == 1
    assert "the conversion changes what the model computes" in capsys.readouterr().err


def test_what_is_no_sample_is_said_to_be_none(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "dreamer", "dtype": "float32"}')
    (tmp_path / "sample").write_bytes(b"PK\x03\x04")
    assert main(["--folder", str(tmp_path), "--sample", str(tmp_path / "sample")]) == 1
    assert "is no sample that --checkpoint wrote" in capsys.readouterr().err
