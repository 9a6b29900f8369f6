"""The comparison of an export with its checkpoint. Needs PyTorch only where transformers computes."""

import json

import numpy as np
import pytest

from dreamer_jax.convert.hf.parity import LIMITS, Limits, ParityError, beyond, compare, main, save_sample, write_parity
from tests import oracle
from tests.convert.hf.exports import TOKENS, export_of, odd_model, rows


def sample(export):
    """What the checkpoint computes: tokens, logits, experts."""
    passed = oracle.forward(export.weights, export.sizes, *rows(TOKENS))
    ids = {"sa": passed.sa_ids, "da": passed.da_ids, "ea": passed.ea_ids}
    return TOKENS, passed.logits, {kind: array for kind, array in ids.items() if array is not None}


def test_equal_samples_are_no_distance_apart():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5))
    arrays = {"logits": logits, "ea_ids": np.array([[[[0, 1], [2, 3], [4, 5]]]])}
    swapped = {"logits": logits, "ea_ids": arrays["ea_ids"][..., ::-1]}
    figures = compare(arrays, swapped)
    assert figures == {
        "difference": 0, "largest_logit": np.abs(logits).max(), "kl": 0, "top1": 1, "ea_experts": 1
    }  # fmt: skip
    assert beyond(figures, LIMITS["float32"]) == []


def test_each_distance_is_measured():
    expected = {"logits": np.log([[[0.5, 0.25, 0.25]]]), "sa_ids": np.array([[[1]], [[-1]], [[0]]])}
    actual = {"logits": np.log([[[0.25, 0.5, 0.25]]]), "sa_ids": np.array([[[[1]]], [[[2]]]])}
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_export_equals_its_checkpoint_and_not_another(tmp_path, capsys):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("transformers", minversion="5.19", reason="transformers is not installed")
    export = export_of(odd_model("DR+DA"))
    tokens, logits, experts = sample(export)
    save_sample(tmp_path / "sample.npz", tokens, logits, experts)
    loose = Limits(difference=2, kl=0.5, top1=0.5, experts=0.5)  # random weights are no trained ones
    figures = write_parity(export.folder, tmp_path / "sample.npz", LIMITS | {"bfloat16": loose})
    assert json.loads((export.folder / "parity.json").read_text()) == figures
    assert figures["float32"]["difference"] < 1e-4 < figures["bfloat16"]["difference"]
    assert [figures["float32"][f"{kind}_experts"] for kind in ("sa", "da", "ea")] == [1, 1, 1]
    save_sample(tmp_path / "other.npz", tokens, logits[:, ::-1], experts)
    with pytest.raises(ParityError, match="float32: logits differ by"):
        write_parity(export.folder, tmp_path / "other.npz")
    assert main(["--folder", str(export.folder), "--sample", str(tmp_path / "other.npz")]) == 1
    assert "error: " in capsys.readouterr().err
