"""Kernels of accelerators on CPUs: TPU kernels interpreted, those of tokamax replaced by stand-ins."""

import sys
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from dreamer_jax.kernels import tpu


@pytest.fixture
def interpreted(monkeypatch):
    """The splash kernel of 'tpu' on a CPU."""
    monkeypatch.setattr(tpu, "_splash", partial(tpu._splash, interpret=True))


class Mask(NamedTuple):
    k_start: Any
    is_causal: bool


class StandIn:
    """What gpu.py asks of an attention kernel of tokamax: attention, what it keeps, a derivative."""

    def bind(self, q, k, v, *, mask):
        return SimpleNamespace(args=(q, k, v), kwargs={"mask": mask, "return_residuals": False})

    def __call__(self, q, k, v, *, mask, return_residuals):
        assert return_residuals
        out, lse = jax.jit(stand_in_forward)(q, k, v, mask.k_start)
        return out, (lse, jnp.zeros_like(lse))

    def vjp(self, residuals, out, d_out, q, k, v, *, mask):
        pull_back = jax.vjp(lambda *x: stand_in_forward(*x, mask.k_start)[0], q, k, v)[1]
        return dict(zip("qkv", pull_back(d_out), strict=True))


def stand_in_forward(q, k, v, k_start):
    dtype, (q, k, v) = q.dtype, (x.astype(jnp.float32) for x in (q, k, v))
    token, group = jnp.arange(q.shape[1]), q.shape[2] // k.shape[2]
    seen = (token[None, None] <= token[None, :, None]) & (token[None, None] >= k_start[:, 0, :, None])
    scores = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, group, axis=2)) / q.shape[-1] ** 0.5
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    out = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), jnp.repeat(v, group, axis=2))
    return out.astype(dtype), jax.nn.logsumexp(scores, axis=-1)


class StandInProduct:
    """What gpu.py asks of a grouped product of tokamax on Hopper: 16 bits, tiles of ours, whole tiles of rows."""

    config = None

    def replace(self, *, config):
        changed = StandInProduct()
        changed.config = config
        return changed

    def __call__(self, a, b, *, group_sizes, ragged_dot_dimension_numbers, preferred_element_type):
        if a.dtype.itemsize != 2:
            raise NotImplementedError  # as tokamax does
        assert self.config["block_m"] * self.config["block_n"] <= 2**14  # what a warp group's registers hold
        y = jax.lax.ragged_dot_general(
            a, b, group_sizes, ragged_dot_dimension_numbers, preferred_element_type=preferred_element_type
        )
        if y.ndim == 3:
            assert a.shape[0] % 64 == 0
            return y
        # Garbage where tokamax may leave it: in rows that no group owns.
        return jnp.where((jnp.arange(y.shape[0]) < group_sizes.sum())[:, None], y, jnp.nan)


@pytest.fixture
def tokamax(monkeypatch):
    """The kernels of 'gpu' on a CPU."""
    attention = SimpleNamespace(
        api=SimpleNamespace(IMPLEMENTATIONS={"mosaic_gpu": StandIn()}), base=SimpleNamespace(Mask=Mask)
    )
    products = SimpleNamespace(
        api=SimpleNamespace(IMPLEMENTATIONS={"mosaic_gpu": StandInProduct()}),
        pallas_mosaic_gpu_common=SimpleNamespace(Config=dict, MatmulDimension=SimpleNamespace(M="m")),
    )
    monkeypatch.setitem(sys.modules, "tokamax", SimpleNamespace())
    hopper = SimpleNamespace(gpu_utils=SimpleNamespace(is_sm90=lambda: True))
    monkeypatch.setitem(sys.modules, "tokamax._src", hopper)
    monkeypatch.setitem(sys.modules, "tokamax._src.ops.attention", attention)
    monkeypatch.setitem(sys.modules, "tokamax._src.ops.ragged_dot", products)


@pytest.fixture
def without_tokamax(monkeypatch, tokamax):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    for name in ("tokamax._src", "tokamax._src.ops.attention", "tokamax._src.ops.ragged_dot"):
        monkeypatch.delitem(sys.modules, name)
