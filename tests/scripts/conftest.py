import os
import random
import time

import pytest


@pytest.fixture
def rng():
    """Other moments every time; the seed is printed when a test fails."""
    seed = int(os.environ.get("QLORA_JAX_TEST_SEED", time.time_ns() % 10**9))
    print(f"QLORA_JAX_TEST_SEED={seed}")
    return random.Random(seed)
