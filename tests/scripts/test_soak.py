"""The soak of tests/soak.py, briefly."""

import pytest
from soak import soak


@pytest.mark.slow
def test_a_run_that_is_broken_at_random_comes_to_the_same_bits(tmp_path):
    counts = soak(12, 0, tmp_path)
    assert counts["completed"] >= 1
    assert counts["kill"] + counts["stop"] >= 2
