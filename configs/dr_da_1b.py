"""DR+DA at depth 16, 1.17B parameters: recurrence and depth attention, matched to la_1b (Tables 1 to 3).

    DREAMER_PREPARED=/prepared python -m dreamer_jax.train --config configs/dr_da_1b.py

Hardware and data: as configs/la_1b.py.

Expected (paper, Tables 1 and 2): 1.1708B parameters, 0.9413 GFLOPs a token, 4.7839 GB at inference; after 100B tokens
of the paper's data, perplexity 6.41 on Maths-College and, in % of answers,
GSM8K 51.7, MATH 50.7, MMLU (math) 38.5, MathQA 37.1. Not trained with this repository yet.
"""

import runpy
from dataclasses import replace
from pathlib import Path

from dreamer_jax.config import Config


def get_config() -> Config:
    """Table 3, column DR+DA (16): what differs from LA (16)."""
    base = runpy.run_path(str(Path(__file__).with_name("la_1b.py")))["get_config"]()
    experts = replace(base.model.ea, experts=537, expert_width=480)
    return replace(
        base, name="dr_da_1b", model=replace(base.model, depth_recurrent=True, mixture=("da+sa", "ea"), ea=experts)
    )
