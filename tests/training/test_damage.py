"""A damaged checkpoint is noticed and named, with the last whole one; what strangers leave beside is ignored."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer_jax.config import MeshConfig
from dreamer_jax.sharding import make_mesh
from dreamer_jax.training.checkpoint import CheckpointError, Checkpoints, Position, load_model, write_run_files
from dreamer_jax.training.checksums import checksums, damaged
from dreamer_jax.training.step import init_state
from tests.training.toy import toy_config

STEPS = (2, 4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder with two checkpoints, untrained."""
    config = toy_config(tmp_path_factory.mktemp("damage"))
    _, state = init_state(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    tokenizer = config.run_dir.parent / "tokenizer.model"
    tokenizer.parent.mkdir(parents=True)
    tokenizer.write_bytes(b"a tokenizer")
    with Checkpoints(config.run_dir, config.checkpoint) as checkpoints:
        for step in STEPS:
            checkpoints.save(config, state, step, Position(rows=8 * step, data="abc"))
            checkpoints.wait()
    write_run_files(config.run_dir, config, tokenizer)
    return config.run_dir


@pytest.fixture
def run(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run"))


def files_of(step):
    """Every kind of file of a checkpoint: (name, which of its data files by size)."""
    names = ["_CHECKPOINT_METADATA", "meta/metadata"]
    names += [f"{item}/{name}" for item in ("model", "training") for name in ("_METADATA", "manifest.ocdbt")]
    return [f"{step}/{name}" for name in names]


def data_files(run, step):
    """The data files of a checkpoint's arrays, largest first."""
    files = [p for p in (run / "checkpoints" / str(step) / "model").rglob("d/*") if p.is_file()]
    return sorted(files, key=lambda path: -path.stat().st_size)


def refused(run):
    with pytest.raises(CheckpointError) as error:
        load_model(run)
    return str(error.value)


def assert_names_the_whole_one(run, message):
    assert message.startswith(f"checkpoint 4 of '{run}/checkpoints'")
    assert f"before it: give --checkpoint {run}/checkpoints/2" in message
    assert load_model(run / "checkpoints" / "2").step == 2


@pytest.mark.parametrize("harm", ["missing", "emptied"])
@pytest.mark.parametrize("name", files_of(4))
def test_a_file_that_is_missing_or_empty_is_named(run, name, harm):
    path = run / "checkpoints" / name
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes(b"")
    message = refused(run)
    assert f"'{path}' is {harm.replace('emptied', 'empty')}" in message
    assert_names_the_whole_one(run, message)


@pytest.mark.parametrize("name", files_of(4))
def test_a_file_that_is_cut_in_half_is_no_traceback(run, name):
    path = run / "checkpoints" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    try:
        load_model(run)
    except CheckpointError as error:
        assert_names_the_whole_one(run, str(error))


def test_data_files_that_are_missing_or_cut_are_noticed(run):
    largest = data_files(run, 4)[0]
    whole = largest.read_bytes()
    largest.write_bytes(whole[: len(whole) // 2])
    assert_names_the_whole_one(run, refused(run))
    largest.unlink()
    assert_names_the_whole_one(run, refused(run))
    shutil.rmtree(run / "checkpoints" / "4" / "model" / "d")
    shutil.rmtree(run / "checkpoints" / "4" / "model" / "ocdbt.process_0" / "d")
    assert "has no data files" in refused(run)


def test_one_flipped_bit_is_noticed_or_stands_where_nothing_is_read(run):
    sound, refusals = np.asarray(load_model(run).model.embed[...]), 0
    for path in data_files(run, 4):
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        path.write_bytes(flipped)
        try:
            np.testing.assert_array_equal(load_model(run).model.embed[...], sound)
        except CheckpointError as error:
            refusals += 1
            assert_names_the_whole_one(run, str(error))
        path.write_bytes(whole)
    assert refusals


def test_an_array_that_is_not_what_was_saved_is_named(run):
    meta = run / "checkpoints" / "4" / "meta" / "metadata"
    content = json.loads(meta.read_text())
    content["checksums"]["params.layer.ea.w_down"] = "0" * 16
    meta.write_text(json.dumps(content))
    assert "the array params.layer.ea.w_down is not what was saved" in refused(run)


def test_without_a_whole_one_the_message_says_so(run):
    shutil.rmtree(run / "checkpoints" / "2")
    (run / "checkpoints" / "4" / "meta" / "metadata").write_text("[1, 2]")
    assert "holds no config\nbefore it: none is whole" in refused(run)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b"{", b'{"config": 3}'])
def test_meta_data_that_cannot_be_read_are_damage(run, content):
    (run / "checkpoints" / "4" / "meta" / "metadata").write_bytes(content)
    assert_names_the_whole_one(run, refused(run))


def test_what_others_leave_beside_checkpoints_and_tokenizer_is_ignored(run):
    (run / "checkpoints" / "77").mkdir()
    for name in ("99", ".DS_Store", "4.swp", "latest", "._4"):
        (run / "checkpoints" / name).write_text("stranger")
    for name in (".DS_Store", "._tokenizer.model", ".nfs0001"):
        (run / "tokenizer" / name).write_text("stranger")
    loaded = load_model(run)
    assert (loaded.step, loaded.tokenizer_path.name) == (4, "tokenizer.model")


def test_checkpoints_without_checksums_still_load(run):
    meta = run / "checkpoints" / "4" / "meta" / "metadata"
    content = json.loads(meta.read_text())
    del content["checksums"], content["rows"], content["data"]
    meta.write_text(json.dumps(content))
    assert load_model(run).step == 4
    with Checkpoints(run) as checkpoints:
        assert checkpoints.position(4) == Position(rows=32, data=None)
        assert checkpoints.position(2) == Position(rows=16, data="abc")


def test_a_checkpoint_that_cannot_be_written_is_a_line_and_costs_no_earlier_one(run):
    config = load_model(run).config
    _, state = init_state(config, make_mesh(MeshConfig(), jax.devices()[:1]))

    def full(*_, **__):
        raise ValueError("OUT_OF_RANGE: Error writing: No space left on device")

    with Checkpoints(run, config.checkpoint) as checkpoints:
        checkpoints._manager.save = full
        with pytest.raises(CheckpointError, match=r"cannot be written to '.*No space left.*\nfree some space there"):
            checkpoints.save(config, state, 6, Position(rows=0, data=None))
    assert load_model(run).step == 4


def arrays():
    rng = np.random.default_rng(0)
    return {
        "a": jnp.asarray(rng.normal(size=(8, 6, 10)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(16, 5)), jnp.bfloat16),
        "c": jnp.asarray(rng.integers(0, 9, 24), jnp.int32),
        "d": jnp.int32(7),
    }


def test_checksums_do_not_depend_on_the_mesh():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    places = {"a": ("x", "y", None), "b": (None, None), "c": (("y", "x"),), "d": ()}
    sharded = {
        name: jax.device_put(a, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*places[name])))
        for name, a in arrays().items()
    }
    assert checksums(sharded) == checksums(arrays())


def test_sums_on_devices_are_those_on_the_host(monkeypatch):
    expected = checksums(arrays())
    monkeypatch.setattr("dreamer_jax.training.checksums._on_host", lambda array: False)
    assert checksums(arrays()) == expected


def test_a_flipped_bit_or_exchanged_columns_change_the_checksum():
    given = arrays()
    expected = checksums(given)
    assert damaged(given, expected) == []
    words = np.asarray(given["a"]).view(np.uint32).copy()
    for bit in (0, 31):
        changed = words.copy()
        changed[3, 2, 1] ^= np.uint32(1) << bit
        assert damaged({**given, "a": jnp.asarray(changed.view(np.float32))}, expected) == ["a"]
    assert damaged({**given, "b": given["b"][:, ::-1]}, expected) == ["b"]
    assert damaged(given, {}) == []
