"""At which depths members of a mixture run, and to which a depth attends."""

import pytest

from dreamer_jax.config import ConfigError
from dreamer_jax.model.dreamer import checked_depth
from tests.models import changed, small

DA = small("DR+DA").da


@pytest.mark.parametrize(
    ("window", "dilation", "back"),
    [(0, 1, {0, 1, 2, 3, 4, 5, 6, 7}), (1, 1, {0}), (3, 1, {0, 1, 2}), (0, 3, {0, 3, 6}), (2, 3, {0, 3})],
)
def test_depth_attention_reaches_so_many_depths_so_far_apart(window, dilation, back):
    da = changed(DA, window=window, dilation=dilation)
    assert {7 - earlier for earlier in range(10) if da.reaches(7, earlier)} == back


@pytest.mark.parametrize(
    ("pattern", "at_five", "at_seven"),
    [
        ("[::2]", (0, 2, 4), (0, 2, 4, 6)),
        ("[:2]", (0, 1), (0, 1)),
        ("[-2:]", (3, 4), (5, 6)),
        ("[1:-1:2]", (1, 3), (1, 3, 5)),
    ],
)
def test_a_pattern_is_taken_of_the_depths_that_run(pattern, at_five, at_seven):
    config = changed(small("DR+DA"), depth=5, mixture=(f"sa{pattern}+da", "ea"))
    assert config.depths_of("sa") == at_five
    assert config.depths_of("sa", 7) == at_seven


def test_a_depth_at_which_a_member_would_not_run_at_all_is_refused():
    with pytest.raises(ConfigError, match="da would run at none of its depths"):
        checked_depth(changed(small("DR+DA"), mixture=("da[2:]+sa", "ea")), 2)
