"""The exported tokenizer makes the ids of the run's own. Needs no transformers."""

import json

import pytest
import tokenizers

from dreamer_jax.convert.hf.tokenizer import SAMPLES, SPELT, TokenizerError, chat_template, check_ids, exported
from dreamer_jax.data.tokenizer import load_tokenizer, train_sentencepiece

TEXTS = ["What is 12 plus 30? It is 42.", "A cat, a hat and a bat sat. That is that.", "  if x:\n    return aaaa  "] * 4
LAYOUT = ("Question: {text}\nAnswer:", " {text}", 64)


def pieces(tmp_path, **changes):
    """A SentencePiece model; `changes` are of its normalizer."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(train_sentencepiece(TEXTS, 330))
    for name, value in changes.items():
        setattr(model.normalizer_spec, name, value)
    (tmp_path / "spm.model").write_bytes(model.SerializeToString())
    return tmp_path / "spm.model"


def byte_level(tmp_path, **changes):
    """A tokenizer.json like that of Llama 3; `changes` are of its description."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(TEXTS, trainer)
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(made.to_str()) | changes))
    return tmp_path / "tokenizer.json"


def read(path):
    """The exported tokenizer, as the tokenizers library reads it, and the original."""
    files = exported(path, (), *LAYOUT).files
    return tokenizers.Tokenizer.from_str(files["tokenizer.json"]), load_tokenizer(path)


@pytest.mark.parametrize("kind", [pieces, byte_level])
def test_ids_and_texts_are_those_of_the_runs_tokenizer(kind, tmp_path):
    converted, original = read(kind(tmp_path))
    for text in (*SAMPLES, *TEXTS):
        assert converted.encode(text).ids == [original.bos, *original.encode(text)]
        assert converted.decode(original.encode(text)) == original.decode(original.encode(text))


@pytest.mark.parametrize("kind", [pieces, byte_level])
def test_names_of_special_tokens_may_be_read_as_text(kind, tmp_path):
    converted, original = read(kind(tmp_path))
    converted.encode_special_tokens = True
    assert converted.encode(SPELT, add_special_tokens=False).ids == original.encode(SPELT)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("spaces", [False, True])
def test_spaces_are_treated_as_the_model_says(prefix, spaces, tmp_path):
    path = pieces(tmp_path, add_dummy_prefix=prefix, remove_extra_whitespaces=spaces)
    converted, original = read(path)
    for text in ("  a  b ", "a", " ", "", "a   \n  b"):
        ids = original.encode(text)
        assert converted.encode(text, add_special_tokens=False).ids == ids, text
        assert converted.decode(ids) == original.decode(ids), text


def test_unigram_models_are_converted_too(tmp_path):
    import io

    import sentencepiece

    model, texts = io.BytesIO(), iter(TEXTS * 4)
    options = {"model_type": "unigram", "vocab_size": 290, "byte_fallback": True, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=model, **options)
    (tmp_path / "spm.model").write_bytes(model.getvalue())
    converted, original = read(tmp_path / "spm.model")
    for text in (*SAMPLES, *TEXTS):
        assert converted.encode(text, add_special_tokens=False).ids == original.encode(text), text


def test_a_tokenizer_json_that_begins_its_texts_stays_as_it_is(tmp_path):
    path = byte_level(tmp_path)
    begun = exported(path, (), *LAYOUT).files["tokenizer.json"]
    assert begun != path.read_text()
    path.write_text(begun)
    assert exported(path, (), *LAYOUT).files["tokenizer.json"] == begun


def test_what_a_tokenizer_json_cuts_is_cut_no_more(tmp_path):
    cut = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    converted, original = read(byte_level(tmp_path, truncation=cut))
    assert converted.encode(TEXTS[0]).ids == [original.bos, *original.encode(TEXTS[0])]


def test_a_tokenizer_of_other_ids_is_refused(tmp_path):
    path = pieces(tmp_path)
    other = tokenizers.Tokenizer.from_file(str(byte_level(tmp_path)))
    with pytest.raises(TokenizerError, match="cannot be converted: of 'Natalia"):
        check_ids(other, load_tokenizer(path), path, SAMPLES)


def test_the_tokenizers_config_names_its_ends(tmp_path):
    made = exported(pieces(tmp_path), (), *LAYOUT)
    config = json.loads(made.files["tokenizer_config.json"])
    assert (made.bos, made.eos) == (1, 2)
    names = [config[f"{name}_token"] for name in ("bos", "eos", "pad", "unk")]
    assert names == ["<s>", "</s>", "</s>", "<unk>"]
    assert (config["padding_side"], config["model_max_length"]) == ("left", 64)


def test_the_chat_template_is_the_layout_of_the_documents():
    jinja2 = pytest.importorskip("jinja2", reason="jinja2 comes with PyTorch and transformers")
    template = jinja2.Template(chat_template('Q "é🙂"\\: {text}\nA:', " {text}."))
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    laid_out = template.render(messages=messages, bos_token="<s>", eos_token="</s>")
    assert laid_out == '<s>Q "é🙂"\\: 2+2?\nA: 4.</s>'
