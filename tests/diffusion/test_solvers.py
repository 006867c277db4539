"""Whole numbers of NumPy are whole numbers: seeds and steps come from its arrays."""

import numpy as np
import pytest

from adaptok.diffusion.solvers import check_steps, make_generators
from adaptok.errors import ConfigError


def test_seeds_and_steps_of_numpy():
    own = [source.initial_seed() for source in make_generators(3, 2)]
    assert [source.initial_seed() for source in make_generators(np.int64(3), 2)] == own == [3, 4]
    assert [source.initial_seed() for source in make_generators(list(np.array([3, 4])), 2)] == own
    check_steps("ddpm", np.int32(2), 2, 1000)
    for wrong in (np.int64(1), np.float64(20.0), np.bool_(True)):
        with pytest.raises(ConfigError, match="'ddpm' takes 2 to 1000 steps, got"):
            check_steps("ddpm", wrong, 2, 1000)
