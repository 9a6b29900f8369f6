"""LA as a stock architecture of transformers: what is exact, what is measured, and what is refused."""

import functools
import itertools
import json
from typing import NamedTuple

import numpy as np
import pytest
from safetensors import safe_open

from dreamer_jax import convert
from dreamer_jax.config import Config, DataConfig
from dreamer_jax.convert.hf.export import ExportError
from dreamer_jax.convert.hf.stock import (
    Calibration,
    Change,
    StockError,
    calibrate,
    check_stock,
    export_stock,
    fitted,
    folded_router,
    selection_change,
    sigmoid,
    stock_bias,
    stock_fields,
    stock_weights,
)
from dreamer_jax.model.dreamer import TokenError
from tests import oracle
from tests.convert.hf.exports import TOKENS, float32, rows
from tests.models import changed, relative_error, sizes_of, small

MODEL = changed(small("LA"), router={"size": 32})
"""The router is as wide as the model."""
SQUARE = np.linalg.qr(np.random.default_rng(7).normal(size=(32, 32)))[0]
"""An orthogonal matrix."""


class Case(NamedTuple):
    """A model with its weights, and what `calibrate` makes of it."""

    config: Config
    weights: dict[str, np.ndarray]
    """Float64."""
    calibration: Calibration


@functools.cache
def case(active=2, bias=0.0, orthogonal=False):
    """A model with router biases of this size; if orthogonal, all queries of its EA routers are equally long."""
    model = changed(MODEL, ea={"active_experts": active})
    weights = oracle.random_weights(sizes_of(model), seed=3)
    for name in weights:
        if name.endswith("ea.router.bias"):
            weights[name] = bias * np.random.default_rng(len(name)).normal(size=7)
        elif name.endswith("ea.router.w_q") and orthogonal:
            weights[name] = SQUARE
        elif name.endswith("ea.norm") and orthogonal:
            weights[name] = np.ones(32)
    built = convert.build(model, float32(weights))
    return Case(Config(name="example", model=model, data=DataConfig(context=77)), weights, calibrate(built, TOKENS))


NOTHING = Change(0, 0, 0)


def example(change=NOTHING):
    """A config, arrays and a calibration that nothing was computed for."""
    arrays = float32(oracle.random_weights(sizes_of(MODEL), seed=1))
    gates = np.random.default_rng(0).normal(size=(3, 7, 32)).astype(np.float32)
    return Config(name="example", model=MODEL), arrays, Calibration(gates, gates[:, :, 0], change)


def tensors_in(file):
    """The tensors of a safetensors file, as its own library reads them."""
    with safe_open(file, "numpy") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)


REFUSED = {
    "depth attention": (small("LA+DA"), "has da in model.mixture"),
    "both": (small("DR+DA"), "has da in model.mixture"),
    "one layer": (small("DR"), r"iterates one layer \(model\.depth_recurrent\)"),
    "parallel": (small("LA", ("sa+ea",)), r"mixture is sa\+ea"),
    "experts first": (small("LA", ("ea", "sa")), "mixture is ea, then sa"),
    "no experts": (small("LA", ("sa",)), "mixture is sa"),
    "some depths": (small("LA", ("sa", "ea[1:]")), r"sa, then ea\[1:\], leaves depths out"),
    "one expert": (changed(MODEL, ea={"experts": 1, "active_experts": 1}), "two experts or more"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_is_no_la_is_refused_by_name(name, tmp_path):
    model, message = REFUSED[name]
    with pytest.raises(StockError, match=f"LA alone.*{message}.*leave --stock out"):
        export_stock(Config(name="example", model=model), {}, example()[2], None, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_an_la_is_not_refused():
    check_stock(MODEL)


def test_the_config_has_the_models_sizes_and_no_code():
    fields = stock_fields(changed(MODEL, ea={"experts": 9}, sa={"rope_base": 5e5}), 77)
    expected = {"model_type": "glm4_moe", "num_hidden_layers": 3, "hidden_size": 32, "head_dim": 8, "vocab_size": 61}
    expected |= {"n_routed_experts": 9, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "use_qk_norm": True}
    expected |= {"max_position_embeddings": 77, "n_shared_experts": 0, "rms_norm_eps": 1e-6}
    assert {name: fields[name] for name in expected} == expected
    assert fields["rope_parameters"] == {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 1.0}
    assert "auto_map" not in fields


def test_the_share_of_other_selections_and_of_moved_weight_is_counted():
    expected = np.array([[[0.5, 0.5, 0], [0.75, 0, 0.25]], [[0, 0.5, 0.5], [0.5, 0, 0.5]]])
    actual = np.array([[[0.5, 0.5, 0], [0.5, 0, 0.5]], [[0, 0.25, 0.75], [0, 0.5, 0.5]]])
    assert selection_change(expected, actual) == Change(selection=1 / 4, moved=(0.25 + 0.25 + 0.5) / 4, most=0.5)
    assert selection_change(expected, expected) == Change(0, 0, 0)


def test_the_sigmoid_takes_any_number():
    np.testing.assert_allclose(sigmoid(np.array([-1e4, -1, 0, 1, 1e4])), [0, 1 / (1 + np.e), 0.5, np.e / (1 + np.e), 1])


def test_the_stock_router_selects_by_score_and_bias_and_weighs_by_score_alone():
    scores = np.array([[0.5, 0.2, 0.4, 0.1]])
    weights = stock_weights(np.log(scores / (1 - scores)), np.array([-0.2, 0, 0, 0.35]), 2)
    np.testing.assert_allclose(weights, [[0, 0, 0.8, 0.2]])


def test_for_one_token_no_bias_is_too_large():
    random = np.random.default_rng(0)
    for _ in range(20):
        logits, bias = random.normal(size=(1, 9)), 3 * random.normal(size=9)
        selected = stock_weights(2 * logits, stock_bias(logits, 2 * logits, bias, 3), 3) > 0
        assert set(np.flatnonzero(selected)) == set(np.argsort(-(logits[0] + bias))[:3])


def test_a_small_bias_is_multiplied_with_the_slope_at_the_threshold():
    logits = np.array([[2.0, 1.5, 0.5, -1.0], [2.0, 0.5, 1.5, -1.0]])
    bias = np.array([0, 1e-4, -1e-4, 2e-4])
    slope = np.e / (1 + np.e) ** 2  # of the sigmoid at 1, halfway between the second and the third
    np.testing.assert_allclose(stock_bias(logits, logits, bias, 2), slope * bias, rtol=1e-3)
    assert not stock_bias(logits, logits, np.zeros(4), 2).any()
    assert not stock_bias(logits, logits, bias, 4).any()  # all are selected


def test_the_scale_is_the_one_over_the_length_of_equally_long_queries():
    logits = np.random.default_rng(0).normal(size=(20, 5))
    fit = fitted(4 * logits, logits, np.zeros(5), stock_weights(logits, np.zeros(5), 2), 2)
    assert fit.scale == pytest.approx(1 / 4)
    assert not fit.bias.any()


def test_the_folded_router_is_the_oracles_but_for_the_length_of_the_query():
    config, arrays, _ = example()
    weights = {name: array.astype(np.float64) for name, array in arrays.items()}
    x, prefix = np.random.default_rng(0).normal(size=(1, 5, 32)), "layers.1.ea.router"
    given = oracle.tensors(weights), sizes_of(config.model), prefix, oracle.tensor(x), oracle.Depth(1, 3)
    route = oracle.route(*given, active=7)
    scores = np.zeros((1, 5, 7))
    np.put_along_axis(scores, route.ids, route.scores.value, -1)
    rms = np.sqrt(np.square(x @ weights[f"{prefix}.w_q"]).mean(-1, keepdims=True) + 1e-6)
    logits = x @ folded_router(config.model, arrays, 1).T / rms
    assert relative_error(logits, np.log(scores / (1 - scores))) < 1e-6


def test_routers_with_equally_long_queries_do_not_change():
    found = case(orthogonal=True).calibration
    assert found.change.selection == 0
    assert found.change.most < 1e-5
    assert not found.biases.any()


def test_without_biases_the_selection_stays_as_it_is():
    change = case().calibration.change
    assert change.selection == 0
    assert 1e-4 < change.moved < change.most < 0.2


def test_large_biases_are_refused_with_the_share(tmp_path):
    config, weights, calibration = case(bias=4.0)
    share = calibration.change.selection
    assert share > 0.05
    with pytest.raises(StockError, match=rf"in {share:.2%} of tokens and layers.*limit is 1\.00%.*leave --stock out"):
        export_stock(config, float32(weights), calibration, None, tmp_path / "out")
    assert not any(tmp_path.iterdir())
    export_stock(config, float32(weights), calibration, None, tmp_path / "out", limit=share)
    assert f"other experts in {share:.2%} of tokens" in (tmp_path / "out" / "README.md").read_text()


def test_an_unknown_token_is_refused():
    with pytest.raises(TokenError, match="not in the model's vocabulary of 61"):
        calibrate(convert.build(MODEL, float32(case().weights)), TOKENS + 60)


def test_the_tensors_are_the_arrays_in_the_layout_of_glm(tmp_path):
    config, arrays, calibration = example()
    said = []
    numbers = export_stock(config, arrays, calibration, None, tmp_path / "out", wrote=said.append)
    found = tensors_in(tmp_path / "out" / "model.safetensors")
    layer, own = "model.layers.1.", "layers.1."
    expected = {
        "model.embed_tokens.weight": arrays["embed"],
        "lm_head.weight": arrays["lm_head"].T,
        "model.norm.weight": arrays["final_norm"],
        layer + "input_layernorm.weight": arrays[own + "sa.norm"],
        layer + "post_attention_layernorm.weight": arrays[own + "ea.norm"],
        layer + "self_attn.q_proj.weight": arrays[own + "sa.w_qkv"][:, :32].T,
        layer + "self_attn.k_proj.weight": arrays[own + "sa.w_qkv"][:, 32:48].T,
        layer + "self_attn.v_proj.weight": arrays[own + "sa.w_qkv"][:, 48:].T,
        layer + "self_attn.o_proj.weight": arrays[own + "sa.w_o"].T,
        layer + "self_attn.k_norm.weight": arrays[own + "sa.k_norm"],
        layer + "mlp.gate.weight": calibration.gates[1],
        layer + "mlp.gate.e_score_correction_bias": calibration.biases[1],
        layer + "mlp.experts.6.gate_proj.weight": arrays[own + "ea.w_gate"][6].T,
        layer + "mlp.experts.0.up_proj.weight": arrays[own + "ea.w_up"][0].T,
        layer + "mlp.experts.3.down_proj.weight": arrays[own + "ea.w_down"][3].T,
        layer + "mlp.shared_experts.up_proj.weight": np.zeros((0, 32)),
        layer + "mlp.shared_experts.down_proj.weight": np.zeros((32, 0)),
    }
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert len(found) == 3 + 3 * (6 + 2 + 2 + 3 * 7 + 3)
    assert numbers == sum(array.size for array in found.values())
    assert sum(said) == 4 * numbers


def test_many_small_tensors_fill_the_files(tmp_path):
    config, arrays, calibration = example()
    export_stock(config, arrays, calibration, None, tmp_path / "out", shard=20_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    sizes = [sum(array.nbytes for array in tensors_in(file).values()) for file in files]
    assert len(sizes) > 5
    assert max(sizes) <= 20_000
    assert all(size + following > 20_000 for size, following in itertools.pairwise(sizes))


def test_in_bfloat16_the_routers_are_float32(tmp_path):
    config, arrays, calibration = example()
    export_stock(config, arrays, calibration, None, tmp_path / "out", dtype="bfloat16")
    with safe_open(tmp_path / "out" / "model.safetensors", "numpy") as opened:
        kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 (it is no dict)
    assert {name for name, kind in kinds.items() if kind == "F32"} == {name for name in kinds if ".gate." in name}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_folder_holds_no_code_and_its_card_says_that_it_is_an_approximation(tmp_path):
    config, arrays, _ = example()
    calibration = example(Change(0.0042, 0.013, 0.21))[2]
    export_stock(config, arrays, calibration, None, tmp_path / "out", step=12)
    names = ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in ("## An approximation", "0.42% of tokens and layers", "1.30% of the experts' weight", "at most 21.0%"):
        assert fact in card
    assert "trust_remote_code" not in card
    with pytest.raises(ExportError, match="is not empty"):
        export_stock(config, arrays, calibration, None, tmp_path / "out")


def test_arrays_that_do_not_fit_are_named(tmp_path):
    config, arrays, calibration = example()
    del arrays["layers.2.ea.router.keys"]
    with pytest.raises(convert.WeightError, match=r"missing: layers\.2\.ea\.router\.keys"):
        export_stock(config, arrays, calibration, None, tmp_path / "out")


EXACT = {"equally long queries": {"orthogonal": True}, "one active expert": {"active": 1}}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:Initializing zero-element")
@pytest.mark.parametrize("name", EXACT)
def test_transformers_computes_it_without_code_of_ours(name, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", minversion="5.19", reason="transformers is not installed")
    config, weights, calibration = case(**EXACT[name])
    sizes = sizes_of(config.model)
    export_stock(config, float32(weights), calibration, None, tmp_path / "out")
    model, loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model).__name__ == "Glm4MoeForCausalLM"
    assert not any(loaded.values())
    with torch.no_grad():
        logits = model(torch.tensor(TOKENS)).logits.numpy()
    assert relative_error(logits, oracle.forward(weights, sizes, *rows(TOKENS)).logits) < 1e-5
    prompt = torch.tensor(TOKENS[:1, :5])
    given = {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    expected = oracle.greedy_decode(weights, sizes, TOKENS[0, :5].tolist(), 8)
    for use_cache in (True, False):
        answer = model.generate(prompt, **given, max_new_tokens=8, use_cache=use_cache)
        assert answer[0, 5:].tolist() == expected
