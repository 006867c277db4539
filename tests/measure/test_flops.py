"""FLOPs against the profiler of PyTorch, against published figures, and against themselves."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import adaptok
from adaptok.dc import DiT, DiTConfig
from adaptok.errors import BudgetError, ShapeError
from adaptok.measure import count_flops, count_flops_by_part

STEPS = 250
PUBLISHED_DIT = {"S": 3.02, "B": 11.46, "L": 40.21, "XL": 59.00}
# scale, tail drop, TFLOPs per image
PUBLISHED_DC = [
    ("S", 0.2, 3.06),
    ("S", 0.5, 2.14),
    ("B", 0.2, 11.94),
    ("B", 0.5, 8.55),
    ("L", 0.1, 39.61),
    ("L", 0.3, 31.86),
    ("XL", 0.0, 62.99),
    ("XL", 0.2, 51.60),
    ("XL", 0.4, 40.26),
]


def per_image(config, kept):
    return STEPS * count_flops(config, (32, 32), [kept]) / 1e12


@pytest.mark.parametrize("scale", PUBLISHED_DIT)
def test_baseline_as_published(scale):
    ours = per_image(DiTConfig(scale=scale, patch_size=2), 256)
    assert ours == pytest.approx(PUBLISHED_DIT[scale], rel=0.012)


def test_baseline_as_published_at_512_px():
    config = DiTConfig(scale="XL", patch_size=2, latent_size=64)
    tflops = STEPS * count_flops(config, (64, 64), [1024]) / 1e12
    assert tflops == pytest.approx(261.25, rel=0.012)


@pytest.mark.parametrize(("scale", "drop", "published"), PUBLISHED_DC)
def test_dc_as_published(scale, drop, published):
    """The paper does not say how many cells are kept; 240 of 1,024 explain all its figures."""
    kept = 240 - int(drop * 240)
    assert per_image(adaptok.DCDiTConfig(scale=scale), kept) == pytest.approx(published, rel=0.025)


def test_published_figures_tell_other_counts_apart():
    config = adaptok.DCDiTConfig(scale="XL")
    assert per_image(config, 192) != pytest.approx(62.99, rel=0.025)
    assert per_image(config, 256) != pytest.approx(62.99, rel=0.025)


def profile(model, *inputs, **options):
    """Count with PyTorch, which sees matrix products and convolutions, by top-level part."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # others hide on a CPU
        model(*inputs, **options)
    found = {}
    for name, operations in counter.get_flop_counts().items():
        found[name.rpartition(".")[2] if name.count(".") == 1 else name] = sum(operations.values())
    return found


@pytest.mark.parametrize("grid", [(16, 16), (8, 24)])
def test_adaptive_parts_agree_with_the_profiler(grid):
    # wide enough that products outweigh elementwise work, which the profiler does not see
    config = adaptok.DCDiTConfig(
        hidden_size=512, depth=2, num_heads=4, latent_size=grid, num_classes=10, layout="fixed"
    )
    model = adaptok.DCDiT(config)
    cells = grid[0] * grid[1]
    x = torch.randn(2, 4, *grid)
    seen = profile(model, x, torch.tensor([1, 700]), torch.tensor([1, 2]), tokens=cells // 4)
    ours = count_flops_by_part(config, grid, [cells // 4] * 2)
    parts = {"encoder": "encoder", "router": "router", "backbone": "backbone", "decoder": "decoder"}
    for part, name in parts.items():
        assert getattr(ours, part) == pytest.approx(seen[name], rel=0.01), part
    assert ours.total == pytest.approx(seen["DCDiT"], rel=0.01)


def test_baseline_agrees_with_the_profiler():
    config = DiTConfig(hidden_size=512, depth=2, num_heads=4, latent_size=32, patch_size=2)
    x = torch.randn(2, 4, 32, 32)
    seen = profile(DiT(config), x, torch.tensor([1, 700]), torch.tensor([1, 2]))
    assert count_flops(config, (32, 32), [256, 256]) == pytest.approx(seen["DiT"], rel=0.01)


def test_profiler_tells_a_missing_part_apart():
    config = DiTConfig(hidden_size=512, depth=2, num_heads=4, latent_size=32, patch_size=2)
    x = torch.randn(2, 4, 32, 32)
    seen = profile(DiT(config), x, torch.tensor([1, 700]), torch.tensor([1, 2]))
    shallow = config.model_copy(update={"depth": 1})
    assert count_flops(shallow, (32, 32), [256, 256]) != pytest.approx(seen["DiT"], rel=0.01)


def test_attention_is_counted_by_real_lengths():
    config = adaptok.DCDiTConfig(hidden_size=64, depth=3, num_heads=2, latent_size=16)
    even = count_flops(config, (16, 16), [100, 100])
    uneven = count_flops(config, (16, 16), [40, 160])
    per_pair = 3 * 2 * (4 * 32 + 3)  # depth * heads * (4 d_head + 3)
    assert uneven - even == per_pair * (40**2 + 160**2 - 2 * 100**2)


def test_samples_add_up():
    config = adaptok.DCDiTConfig(hidden_size=64, depth=3, num_heads=2, latent_size=16)
    alone = [count_flops(config, (16, 16), [kept]) for kept in (5, 99)]
    assert count_flops(config, (16, 16), [5, 99]) == pytest.approx(sum(alone))


def test_cost_of_a_cell_does_not_grow_with_the_grid():
    config = adaptok.DCDiTConfig(hidden_size=64, depth=1, num_heads=2, latent_size=16)
    small = count_flops_by_part(config, (64, 64), [1]).dechunk / 64**2
    large = count_flops_by_part(config, (256, 256), [1]).dechunk / 256**2
    assert large < 1.2 * small


@pytest.mark.parametrize(
    ("config", "grid", "kept", "error", "match"),
    [
        (adaptok.DCDiTConfig(scale="S"), (32, 32), [0], BudgetError, "at least one token"),
        (adaptok.DCDiTConfig(scale="S"), (4, 4), [17], BudgetError, "more than the 16 cells"),
        (adaptok.DCDiTConfig(scale="S"), (2, 4), [1], ShapeError, "smaller than a kernel"),
        (DiTConfig(scale="S"), (32, 32), [255], BudgetError, "runs all its 256 patches"),
        (DiTConfig(scale="S"), (5, 4), [4], ShapeError, "no multiple of the patch 2"),
    ],
)
def test_bad_input(config, grid, kept, error, match):
    with pytest.raises(error, match=match):
        count_flops(config, grid, kept)
