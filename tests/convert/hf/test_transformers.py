"""What transformers computes from an export, held to the oracle; only where PyTorch and transformers are installed."""

import copy
import inspect
import sys

import numpy as np
import pytest

from dreamer_jax.config import Config
from dreamer_jax.convert.hf import export_hf
from dreamer_jax.convert.hf.tokenizer import SAMPLES, SPELT
from dreamer_jax.convert.hf.weights import targets
from dreamer_jax.data.tokenizer import load_tokenizer, train_sentencepiece
from tests import oracle
from tests.convert.hf.exports import TOKENS, Export, export_of, exported, float32, odd_model, rows
from tests.models import MIXTURES, VARIANTS, changed, mixture_of, relative_error, sizes_of, small

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", minversion="5.19", reason="transformers is not installed")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
FORMS = [(variant, m, False) for variant in VARIANTS for m in dict.fromkeys(mixture_of(variant, m) for m in MIXTURES)]
FORMS += [(variant, m, True) for variant, m, _ in FORMS if "DR" in variant]


def load(export: Export, **more):
    """The language model, as a user loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(export.folder, trust_remote_code=True, **more)


def logits_of(model, tokens=TOKENS, **more) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens), **more).logits.float().numpy()


def expected_logits(export: Export, tokens=TOKENS, depth=None) -> np.ndarray:
    return oracle.forward(export.weights, export.sizes, *rows(tokens), depth=depth).logits


def generated(model, prompts, **more) -> list[list[int]]:
    """Eight new tokens of each prompt, the likeliest ones."""
    given = {"attention_mask": torch.ones_like(prompts), "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    return model.generate(prompts, **{**given, "max_new_tokens": 8, **more})[:, prompts.shape[1] :].tolist()


def code_of(model):
    """The exported module of the model."""
    return sys.modules[type(model).__module__]


@pytest.mark.parametrize(("variant", "mixture", "merged"), FORMS)
def test_logits_and_generated_text_equal_the_oracles(variant, mixture, merged):
    export = exported(variant, mixture, merged)
    model, prompt = load(export), torch.tensor(TOKENS[:1, :5])
    assert relative_error(logits_of(model), expected_logits(export)) < 1e-5
    expected = [oracle.greedy_decode(export.weights, export.sizes, TOKENS[0, :5].tolist(), 8)]
    assert generated(model, prompt, use_cache=True) == expected
    assert generated(model, prompt, use_cache=False) == expected


@pytest.mark.parametrize("variant", ["LA+DA", "DR+DA"])
def test_windows_dilation_and_slices_of_depths_are_those_of_the_oracle(variant):
    export = export_of(odd_model(variant))
    model = load(export)
    assert relative_error(logits_of(model), expected_logits(export)) < 1e-5
    assert [model.config.depths_of(name) for name in ("sa", "da", "ea")] == [(1, 2, 3, 4), (0, 2, 4), (0, 1, 2, 3)]
    prompt = torch.tensor(TOKENS[:1, :5])
    assert generated(model, prompt) == [oracle.greedy_decode(export.weights, export.sizes, TOKENS[0, :5].tolist(), 8)]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_by_either_name_is_filled_and_read(name):
    export = exported("DR+DA")
    model = load(export)
    cache = transformers.DynamicCache(config=model.config)
    logits_of(model, TOKENS[:, :6], **{name: cache})
    assert cache.get_seq_length() == 6
    rest = logits_of(model, TOKENS[:, 6:], **{name: cache})
    assert relative_error(rest, expected_logits(export)[:, 6:]) < 1e-5
    base, cache = model.model, transformers.DynamicCache(config=model.config)
    base(torch.tensor(TOKENS), **{name: cache})
    assert cache.get_seq_length() == TOKENS.shape[1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_prompt_padded_on_the_left_answers_as_it_does_alone(variant, attention):
    model = load(exported(variant), attn_implementation=attention)
    short, long = TOKENS[:1, :4], TOKENS[1:, :9]
    padded = np.concatenate([np.concatenate([np.zeros((1, 5), int), short], 1), long])
    mask = torch.tensor([[0] * 5 + [1] * 4, [1] * 9])
    together = logits_of(model, padded, attention_mask=mask)
    assert np.isfinite(together).all()
    assert relative_error(together[0, 5:], logits_of(model, short)[0]) < 1e-5
    alone = [generated(model, torch.tensor(prompt))[0] for prompt in (short, long)]
    assert generated(model, torch.tensor(padded), attention_mask=mask) == alone


def test_positions_begin_at_the_first_token_that_is_no_padding():
    model = load(exported("DR"))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    x = torch.zeros(2, 2, 4)
    assert code_of(model).positions_of(mask, 3, x).tolist() == [[1, 2], [3, 4]]
    assert code_of(model).positions_of(None, 3, x).tolist() == [[3, 4]]


@pytest.mark.parametrize("variant", ["LA+DA", "DR+DA"])
def test_static_caches_beams_and_drafts_find_the_same_text(variant):
    export = exported(variant)
    model, prompt = load(export), torch.tensor(TOKENS[:1, :6])
    greedy = generated(model, prompt)
    assert generated(model, prompt, cache_implementation="static") == greedy
    assert generated(model, prompt, prompt_lookup_num_tokens=2) == greedy
    assert generated(model, prompt, assistant_model=load(exported("DR"))) == greedy
    beams = {"num_beams": 3, "num_return_sequences": 3}
    assert generated(model, prompt, **beams) == generated(model, prompt, **beams, use_cache=False)


def test_another_depth_may_run_than_the_trained_one():
    export = exported("DR+DA")
    model = load(export, depth=6)
    assert model.config.num_hidden_layers == model.config.depth == 6
    assert relative_error(logits_of(model), expected_logits(export, depth=6)) < 1e-5
    prompt = torch.tensor(TOKENS[:1, :5])
    expected = oracle.greedy_decode(export.weights, export.sizes, TOKENS[0, :5].tolist(), 8, depth=6)
    assert generated(model, prompt) == [expected]


@pytest.mark.parametrize("reversed_", [True, False])
def test_another_depth_may_stretch_to_the_trained_one(reversed_):
    export = export_of(changed(small("DR+DA"), depth_rope_scaling=True, depth_rope_reversed=reversed_))
    assert relative_error(logits_of(load(export, depth=2)), expected_logits(export, depth=2)) < 1e-5


def test_layers_of_their_own_run_at_their_depth_only():
    with pytest.raises(ValueError, match="depth is 2, but this model has 3 layers of its own"):
        load(exported("LA"), depth=2)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_equal_the_oracles(variant, checkpointing):
    export = exported(variant)
    model = load(export).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    tokens = torch.tensor(TOKENS)
    passed = model(tokens, labels=tokens)
    loss = passed.loss
    loss.backward()
    # A layer that runs again in the backward pass would write a cache twice.
    assert (getattr(passed, code_of(model).CACHE) is None) == checkpointing
    assert loss.item() == pytest.approx(oracle.loss(export.weights, export.sizes, *rows(TOKENS)), rel=1e-5)
    expected = oracle.gradients(export.weights, export.sizes, *rows(TOKENS))
    parameters = dict(model.named_parameters())
    for target in targets(small(variant), "float32", merged=False):
        actual = parameters.pop(target.name).grad
        if target.name.endswith("router.bias"):
            assert actual is None
            continue
        parts = [np.swapaxes(expected[name], -1, -2) if target.turned else expected[name] for name in target.sources]
        assert relative_error(actual.numpy(), np.concatenate(parts, -2 if target.turned else 0)) < 1e-4, target.name
    assert not parameters


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_all_implementations_of_experts_compute_the_same(implementation):
    export = exported("DR+DA")
    model = load(export, experts_implementation=implementation)
    assert relative_error(logits_of(model), expected_logits(export)) < 1e-5


def test_the_forward_pass_compiles_into_one_graph():
    export = export_of(changed(small("DR+DA"), ea={"expert_width": 16}))
    model = load(export)
    assert model.config._experts_implementation == "grouped_mm"
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_error(logits_of(compiled, use_cache=False), expected_logits(export)) < 1e-5


@pytest.mark.parametrize(("variant", "expert_width"), [("LA", 16), ("DR+DA", 16), ("DR+DA", 12)])
def test_in_bfloat16_the_router_biases_stay_float32(variant, expert_width):
    export = export_of(changed(small(variant), ea={"expert_width": expert_width}))
    model = load(export, dtype=torch.bfloat16)
    dtypes = {name.endswith("router.bias"): parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert all(p.dtype == dtypes[n.endswith("router.bias")] for n, p in model.named_parameters())
    bias = dict(model.named_parameters())["model.layers.0.ea.router.bias"]
    assert not bias.requires_grad
    assert "router.bias" in model._keep_in_fp32_modules_strict  # which other loaders go by
    name = "layer.ea.router.bias" if "DR" in variant else "layers.0.ea.router.bias"
    np.testing.assert_array_equal(bias.numpy(), export.weights[name].astype(np.float32))
    actual, expected = logits_of(model), expected_logits(export)
    assert np.median(np.abs(actual - expected)) < 0.03 * np.abs(expected).max()


def test_routing_is_float32_in_a_model_of_bfloat16():
    model = load(exported("DR+DA"), dtype=torch.bfloat16)
    rotation = code_of(model).depth_rotations(model.config, model.config.router_size, torch.device("cpu"))[1]
    x = torch.randn(1, 50, model.config.hidden_size, generator=torch.manual_seed(0)).bfloat16()
    router = model.model.layers[0].ea.router
    found, expected = router(x, rotation), copy.deepcopy(router).float()(x.float(), rotation)
    assert found.scores.dtype == torch.float32
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.scores, expected.scores)


def test_norms_that_stay_float32_are_none_that_vllm_replaces():
    norms = [m for name, m in load(exported("DR+DA")).named_modules() if name.endswith(("q_norm", "k_norm"))]
    assert len(norms) == 10
    # vLLM takes a norm for one of its own if its only argument is a tensor.
    assert {tuple(inspect.signature(type(norm).forward).parameters) for norm in norms} == {("self", "x", "rotation")}


def test_there_is_a_slot_for_every_depth_and_sa_fills_the_first_ones():
    model = load(export_of(odd_model("DR+DA")))
    assert [slot.layer_idx for slot in model.model.slots] == [0, 1, 2, 3, 4]  # without a gap, vLLM wants them
    cache = transformers.DynamicCache(config=model.config)
    logits_of(model, past_key_values=cache)
    assert [cache.get_seq_length(slot) for slot in range(5)] == [9, 9, 9, 9, 0]


def test_of_equal_experts_the_lower_index_is_selected():
    best = code_of(load(exported("DR"))).best
    preference = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]]).repeat(1, 40)
    assert best(preference, 1).tolist() == [[1]]
    assert best(preference, 4).tolist() == [[1, 2, 4, 6]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiling", [False, True])
def test_each_row_is_multiplied_with_the_matrix_that_it_selects(dtype, compiling, monkeypatch):
    selected_linear = code_of(load(exported("DR"))).selected_linear
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    x, weight, ids = (
        torch.randn(7, 8, dtype=dtype),
        torch.randn(4, 16, 8, dtype=dtype),
        torch.tensor([2, 0, 2, 3, 3, 0, 2]),
    )
    expected = torch.stack([weight[i].float() @ row.float() for i, row in zip(ids, x, strict=True)])
    tolerance = {"rtol": 1e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(selected_linear(x, weight, ids).float(), expected, **tolerance)


@pytest.mark.parametrize("merged", [False, True])
def test_what_transformers_saves_it_loads(tmp_path, merged):
    export = exported("DR+DA", merged=merged)
    model = load(export)
    model.save_pretrained(tmp_path)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    weights, theirs = model.state_dict(), saved.state_dict()
    assert weights.keys() == theirs.keys()
    assert all(torch.equal(weight, theirs[name]) for name, weight in weights.items())
    np.testing.assert_allclose(logits_of(saved), logits_of(model), rtol=1e-5, atol=1e-5)
    assert saved.config.to_diff_dict() | {"_name_or_path": ""} == model.config.to_diff_dict() | {"_name_or_path": ""}


def test_the_automatic_classes_find_config_and_model():
    export = exported("DR+DA")
    config = transformers.AutoConfig.from_pretrained(export.folder, trust_remote_code=True)
    assert config.model_type == "dreamer"
    model = load(export)
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    base = transformers.AutoModel.from_pretrained(export.folder, trust_remote_code=True)
    with torch.no_grad():
        passed = base(torch.tensor(TOKENS), output_hidden_states=True)
    expected = oracle.forward(export.weights, export.sizes, *rows(TOKENS)).hidden
    assert relative_error(torch.stack(passed.hidden_states).numpy(), expected) < 1e-5
    assert torch.equal(passed.last_hidden_state, passed.hidden_states[-1])


def test_a_model_may_start_from_fresh_weights():
    config = transformers.AutoConfig.from_pretrained(exported("DR+DA").folder, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    drawn = dict(model.named_parameters())
    layer = "model.layers.0."
    assert drawn[layer + "sa.qkv_proj.weight"].std().item() == pytest.approx((1 / (5 * 32)) ** 0.5, rel=0.1)
    assert drawn[layer + "sa.o_proj.weight"].std().item() == pytest.approx((1 / (2.5 * 32 * 3 * 3)) ** 0.5, rel=0.1)
    assert drawn[layer + "ea.experts.down_proj"].std().item() == pytest.approx((1 / (2.5 * 32 * 3 * 3)) ** 0.5, rel=0.1)
    assert drawn[layer + "ea.router.bias"].eq(0).all()
    assert drawn[layer + "ea.norm.weight"].eq(1).all()


def test_only_the_logits_asked_for_are_computed():
    model = load(exported("DR"))
    last = logits_of(model, logits_to_keep=2)
    np.testing.assert_allclose(last, logits_of(model)[:, -2:], rtol=1e-5, atol=1e-5)


def test_the_tokenizer_lays_out_texts_as_in_training(tmp_path):
    texts = ["What is 12 plus 30? It is 42."] * 4
    (tmp_path / "spm.model").write_bytes(train_sentencepiece(texts, 300))
    config = Config(name="example", model=small("LA"))
    arrays = float32(oracle.random_weights(sizes_of(config.model), seed=1))
    export_hf(config, arrays, tmp_path / "spm.model", tmp_path / "out", merged=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    original = load_tokenizer(tmp_path / "spm.model")
    for text in (*SAMPLES, *texts):
        ids = tokenizer(text)["input_ids"]
        assert ids == [original.bos, *original.encode(text)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == original.decode(ids)
    spelt = tokenizer(SPELT, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert spelt == original.encode(SPELT)
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "1+1?"}], return_dict=True)["input_ids"]
    assert asked == [original.bos, *original.encode("Question: 1+1?\nAnswer:")]
    padded = tokenizer(["a", "a b c"], padding=True)
    assert padded["attention_mask"][0][0] == 0
    ends = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (ends.bos_token_id, ends.eos_token_id, ends.pad_token_id) == (1, 2, 2)
