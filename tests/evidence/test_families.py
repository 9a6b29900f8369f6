"""The evidence harness: what is asked and counted, in which order runs go, and what the report says of them."""

import dataclasses
import functools
import gzip
import json
import math

import numpy as np
import pytest

from benchmarks.evidence import campaign, run
from benchmarks.evidence.__main__ import main
from benchmarks.evidence.accuracy import (
    Question,
    Score,
    check_tests,
    documents_of,
    questions_of,
    scores,
)
from benchmarks.evidence.figures import against_depth
from benchmarks.evidence.findings import (
    Curve,
    Finding,
    band,
    efficiency,
    final_accuracy,
    finding,
    is_done,
    lacking,
    minutes,
    none_accuracy,
    steps_to,
)
from benchmarks.evidence.packed import pack, unpack
from benchmarks.evidence.report import write_report
from benchmarks.evidence.setup import (
    FAMILIES,
    NO_HOP,
    WORKED,
    Group,
    Run,
    config_of,
    pilots_of,
    runs_of,
    setup_of,
    sized,
)
from dreamer_jax.accounting.match import TOLERANCE, MatchError
from dreamer_jax.config import ConfigError, Source, to_json
from dreamer_jax.data.families import dag_mod7
from dreamer_jax.data.families.p_hop import NONE
from dreamer_jax.data.files import DataError
from dreamer_jax.data.template import Template
from dreamer_jax.data.tokenizer import load_tokenizer, word_tokenizer
from dreamer_jax.inference.likelihood import packed, packed_arrays
from tests.training.shared import train

GRAPH = "two_hop(entities=20, relations=6, out_degree=4, compositions=2.0)"
TINY = dataclasses.replace(
    setup_of("two_hop", small=True),
    sources=(Source("graph", tasks=(GRAPH,)),),
    vocab=32,
    context=32,
    depth=1,
    width=16,
    expert_width=48,
    variants=("LA", "DR"),
    steps=4,
    batch=8,
    evaluate_every=2,
)


class Ended:
    """A process that has ended."""

    def __init__(self, code):
        self.code = code

    def poll(self):
        return self.code

    def terminate(self):
        raise AssertionError("it has ended already")

    wait = poll


def in_this_process(setup, out):
    return lambda one, place: Ended(run.carried_out(setup, one, out))


def with_few_documents(setup):
    """The family with two documents of each test, where their number can be chosen."""

    def fewer(task):
        return task if task.startswith("two_hop") else task.replace("(", "(test_size=2, ", 1)

    sources = [dataclasses.replace(source, tasks=tuple(map(fewer, source.tasks))) for source in setup.sources]
    return dataclasses.replace(setup, sources=tuple(sources))


def finished(one, out):
    """What a finished run would have written."""
    config = json.loads(to_json(config_of(TINY, one, out)))
    return Finding(one, [{"step": TINY.steps}], {**one._asdict(), "steps": TINY.steps}, config)


# The whole of it.


def test_a_campaign_trains_what_is_missing_once_and_reports_the_rest_as_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "train", train)
    out, start = tmp_path / "two_hop", in_this_process(TINY, tmp_path / "two_hop")
    carry_out = functools.partial(campaign.carried_out, TINY, jobs=1)
    assert carry_out(runs_of(TINY, [0]), out, start) == []
    assert carry_out(runs_of(TINY, [0]), out, lambda one, place: pytest.fail("all is done")) == []

    records = [json.loads(line) for line in (out / "DR-w16-s0" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "accuracy/in_distribution" in r] == [2, 4]
    final = json.loads((out / "DR-w16-s0" / "final.json").read_text())
    documents = {name: min(len(asked), TINY.final_documents) for name, asked in documents_of(TINY).items()}
    assert {name: score["asked"] for name, score in final["trained"]["tests"].items()} == documents
    assert [(at["depth"], at["scaled"]) for at in final["swept"]] == [(1, False), (2, False), (2, True)]
    assert json.loads((out / "LA-w16-s0" / "final.json").read_text())["swept"] == []

    text = write_report(TINY, runs_of(TINY, [0, 1]), out, tmp_path).read_text()
    assert "* LA-w16-s1: not started" in text
    assert "LA-w16-s0:" not in text
    assert len(list(tmp_path.glob("evidence_two_hop_cpu_*.png"))) == 3


def test_the_packed_runs_of_a_report_are_enough_to_write_it_again(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "train", train)
    tiny = dataclasses.replace(TINY, variants=("LA", "DR+DA"), depth=2, width=64)
    out, elsewhere, runs = tmp_path / "two_hop", tmp_path / "elsewhere", runs_of(tiny, [0])
    campaign.carried_out(tiny, runs, out, in_this_process(tiny, out), jobs=1)
    first = write_report(tiny, runs, out, tmp_path)
    packed = first.with_name(f"{first.stem}_runs.jsonl.gz")

    assert unpacked(packed, elsewhere, tiny) == runs
    assert all(is_done(finding(one, elsewhere), tiny.steps) for one in runs)
    again = write_report(tiny, runs, elsewhere, elsewhere)
    assert again.read_text() == first.read_text()
    assert again.with_name(packed.name).read_bytes() == packed.read_bytes()
    pictures = [picture.name for picture in tmp_path.glob("*.png")]
    assert len(pictures) == 3
    assert all((elsewhere / name).read_bytes() == (tmp_path / name).read_bytes() for name in pictures)
    assert str(tmp_path) not in gzip.decompress(packed.read_bytes()).decode()


def unpacked(path, out, setup=TINY, seeds=(0,)):
    return unpack(path, runs_of(setup, seeds), out, lambda one: config_of(setup, one, out))


def test_unpacking_leaves_alone_what_has_been_trained_here(tmp_path):
    one = finished(Run("two_hop", "DR", 16, 0), tmp_path)
    packed = pack([one], tmp_path / "runs.jsonl.gz")
    folder = tmp_path / one.run.name
    (folder / "checkpoints").mkdir(parents=True)
    assert unpacked(packed, tmp_path) == [one.run]
    assert [path.name for path in folder.iterdir()] == ["checkpoints"]

    (folder / "checkpoints").rmdir()
    (folder / "log.txt").write_text("a start that failed")
    unpacked(packed, tmp_path)
    assert finding(one.run, tmp_path).final == one.final


def test_a_narrower_report_keeps_the_packed_runs_of_a_wider_one(tmp_path):
    path, (first, second) = tmp_path / "runs.jsonl.gz", runs_of(TINY, [0])
    assert not pack([finished(first, tmp_path)._replace(final=None)], path).exists()
    pack([finished(first, tmp_path), finished(second, tmp_path)], path)
    again = finished(first, tmp_path)
    pack([again._replace(records=[{"step": TINY.steps, "train/loss": 1.0}]), again._replace(final=None)], path)
    assert unpacked(path, tmp_path / "out") == [first, second]
    assert finding(first, tmp_path / "out").records[0]["train/loss"] == 1.0


LINE = {"name": "LA-w16-s0", "metrics.jsonl": [], "final.json": {"family": "two_hop"}, "config.json": {}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"{}", "not a file of packed runs"),
        (b"", "not a file of packed runs"),
        (gzip.compress(b""), "not a file of packed runs"),
        (gzip.compress(b"[1]\n"), "not a file of packed runs"),
        (gzip.compress(json.dumps(LINE | {"name": 1}).encode()), "not a file of packed runs"),
        (gzip.compress(json.dumps(LINE | {"final.json": None}).encode()), "not a file of packed runs"),
        (gzip.compress(json.dumps(LINE | {"final.json": {}}).encode()), "LA-w16-s0 is of None, not of two_hop"),
    ],
)
def test_a_file_that_has_no_runs_of_the_family_is_refused(content, message, tmp_path, capsys):
    path = tmp_path / "runs.jsonl.gz"
    if content is not None:
        path.write_bytes(content)
    assert main(["two_hop", "--out", str(tmp_path), "--report", "--finished", str(path)]) == 1
    assert message in capsys.readouterr().err


def test_packed_runs_of_another_setup_are_refused_before_anything_is_written(tmp_path):
    packed = pack([finished(one, tmp_path) for one in runs_of(TINY, [0])], tmp_path / "runs.jsonl.gz")
    with pytest.raises(ConfigError, match=r"another setup \(it differs in optimizer.weight_decay\)"):
        unpacked(packed, tmp_path / "out", dataclasses.replace(TINY, weight_decay=0.5))
    assert not (tmp_path / "out").exists()


# What is compared.


@pytest.mark.parametrize("family", FAMILIES)
def test_recurrent_variants_cost_what_la_does(family):
    setup = setup_of(family)
    costs = [sized(setup, variant, width) for variant in ("DR", "DR+DA") for width in setup.all_widths]
    assert max(abs(share) for cost in costs for share in cost[1:]) <= TOLERANCE


def test_a_variant_that_cannot_cost_the_same_is_refused():
    with pytest.raises(MatchError, match="no match"):
        sized(dataclasses.replace(TINY, expert_width=8), "DR", 16)


def test_runs_of_a_seed_differ_in_their_models_alone(tmp_path):
    one, other = (config_of(TINY, Run("two_hop", variant, 16, 0), tmp_path) for variant in TINY.variants)
    assert dataclasses.replace(one, name=other.name, model=other.model) == other


def test_random_depths_are_a_matter_of_training(tmp_path):
    setup = setup_of("p_hop")
    plain, random = (config_of(setup, Run("p_hop", variant, 64, 0), tmp_path) for variant in ("DR", "DR random"))
    assert (plain.train.depths, random.train.depths) == ("", "uniform(2, 6)")
    assert plain.model == random.model


def test_a_seed_of_all_variants_comes_before_the_next():
    setup = dataclasses.replace(setup_of("dag_mod7"), variants=("LA", "DR"), widths=(32,))
    names = [one.name for one in runs_of(setup, [0, 1])]
    assert names[:4] == ["LA-w64-s0", "DR-w64-s0", "LA-w32-s0", "DR-w32-s0"]
    assert names[4:] == [name.replace("s0", "s1") for name in names[:4]]


def test_a_pilot_tries_each_rate_in_a_folder_of_its_own():
    names = [one.name for one in pilots_of(setup_of("p_hop"), ["DR+DA"])]
    assert names == [*(f"DR+DA-w64-s0-rate{rate}" for rate in ("0.0001", "0.0003", "0.001"))]


def test_every_test_of_a_group_exists_and_most_are_asked_along_the_training():
    for setup in map(setup_of, FAMILIES):
        tests = documents_of(with_few_documents(setup))
        assert {name for group in setup.groups for name in group.tests} <= tests.keys()
        assert all(set(group.tests) & set(setup.along) for group in setup.groups)
        assert set(setup.along) <= tests.keys()


def letters_and_answers(document):
    """Each letter that an answer is asked for, with the letter before it; answers that there is none are left out."""
    text = [(document.prompt, document.response), *document.further]
    words = " ".join(f"{given} {answered}" for given, answered in text).replace("> ", "").upper().split()
    rows = zip([None, *words[0::2]], words[0::2], words[1::2], strict=False)
    return [(before, letter, answer) for before, letter, answer in rows if answer in "ABCD"]


def test_the_guess_without_a_hop_is_as_good_as_is_said():
    guesses = {}
    for name, documents in documents_of(setup_of("p_hop")).items():
        asked = [row for document in documents for row in letters_and_answers(document)]
        before, itself = (sum(row[i] == row[2] for row in asked) / len(asked) for i in (0, 1))
        guesses[name] = max(before, itself, (1 - before - itself) / 2)
    assert {name: guesses[name] for name in NO_HOP} == pytest.approx(NO_HOP, abs=0.01)
    for group in setup_of("p_hop").groups:
        assert group.chance == pytest.approx(sum(guesses[test] for test in group.tests) / len(group.tests), abs=0.01)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variants", "DR random"], "--variants 'DR random': two_hop has LA, DR, DR+DA"),
        (["--jobs", "0"], "--jobs 0: must be at least 1"),
        (["--seeds", "1", "0", "1"], "--seeds 1 0 1: one stands twice"),
        (["--report"], "none of these runs has a record of a step yet"),
    ],
)
def test_what_cannot_be_is_told_of_in_a_line(words, message, tmp_path, capsys):
    assert main(["two_hop", "--out", str(tmp_path), *words]) == 1
    assert message in capsys.readouterr().err


# In which order, and until when.


def test_runs_start_in_order_as_places_become_free(capsys):
    started = []

    def start(one, place):
        started.append((one.seed, place))
        return Ended(3 if one.seed == 1 else 0)

    runs = [Run("two_hop", "LA", 16, seed) for seed in range(3)]
    failed = campaign.worked_off(runs, start, jobs=2, pause=0)
    assert started == [(0, 0), (1, 1), (2, 0)]
    assert failed == [runs[1]]
    assert "LA-w16-s1: ended with 3, see its log.txt" in capsys.readouterr().out


def test_no_run_starts_after_the_time():
    times = iter([True, True, False])
    started = []
    runs = [Run("two_hop", "LA", 16, seed) for seed in range(3)]
    campaign.worked_off(
        runs, lambda one, place: started.append(one) or Ended(0), 1, lambda: next(times, False), pause=0
    )
    assert started == runs[:1]


def test_a_folder_of_another_setup_is_refused(tmp_path):
    one = Run("two_hop", "DR", 16, 0)
    (tmp_path / one.name).mkdir()
    (tmp_path / one.name / "config.json").write_text(to_json(config_of(TINY, one, tmp_path / "elsewhere")))

    def check(setup, runs):
        campaign.check_folders(lambda run: config_of(setup, run, tmp_path), runs, tmp_path)

    check(dataclasses.replace(TINY, steps=8), [one, one._replace(seed=1)])
    with pytest.raises(ConfigError, match=r"another setup \(it differs in optimizer.weight_decay\)"):
        check(dataclasses.replace(TINY, weight_decay=0.5), [one])


def test_runs_that_still_go_on_are_asked_to_end_when_the_campaign_is_interrupted():
    ended = []

    class Going(Ended):
        def terminate(self):
            ended.append("asked")

        def wait(self):
            ended.append("waited for")

    def start(one, place):
        if one.seed:
            raise KeyboardInterrupt
        return Going(None)

    with pytest.raises(KeyboardInterrupt):
        campaign.worked_off([Run("two_hop", "LA", 16, seed) for seed in range(2)], start, jobs=2, pause=0)
    assert ended == ["asked", "waited for"]


# What is counted.


def test_a_test_that_asks_for_what_is_trained_on_is_refused():
    leaking = Source("more", tasks=(GRAPH.replace("(", "(seed=1, ", 1),))  # another graph of the same names
    with pytest.raises(DataError, match="training documents have as well"):
        check_tests(dataclasses.replace(TINY, sources=(*TINY.sources, leaking)))
    check_tests(TINY)


def test_a_test_with_working_may_have_the_problems_of_that_without():
    graphs = "definitions=(2, 2), test_definitions=(3, 3)"
    sources = (
        Source("problems", tasks=(f"dag_mod7({graphs}, seed=1)",), documents_per_task=200),
        Source(WORKED, tasks=(f"dag_mod7({graphs}, asked='some')",), documents_per_task=200),
    )
    setup = dataclasses.replace(TINY, sources=sources)
    alone, worked = (documents_of(setup)[f"definitions=2{ending}"] for ending in ("", f" {WORKED}"))
    assert {dag_mod7.same(document) for document in alone} & {dag_mod7.same(document) for document in worked}
    check_tests(setup)


def test_an_answer_is_right_where_the_token_before_it_foretells_it():
    questions = [
        Question("a", [1, 5, 6, 2], [2], [False]),
        Question("b", [1, 5, 6, 5, 7, 2], [2, 4], [False, True]),
        Question("a", [1, 5, 8, 2], [2], [False]),
    ]
    rows = packed(questions, context=10)
    assert [len(row) for row in rows] == [2, 1]
    right = np.zeros((2, 10), bool)
    right[0, [1, 7]] = True  # the answer of the first document, and the second answer of the next
    assert scores(rows, right) == {"a": Score(1, 2, 0, 0), "b": Score(0, 1, 1, 1)}


def test_documents_of_a_row_begin_at_position_0_in_segments_of_their_own():
    rows = packed([Question("a", [1, 5, 6], [2], [False]), Question("a", [1, 7], [1], [False])], context=6)
    tokens, positions, segments = packed_arrays(rows, 2, 6)
    assert tokens.tolist() == [[1, 5, 6, 1, 7, 0], [0] * 6]
    assert positions[0].tolist() == [0, 1, 2, 0, 1, 0]
    assert segments[0].tolist() == [1, 1, 1, 2, 2, 0]


def test_the_places_of_questions_hold_their_answers(tmp_path):
    tests = documents_of(with_few_documents(setup_of("p_hop")))
    texts = [text for asked in tests.values() for d in asked for turn in (d[:2], *d.further) for text in turn]
    path = tmp_path / "tokenizer.json"
    path.write_bytes(word_tokenizer({word for text in texts for word in text.split()}))
    tokenizer = load_tokenizer(path)
    found = questions_of(tests, tokenizer, Template("{text} ", "{text}"))
    documents = [document for asked in tests.values() for document in asked]
    for question, document in zip(found, documents, strict=True):
        answers = [document.response, *(answered for _, answered in document.further)]
        assert [tokenizer.decode([question.tokens[place]]) for place in question.places] == answers
        assert question.is_none == [answer == NONE for answer in answers]


# What follows from it.


def test_steps_to_a_goal_are_those_until_it_is_first_reached():
    reached = Curve((100, 200, 300, 400), (0.2, 0.91, 0.88, 0.95))
    assert steps_to(0.9, reached) == 200
    assert steps_to(0.96, reached) is None


def test_a_band_has_the_range_of_the_seeds_that_reach_a_step():
    steps, values = band([Curve((1, 2), (0.2, 0.6)), Curve((1,), (0.4,))])
    assert steps == (1, 2)
    assert [(round(v.mean, 6), v.low, v.high, v.seeds) for v in values] == [(0.3, 0.2, 0.4, 2), (0.6, 0.6, 0.6, 1)]


def test_data_efficiency_is_the_baselines_training_over_the_variants():
    baseline = Curve((100, 200, 300, 400), (0.1, 0.2, 0.3, 0.5))
    twice = efficiency(baseline, Curve((100, 200, 300, 400), (0.3, 0.5, 0.7, 0.8)))
    assert twice is not None
    assert twice.value == pytest.approx(2.0)
    never = efficiency(baseline, Curve((100, 200), (0.1, 0.2)))
    assert str(never) == "not reached"


def test_stretched_depths_are_drawn_apart_and_meet_the_others_at_the_trained_depth():
    def at(depth, scaled, right):
        return {"depth": depth, "scaled": scaled, "tests": {"p=1": {"right": right, "asked": 10}}}

    swept = [at(1, False, 2), at(2, False, 9), at(3, False, 5), at(1, True, 3), at(3, True, 6)]
    setup, group = dataclasses.replace(TINY, depth=2), Group("p=1", ("p=1",), 0.25)
    one = Finding(Run("two_hop", "DR", 16, 0), [{"step": 4}], {"trained_depth": 2, "swept": swept}, None)
    for stretched, expected in ((False, {1.0: 0.2, 2.0: 0.9, 3.0: 0.5}), (True, {1.0: 0.3, 2.0: 0.9, 3.0: 0.6})):
        [panel] = against_depth(setup, [one], 16, [group], stretched=stretched)
        [line] = panel.lines
        assert dict(zip(line.x, (value.mean for value in line.values), strict=True)) == expected


def test_minutes_are_those_at_the_median_speed():
    speed = "speed/tokens_per_second"
    records = [{"step": step, speed: value} for step, value in ((2, 10.0), (4, 500.0), (6, 400.0), (8, 400.0))]
    one = Finding(Run("two_hop", "LA", 16, 0), records, None, {"train": {"batch": 5}, "data": {"context": 600}})
    assert minutes(one) == pytest.approx(8 * 5 * 600 / 400 / 60)
    assert minutes(one._replace(records=[{"step": 2}])) is None


def test_a_run_is_missing_until_it_has_been_evaluated_after_all_steps():
    one = Finding(Run("two_hop", "LA", 16, 0), [{"step": 2}], None, None)
    assert lacking([one], lambda _: TINY.steps) == ["LA-w16-s0: at step 2 of 4"]
    assert lacking([one._replace(final={"steps": 2})], lambda _: TINY.steps) == ["LA-w16-s0: at step 2 of 4"]
    assert lacking([one._replace(final={"steps": 4})], lambda _: TINY.steps) == []


def test_answers_that_say_there_is_none_count_apart():
    tests = {
        "p=1": {"right": 3, "asked": 4, "none_right": 1, "none_asked": 1},
        "p=2": {"right": 1, "asked": 4, "none_right": 0, "none_asked": 3},
    }
    assert final_accuracy(tests, ["p=1", "p=2"]) == 0.5
    assert none_accuracy(tests, ["p=1", "p=2"]) == 0.25
    assert math.isnan(final_accuracy(tests, ["p=3"]))
