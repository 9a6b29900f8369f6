"""Three runs to compare."""

import pytest

from tests.evaluation.comparison.folders import train


@pytest.fixture
def runs(tmp_path):
    """The best of `la` on gsm8k and math are at different checkpoints."""
    return [
        train(tmp_path, "la", [4, 6, 8, 10], [4, 10, 6, 6], variant="LA"),
        train(tmp_path, "dr", [6, 10, 12, 11], [6, 8, 12, 12], (8.0, 7.0, 6.5, 5.5)),
        train(tmp_path, "dr_da", [12, 14, 16, 15], [4, 4, 6, 8], (7.0, 6.0, 5.5, 5.0), variant="DR+DA"),
    ]
