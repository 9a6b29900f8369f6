"""DR at depth 16, 1.17B parameters: one recurrent layer, FLOP- and parameter-matched to la_1b (Tables 1 to 3).

    DREAMER_PREPARED=/prepared python -m dreamer_jax.train --config configs/dr_1b.py

Hardware and data: as configs/la_1b.py.

Expected (paper, Tables 1 and 2): 1.1704B parameters, 0.9389 GFLOPs a token, 4.7822 GB at inference; after 100B tokens
of the paper's data, perplexity 6.64 on Maths-College and, in % of answers,
GSM8K 47.6, MATH 47.8, MMLU (math) 44.5, MathQA 45.6. Not trained with this repository yet.
"""

import runpy
from dataclasses import replace
from pathlib import Path

from dreamer_jax.config import Config


def get_config() -> Config:
    """Table 3, column DR (16): what differs from LA (16)."""
    base = runpy.run_path(str(Path(__file__).with_name("la_1b.py")))["get_config"]()
    experts = replace(base.model.ea, experts=517, expert_width=504)
    return replace(base, name="dr_1b", model=replace(base.model, depth_recurrent=True, ea=experts))
