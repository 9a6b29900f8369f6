"""LA at depth 32, 2.08B parameters: the paper's baseline at twice the depth (Tables 1 to 3).

    DREAMER_PREPARED=/prepared python -m dreamer_jax.train --config configs/la_2b.py

Hardware: devices of 80 GB; each holds the whole model (33.3 GB of weights, Adam moments and gradient). Rows in flight
and data: as configs/la_1b.py. The run is 6.0e20 model FLOPs, by arithmetic 53 hours on eight H100 at 40 % MFU.

Expected (paper, Tables 1 and 2): 2.0790B parameters, 1.6150 GFLOPs a token, 6.6337 GB at inference; after 100B tokens
of the paper's data, perplexity 6.31 on Maths-College and, in % of answers,
GSM8K 49.7, MATH 48.2, MMLU (math) 37.2, MathQA 26.0. Not trained with this repository yet.
"""

import runpy
from dataclasses import replace
from pathlib import Path

from dreamer_jax.config import Config


def get_config() -> Config:
    """Table 3, column LA (32): what differs from LA (16)."""
    base = runpy.run_path(str(Path(__file__).with_name("la_1b.py")))["get_config"]()
    return replace(base, name="la_2b", model=replace(base.model, depth=32))
