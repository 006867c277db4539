"""What a benchmark refuses, by message."""

import pytest
import torch
from wrapped_vit import IMAGE, make_wrapped

import adaptok
from adaptok.errors import BudgetError, ConfigError, NotWrappedError, ShapeError
from adaptok.measure import benchmark
from adaptok.testing import make_vit

QUICK = {"repeats": 1, "warmup": 0}


class TestErrors:
    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (make_vit, "VisionTransformer is neither wrapped nor an adaptok.DCDiT"),
            (lambda: "vit", "str is neither wrapped"),
        ],
        ids=["plain model", "no model"],
    )
    def test_models(self, model, message):
        with pytest.raises(NotWrappedError, match=message):
            benchmark(model(), IMAGE, **QUICK)

    @pytest.mark.parametrize(
        ("budgets", "message"),
        [
            ([], "no budgets to measure"),
            ([0.5, {"keep": 0.5}], "keep=0.5 came twice"),
            ([1.5], "keep is a fraction"),
            (["0.5"], "a budget is a number"),
            ([True], "a budget is a number"),
            (0.5, "budgets is a list"),
            ({"drop": 0.3}, "budgets is a list"),
            ([{"target_ms": 3}], "got 'target_ms'"),
            ([{"tokens": 25}], "^tokens=25: .*tokens=25 is more than the 24 cells"),
        ],
    )
    def test_budgets(self, budgets, message):
        with pytest.raises(BudgetError, match=message):
            benchmark(make_wrapped(), IMAGE, budgets, **QUICK)

    def test_a_budget_that_does_not_fit_the_router(self):
        model = make_wrapped(router="norm")
        with pytest.raises(BudgetError, match=r"^drop=0.3: this router only ranks cells"):
            benchmark(model, IMAGE, [0.5, {"drop": 0.3}], **QUICK)

    @pytest.mark.parametrize("inputs", [{}, (), None, "image"], ids=str)
    def test_no_inputs(self, inputs):
        with pytest.raises(ShapeError, match="inputs is"):
            benchmark(make_wrapped(), inputs, **QUICK)

    def test_inputs_that_do_not_fit(self):
        with pytest.raises(RuntimeError, match="channels") as caught:
            benchmark(make_wrapped(), torch.randn(2, 5, 32, 48), **QUICK)
        assert caught.value.__notes__ == [
            "raised in adaptok.benchmark by the call of: the same model without its stages"
        ]

    def test_repeats(self):
        with pytest.raises(ConfigError, match="repeats >= 1"):
            benchmark(make_wrapped(), IMAGE, repeats=0)

    def test_compiled_already(self):
        with pytest.raises(ConfigError, match="compiled already"):
            benchmark(torch.compile(make_wrapped(), backend="eager"), IMAGE, **QUICK)

    def test_baseline_that_cannot_be_called(self):
        with pytest.raises(ConfigError, match="a module or a callable, got a int"):
            benchmark(make_wrapped(), IMAGE, baseline=3, **QUICK)

    def test_a_target(self):
        with pytest.raises(BudgetError, match="target_ms=20 is no budget of a benchmark"):
            benchmark(make_wrapped(), IMAGE, [adaptok.Budget(target_ms=20.0)], **QUICK)

    def test_one_side_compiled(self):
        other = torch.compile(make_vit(), backend="eager")
        with pytest.raises(ConfigError, match="one side is compiled already: give both"):
            benchmark(make_wrapped(), IMAGE, [0.5], baseline=other, **QUICK)
