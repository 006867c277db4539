import os

import numpy as np
import pytest

from adaptok import DCDiTConfig
from adaptok.train.config import TrainConfig, fit_model_to_data

CLASSES = 3
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for child processes


@pytest.fixture(scope="session")
def tiny_npz(tmp_path_factory):
    """Twelve 16 px images whose classes differ in brightness."""
    random = np.random.default_rng(0)
    labels = np.arange(12) % CLASSES
    images = random.integers(0, 90, (12, 16, 16, 3)) + 80 * labels[:, None, None, None]
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, images=images.astype(np.uint8), labels=labels)
    return path


@pytest.fixture(scope="session")
def make_config(tiny_npz):
    """Make a run of a tiny model; latents are 8 x 8 x 12."""

    def make(fit=True, model=None, **options):
        model = model or DCDiTConfig(hidden_size=32, depth=2, num_heads=2)
        values = {
            "data": str(tiny_npz),
            "image_size": 16,
            "batch_size": 8,
            "ratio_group": 2,
            "steps": 6,
            "log_every": 2,
            "checkpoint_every": 2,
            "budget_warmup": 2,
            "learning_rate": 1e-3,
        }
        config = TrainConfig(model=model, **(values | options))
        return fit_model_to_data(config, CLASSES) if fit else config

    return make
