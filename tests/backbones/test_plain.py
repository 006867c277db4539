"""A plain list of blocks that the user describes."""

import copy
import gc
import pickle
import weakref
from dataclasses import replace

import pytest
import torch
from backbones import host_checks
from backbones.host_checks import KEEP, find_case, run
from torch import nn

import adaptok
from adaptok.errors import ConfigError, HandOverError, HostOptionError, UnsupportedModelError
from adaptok.testing.models import fill_weights
from benchmarks.architectures.case import build_quietly
from benchmarks.architectures.plain_models import OwnViT

DESCRIBED = {
    "own_vit": {"blocks": "trunk.units", "grid": (5, 7), "prefix": 2},
    "own_sequence": {"blocks": "stack", "grid": (5, 7), "prefix": 0},
}


class Iterated(OwnViT):
    """The model of the catalogue, but it iterates its list."""

    def forward(self, image):
        cells = self.patches(image).flatten(2).transpose(1, 2) + self.place_table
        tokens = torch.cat([self.front_tokens.expand(len(image), -1, -1), cells], dim=1)
        for unit in self.trunk["units"]:
            tokens = unit(tokens)
        return self.head(tokens[:, :2].mean(1) + tokens[:, 2:].mean(1))


class Children(OwnViT):
    """The same, but it runs the children of its list."""

    def forward(self, image):
        tokens = self.patches(image).flatten(2).transpose(1, 2) + self.place_table
        for unit in self.trunk["units"].children():
            tokens = unit(tokens)
        return tokens


def find(name):
    case = find_case(f"plain/{name}")
    return replace(case, build=build_quietly(Iterated)) if name == "own_vit" else case


def host_of(model):
    name = "own_vit" if isinstance(model, OwnViT) else "own_sequence"
    return adaptok.ListBackbone(**DESCRIBED[name])


def run_short(blocks, args, kwargs, rows):
    """Run the blocks on the kept tokens of one sample."""
    x = args[0][:, rows]
    for block in blocks:
        x = block(x)
    return x


@pytest.mark.parametrize("name", DESCRIBED)
def test_three_arguments_are_enough(name):
    host_checks.check_identity_keys_and_unwrap(find(name), host_of)


@pytest.mark.parametrize("name", DESCRIBED)
def test_copies(name):
    host_checks.check_copies(find(name), host_of)


@pytest.mark.parametrize("name", DESCRIBED)
def test_a_sample_does_not_depend_on_its_batch_mates(name):
    host_checks.check_batch_invariance(find(name), host_of)


@pytest.mark.parametrize("name", DESCRIBED)
def test_router_learns(name):
    host_checks.check_router_gradient(find(name), host_of)


def test_compiles_as_one_graph():
    host_checks.check_compile(find("own_vit"), host_of)


@pytest.mark.parametrize("name", DESCRIBED)
def test_kept_tokens_are_what_the_host_computes_of_them_alone(name):
    case = find(name)
    model = adaptok.wrap(
        case.build(), "dc", router="norm", budget=0.5, backbone=host_of(case.build())
    )
    host_checks.check_loop_oracle(case, model, case.inputs(model), run_short)


@pytest.mark.parametrize(
    ("prefix", "grid"), [(1, (5, 7)), (3, (5, 7)), (2, (5, 6)), (2, (6, 7)), (0, (5, 7))]
)
def test_a_wrong_description_does_not_pass_the_probe(prefix, grid):
    model = find("own_vit").build()
    host = adaptok.ListBackbone(
        blocks="trunk.units", grid=grid, prefix=prefix, inputs=find("own_vit").inputs
    )
    with pytest.raises(HandOverError, match=rf"37 tokens, and {prefix} in front of the grid"):
        adaptok.wrap(model, "dc", budget=0.5, backbone=host)
    assert not adaptok.is_wrapped(model)


def test_a_wrong_split_of_the_same_count_does_not_pass_the_oracle():
    case = find("own_vit")
    model = case.build()
    host = adaptok.ListBackbone(
        blocks="trunk.units", grid=(4, 9), prefix=1, inputs=find("own_vit").inputs
    )
    adaptok.wrap(model, "dc", router="norm", budget=0.5, backbone=host)
    with pytest.raises((AssertionError, IndexError)):
        host_checks.check_loop_oracle(case, model, case.inputs(model), run_short)


class Conditioned(nn.Module):
    """Blocks that take a condition per sample, a number, and a table that all samples share."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 48, 8, 8)
        self.embed = nn.Linear(1, 48)
        self.units = nn.ModuleList(Shifted() for _ in range(3))
        self.bias = nn.Parameter(torch.zeros(48))
        self.extra = {}

    def forward(self, image, t):
        x = self.patches(image).flatten(2).transpose(1, 2)
        c = self.embed(t[:, None])
        for unit in self.units:
            x = unit(x, c, bias=self.bias, **self.extra)
        return x


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(48)
        self.mix = nn.MultiheadAttention(48, 3, batch_first=True)

    def forward(self, x, c, bias=None, **extra):
        h = self.norm(x) + c[:, None] + bias
        return x + self.mix(h, h, h, need_weights=False)[0]


def grid_of_call(image, t):
    return image.shape[-2] // 8, image.shape[-1] // 8


def make_inputs(model):
    generator = torch.Generator().manual_seed(1)
    return adaptok.HostInputs(
        (torch.randn(2, 3, 32, 48, generator=generator), torch.tensor([0.1, 0.9]))
    )


def describe(**options):
    settings = {"blocks": "units", "grid": grid_of_call, "per_sample": (1,), "inputs": make_inputs}
    return adaptok.ListBackbone(**(settings | options))


def make_conditioned():
    return fill_weights(Conditioned()).eval()


class TestFurtherArguments:
    def test_conditions_follow_their_sample_and_the_grid_its_image(self):
        model = make_conditioned()
        images = torch.randn(3, 3, 40, 56)
        times = torch.tensor([0.0, 0.5, 1.0])
        with torch.no_grad():
            expected = model(images, times)
            adaptok.wrap(model, "dc", router="norm", budget=1.0, backbone=describe())
            assert torch.equal(model(images, times), expected)
            adaptok.set_budget(model, keep=list(KEEP))
            for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                out = other(images, times)
                for i, keep in enumerate(KEEP):
                    with adaptok.budget(other, keep=keep):
                        alone = other(images[i : i + 1], times[i : i + 1])
                    torch.testing.assert_close(alone[0], out[i], rtol=0, atol=1e-5)

    def test_a_condition_that_is_not_named(self):
        model = make_conditioned()
        with pytest.raises(HandOverError, match=r"argument 1 .*per_sample=\(1,\)\)"):
            adaptok.wrap(model, "dc", budget=0.5, backbone=describe(per_sample=()))
        assert not adaptok.is_wrapped(model)
        model.extra = {"text": torch.randn(2, 5)}
        with pytest.raises(HandOverError, match=r"argument text .*per_sample=\('text',\)\)"):
            adaptok.wrap(model, "dc", budget=0.5, backbone=describe())

    @pytest.mark.parametrize("shape", [(24, 8), (1, 24, 8), (24,), (24, 24), (1, 1, 24, 24)])
    def test_tables_with_a_row_per_token(self, shape):
        model = make_conditioned()
        model.extra = {"rope": torch.randn(shape)}
        with pytest.raises(HandOverError, match=r"argument rope .*one row per token.*Backbone"):
            adaptok.wrap(model, "dc", budget=0.5, backbone=describe())

    def test_what_no_tensor_is_stays_the_same_for_all(self):
        model = make_conditioned()
        model.extra = {"flag": True, "mask": None, "scale": torch.tensor(2.0)}
        adaptok.wrap(model, "dc", budget=0.5, backbone=describe(per_sample=(1, "mask")))
        assert model(*make_inputs(model).args).shape == (2, 24, 48)


class TestGuessedInputs:
    def test_a_model_that_takes_more_than_an_image(self):
        model = make_conditioned()
        with pytest.raises(ConfigError, match=r"cannot be guessed what Conditioned takes.*inputs="):
            adaptok.wrap(model, "dc", budget=0.5, backbone=describe(grid=(4, 6), inputs=None))
        assert not adaptok.is_wrapped(model)

    def test_a_grid_that_only_a_call_knows(self):
        with pytest.raises(ConfigError, match="cannot be guessed"):
            adaptok.wrap(make_conditioned(), "dc", budget=0.5, backbone=describe(inputs=None))

    def test_unverified(self):
        model = make_conditioned()
        adaptok.wrap(model, "dc", budget=0.5, backbone=describe(inputs=None), verify=False)
        assert adaptok.is_wrapped(model)


class TestOtherLists:
    def make(self, forward, **parts):
        class Mine(nn.Module):
            pass

        Mine.forward = forward
        model = Mine()
        model.patches = nn.Conv2d(3, 48, 8, 8)
        model.units = nn.ModuleList(
            nn.TransformerEncoderLayer(48, 3, 96, 0.0, batch_first=True) for _ in range(3)
        )
        for name, part in parts.items():
            setattr(model, name, part)
        return fill_weights(model).eval()

    def wrap(self, model, **options):
        host = adaptok.ListBackbone(**({"blocks": "units", "grid": (4, 6)} | options))
        return adaptok.wrap(model, "dc", budget=0.5, backbone=host)

    def test_a_forward_that_counts_its_blocks(self):
        def forward(self, image):
            x = self.patches(image).flatten(2).transpose(1, 2)
            for i in range(len(self.units)):
                x = self.units[i](x)
            return x

        with pytest.raises(HostOptionError, match="whoever counts them"):
            self.wrap(self.make(forward))

    def test_a_forward_that_takes_some_of_its_blocks(self):
        def forward(self, image):
            x = self.patches(image).flatten(2).transpose(1, 2)
            for unit in self.units[:2]:
                x = unit(x)
            return x

        model = self.make(forward)
        with pytest.raises(adaptok.errors.ProbeError, match="entered units 0 times"):
            self.wrap(model)
        assert not adaptok.is_wrapped(model)

    def test_a_forward_that_runs_its_blocks_twice(self):
        def forward(self, image):
            x = self.patches(image).flatten(2).transpose(1, 2)
            for unit in [*self.units, *self.units]:
                x = unit(x)
            return x

        with pytest.raises(adaptok.errors.ProbeError, match="entered units 2 times"):
            self.wrap(self.make(forward))

    def test_a_forward_that_runs_the_children_of_its_list(self):
        host = adaptok.ListBackbone(blocks="trunk.units", grid=(5, 7))
        model = fill_weights(Children()).eval()
        with pytest.raises(HostOptionError, match="runs the children of its list"):
            adaptok.wrap(model, "dc", budget=0.5, backbone=host)

    def test_blocks_that_return_more_than_tokens(self):
        class Pair(nn.TransformerEncoderLayer):
            def forward(self, x):
                return super().forward(x), None

        def forward(self, image):
            x = self.patches(image).flatten(2).transpose(1, 2)
            for unit in self.units:
                x = unit(x)[0]
            return x

        units = nn.ModuleList(Pair(48, 3, 96, 0.0, batch_first=True) for _ in range(2))
        with pytest.raises(HandOverError, match="Pair returned a tuple: it needs a backbone"):
            self.wrap(self.make(forward, units=units))

    def test_tokens_by_name(self):
        def forward(self, image):
            x = self.patches(image).flatten(2).transpose(1, 2)
            for unit in self.units:
                x = unit(src=x)
            return x

        with pytest.raises(HandOverError, match="first, by place; got NoneType"):
            self.wrap(self.make(forward))

    def test_every_way_into_the_model_when_the_grid_is_given(self):
        def forward(self, image):
            x = self.patches(image).flatten(2).transpose(1, 2)
            for unit in self.units:
                x = unit(x)
            return x

        model = self.wrap(self.make(forward))
        with adaptok.trace(model) as trace:
            model.forward(torch.randn(1, 3, 32, 48))  # hooks of the model itself do not fire
        assert trace.steps[0].kept.tolist() == [12]

    def test_an_unknown_path(self):
        def forward(self, image):
            return image

        message = r"Mine has no attribute layers; lists in it: units"
        with pytest.raises(UnsupportedModelError, match=message):
            self.wrap(self.make(forward), blocks="layers")
        with pytest.raises(UnsupportedModelError, match="patches is no list of blocks"):
            self.wrap(self.make(forward), blocks="patches")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix": -1}, "prefix is a number of tokens of at least 0, got -1"),
        ({"grid": ()}, "grid is one or more lengths"),
        ({"grid": (0, 4)}, "grid is one or more lengths"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ConfigError, match=message):
        adaptok.ListBackbone(**({"blocks": "units", "grid": (4, 6)} | options))


def test_a_wrapped_model_is_freed_without_the_garbage_collector():
    gc.collect()
    gc.disable()
    try:
        model = find("own_vit").build()
        adaptok.wrap(model, "dc", budget=0.5, backbone=host_of(model))
        gone = weakref.ref(model.trunk["units"])
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_an_adapter_of_ones_own_class_keeps_it():
    class Mine(adaptok.ListBackbone):
        name = "mine"

    case = find("own_vit")
    model = case.build()
    adaptok.wrap(model, "dc", budget=0.5, backbone=Mine(**DESCRIBED["own_vit"]))
    assert type(model.trunk["units"].backbone) is Mine
    assert run(case, model, case.inputs(model)).isfinite().all()
