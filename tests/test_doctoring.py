"""`adaptok.doctor`: what it finds, and that it leaves the model as it was."""

import json

import pytest
import torch
from adapter_models import is_same, state_of
from torch import nn

import adaptok
from adaptok.doctoring import doctor
from adaptok.errors import AlreadyWrappedError, ConfigError, UnknownNameError
from adaptok.hosts import HostInputs
from adaptok.testing import make_vit
from adaptok.testing.models import fill_weights


def fits_of(report, kind):
    return {fit.name: fit.reason for fit in report.fits if fit.kind == kind}


@pytest.fixture(scope="module")
def report():
    return doctor(make_vit(), repeats=2)


class TestReport:
    def test_of_the_host(self, report):
        assert report.ok
        assert report.model == "timm.models.vision_transformer.VisionTransformer"
        assert (report.backbone, report.versions) == ("timm-vit", "timm 1.0.31")
        assert (report.blocks, report.width, report.containers) == (3, 96, ("blocks",))
        assert (report.grid, report.prefix, report.tokens) == ((4, 6), 1, 25)
        assert report.error == 0.0
        assert report.kept == (12, 12)

    def test_of_layouts_and_parts(self, report):
        assert fits_of(report, "layout") == {"packed": "", "bucketed": "", "fixed": ""}
        routers = fits_of(report, "router")
        assert set(routers) >= {"dc", "norm", "random", "cosine", "entropy", "predictability"}
        assert not any(routers.values())
        assert fits_of(report, "chunker")["dc"] == fits_of(report, "dechunker")["dc"] == ""

    def test_of_times(self, report):
        cost = report.overhead
        assert cost.plain_ms > 0
        assert cost.ratio == cost.full_ms / cost.plain_ms
        assert (cost.repeats, cost.batch, cost.device) == (2, 2, "cpu")

    def test_as_text(self, report):
        text = str(report)
        for part in (
            "can be wrapped",
            "timm-vit: timm VisionTransformer; checked with timm 1.0.31",
            "3 of width 96, in blocks",
            "grid 4 x 6 = 24 cells, 1 in front",
            "error 0 with every cell kept",
            "12, 12 cells computed",
            "x the time",
            "on a small grid",
        ):
            assert part in text
        assert max(map(len, text.splitlines())) < 100

    def test_as_json(self, report):
        content = json.loads(report.to_json())
        assert content["ok"] is True
        assert content["backbone"] == "timm-vit"
        assert content["overhead"]["ratio"] == report.overhead.ratio
        assert {"kind": "router", "name": "norm", "reason": ""} in content["fits"]


class TestModelStaysAsItWas:
    @pytest.mark.parametrize("training", [False, True])
    def test_after_a_report(self, training):
        vit = make_vit().train(training)
        vit.blocks[1].eval()
        modes = {name: module.training for name, module in vit.named_modules()}
        before, attributes = state_of(vit), {n: sorted(vars(m)) for n, m in vit.named_modules()}
        random = torch.get_rng_state()
        doctor(vit, repeats=1)
        assert torch.equal(torch.get_rng_state(), random)
        assert {name: module.training for name, module in vit.named_modules()} == modes
        assert {n: sorted(vars(m)) for n, m in vit.named_modules()} == attributes
        assert is_same(state_of(vit), before)
        assert all(p.grad is None for p in vit.parameters())

    def test_after_a_host_that_fails(self):
        vit = make_vit()
        before = state_of(vit)
        vit.norm.register_forward_pre_hook(fail)
        report = doctor(vit, repeats=1)
        vit.norm._forward_pre_hooks.clear()
        assert not report.ok
        assert "no more" in report.problem
        assert report.backbone == "timm-vit"
        assert "cannot be wrapped" in str(report)
        assert is_same(state_of(vit), before)

    def test_after_a_probe_that_fails(self):
        from adaptok.backbones.timm_vit import TimmViT

        class Twin(TimmViT):
            def run(self, block, index, call):
                return call.with_x(
                    super().run(block, index, call).x * (1 + (call.cells is not None))
                )

        vit = make_vit()
        before = state_of(vit)
        report = doctor(vit, backbone=Twin.match(vit), repeats=1)
        assert "with every cell kept" in report.problem
        assert report.error is None
        assert is_same(state_of(vit), before)


def fail(*_):
    raise RuntimeError("no more")


class TestParts:
    def test_that_do_not_fit_say_why_and_hurt_nobody(self):
        @adaptok.register_router("test-doctor-needs")
        class Needs(adaptok.Router):
            def __init__(self, teeth):
                super().__init__()

            def forward(self, tokens, context):
                raise AssertionError

        @adaptok.register_stage("test-doctor-breaks")
        class Breaks(adaptok.Stage):
            effects = adaptok.Effects("tokens")

            def forward(self, inner, call):
                raise ZeroDivisionError("by zero")

        @adaptok.register_stage("test-doctor-works")
        class Works(adaptok.Stage):
            effects = adaptok.Effects("tokens")

            def forward(self, inner, call):
                return inner(call)

        try:
            vit = make_vit()
            before = state_of(vit)
            report = doctor(vit, repeats=1)
        finally:
            from adaptok.discovery import HOST

            for key in list(HOST.registry.entries):
                if key[1].startswith("test-doctor"):
                    del HOST.registry.entries[key]
        assert report.ok
        assert "teeth" in fits_of(report, "router")["test-doctor-needs"]
        assert fits_of(report, "stage")["test-doctor-breaks"] == "by zero"
        assert fits_of(report, "stage")["test-doctor-works"] == ""
        assert "not test-doctor-breaks: by zero" in str(report)
        assert is_same(state_of(vit), before)


class TestOtherModels:
    def test_that_no_backbone_fits(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)))
        report = doctor(model)
        assert not report.ok
        assert report.backbone == ""
        assert "timm-vit: no timm VisionTransformer" in report.problem
        assert "Lists in this model: 1 (2)" in report.problem
        assert "cannot be wrapped" in str(report)
        assert json.loads(report.to_json())["ok"] is False

    def test_that_are_described(self):
        class Mine(nn.Module):
            def __init__(self):
                super().__init__()
                self.cut = nn.Conv2d(3, 48, 8, 8)
                self.units = nn.ModuleList(
                    nn.TransformerEncoderLayer(48, 3, 96, 0.0, batch_first=True) for _ in range(2)
                )

            def forward(self, image):
                x = self.cut(image).flatten(2).transpose(1, 2)
                for unit in self.units:
                    x = unit(x)
                return x

        host = adaptok.ListBackbone(blocks="units", grid=(4, 6))
        report = doctor(fill_weights(Mine()), backbone=host, repeats=1)
        assert report.ok
        assert (report.backbone, report.grid, report.width) == ("list", (4, 6), 48)
        assert "packed" in {name for name, reason in fits_of(report, "layout").items() if reason}

    def test_on_inputs_of_ones_own(self):
        images = HostInputs((torch.randn(5, 3, 64, 96),))
        report = doctor(make_vit(), images, repeats=1)
        assert (report.grid, report.overhead.batch, report.kept) == ((8, 12), 5, (48,) * 5)

    def test_whose_weights_are_not_here(self):
        report = doctor(make_vit().to("meta"))
        assert report.ok
        assert report.overhead is None
        assert "the weights are not here" in str(report)

    def test_that_are_wrapped_already(self):
        with pytest.raises(AlreadyWrappedError, match="is wrapped already"):
            doctor(adaptok.wrap(make_vit(), "dc", budget=0.5))

    def test_pipelines(self):
        class Pipeline:
            transformer = None

        assert "pass its transformer" in doctor(Pipeline()).problem

    def test_bad_options(self):
        with pytest.raises(ConfigError, match="repeats is a number of turns of at least 1, got 0"):
            doctor(make_vit(), repeats=0)
        with pytest.raises(UnknownNameError, match=r"no backbone 'timm-vot'.*'timm-vit'"):
            doctor(make_vit(), backbone="timm-vot")
