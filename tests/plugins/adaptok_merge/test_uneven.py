"""Samples that keep everything beside samples that lose most: each as if it were alone."""

import pytest
import torch

import adaptok
from adaptok.errors import BudgetError
from adaptok.testing import make_vit
from adaptok.testing.models import fill_weights

IMAGES = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(5))


def compare(vit, images, budgets):
    """Run a batch with a budget for each sample, and each sample by itself."""
    with torch.no_grad():
        with adaptok.budget(vit, tokens=budgets), adaptok.trace(vit) as seen:
            together = vit(images)
        alone = []
        for image, count in zip(images, budgets, strict=True):
            with adaptok.budget(vit, tokens=count):
                alone.append(vit(image[None]))
    assert seen.steps[0].kept.tolist() == list(budgets)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "stack",
    [["tome", "exit"], [{"name": "tome", "r": [8, 0, 0]}], [{"name": "tome", "site": "boundary"}]],
    ids=["pieces", "one-block", "boundary"],
)
@pytest.mark.parametrize("budgets", [(2, 24), (24, 3), (5, 20)])
def test_one_keeps_all_where_another_needs_several_rounds(stack, budgets):
    vit = adaptok.wrap(fill_weights(make_vit()).eval(), stack=stack)
    compare(vit, IMAGES, budgets)


def test_one_block_for_all_of_it():
    vit = adaptok.wrap(fill_weights(make_vit()).eval(), stack=["tome"], span=(0, 1))
    compare(vit, IMAGES, (2, 24))


def test_a_count_that_the_image_decides_limits_r_and_is_no_error():
    vit = adaptok.wrap(fill_weights(make_vit()).eval(), stack=["dc", "tome"], budget=0.9)
    with adaptok.budget(vit, tokens=[24, 3]), adaptok.trace(vit) as seen, torch.no_grad():
        vit(IMAGES)
    assert seen.steps[0].stages == ("dc", "tome")
    natural = adaptok.wrap(
        fill_weights(make_vit()).eval(), stack=["hnet", {"name": "tome", "r": 8}], verify=False
    )
    blank = torch.cat([IMAGES[:1], torch.zeros(1, 3, 32, 48)])
    with adaptok.trace(natural) as seen, torch.no_grad():
        natural(blank)
    assert seen.steps[0].plans[0].computed.min() < 8  # fewer than r
    whole = adaptok.wrap(make_vit(), stack=[{"name": "tome", "r": 25}])
    with pytest.raises(BudgetError, match="r=25 is more than the 24 tokens of the grid"):
        whole(IMAGES)


def test_kept_of_nested_mergings_is_what_the_innermost_left():
    vit = adaptok.wrap(fill_weights(make_vit()).eval(), stack=["tomesd", "tome"], budget=0.5)
    with adaptok.trace(vit) as seen, torch.no_grad():
        vit(IMAGES)
    step = seen.steps[0]
    tokens = [len(set(row.tolist())) for row in step.provenance.token]
    assert step.kept.tolist() == tokens
    assert step.kept_share == tokens[0] / 24
