import pytest
import torch
from torch import nn
from wrapped_vit import (
    IMAGE,
    ShiftingDechunker,
    make_wrapped,
    state_of,
)

import adaptok
from adaptok.dc.host import HostChunker, HostDechunker, HostRouter
from adaptok.errors import (
    AlreadyWrappedError,
    ConfigError,
    NotWrappedError,
    ProbeError,
    RoutingError,
    UnknownNameError,
    UnsupportedModelError,
    WrapError,
)
from adaptok.testing import make_vit
from adaptok.testing.models import fill_weights
from benchmarks.architectures import find_case


class BadRouter(adaptok.Router):
    def __init__(self, answer):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.answer = answer

    def forward(self, tokens, context):
        return self.answer(self, tokens.x.norm(dim=-1).sigmoid())


class CountingChunker(HostChunker):
    """Keeps everything, whatever the budget."""

    def forward(self, tokens, routing, budget):
        return super().forward(tokens, routing, adaptok.Budget(keep=1.0))


class ShortDechunker(HostDechunker):
    def forward(self, chunks, plan, before):
        return chunks


REFUSED = {
    "nothing": ({}, WrapError, "nothing was asked for"),
    "router alone": ({"router": "norm"}, (WrapError, ConfigError), "give a chunker|chunker= too"),
    "unknown chunker": ({"chunker": "dcc"}, UnknownNameError, "did you mean 'dc'"),
    "unknown option": (
        {"chunker": {"name": "dc", "bucket": 3}},
        ConfigError,
        "bucket: this option",
    ),
    "wrong type": ({"chunker": {"name": "dc", "buckets": "x"}}, ConfigError, "buckets"),
    "no name": ({"chunker": {"layout": "fixed"}}, ConfigError, "needs a name"),
    "no spec": ({"chunker": 3}, ConfigError, "a chunker is a name"),
    "a class": ({"chunker": HostChunker}, ConfigError, "make an instance"),
    "span outside": ({"chunker": "dc", "span": (1, 4)}, WrapError, "outside the 3 blocks"),
    "span empty": ({"chunker": "dc", "span": (2, 2)}, WrapError, "first < last"),
    "span no pair": ({"chunker": "dc", "span": 3}, WrapError, "pair of blocks"),
    "keep nothing": (
        {"chunker": "dc", "budget": 0.0},
        ValueError,
        r"keep is a fraction in \(0, 1\]",
    ),
    "no tokens": ({"chunker": "dc", "budget": {"tokens": 0}}, ValueError, "at least 1"),
    "odd budget": ({"chunker": "dc", "budget": {"share": 0.5}}, ValueError, "keep, tokens or drop"),
    "unknown backbone": (
        {"chunker": "dc", "backbone": "vit"},
        UnknownNameError,
        "no backbone 'vit'",
    ),
    "no backbone": ({"chunker": "dc", "backbone": 3}, ConfigError, "backbone is a name"),
    "wrong backbone": (
        {"chunker": "dc", "backbone": "list"},
        UnsupportedModelError,
        "does not fit",
    ),
    "NaN": (
        {"chunker": "dc", "router": BadRouter(lambda _, p: adaptok.Routing(p * float("nan")))},
        RoutingError,
        "no number",
    ),
    "wrong shape": (
        {"chunker": "dc", "router": BadRouter(lambda _, p: adaptok.Routing(p[:, 1:]))},
        RoutingError,
        r"\(2, 23\).*\(2, 24\)",
    ),
    "no routing": (
        {"chunker": "dc", "router": BadRouter(lambda _, p: p)},
        RoutingError,
        "answered with a Tensor",
    ),
    "above one": (
        {"chunker": "dc", "router": BadRouter(lambda _, p: adaptok.Routing(p * 9))},
        RoutingError,
        "through a sigmoid",
    ),
    "keeps all": ({"chunker": CountingChunker()}, ProbeError, "would not save a token"),
    "not the identity": (
        {"chunker": "dc", "dechunker": ShiftingDechunker(96)},
        ProbeError,
        r"with every cell kept, .* differs by 0\.0.* more than rounding explains",
    ),
    "too short": (
        {"chunker": "dc", "dechunker": ShortDechunker(96)},
        ValueError,
        "one token per cell",
    ),
    "wrong width": ({"chunker": "dc", "router": HostRouter(64)}, ValueError, "made for 64 .* 96"),
    "no part": ({"stack": ["nothing-such"]}, UnknownNameError, "no stage 'nothing-such'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_wrapped_is_refused_and_the_model_is_as_it_was(case):
    options, error, match = REFUSED[case]
    vit = make_vit()
    before, expected = state_of(vit), vit(IMAGE)
    with pytest.raises(error, match=match):
        adaptok.wrap(vit, **options)
    assert state_of(vit) == before
    assert torch.equal(vit(IMAGE), expected)


def test_a_router_without_gradient_is_refused_where_it_would_be_trained():
    answer = BadRouter(lambda _, p: adaptok.Routing(p.detach()))
    vit = make_wrapped(router=answer)
    vit.eval()(IMAGE)
    vit.train()
    with pytest.raises(RoutingError, match="has no gradient"):
        vit(IMAGE)
    answer.requires_grad_(False)
    vit(IMAGE)


def test_a_second_wrap_and_an_unwrap_of_nothing_are_refused():
    vit = make_wrapped()
    with pytest.raises(AlreadyWrappedError, match="is wrapped already"):
        adaptok.wrap(vit, chunker="dc")
    assert adaptok.is_wrapped(vit)
    adaptok.unwrap(vit)
    for use in (
        adaptok.unwrap,
        lambda m: adaptok.trace(m).__enter__(),
        lambda m: adaptok.collect_losses(m).__enter__(),
        lambda m: adaptok.request(m, "a").__enter__(),
    ):
        with pytest.raises(NotWrappedError, match="VisionTransformer is not wrapped"):
            use(vit)


def test_unsupported_models_are_refused_with_what_was_looked_for():
    with pytest.raises(
        UnsupportedModelError, match=r"no backbone fits .*Linear; looked for"
    ) as seen:
        adaptok.wrap(nn.Linear(2, 2), chunker="dc")
    for name in adaptok.available("backbones"):
        assert f"  {name}: " in str(seen.value)
    with pytest.raises(UnsupportedModelError, match=r"takes a torch\.nn\.Module, got a str"):
        adaptok.wrap("vit", chunker="dc")

    class Pipe:
        transformer = None

    with pytest.raises(UnsupportedModelError, match="pass its transformer"):
        adaptok.wrap(Pipe(), chunker="dc")
    with pytest.raises(UnsupportedModelError, match="before it is compiled"):
        adaptok.wrap(torch.compile(make_vit()), chunker="dc")


def test_a_router_that_only_ranks_needs_a_budget_when_called():
    vit = make_wrapped(router="norm", budget=None)
    with pytest.raises(ValueError, match="only ranks cells"):
        vit(IMAGE)
    adaptok.set_budget(vit, keep=0.5)
    vit(IMAGE)


def test_weights_that_are_not_there_are_probed_at_the_first_call():
    vit = make_vit()
    weights = {k: v.clone() for k, v in vit.state_dict().items()}
    vit.to("meta")
    adaptok.wrap(vit, chunker="dc", budget=0.5, dechunker=ShiftingDechunker(96))
    vit.to_empty(device="cpu")
    fill_weights(vit.blocks.adaptok)
    vit.load_state_dict(weights, strict=False)
    with pytest.raises(ProbeError, match="the first call of a wrapped model differs"):
        vit(IMAGE)
    with pytest.raises(ProbeError, match="differs"):
        vit(IMAGE)

    honest = make_vit().to("meta")
    adaptok.wrap(honest, chunker="dc", budget=0.5)
    honest.to_empty(device="cpu")
    honest.load_state_dict(make_wrapped().state_dict())
    assert honest.blocks.proof is not None
    honest(IMAGE)
    assert honest.blocks.proof is None


def test_verify_false_skips_the_probe():
    vit = make_wrapped(dechunker=ShiftingDechunker(96), verify=False)
    assert vit(IMAGE).isfinite().all()


def test_a_list_of_blocks_with_weights_of_its_own_is_refused():
    class Scaled(nn.Sequential):
        def __init__(self, *blocks):
            super().__init__(*blocks)
            self.scale = nn.Parameter(torch.ones(1))

    vit = make_vit()
    vit.blocks = Scaled(*vit.blocks)
    with pytest.raises(UnsupportedModelError, match=r"blocks holds weights of its own \(scale"):
        adaptok.wrap(vit, chunker="dc", budget=0.5)
    assert "blocks.scale" in vit.state_dict()


def test_a_stack_that_is_no_list_and_a_budget_that_is_no_number_are_refused_in_words():
    with pytest.raises(ConfigError, match=r'stack is a list of stages, as in stack=\["dc"\]'):
        adaptok.wrap(make_vit(), stack="dc")
    with pytest.raises(ValueError, match=r"budget is a number, .* got 'half'"):
        adaptok.wrap(make_vit(), chunker="dc", budget="half")
    with pytest.raises(ConfigError, match='buckets=4 is for layout "bucketed"'):
        adaptok.wrap(make_vit(), chunker={"name": "dc", "layout": "fixed", "buckets": 4})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_proven_within_its_own_rounding(dtype):
    """Without a prefix the gathered tokens lie otherwise in memory, and round otherwise."""
    host = find_case("timm/vit_base_patch16_rpn_224").build().to(dtype)
    adaptok.wrap(host, chunker="dc", budget=0.5)

    class Broken(HostDechunker):
        def forward(self, chunks, plan, before):
            after = super().forward(chunks, plan, before)
            return after.with_x(after.x.roll(1, dims=1))

    host = find_case("timm/vit_base_patch16_rpn_224").build().to(dtype)
    with pytest.raises(ProbeError, match="more than rounding explains"):
        adaptok.wrap(host, chunker="dc", budget=0.5, dechunker=Broken(host.embed_dim))
