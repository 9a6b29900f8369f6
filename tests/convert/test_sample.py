"""What is computed of sample text, for the comparison of a model before and after a conversion."""

import numpy as np
import pytest
import tokenizers

from dreamer_jax import convert
from dreamer_jax.config import Config, DataConfig, ModelConfig
from dreamer_jax.convert.parity import LIMITS, Computed, beyond, compare
from dreamer_jax.convert.sample import LENGTH, ROWS, computed, sample_tokens
from dreamer_jax.data.tokenizer import load_tokenizer, train_sentencepiece
from dreamer_jax.model.dreamer import TokenError
from tests import oracle
from tests.convert.hf.exports import TOKENS, experts_of, float32, odd_model, rows
from tests.models import sizes_of


def test_a_sample_holds_what_the_model_computes():
    config = odd_model("DR+DA")
    weights = oracle.random_weights(sizes_of(config), seed=3)
    model = convert.build(config, float32(weights))
    passed = oracle.forward(weights, sizes_of(config), *rows(TOKENS))
    found = computed(model, TOKENS)
    assert {kind: len(ids) for kind, ids in found.experts.items()} == {"sa": 4, "da": 3, "ea": 4}
    assert beyond(compare(Computed(passed.logits, experts_of(passed)), found), LIMITS["float32"]) == []
    with pytest.raises(TokenError):
        computed(model, TOKENS + 60)


def config_of(vocab, context, *special_tokens):
    data = DataConfig(context=context, special_tokens=special_tokens)
    return Config(name="run", model=ModelConfig(vocab=vocab), data=data)


def test_the_tokens_are_the_sample_text_where_the_tokenizer_knows_it(tmp_path):
    known = tmp_path / "known.model"
    known.write_bytes(train_sentencepiece(["Question: A bakery sells 48 loaves on Monday."] * 4, 300))
    tokens = sample_tokens(config_of(300, 999), known)
    assert tokens.shape == (ROWS, LENGTH)
    assert load_tokenizer(known).decode(tokens[0]).startswith("Question: A bakery sells 48 loaves on Monday and half")
    assert sample_tokens(config_of(300, 9), None).shape == (ROWS, 9)
    assert sample_tokens(config_of(7, 999), None).max() == 6


def test_a_tokenizer_without_the_texts_words_gives_random_ids(tmp_path):
    path = tmp_path / "tokenizer.json"
    words = {"<unk>": 0, "[[A]]": 1, "[[Z]]": 2, "left": 3}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(["<unk>", "[[A]]", "[[Z]]"])
    model.save(str(path))
    assert set(np.unique(sample_tokens(config_of(4, 99, "[[A]]", "[[Z]]"), path))) == {0, 1, 2, 3}
