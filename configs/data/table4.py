"""The paper's data: all sets of Table 4 (Section 4.1), from raw files to packed rows of token ids.

    export DREAMER_RAW=/raw DREAMER_DATA=/data DREAMER_PREPARED=/prepared
    python -m dreamer_jax.prepare --config configs/data/table4.py --work.fetch True

The paper's six configs train on the result, $DREAMER_PREPARED. $DREAMER_RAW holds the raw sets, each in a folder that
is named as the hub names it (openai/gsm8k); with work.fetch, those that are not there are fetched, many hundred
gigabytes. $DREAMER_DATA holds the tokenizer of Llama 3.3 as tokenizer.json, and the files of the benchmarks, whose
questions no training row may contain (docs/evaluation.md).

    --exclude non-commercial gated     leave out what may not be used commercially, and what needs asking for access
    --exclude nemotron math_instruct   leave out sets by name

The order is that of their claim: of rows that say the same, the one of the earlier set stays. Short answers by people
come first; then texts that a model has rewritten or written, the checked ones before the unchecked; then those whose
licence allows least; and last the two that are large enough to drown all others.

The paper does not say how much of each set it uses. Two are cut down here. Nemotron-SFT-MATH alone has some 207B
tokens, as others who train on it count them: twice what the paper trains on. A fifth of it is still most of the
mixture. ibivibiv/math_instruct has 114 million short rows.

A licence is "not stated" where Table 4 has "-". That grants nothing, so such a set counts as non-commercial; so does
NVIDIA's own agreement, which everyone has to read and accept for themselves. Change `commercial` in a copy of this
file if you know better.
"""

from dreamer_jax.preparation.recipe import DecontaminateConfig, Keep, RawSource, Recipe, TokensConfig

CONTEXT = 4096
TRAINING_TOKENS = 100_000
"""Millions."""
NOT_STATED = "not stated"
BOXED = r"\AReturn your final response within \\boxed\{\}\.\s*"
"""OpenThoughts puts this in front of questions, which would hide that other sets have them, too."""
CODE_ANSWER = r"(?s)</think>.*```"
"""A block of code in the answer, behind the trace."""


def get_config() -> Recipe:
    """Table 4: 15 sets of the hub, 16 subsets."""
    return Recipe(
        sources=(
            RawSource(
                name="gsm8k",
                hub="openai/gsm8k",
                subset="main",
                licence="MIT",
                prompt=("question",),
                response=("answer",),
                remove=r"<<[^<>]*>>",  # its calculator's marks
            ),
            RawSource(
                name="math",
                hub="EleutherAI/hendrycks_math",  # seven subsets, one for each subject
                licence="MIT",
                prompt=("problem",),
                response=("solution",),
            ),
            RawSource(
                name="amps_khan",
                hub="XinyaoHu/AMPS_khan",
                licence="MIT",
                prompt=("problem",),
                # Parts of sentences. So named by one public loader of this copy, and not seen otherwise; in AMPS
                # itself, which is one JSON file for each problem, it is `hints`.
                response=("hints/solutions",),
                joined=True,
            ),
            RawSource(
                name="numina_cot",
                hub="AI-MO/NuminaMath-CoT",
                licence="Apache 2.0",
                prompt=("problem",),
                response=("solution",),
            ),
            RawSource(
                name="mathinstruct",
                hub="TIGER-Lab/MathInstruct",
                licence="MIT",
                prompt=("instruction",),
                response=("output",),
                # Not its programs (data/PoT/...). Not data/CoT/aqua_rat.json either: MathQA took its questions from
                # AQuA-RAT and rewrote them here and there ("17.5 m" for "17.5 metre"), and so some of MathQA's test
                # questions would not be found in it.
                keep=(
                    Keep(
                        "source",
                        (
                            "data/CoT/MATH_train.json",
                            "data/CoT/TheoremQA.json",
                            "data/CoT/college_math.json",
                            "data/CoT/gsm_rft.json",
                            "data/CoT/gsm_train.json",
                            "data/CoT/number_comparison.json",
                        ),
                    ),
                ),
            ),
            RawSource(
                name="orca_math",
                hub="microsoft/orca-math-word-problems-200k",
                licence="MIT",
                prompt=("question",),
                response=("answer",),
            ),
            RawSource(
                name="maths_college",
                hub="ajibawa-2023/Maths-College",
                licence="Apache 2.0",
                prompt=("instruction",),
                response=("output",),
                held_out=0.02,  # the paper's perplexity is measured on it
                benchmark=True,
            ),
            RawSource(
                name="deepmath",
                hub="zwhe99/DeepMath-103K",
                licence="MIT",
                prompt=("question",),
                response=("r1_solution_1", "r1_solution_2", "r1_solution_3"),
                traces="deepmath",
            ),
            RawSource(
                name="openthoughts2",
                hub="open-thoughts/OpenThoughts2-1M",
                licence="Apache 2.0",
                turns="conversations",
                # Its sets of code. Of the rows without a source, some few per cent are code as well.
                keep=(
                    Keep(
                        "source",
                        ("codefeedback", "dolphin", "evolcodegolf", "glaive", "magicoder", "sharegpt"),
                        drop=True,
                    ),
                ),
                without=CODE_ANSWER,
                remove=BOXED,
                traces="think",
            ),
            RawSource(
                name="openmathreasoning",
                hub="nvidia/OpenMathReasoning",
                split="cot",
                licence="CC-BY-4.0",
                prompt=("problem",),
                response=("generated_solution",),
                keep=(Keep("inference_mode", ("cot",)),),  # not tir, which runs programs, nor genselect
                traces="think",
            ),
            RawSource(
                name="openmathinstruct2",
                hub="nvidia/OpenMathInstruct-2",
                licence="CC-BY-4.0",
                prompt=("problem",),
                response=("generated_solution",),
            ),
            RawSource(
                name="openr1_math",
                hub="bethgelab/CuratedThoughts",
                subset="OpenR1-Math-220k-default",
                licence=NOT_STATED,
                commercial=False,
                prompt=("problem",),
                response=("generations",),
                keep=(Keep("correctness_math_verify", ("true",)),),  # a value for each generation
                traces="think",
            ),
            RawSource(
                name="openthoughts_math",
                hub="bethgelab/CuratedThoughts",
                subset="OpenThoughts-114k-math-default",
                licence=NOT_STATED,
                commercial=False,
                turns="conversations",
                keep=(Keep("correct", ("true",)),),
                remove=BOXED,
                traces="open_thoughts",
            ),
            RawSource(
                name="mathinstruct_camel",
                hub="TIGER-Lab/MathInstruct",
                licence="CC-BY-NC-4.0",  # of this part, in the set's own list as others quote it; MIT in Table 4
                commercial=False,
                prompt=("instruction",),
                response=("output",),
                keep=(Keep("source", ("data/CoT/math50k_camel.json",)),),
            ),
            RawSource(
                name="natural_reasoning",
                hub="facebook/natural_reasoning",
                licence="CC-BY-NC-4.0",
                commercial=False,
                prompt=("question",),
                response=("responses.response",),  # worked answers; reference_answer is short, and often empty
            ),
            RawSource(
                name="nemotron",
                hub="nvidia/Nemotron-Pretraining-SFT-v1",
                subset="Nemotron-SFT-MATH",
                licence="NVIDIA Data Agreement for Model Training",
                commercial=False,
                gated=True,
                text="text",  # question and answer, with no mark between them
                traces="think",
                share=0.2,
                held_out=0.0002,
            ),
            RawSource(
                name="math_instruct",
                hub="ibivibiv/math_instruct",
                licence=NOT_STATED,
                commercial=False,
                prompt=("instruction", "input"),
                response=("output",),
                share=0.1,
                cap=5_000_000,
            ),
        ),
        root="$DREAMER_RAW",
        out="$DREAMER_PREPARED",
        decontaminate=DecontaminateConfig(root="$DREAMER_DATA"),
        tokens=TokensConfig(tokenizer="$DREAMER_DATA/tokenizer.json", context=CONTEXT, budget=TRAINING_TOKENS),
    )
