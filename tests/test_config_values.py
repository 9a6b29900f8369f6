"""Values of configs: what each key takes, and what an error says of one that it does not take."""

import copy
import dataclasses
import io
import pickle
import re
from typing import Annotated, Any, get_args, get_origin

import numpy as np
import pytest
from pydantic import Field, TypeAdapter

from dreamer_jax import config
from dreamer_jax.config import Config, ConfigError, ModelConfig, Source, TrainConfig, check_run_path, readable_path
from dreamer_jax.dimensions.base import Dimension
from dreamer_jax.values import (
    LIST,
    Count,
    NonNegative,
    Share,
    Texts,
    allowed,
    annotations,
    bare,
    from_dict,
    keys_of,
    section,
    shown,
)

SECTIONS = (
    Config,
    config.CheckpointConfig,
    config.DataConfig,
    config.DepthAttentionConfig,
    config.DistributedConfig,
    config.ExpertAttentionConfig,
    config.KernelConfig,
    config.LatentAttentionConfig,
    config.LogConfig,
    config.MeshConfig,
    ModelConfig,
    config.OptimizerConfig,
    config.ParameterAttentionConfig,
    config.RouterConfig,
    config.SequenceAttentionConfig,
    Source,
    TrainConfig,
)
FILES = {"name": "a", "train": ("a.jsonl",)}


def with_key(key: str, value: Any) -> Any:
    """The section of a dotted key, made with this value."""
    section, _, name = key.rpartition(".")
    made = {"": Config, "data.sources['a']": Source}.get(section)
    if made is None:
        holder = ModelConfig if section.startswith("model.") else Config
        made = bare(annotations(holder)[section.removeprefix("model.")])[0]
    required = {Config: {"name": "x"}, Source: FILES}.get(made, {})
    return made(**{**required, name: value})


# Types


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.steps", 6.0, "must be a whole number from 1 to 2147483647 (write 6)"),
        ("train.steps", "6", "must be a whole number from 1 to 2147483647 (write 6)"),
        ("train.steps", "1e3", "must be a whole number from 1 to 2147483647 (write 1000)"),
        ("train.steps", "0", "must be a whole number from 1 to 2147483647"),
        ("train.steps", 6.5, "must be a whole number from 1 to 2147483647"),
        ("train.steps", True, "must be a whole number from 1 to 2147483647"),
        ("train.steps", None, "must be a whole number from 1 to 2147483647"),
        ("train.steps", [6], "must be a whole number from 1 to 2147483647"),
        ("train.steps", np.int64(6), "must be a whole number from 1 to 2147483647 (write 6)"),
        ("optimizer.learning_rate", "1e-3", "must be a finite number above 0 (write 0.001)"),
        ("optimizer.learning_rate", True, "must be a finite number above 0"),
        ("optimizer.learning_rate", 1j, "must be a finite number above 0"),
        ("optimizer.beta1", 1, "must be a finite number of at least 0 and below 1"),
        ("log.wandb", 1, "must be True or False (write True)"),
        ("log.wandb", "false", "must be True or False (write False)"),
        ("log.wandb", None, "must be True or False"),
        ("out", 5, "must be text that is not empty (Unicode, without NUL) (write '5')"),
        ("out", b"runs", "must be text that is not empty (Unicode, without NUL)"),
        ("train.remat", "ful", "must be one of 'none', 'full', 'selective', 'products'; did you mean 'full'?"),
        ("train.remat", None, "must be one of 'none', 'full', 'selective', 'products'"),
        ("kernels.implementation", "Native", "did you mean 'native'?"),
        ("data.sources['a'].train", "a.jsonl", "(write ('a.jsonl',))"),
        ("data.sources['a'].train", ("a.jsonl", 5), "must be text that is not empty"),
        ("data.sources", {"name": "a"}, "must be a list, each entry a section (in Python: Source(...))"),
        ("model.mixture", "da+sa", "(write ('da+sa',))"),
        ("model.sa", {"query_heads": 2}, "must be a section (in Python: SequenceAttentionConfig(...))"),
        ("model", ModelConfig, "must be a section (in Python: ModelConfig(...))"),
    ],
)
def test_a_value_of_another_type_is_refused_with_what_to_write(key, value, message):
    with pytest.raises(ConfigError) as caught:
        with_key(key, value)
    said = str(caught.value)
    assert said.startswith(key)
    assert said.endswith(message) or message in said
    assert "\n" not in said


def test_a_whole_number_is_one_of_those_with_a_fraction():
    rate = config.OptimizerConfig(learning_rate=1).learning_rate
    assert rate == 1.0
    assert type(rate) is float


def test_lists_become_tuples():
    source = Source("a", train=["a.jsonl"])
    assert source.train == ("a.jsonl",)
    assert config.DataConfig(sources=[source]).sources == (source,)
    assert hash(ModelConfig(mixture=["sa", "ea"])) == hash(ModelConfig(mixture=("sa", "ea")))


# Ranges


@pytest.mark.parametrize(
    ("key", "taken", "refused"),
    [
        ("optimizer.learning_rate", (1e-9, 50.0), (0.0, -1e-3, np.nan, np.inf)),
        ("optimizer.warmup_steps", (0, 2**31 - 1), (-1, 2**31)),
        ("optimizer.cooldown_start", (0, 2**31 - 1), (-1, 2**31)),
        ("optimizer.cooldown_steps", (0, 2**31 - 1), (-1, 2**31)),
        ("optimizer.beta1", (0.0, 0.999), (1.0, -0.1, np.nan)),
        ("optimizer.beta2", (0.0, 0.999), (1.0, -0.1)),
        ("optimizer.epsilon", (1e-30,), (0.0, -1e-8)),
        ("optimizer.weight_decay", (0.0, 1.0), (-1e-3, np.inf)),
        ("optimizer.gradient_clip", (0.0, 1.0), (-0.5, np.nan)),
        ("optimizer.expert_bias_rate", (0.0,), (-1e-3,)),
        ("optimizer.attention_bias_rate", (0.0,), (-1e-3,)),
        ("train.steps", (1, 2**31 - 1), (0, -1, 2**31)),
        ("train.batch", (1, 2**20), (0, 2**20 + 1)),
        ("train.microbatches", (1, 32), (0, 2**20 + 1)),
        ("train.seed", (0, 2**31 - 1), (-1, 2**31)),
        ("train.max_bad_steps", (1,), (0,)),
        ("train.validate_every", (0,), (-1,)),
        ("train.validation_batches", (1,), (0,)),
        ("data.context", (2, 2**24), (1, 0, -5, 2**24 + 1)),
        ("data.prefetch", (1, 1024), (0, 1025)),
        ("data.sources['a'].weight", (1e-3, 5), (0, -1.0, np.nan, 1e300)),
        ("data.sources['a'].documents_per_task", (0,), (-1,)),
        ("model.depth", (1, 4096), (0, 4097, 10**9, 10**5000)),
        ("model.width", (1, 2**20), (0, 2**20 + 1)),
        ("model.vocab", (1, 2**31), (0, 2**31 + 1)),
        ("model.norm_epsilon", (1e-9,), (0.0, 1.0)),
        ("model.depth_rope_base", (1.0,), (0.0, -500.0, np.inf)),
        ("model.sa.rope_base", (1e4,), (0.0, 1e300)),
        ("model.sa.head_size", (2, 2**16), (0, 7, 2**16 + 2)),
        ("model.sa.query_heads", (1, 2**16), (0, 2**16 + 1)),
        ("model.da.head_size", (4,), (0, 6, -4)),
        ("model.da.window", (0,), (-1,)),
        ("model.da.dilation", (1,), (0,)),
        ("model.ea.experts", (4, 2**20), (0, 2**20 + 1)),
        ("model.ea.active_experts", (1,), (0,)),
        ("model.ea.expert_width", (1, 2**20), (0, 2**20 + 1)),
        ("model.latent.latents", (1,), (0,)),
        ("model.latent.embedding_size", (0,), (-1,)),
        ("model.parameter.pairs", (1,), (0,)),
        ("model.router.size", (4,), (0, 6)),
        ("model.router.attention_experts", (0,), (-1,)),
        ("mesh.data", (-1, 1, 2**20), (0, -2, 2**20 + 1)),
        ("checkpoint.every", (1,), (0,)),
        ("checkpoint.keep", (1,), (0,)),
        ("log.every", (1,), (0,)),
        ("distributed.heartbeat_s", (2,), (1,)),
        ("distributed.hang_s", (0,), (-1,)),
    ],
)
def test_a_number_is_taken_within_its_range_only(key, taken, refused):
    for value in taken:
        made = with_key(key, value)
        assert getattr(made, key.rpartition(".")[2]) == value
    for value in refused:
        with pytest.raises(ConfigError) as caught:
            with_key(key, value)
        assert str(caught.value).startswith(f"{key} = {shown(value)}: must be a ")


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "-x", "a/b", "/", "a\0", "a*", "a?", "[a", "a]", "a\n", " a", "a ", "x" * 201, "\ud800"],
)
def test_a_run_is_named_as_one_folder_that_can_be_read(name):
    with pytest.raises(ConfigError, match=r"^name = .*: must be a folder name of 1 to 200 characters"):
        Config(name=name)


def test_a_name_of_few_characters_may_still_be_too_long_for_a_folder():
    with pytest.raises(ConfigError, match=r"^name = '実.*: is longer than file systems allow, which is 255 bytes"):
        Config(name="実" * 100)


@pytest.mark.parametrize("name", ["a", "la_1b", "x" * 200, "run 2", "A.b-c_d", "läuft", "実験"])
def test_other_names_of_runs_are_taken(name):
    assert Config(name=name).name == name


@pytest.mark.parametrize("name", ["", "A", "1a", "_a", "a-b", "a/b", "a\n", "ä", "a" * 101])
def test_a_source_has_a_plain_name(name):
    with pytest.raises(ConfigError, match=r"\.name = .*: must be a name of small letters"):
        Source(name, train=("a",))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("out", ("", "a\0b", "\udcff")),
        ("data.root", ("a\0b",)),
        ("data.prepared", ("", "a\0b")),
        ("data.tokenizer", ("", "a\0b")),
        ("data.sources['a'].train", (("",), ("a\0b",))),
        ("data.sources['a'].validation", (("",), ("a\0b",))),
        ("data.sources['a'].prompt_field", ("",)),
        ("data.sources['a'].response_field", ("",)),
        ("data.sources['a'].tasks", (("",),)),
        ("model.latent.embeddings", ("a\0b",)),
        ("log.project", ("",)),
        ("log.sample_prompt", ("a\0b", "\ud800")),
    ],
)
def test_text_that_cannot_be_a_path_or_a_name_is_refused(key, values):
    for value in values:
        with pytest.raises(ConfigError, match="must be text"):
            with_key(key, value)


@pytest.mark.parametrize("pattern", ["(", "[a", "*", "a{99999999999999999999}", "(?P<n>", "\\"])
def test_what_to_remove_is_a_regular_expression(pattern):
    with pytest.raises(ConfigError, match=r"data\.sources\['a'\]\.remove = .*: is no regular expression: "):
        with_key("data.sources['a'].remove", pattern)


@pytest.mark.parametrize("key", ["data.prompt_template", "data.response_template"])
@pytest.mark.parametrize("template", ["", "Question:", "{text} {text}", "{Text}"])
def test_a_template_has_one_place_for_its_text(key, template):
    with pytest.raises(ConfigError, match=rf"{re.escape(key)} = .*: must hold {{text}} once, where the text goes"):
        with_key(key, template)


def test_documents_are_given_as_files_or_as_tasks():
    with pytest.raises(ConfigError, match="data source 'a': give either train files or tasks"):
        Source("a", train=("a",), tasks=("lcm",))


def test_checks_across_keys_come_out_as_they_are():
    with pytest.raises(ConfigError) as caught:
        TrainConfig(batch=6, microbatches=4)
    assert str(caught.value) == "train.batch = 6 is not a multiple of train.microbatches = 4"
    with pytest.raises(ConfigError, match=r"names are not distinct: \['a', 'a'\]"):
        config.DataConfig(sources=(Source(**FILES), Source(**FILES)))
    with pytest.raises(ConfigError, match=r"^mesh: only one axis can be -1$"):
        config.MeshConfig(data=-1, fsdp=-1)


# Keys


@pytest.mark.parametrize(
    ("cls", "keys", "message"),
    [
        (ModelConfig, {"widht": 3}, "unknown key 'model.widht'; did you mean 'model.width'?"),
        (ModelConfig, {"query_head": 3}, "unknown key 'model.query_head'; did you mean 'model.sa.query_heads'?"),
        (Config, {"name": "x", "stepz": 3}, "unknown key 'stepz'; did you mean 'train.steps'?"),
        (Config, {"name": "x", "modle": 3}, "unknown key 'modle'; did you mean 'model'?"),
        (config.MeshConfig, {"pipeline": 3}, "unknown key 'mesh.pipeline'; there are data, fsdp, expert"),
        (Config, {}, "missing key 'name': give a folder name"),
        (Source, {"train": ("a",)}, "missing key 'data.sources.name': give a name"),
    ],
)
def test_an_unknown_or_a_missing_key_is_named_with_the_nearest(cls, keys, message):
    with pytest.raises(ConfigError) as caught:
        cls(**keys)
    assert str(caught.value).startswith(message)


def test_values_without_keys_are_checked_as_those_with_keys():
    assert TrainConfig(5, 8) == TrainConfig(steps=5, batch=8)
    with pytest.raises(ConfigError, match=r"^train\.batch = '8': must be .* \(write 8\)$"):
        TrainConfig(5, "8")
    with pytest.raises(ConfigError, match=r"^train\.steps is given twice, with a key and without$"):
        TrainConfig(5, steps=5)
    with pytest.raises(ConfigError, match=r"^mesh: 3 values at most go without a key; 4 is one more$"):
        config.MeshConfig(1, 2, 3, 4)


def test_every_fault_has_a_line():
    with pytest.raises(ConfigError) as caught:
        TrainConfig(steps=0, batch=0, dtype="float16")
    assert [line.split(" ")[0] for line in str(caught.value).splitlines()] == [
        "train.steps",
        "train.batch",
        "train.dtype",
    ]


def test_a_long_value_is_shown_in_part_and_in_one_line():
    with pytest.raises(ConfigError) as caught:
        TrainConfig(steps="a\nb" * 1000)
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)
    assert shown([["a\n"]]) == r"[['a\n']]"


# Sections


def test_every_key_of_every_section_has_a_range_or_a_choice():
    open_ended = {
        f"{cls.__name__}.{key}"
        for cls in SECTIONS
        for key, annotation in annotations(cls).items()
        if annotation in (int, float, str) or (get_origin(annotation) is tuple and get_args(annotation)[0] is str)
    }
    assert not open_ended


@pytest.mark.parametrize("cls", SECTIONS)
def test_defaults_are_in_their_ranges(cls):
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            annotation = annotations(cls)[field.name]
            assert TypeAdapter(annotation).validate_python(field.default, strict=True) == field.default


@pytest.mark.parametrize("cls", SECTIONS)
def test_a_section_is_a_frozen_dataclass_like_any_other(cls):
    required = {Config: {"name": "x"}, Source: FILES}.get(cls, {})
    made = cls(**required)
    assert made == cls(**required) == pickle.loads(pickle.dumps(made)) == copy.deepcopy(made)
    assert hash(made) == hash(cls(**required))
    assert dataclasses.replace(made) == made
    assert list(dataclasses.asdict(made)) == [field.name for field in dataclasses.fields(made)]
    assert repr(made).startswith(f"{cls.__name__}(")
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, dataclasses.fields(made)[0].name, 1)


def test_a_replaced_value_is_checked_too():
    with pytest.raises(ConfigError, match=r"^train\.steps = 0: "):
        dataclasses.replace(TrainConfig(), steps=0)


def test_a_dimension_without_weights_is_still_refused_when_it_is_made():
    @section("model.hollow")
    class Hollow(Dimension):
        size: Count = 1

    with pytest.raises(TypeError, match="abstract"):
        Hollow()


def test_what_is_allowed_is_said_from_the_annotation():
    assert allowed(Count) == "a whole number from 1 to 2147483647"
    assert allowed(NonNegative) == "a finite number of at least 0"
    assert allowed(Share) == "a finite number of at least 0 and below 1"
    assert allowed(int) == "a whole number"
    assert allowed(Annotated[int, Field(multiple_of=4)]) == "a whole number, a multiple of 4"
    assert allowed(Texts) == "a list, each entry text (Unicode, without NUL)"
    assert allowed(bool) == "True or False"
    assert keys_of(config.MeshConfig, "mesh.").keys() == {"mesh.data", "mesh.fsdp", "mesh.expert"}


def test_a_section_of_a_kind_that_ships_in_none_has_errors_too():
    @section("model.mine")
    class Mine:
        sizes: Annotated[tuple[Count, ...], LIST] = ()
        limit: int | None = None
        name: str = ""

    assert Mine(sizes=[1, 2], limit=3) == from_dict(Mine, {"sizes": [1, 2], "limit": 3}, "model.mine")
    for make in (lambda **keys: Mine(**keys), lambda **keys: from_dict(Mine, keys, "model.mine")):
        with pytest.raises(ConfigError, match=r"^model\.mine\.sizes\[1\] = 0: must be a whole number from 1"):
            make(sizes=[1, 0])
        with pytest.raises(ConfigError, match=r"^model\.mine\.limit = 'x': must be of the type int \| None"):
            make(limit="x")
        with pytest.raises(ConfigError, match=r"^model\.mine\.name = 5: must be of the type str \(write '5'\)"):
            make(name=5)


def test_a_key_of_a_text_is_shown_in_one_line():
    with pytest.raises(ConfigError) as caught:
        from_dict(TrainConfig, {"a\nb" * 1000: 1}, "train")
    assert str(caught.value).startswith(r"unknown key 'train.a\nba\nb")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_what_json_cannot_hold_is_refused_as_values_are():
    with pytest.raises(ConfigError, match=r"^train: JSON cannot hold it: Object of type set"):
        from_dict(TrainConfig, {"steps": {1}}, "train")


# Paths


@pytest.mark.parametrize("character", "[]*?")
def test_a_path_that_the_library_takes_for_a_pattern_is_refused(character, tmp_path):
    folder = tmp_path / f"a{character}b"
    with pytest.raises(ConfigError, match=r"^--out: checkpoints under '.*' could not be read, for it has . in it"):
        readable_path(folder / "run", "--out")
    with pytest.raises(ConfigError, match=r"^out: checkpoints under "):
        check_run_path(Config(name="x", out=str(folder)))


def test_a_path_is_read_whole_from_the_folder_at_hand(tmp_path, monkeypatch):
    (tmp_path / "[x]").mkdir()
    check_run_path(Config(name="x", out="runs"))
    monkeypatch.chdir(tmp_path / "[x]")
    with pytest.raises(ConfigError, match=r"\[ \] in it"):
        check_run_path(Config(name="x", out="runs"))


def test_a_home_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="out '~nobody-of-this-name/runs': there is no such home folder"):
        _ = Config(name="x", out="~nobody-of-this-name/runs").run_dir


@pytest.mark.parametrize(
    ("optimizer", "steps", "message"),
    [
        ({"cooldown_start": 100}, 100, "optimizer.cooldown_start = 100 needs optimizer.cooldown_steps"),
        ({"cooldown_start": 100, "cooldown_steps": 20}, 121, "train.steps = 121 is beyond the cooldown.* step 120"),
    ],
)
def test_a_cooldown_that_leaves_steps_without_a_learning_rate_is_refused(optimizer, steps, message):
    def cooled(steps):
        return Config(name="x", optimizer=config.OptimizerConfig(**optimizer), train=TrainConfig(steps=steps))

    with pytest.raises(ConfigError, match=message):
        cooled(steps)
    if "cooldown_steps" in optimizer:
        cooled(steps - 1)


def stored(array: np.ndarray, save: Any = np.save) -> bytes:
    file = io.BytesIO()
    save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no .npy file"),
        (b"text", "is no .npy file"),
        (b"PK\3\4 broken", "is no .npy file"),
        (stored(np.zeros((2, 3)))[:-8], "is no .npy file"),
        (stored(np.array([[{}]]), lambda file, a: np.save(file, a, allow_pickle=True)), "is no .npy file"),
        (stored(np.zeros((2, 3)), np.savez), "holds no array of numbers"),
        (stored(np.array([["a", "b", "c"]])), "holds no array of numbers"),
        (stored(np.zeros((2, 3), complex)), "holds no array of numbers"),
        (stored(np.zeros((3, 2))), r"has shape \(3, 2\)"),
        (stored(np.full((2, 3), np.nan)), "not finite in float32"),
        (stored(np.full((2, 3), 1e300)), "not finite in float32"),
    ],
)
def test_a_file_that_holds_no_embeddings_is_named(content, message, tmp_path):
    path = tmp_path / "texts.npy"
    latent = config.LatentAttentionConfig(latents=2, embeddings=str(path), embedding_size=3)
    with pytest.raises(ConfigError, match=r"^model\.latent\.embeddings: there is no file"):
        latent.check_files()
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^model\.latent\.embeddings: .*{message}"):
        latent.check_files()
