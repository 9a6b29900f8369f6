"""DR at depth 32, 2.08B parameters: one recurrent layer, FLOP- and parameter-matched to la_2b (Tables 1 to 3).

    DREAMER_PREPARED=/prepared python -m dreamer_jax.train --config configs/dr_2b.py

Hardware and data: as configs/la_2b.py.

Expected (paper, Tables 1 and 2): 2.0794B parameters, 1.6199 GFLOPs a token, 6.6343 GB at inference; after 100B tokens
of the paper's data, perplexity 6.12 on Maths-College and, in % of answers,
GSM8K 51.5, MATH 51.3, MMLU (math) 45.3, MathQA 43.2. Not trained with this repository yet.
"""

import runpy
from dataclasses import replace
from pathlib import Path

from dreamer_jax.config import Config


def get_config() -> Config:
    """Table 3, column DR (32): what differs from LA (16)."""
    base = runpy.run_path(str(Path(__file__).with_name("la_1b.py")))["get_config"]()
    experts = replace(base.model.ea, experts=1039, expert_width=504)
    return replace(base, name="dr_2b", model=replace(base.model, depth=32, depth_recurrent=True, ea=experts))
