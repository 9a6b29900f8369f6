"""DR+DA at depth 32, 2.08B parameters: the paper's best model, matched to la_2b (Tables 1 to 3).

    DREAMER_PREPARED=/prepared python -m dreamer_jax.train --config configs/dr_da_2b.py

Hardware and data: as configs/la_2b.py.

Expected (paper, Tables 1 and 2): 2.0788B parameters, 1.6130 GFLOPs a token, 6.6349 GB at inference; after 100B tokens
of the paper's data, perplexity 5.90 on Maths-College and, in % of answers,
GSM8K 56.3, MATH 54.5, MMLU (math) 50.0, MathQA 50.8. Not trained with this repository yet.
"""

import runpy
from dataclasses import replace
from pathlib import Path

from dreamer_jax.config import Config


def get_config() -> Config:
    """Table 3, column DR+DA (32): what differs from LA (16)."""
    base = runpy.run_path(str(Path(__file__).with_name("la_1b.py")))["get_config"]()
    experts = replace(base.model.ea, experts=1097, expert_width=472)
    return replace(
        base,
        name="dr_da_2b",
        model=replace(base.model, depth=32, depth_recurrent=True, mixture=("da+sa", "ea"), ea=experts),
    )
