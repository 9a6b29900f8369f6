"""The sources of configs/data/table4.py: of rows in each set's own layout, which questions and answers are read."""

import json
import runpy
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dreamer_jax.data.files import DataError
from dreamer_jax.data.layout import UnusableRow
from dreamer_jax.preparation.filters import MARKS
from dreamer_jax.preparation.raw import Group, files_of, read_group, texts_of
from dreamer_jax.preparation.reasoning import is_unproved, stripped
from dreamer_jax.preparation.recipe import RawSource, included, licences

FILE = Path(__file__).parents[2] / "configs" / "data" / "table4.py"
RECIPE = runpy.run_path(str(FILE))["get_config"]()
SOURCES: dict[str, RawSource] = {source.name: source for source in RECIPE.sources}
TABLE_4 = {
    ("EleutherAI/hendrycks_math", ""): "MIT",
    ("bethgelab/CuratedThoughts", "OpenR1-Math-220k-default"): "not stated",
    ("bethgelab/CuratedThoughts", "OpenThoughts-114k-math-default"): "not stated",
    ("microsoft/orca-math-word-problems-200k", ""): "MIT",
    ("TIGER-Lab/MathInstruct", ""): "MIT",
    ("openai/gsm8k", "main"): "MIT",
    ("XinyaoHu/AMPS_khan", ""): "MIT",
    ("open-thoughts/OpenThoughts2-1M", ""): "Apache 2.0",
    ("AI-MO/NuminaMath-CoT", ""): "Apache 2.0",
    ("facebook/natural_reasoning", ""): "CC-BY-NC-4.0",
    ("nvidia/OpenMathInstruct-2", ""): "CC-BY-4.0",
    ("nvidia/OpenMathReasoning", ""): "CC-BY-4.0",
    ("zwhe99/DeepMath-103K", ""): "MIT",
    ("ibivibiv/math_instruct", ""): "not stated",
    ("nvidia/Nemotron-Pretraining-SFT-v1", "Nemotron-SFT-MATH"): "NVIDIA Data Agreement for Model Training",
    ("ajibawa-2023/Maths-College", ""): "Apache 2.0",
}
TRACE = "<think>\nOkay, so I need to find it.\n</think>\n\n"
BOXED = r"Return your final response within \boxed{}. "


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]


def openr1(generations: list[str], verified: list[bool] | None) -> dict[str, Any]:
    return {
        "problem": "What is 7 times 6?",
        "solution": "Multiply.",
        "answer": "42",
        "problem_type": "Algebra",
        "source": "olympiads",
        "is_reasoning_complete": [True] * len(generations),
        "generations": generations,
        "correctness_math_verify": verified,
        "correctness_llama": None,
    }


def openthoughts_math(answer: str, correct: bool, question: str = "Find 6 + 6.") -> dict[str, Any]:
    return {
        "source": "cn_k12",
        "problem": question,
        "solution": r"\boxed{12}",
        "system": "Your role as an assistant",
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "conversations": turns(BOXED + question, answer),
        "generated_token_count": 30,
        "correct": correct,
    }


def openmathreasoning(solution: str, mode: str = "cot") -> dict[str, Any]:
    return {
        "expected_answer": "14",
        "problem_type": "has_answer_extracted",
        "problem_source": "aops_c4_high_school_math",
        "generation_model": "DeepSeek-R1",
        "pass_rate_72b_tir": "0.96875",
        "problem": "How many are there?",
        "generated_solution": solution,
        "inference_mode": mode,
        "used_in_kaggle": None,
    }


def deepmath(*solutions: str | None) -> dict[str, Any]:
    columns = {f"r1_solution_{number}": solution for number, solution in enumerate(solutions, start=1)}
    return {"question": "Evaluate the limit.", "final_answer": "0", "difficulty": 4.5, "topic": "Limits", **columns}


def mathinstruct(source: str, output: str = "The answer is 4.") -> dict[str, Any]:
    return {"source": f"data/{source}.json", "instruction": "What is 2 + 2?", "output": output}


CASES: list[tuple[str, dict[str, Any], list[tuple[str, str]]]] = [
    ("gsm8k", {"question": "2 + 2?", "answer": "It is <<2+2=4>>4.\n#### 4"}, [("2 + 2?", "It is 4.\n#### 4")]),
    (
        "math",
        {"problem": "Find $x$.", "level": "Level 1", "type": "Algebra", "solution": r"$\boxed{2}$"},
        [("Find $x$.", r"$\boxed{2}$")],
    ),
    (
        "amps_khan",
        {"problem": "$4,10,16$: the next?", "hints/solutions": ["Each term is", "$6$", "more.", None, "$22$"]},
        [("$4,10,16$: the next?", "Each term is $6$ more. $22$")],
    ),
    (
        "numina_cot",
        {"source": "synthetic_math", "problem": "Solve $2y=3$.", "solution": "$y=1.5$", "messages": []},
        [("Solve $2y=3$.", "$y=1.5$")],
    ),
    ("mathinstruct", mathinstruct("CoT/gsm_rft"), [("What is 2 + 2?", "The answer is 4.")]),
    ("mathinstruct", mathinstruct("PoT/TheoremQA", "print(2 + 2)"), []),
    ("mathinstruct", mathinstruct("CoT/aqua_rat"), []),
    ("mathinstruct", mathinstruct("CoT/math50k_camel"), []),
    ("mathinstruct_camel", mathinstruct("CoT/math50k_camel"), [("What is 2 + 2?", "The answer is 4.")]),
    ("mathinstruct_camel", mathinstruct("CoT/gsm_rft"), []),
    ("orca_math", {"question": "How much?", "answer": "She spends $121.50."}, [("How much?", "She spends $121.50.")]),
    ("maths_college", {"instruction": "Explain groups.", "output": "A set..."}, [("Explain groups.", "A set...")]),
    (
        "deepmath",
        deepmath("Okay, a limit...\n</think>\n\nIt is 0.", "<think>Hm.</think>Zero.", "Okay, I need to evaluate the"),
        [("Evaluate the limit.", "It is 0."), ("Evaluate the limit.", "Zero.")],
    ),
    ("deepmath", deepmath("No.</think>1</think>It is 0.", None, None), [("Evaluate the limit.", "It is 0.")]),
    (
        "openthoughts2",
        {"conversations": turns(BOXED + "Find $181^1$.\n", f"{TRACE}It is 181."), "source": None},
        [("Find $181^1$.", "It is 181.")],
    ),
    ("openthoughts2", {"conversations": turns("Q?", f"{TRACE}A."), "source": "automath"}, [("Q?", "A.")]),
    ("openthoughts2", {"conversations": turns("Q?", f"{TRACE}A."), "source": "evolcodegolf"}, []),
    ("openthoughts2", {"conversations": turns("Sort.", f"{TRACE}```python\nsort()\n```"), "source": None}, []),
    ("openthoughts2", {"conversations": turns("Q?", "<think>```x```</think>A."), "source": None}, [("Q?", "A.")]),
    ("openmathreasoning", openmathreasoning(f"{TRACE}It is 14."), [("How many are there?", "It is 14.")]),
    ("openmathreasoning", openmathreasoning(f"{TRACE}<tool_call>\n14\n</tool_call>", "tir"), []),
    ("openmathreasoning", openmathreasoning("Judgment: 0", "genselect"), []),
    ("openmathreasoning", openmathreasoning("<think>\nOkay, so this never ends"), []),
    (
        "openmathinstruct2",
        {"problem": "P?", "generated_solution": "S.", "expected_answer": "1", "problem_source": "augmented_math"},
        [("P?", "S.")],
    ),
    (
        "openr1_math",
        openr1([f"{TRACE}It is 42.", f"{TRACE}It is 43.", f"{TRACE}So 42."], [True, False, True]),
        [("What is 7 times 6?", "It is 42."), ("What is 7 times 6?", "So 42.")],
    ),
    ("openr1_math", openr1([f"{TRACE}It is 42."], None), []),
    (
        "openthoughts_math",
        openthoughts_math(
            "<|begin_of_thought|>\n\nHm.\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n12\n\n<|end_of_solution|>",
            True,
        ),
        [("Find 6 + 6.", "12")],
    ),
    ("openthoughts_math", openthoughts_math("<|begin_of_solution|>13<|end_of_solution|>", False), []),
    (
        "openthoughts_math",
        openthoughts_math(
            "<|begin_of_solution|>AB is parallel to CD.<|end_of_solution|>", True, "Prove that AB is parallel to CD."
        ),
        [],
    ),
    (
        "natural_reasoning",
        {
            "question": "Why?",
            "reference_answer": "",
            "responses": [{"response_model": "Llama3.3-70B-Instruct", "response": "## Step 1: Because."}],
        },
        [("Why?", "## Step 1: Because.")],
    ),
    ("nemotron", {"id": "1", "text": "What is 2 + 2? It is 4."}, [("", "What is 2 + 2? It is 4.")]),
    ("nemotron", {"id": "1", "text": f"What is 2 + 2?\n{TRACE}It is 4."}, [("", "What is 2 + 2?\n\nIt is 4.")]),
    ("math_instruct", {"instruction": "Add.", "input": "2 and 2", "output": "4"}, [("Add.\n\n2 and 2", "4")]),
    ("math_instruct", {"instruction": "Add 2 to 2.", "input": "", "output": "4"}, [("Add 2 to 2.", "4")]),
]


def read(row: dict[str, Any], source: RawSource) -> Iterator[tuple[str, str]]:
    """What is left of a row after its stages of reading and stripping."""
    for prompt, response in texts_of(row, source, Counter()):
        left = stripped(response, MARKS[source.traces]).text if source.traces in MARKS else response
        if left and not is_unproved(prompt, left):
            yield prompt.rstrip(), left


@pytest.mark.parametrize(("name", "row", "expected"), CASES)
def test_a_row_of_a_set_gives_its_questions_and_checked_answers(name, row, expected) -> None:
    assert list(read(row, SOURCES[name])) == expected


def test_all_sets_of_the_table_are_there_with_their_licences() -> None:
    listed = {(source.hub, source.subset): source.licence for source in RECIPE.sources if "camel" not in source.name}
    assert listed == TABLE_4
    assert {name for name, _, _ in CASES} == set(SOURCES)


def test_sets_can_be_left_out_by_what_their_licences_allow() -> None:
    free = replace(RECIPE, exclude=("non-commercial",))
    assert {source.licence for source in included(free).values()} == {"MIT", "Apache 2.0", "CC-BY-4.0"}
    open_to_all = included(replace(RECIPE, exclude=("gated",))).values()
    assert set(SOURCES) - {source.name for source in open_to_all} == {"nemotron"}
    [line] = [line for line in licences(free).splitlines() if line.startswith("natural_reasoning")]
    assert "CC-BY-NC-4.0" in line
    assert "no commercial use" in line
    assert line.endswith("left out")


def test_a_row_without_a_response_is_counted():
    row = {"question": "Why?", "reference_answer": "So.", "responses": []}
    with pytest.raises(UnusableRow, match="no answer"):
        list(texts_of(row, SOURCES["natural_reasoning"], Counter()))


@pytest.mark.parametrize("name", SOURCES)
def test_a_set_whose_columns_have_changed_is_refused_by_name(name, tmp_path) -> None:
    source = SOURCES[name]
    column = (source.prompt or (source.turns or source.text,))[0]
    row = next(row for of, row, _ in CASES if of == name)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({f"{key}_v2" if key == column else key: value for key, value in row.items()}))
    with pytest.raises(DataError, match=f"source '{name}' expects the fields .*{column}.* the row has .*{column}_v2"):
        read_group(tmp_path, source, 0, Group(0, (path,)), 10)


@pytest.mark.parametrize(
    ("name", "there", "taken"),
    [
        ("gsm8k", ("main/train-0.parquet", "main/test-0.parquet", "socratic/train-0.parquet"), 1),
        ("gsm8k", ("train.jsonl", "test.jsonl"), 1),
        ("math", ("algebra/train-0.parquet", "algebra/test-0.parquet", "geometry/train-0.parquet"), 2),
        ("openmathinstruct2", ("data/train-0.parquet", "data/train_1M-0.parquet"), 1),
        ("openmathreasoning", ("data/cot-0.parquet", "data/tir-0.parquet"), 1),
        ("openr1_math", ("OpenThoughts-114k-math-default/train-0.parquet",), 0),
        ("maths_college", ("Maths-College-0-Final.jsonl", "Maths-College-1-Final.jsonl", ".cache/state.json"), 2),
    ],
)
def test_of_a_set_as_the_hub_has_it_the_right_files_are_taken(name, there, taken, tmp_path) -> None:
    for path in (tmp_path / SOURCES[name].hub / file for file in there):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = files_of(SOURCES[name], tmp_path)
    assert [path.relative_to(tmp_path / SOURCES[name].hub).as_posix() for path in found][:1] == list(
        there[: bool(taken)]
    )
    assert len(found) == taken


def test_the_large_sets_are_cut_down() -> None:
    assert SOURCES["math_instruct"].cap
    assert {name for name, source in SOURCES.items() if source.share < 1} == {"nemotron", "math_instruct"}


def test_perplexity_is_measured_on_questions_that_no_other_set_holds() -> None:
    assert [source.name for source in RECIPE.sources if source.benchmark] == ["maths_college"]
    assert SOURCES["maths_college"].held_out > max(
        source.held_out for source in RECIPE.sources if source.name != "maths_college"
    )
