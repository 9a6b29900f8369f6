"""The sample of a checkpoint that its export is compared with."""

import numpy as np
import pytest

from dreamer_jax import convert
from dreamer_jax.convert.hf.parity import LIMITS, beyond, compare
from dreamer_jax.convert.hf.sample import write_sample
from dreamer_jax.model.dreamer import TokenError
from tests import oracle
from tests.convert.hf.exports import TOKENS, float32, odd_model, rows
from tests.models import sizes_of


def test_the_sample_holds_what_the_model_computes(tmp_path):
    config = odd_model("DR+DA")
    weights = oracle.random_weights(sizes_of(config), seed=3)
    model = convert.build(config, float32(weights))
    write_sample(tmp_path / "sample.npz", model, TOKENS)
    expected = oracle.forward(weights, sizes_of(config), *rows(TOKENS))
    with np.load(tmp_path / "sample.npz") as sample:
        found = dict(sample)
    np.testing.assert_array_equal(found["tokens"], TOKENS)
    ids = {"sa_ids": expected.sa_ids, "da_ids": expected.da_ids, "ea_ids": expected.ea_ids}
    assert {name: found[name].shape[:3] for name in ids} == dict.fromkeys(ids, (5, 2, 9))
    runs = {name: (array.reshape(5, -1) >= 0).all(1) for name, array in ids.items()}
    for name, array in ids.items():
        assert ((found[name].reshape(5, -1) >= 0).all(1) == runs[name]).all()
        ids[name] = array.reshape(*array.shape[:3], -1)[runs[name]]
    assert beyond(compare(found, {"logits": expected.logits, **ids}), LIMITS["float32"]) == []
    with pytest.raises(TokenError):
        write_sample(tmp_path / "sample.npz", model, TOKENS + 60)
