"""The way back from transformers. Only the last test, of what save_pretrained writes, needs PyTorch."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from dreamer_jax import convert
from dreamer_jax.config import Config, DataConfig, LatentAttentionConfig, ParameterAttentionConfig
from dreamer_jax.convert.hf import SourceError, export_hf, load_hf
from dreamer_jax.convert.hf.tokenizer import SAMPLES, chat_template, templates_of
from dreamer_jax.data.tokenizer import load_tokenizer, train_sentencepiece
from tests import oracle
from tests.convert.hf.exports import exported, float32, odd_model
from tests.models import VARIANTS, changed, sizes_of, small

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BIAS = "model.layers.0.sa.router.bias"
DATA = DataConfig(context=77, prompt_template='Ask "{text}"\n\\ ', response_template=" {text}!")


def assert_equal(actual, expected):
    """The same names, and the same bits."""
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == np.float32
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def tensors_in(file):
    """The tensors of a safetensors file."""
    with safe_open(file, "numpy") as opened:
        return {name: opened.get_tensor(name) for name in list(opened.keys())}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A SentencePiece model of 300 entries."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_sentencepiece(["What is 12 plus 30? It is 42."] * 4, 300))
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory, tokenizer):
    """An export with a tokenizer, in several files."""
    config = Config(name="small", model=changed(small("DR+DA"), vocab=300), data=DATA)
    arrays = float32(oracle.random_weights(sizes_of(config.model), seed=4))
    folder = tmp_path_factory.mktemp("original") / "hf"
    export_hf(config, arrays, tokenizer, folder, merged=False, shard=60_000)
    return config, arrays, folder


@pytest.fixture
def copied(original, tmp_path):
    """A copy of that export, to be damaged."""
    return shutil.copytree(original[2], tmp_path / "hf")


@pytest.fixture
def plain(tmp_path):
    """A copy of an export in one file, without a tokenizer."""
    return shutil.copytree(exported("DR+DA").folder, tmp_path / "hf")


def shape_alone(model):
    """The model without what config.json does not have, as it is not in the mixture."""
    return dataclasses.replace(model, latent=LatentAttentionConfig(), parameter=ParameterAttentionConfig())


def change(path, **fields):
    """Set keys of a JSON file; None takes one out."""
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def rewrite(folder, edit, metadata=None):
    """Pass the tensors of a model in one file through a function."""
    file = folder / "model.safetensors"
    tensors = tensors_in(file)
    edit(tensors)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, file, metadata)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_was_exported_comes_back_to_the_bit(variant, merged):
    merged = merged and "DR" in variant
    export = exported(variant, merged=merged)
    found = load_hf(export.folder)
    assert_equal(found.arrays, float32(oracle.merge(export.weights, export.sizes) if merged else export.weights))
    assert (found.merged, found.notes) == (merged, [])
    assert found.config == Config(name="small", model=small(variant))


@pytest.mark.parametrize("variant", ["LA+DA", "DR+DA"])
def test_without_run_json_the_model_is_read_from_transformers_config(variant, tmp_path):
    ropes = {"depth_rope_reversed": False, "depth_rope_scaling": True, "sa": {"rope_base": 5e5}}
    model = changed(odd_model(variant), norm_epsilon=1e-5, **ropes)
    arrays = float32(oracle.random_weights(sizes_of(model), seed=4))
    export_hf(Config(name="small", model=model, data=DATA), arrays, None, tmp_path / "hf", merged=False)
    (tmp_path / "hf/run.json").unlink()
    found = load_hf(tmp_path / "hf")
    assert model.depth == model.linear_experts == 5
    assert found.config.model == shape_alone(changed(model, router={"attention_experts": 0}))
    assert found.config.data == DataConfig(context=77)
    assert "there is no run.json" in found.notes[0]
    assert "there is no chat template: data.prompt_template" in found.notes[1]
    assert_equal(found.arrays, arrays)


def test_an_export_that_knows_no_switch_for_reversed_depths_reverses_them(plain):
    change(plain / "config.json", depth_rope_reversed=None)
    (plain / "run.json").unlink()
    assert load_hf(plain).config.model.depth_rope_reversed is True


def test_files_of_an_index_a_tokenizer_and_the_runs_config_come_back(original, tokenizer):
    config, arrays, folder = original
    found = load_hf(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_equal(found.arrays, arrays)
    assert (found.config, found.notes) == (config, [])
    before, after = load_tokenizer(tokenizer), load_tokenizer(found.tokenizer, found.config.data.special_tokens)
    assert (after.bos, after.eos) == (before.bos, before.eos)
    assert [after.encode(text) for text in SAMPLES] == [before.encode(text) for text in SAMPLES]


def test_templates_come_back_from_where_old_and_new_transformers_keep_them(copied, original):
    (copied / "run.json").unlink()
    assert load_hf(copied).config == Config(name="from-hf", model=shape_alone(original[0].model), data=DATA)
    chat = json.loads((copied / "tokenizer_config.json").read_text())["chat_template"]
    change(copied / "tokenizer_config.json", chat_template=None)
    (copied / "chat_template.jinja").write_text(chat + "\n")
    assert load_hf(copied).config.data == DATA
    (copied / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    found = load_hf(copied)
    assert found.config.data == DataConfig(context=77)
    assert "a chat template that --to hf did not write" in found.notes[1]


@pytest.mark.parametrize("prompt", ["{text}", 'part 1{text}\\"part 0"', "{% if %}{text}\u2028é\n"])
def test_a_chat_template_says_what_it_was_made_of(prompt):
    assert templates_of(chat_template(prompt, " {text}x")) == (prompt, " {text}x")
    assert templates_of("x" + chat_template(prompt, "{text}")) is None


def test_bfloat16_becomes_float32_and_rounded_biases_are_noted(tmp_path):
    export = exported("DR+DA")
    arrays = float32(export.weights)
    export_hf(Config(name="small", model=small("DR+DA")), arrays, None, tmp_path / "hf", merged=False, dtype="bfloat16")
    rounded = {name: array.astype(ml_dtypes.bfloat16).astype(np.float32) for name, array in arrays.items()}
    biases = {name: array for name, array in arrays.items() if name.endswith("bias")}
    assert_equal(load_hf(tmp_path / "hf").arrays, rounded | biases)

    rewrite(tmp_path / "hf", lambda tensors: tensors.update({BIAS: tensors[BIAS].astype(ml_dtypes.bfloat16)}))
    found = load_hf(tmp_path / "hf")
    assert_equal(found.arrays, rounded | biases | {"layer.sa.router.bias": rounded["layer.sa.router.bias"]})
    assert found.notes == ["router biases that are not float32 in the files: 1; other experts may win"]


def test_more_tokens_and_another_depth_are_taken_over_with_the_rest_of_the_runs_config(copied, original):
    config, arrays, _ = original
    every = {name: array for file in copied.glob("*.safetensors") for name, array in tensors_in(file).items()}
    for file in (*copied.glob("*.safetensors"), copied / "model.safetensors.index.json"):
        file.unlink()
    more = {name: np.concatenate([every[name], np.ones((2, 32), np.float32)]) for name in (EMBEDDING, HEAD)}
    save_file(every | more, copied / "renamed.safetensors")
    change(copied / "config.json", vocab_size=302, num_hidden_layers=6)
    found = load_hf(copied)
    assert found.config == dataclasses.replace(config, model=changed(config.model, vocab=302))
    np.testing.assert_array_equal(found.arrays["lm_head"][:, :300], arrays["lm_head"])
    assert found.notes == ["it was saved at depth 6; the checkpoint has the trained depth, model.depth = 3"]


@pytest.mark.parametrize("stored", ["dropped", "twice", "alias"])
def test_a_tied_lm_head_becomes_an_array_of_its_own(stored, plain):
    def tie(tensors):
        tensors[HEAD] = tensors[EMBEDDING]
        if stored != "twice":
            del tensors[HEAD]

    rewrite(plain, tie, {HEAD: EMBEDDING} if stored == "alias" else None)
    change(plain / "config.json", tie_word_embeddings=True)
    found = load_hf(plain)
    np.testing.assert_array_equal(found.arrays["lm_head"], found.arrays["embed"].T)
    assert "were tied; from here on they are two arrays" in found.notes[0]


def test_an_uncommon_name_of_the_end_of_a_document_is_remembered(copied):
    change(copied / "tokenizer_config.json", bos_token=None, eos_token={"content": "<s>", "special": True})
    change(copied / "config.json", eos_token_id=[1, 7], bos_token_id=None)
    found = load_hf(copied)
    assert found.config.data.special_tokens == ("<s>", "<s>")


def test_a_tokenizer_that_training_reads_otherwise_is_noted(copied):
    description = json.loads((copied / "tokenizer.json").read_text())
    description["model"]["dropout"] = 1.0  # transformers would draw, training does not
    (copied / "tokenizer.json").write_text(json.dumps(description))
    [note] = load_hf(copied).notes
    assert "training makes the ids" in note


def overlapping(folder):
    """Two names for the same bytes, which the format forbids."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[HEAD] = header[EMBEDDING]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def as_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index(folder, *files):
    """An index of these files instead of the one file."""
    (folder / "model.safetensors").unlink()
    places = {f"tensor {n}": file for n, file in enumerate(files)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def again(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")


def value(name, number):
    return lambda tensors: tensors.update({name: np.full_like(tensors[name], number)})


FAULTS = {
    "no folder": (shutil.rmtree, "has no config.json: give a folder that --to hf or save_pretrained wrote"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "an adapter of PEFT.*merge it first"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "no object": (lambda f: (f / "config.json").write_text("[]"), "it is no JSON object"),
    "another model": (lambda f: change(f / "config.json", model_type="llama"), "has the model_type 'llama'; --from hf"),
    "another format": (lambda f: change(f / "config.json", model_type=None), "names no model_type; --from hf"),
    "a key is gone": (lambda f: change(f / "config.json", head_dim=None), "lacks head_dim; take these"),
    "merged is gone": (lambda f: change(f / "config.json", merged=None), "lacks merged"),
    "an odd flag": (lambda f: change(f / "config.json", merged="no"), "merged must be true or false, not 'no'"),
    "another activation": (lambda f: change(f / "config.json", hidden_act="gelu"), "has hidden_act = 'gelu', which"),
    "a bad size": (lambda f: change(f / "config.json", head_dim=-8), r"config\.json': .*head_size"),
    "said to be merged": (lambda f: change(f / "config.json", merged=True), r"not in this model: .*qkv_proj\.shared"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"has no model\.safetensors; save_pretrained"),
    "a pickle": (as_pickle, r"pytorch_model\.bin is a pickle, which may run code and is not read"),
    "cut": (cut, r"model\.safetensors' is cut off or damaged \(.*not fully covered"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "is cut off or damaged"),
    "overlapping": (overlapping, f"{HEAD.replace('.', '[.]')}.* share their storage"),
    "an alias": (
        lambda f: rewrite(f, lambda t: t.pop(HEAD), {HEAD: EMBEDDING}),
        f"{HEAD} and {EMBEDDING} share their storage, but are two tensors",
    ),
    "another alias": (
        lambda f: rewrite(f, lambda t: t.pop("model.norm.weight"), {"model.norm.weight": HEAD}),
        f"model.norm.weight and {HEAD} share their storage",
    ),
    "another alias beside the tie": (
        lambda f: (
            change(f / "config.json", tie_word_embeddings=True),
            rewrite(f, lambda t: t.pop("model.norm.weight"), {"model.norm.weight": HEAD}),
        ),
        f"model.norm.weight and {HEAD} share their storage",
    ),
    "missing": (lambda f: rewrite(f, lambda t: [t.pop(BIAS), t.pop(HEAD)]), rf"missing: {HEAD} \(61, 32\)\n.*{BIAS}"),
    "extra": (lambda f: rewrite(f, lambda t: t.update(more=t[BIAS])), r"not in this model: more \(5,\)"),
    "extra, of no numbers": (
        lambda f: rewrite(f, lambda t: t.update(none=np.zeros((0, 3), np.float32))),
        r"not in this model: none \(0, 3\)",
    ),
    "misshapen": (
        lambda f: rewrite(f, lambda t: t.update({BIAS: t[BIAS][:4]})),
        rf"misshapen: {BIAS} is \(4,\), the config asks for \(5,\)",
    ),
    "not finite": (lambda f: rewrite(f, value(BIAS, np.nan)), f"{BIAS} has numbers that are not finite"),
    "integers": (
        lambda f: rewrite(f, lambda t: t.update({BIAS: t[BIAS].astype(np.int8)})),
        f"{BIAS} is of type I8; weights are .*not quantized",
    ),
    "tied, yet different": (lambda f: change(f / "config.json", tie_word_embeddings=True), "ties .* yet they differ"),
    "an absent file": (lambda f: index(f, "x.safetensors", "y.safetensors"), r"lacks x\.safetensors, y\.safetensors"),
    "a path": (lambda f: index(f, "../x.safetensors"), r"names '\.\./x\.safetensors'; only"),
    "a pickle in the index": (lambda f: index(f, "x.bin"), r"names 'x\.bin'; only \.safetensors files"),
    "an empty index": (index, "has no weight_map"),
    "twice": (again, rf"b\.safetensors' has {HEAD}, .*, as an earlier file does"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named(fault, plain):
    spoil, message = FAULTS[fault]
    spoil(plain)
    with pytest.raises((SourceError, convert.WeightError), match=message):
        load_hf(plain)


def test_one_file_goes_before_an_index_as_in_transformers(plain):
    one = (plain / "model.safetensors").read_bytes()
    index(plain, "absent.safetensors")
    (plain / "model.safetensors").write_bytes(one)
    assert_equal(load_hf(plain).arrays, float32(exported("DR+DA").weights))


def test_a_file_of_the_index_that_is_cut_is_named(copied):
    file = sorted(copied.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SourceError, match=f"{file.name}' is cut off or damaged"):
        load_hf(copied)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"eos_token_id": 5}, "has 2 as eos_token_id and config.json 5"), ({"vocab_size": 299}, "misshapen: ")],
)
def test_a_tokenizer_of_another_model_is_refused(fields, message, copied):
    change(copied / "config.json", **fields)
    with pytest.raises((SourceError, convert.WeightError), match=message):
        load_hf(copied)


def test_a_tokenizer_with_more_entries_than_the_model_is_refused(plain, original):
    shutil.copy(original[2] / "tokenizer.json", plain)
    with pytest.raises(SourceError, match=r"has 300 entries and the model 61; resize_token_embeddings"):
        load_hf(plain)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_save_pretrained_wrote_comes_back(dtype, original, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", minversion="5.19", reason="transformers is not installed")
    config, arrays, folder = original
    kind = getattr(torch, dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=kind)
    model.save_pretrained(tmp_path / "tuned", max_shard_size="60KB" if dtype == "float32" else "5GB")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "tuned")
    found = load_hf(tmp_path / "tuned")
    number = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    kept = {name: array for name, array in arrays.items() if name.endswith("bias")}
    assert_equal(found.arrays, {name: array.astype(number).astype(np.float32) for name, array in arrays.items()} | kept)
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) == (5 if dtype == "float32" else 1)
    assert found.config.data == config.data
    assert found.config.model == shape_alone(config.model)
    [note] = found.notes
    assert "there is no run.json" in note
    before, after = load_tokenizer(folder / "tokenizer.json"), load_tokenizer(found.tokenizer)
    assert [after.encode(text) for text in SAMPLES] == [before.encode(text) for text in SAMPLES]
