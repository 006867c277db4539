import copy
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import make_model, make_uneven_batch

import adaptok
from adaptok.dc import DCDiT, DCDiTConfig
from adaptok.dc.dechunker import natural_confidence, pass_gradient
from adaptok.errors import (
    BudgetError,
    ConfigError,
    DeviceError,
    DtypeError,
    LabelError,
    ShapeError,
)
from adaptok.measure import measure_peak

LAYOUTS = [
    ("packed", {}),
    ("packed", {"drop": 0.3}),
    ("packed", {"keep": [0.1, 0.6, 0.3]}),
    ("bucketed", {}),
    ("bucketed", {"drop": 0.5}),
    ("fixed", {"keep": 0.3}),
    ("fixed", {"tokens": 17}),
]


@pytest.mark.parametrize(("scale", "millions"), [("S", 34.7), ("B", 137), ("L", 469), ("XL", 689)])
def test_parameter_counts_are_the_published_ones(scale, millions):
    with torch.device("meta"):
        model = DCDiT(DCDiTConfig(scale=scale))
    count = sum(value.numel() for value in model.reference_state_dict().values())
    assert count / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize(("layout", "budget"), LAYOUTS)
def test_a_sample_does_not_depend_on_its_batch_mates(layout, budget):
    model = make_model(layout=layout)
    x, t, y = make_uneven_batch(model)
    with torch.no_grad():
        out, routing = model(x, t, y, **budget, return_routing=True)
        if layout != "fixed" and "keep" not in budget:
            kept = routing.kept
            assert kept.max() >= 2 * kept.min(), kept
        for sample in range(3):
            one = slice(sample, sample + 1)
            mine = {
                name: value[sample] if isinstance(value, list) else value
                for name, value in budget.items()
            }
            alone, alone_routing = model(x[one], t[one], y[one], **mine, return_routing=True)
            assert torch.equal(alone_routing.keep_mask[0], routing.keep_mask[sample])
            assert torch.allclose(alone[0], out[sample], atol=1e-5)
        # the test can fail: other batch mates have other outputs
        assert (out[0] - out[1]).abs().max() > 0.01 * out.abs().max()


def test_fixed_layout_with_other_mates_at_equal_counts():
    model = make_model(layout="fixed")
    x, t, y = make_uneven_batch(model)
    out = model(x, t, y, keep=0.25)
    swapped = model(x[[0, 2, 1]], t[[0, 2, 1]], y[[0, 2, 1]], keep=0.25)
    assert torch.allclose(out[0], swapped[0], atol=1e-5)


def test_layouts_agree_where_they_compute_the_same_cells():
    models = {name: make_model(layout=name, buckets=16) for name in ("packed", "bucketed", "fixed")}
    x, t, y = make_uneven_batch(models["packed"])
    n = 12 * 18
    step = -(-n // 16)  # a count that is a bucket
    outs = {layout: model(x, t, y, tokens=3 * step) for layout, model in models.items()}
    assert torch.allclose(outs["packed"], outs["bucketed"], atol=1e-5)
    assert torch.allclose(outs["packed"], outs["fixed"], atol=1e-5)
    natural = {name: models[name](x, t, y) for name in ("packed", "bucketed")}
    assert not torch.allclose(natural["packed"], natural["bucketed"], atol=1e-3)


def test_gradients_agree_between_layouts_and_reach_every_parameter():
    grads = {}
    for layout in ("packed", "bucketed", "fixed"):
        model = make_model(layout=layout, buckets=16)
        x, t, y = make_uneven_batch(model)
        model(x, t, y, tokens=42).square().mean().backward()
        grads[layout] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for name, grad in grads["packed"].items():
        assert grad is not None, name
        largest = grad.abs().max()
        # the bias in front of a norm is the one part that cannot matter much
        assert largest > (1e-9 if name.endswith("conv1.bias") else 1e-6), (name, largest)
        for layout in ("bucketed", "fixed"):
            assert torch.allclose(grad, grads[layout][name], atol=1e-5 + 1e-4 * grad.abs().max())


@pytest.mark.parametrize("kind", [True, "convolutions"])
def test_gradient_checkpointing_changes_nothing(kind):
    plain, saving = make_model(), make_model(gradient_checkpointing=kind)
    x, t, y = make_uneven_batch(plain)
    for model in (plain, saving):
        model(x, t, y, drop=0.2).square().mean().backward()
    for ours, theirs in zip(plain.parameters(), saving.parameters(), strict=True):
        assert ours.grad is None or torch.allclose(ours.grad, theirs.grad, atol=1e-6)


def test_gradient_checkpointing_runs_each_block_again_but_only_for_gradients():
    for saving in (False, True):
        model = make_model(gradient_checkpointing=saving)
        x, t, y = make_uneven_batch(model)
        calls = []
        for block in model.backbone.blocks:
            block.register_forward_pre_hook(lambda block, *_, calls=calls: calls.append(block))
        model(x, t, y).sum().backward()
        assert len(calls) == (4 if saving else 2)
        with torch.no_grad():
            model(x, t, y)
        assert len(calls) == (6 if saving else 4)


def test_recomputed_convolutions_take_less_memory_and_leave_the_blocks_alone():
    peaks = []
    for saving in (False, "convolutions", True):
        model = make_model(gradient_checkpointing=saving)
        x, t, y = make_uneven_batch(model)
        calls = []
        model.backbone.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model.encoder.register_forward_pre_hook(lambda *_, calls=calls: calls.append(2))
        model(x, t, y).sum().backward()
        assert calls.count(1) == (2 if saving is True else 1)
        assert calls.count(2) == (2 if saving else 1)
        peaks.append(
            measure_peak(lambda m=model, i=(x, t, y): m(*i).sum().backward(), torch.device("cpu"))
        )
    assert peaks[2] < peaks[1] < peaks[0]
    with pytest.raises(ConfigError, match="gradient_checkpointing"):
        make_model(gradient_checkpointing="blocks")


def test_other_latent_sizes_than_the_configured_one(tiny_model):
    for h, w in [(3, 3), (5, 31), (20, 7)]:
        out, routing = tiny_model(
            torch.randn(2, 4, h, w),
            torch.tensor([1, 700]),
            torch.tensor([0, 10]),
            drop=0.1,
            return_routing=True,
        )
        assert out.shape == (2, 8, h, w)
        assert out.isfinite().all()
        assert routing.keep_prob.shape == (2, h * w)
    # a square of the same number of cells is another grid
    x = torch.randn(1, 4, 12, 18)
    t, y = torch.tensor([4]), torch.tensor([2])
    other = tiny_model(x.reshape(1, 4, 18, 12), t, y).reshape(1, 8, 12, 18)
    assert not torch.allclose(tiny_model(x, t, y), other, atol=1e-2)


def test_without_learned_sigma():
    model = make_model(learn_sigma=False, in_channels=3)
    assert model.out_channels == 3
    out = model(torch.randn(1, 3, 12, 18), torch.tensor([3.5]), torch.tensor([1]))
    assert out.shape == (1, 3, 12, 18)


def test_a_fresh_model_predicts_zero_and_starts_near_one_cell_in_four():
    model = DCDiT(DCDiTConfig(hidden_size=128, depth=1, num_heads=4, latent_size=16))
    x, t, y = torch.randn(4, 4, 16, 16), torch.arange(4) * 200, torch.arange(4)
    out, routing = model(x, t, y, return_routing=True)
    assert (out == 0).all()
    assert (model.dechunker.residual.weight == 0).all()
    assert 0.2 < routing.keep_prob.mean() < 0.4
    assert (routing.keep_prob[:, [0, -1]] == 1).all()


def test_bfloat16_leaves_router_and_dechunker_in_float32(tiny_model):
    x, t, y = make_uneven_batch(tiny_model)
    before = copy.deepcopy(tiny_model)
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()):
        model = cast(copy.deepcopy(tiny_model))
        for part in (model.router, model.dechunker):
            assert {p.dtype for p in part.parameters()} == {torch.float32}
        assert torch.equal(model.router.project.weight, before.router.project.weight)
        assert model.backbone.blocks[0].attn.qkv.weight.dtype != torch.float32
    model = copy.deepcopy(tiny_model).to(torch.bfloat16)
    out, routing = model(x, t, y, tokens=40, return_routing=True)
    assert out.dtype == torch.bfloat16
    assert routing.keep_prob.dtype == torch.float32
    reference = tiny_model(x, t, y, tokens=40)
    assert (out.float() - reference).abs().mean() < 0.2 * reference.abs().mean()


def test_autocast_leaves_router_and_dechunker_in_float32(tiny_model):
    x, t, y = make_uneven_batch(tiny_model)
    dtypes = {}
    for name in ("router", "dechunker"):
        part = getattr(tiny_model, name)
        part.register_forward_hook(lambda m, args, out, name=name: dtypes.update({name: out}))
    with torch.autocast("cpu", torch.bfloat16):
        out = tiny_model(x, t, y, tokens=30)
    assert dtypes["router"].keep_prob.dtype == torch.float32
    assert dtypes["dechunker"].x.dtype == torch.float32
    assert out.dtype == torch.bfloat16


def test_moves_and_copies(tiny_model):
    x, t, y = make_uneven_batch(tiny_model)
    out = tiny_model(x, t, y)
    assert torch.equal(copy.deepcopy(tiny_model)(x, t, y), out)
    assert torch.equal(pickle.loads(pickle.dumps(tiny_model))(x, t, y), out)
    other = DCDiT(tiny_model.config)
    other.load_state_dict(tiny_model.state_dict())
    assert torch.equal(other(x, t, y), out)
    changed = copy.deepcopy(tiny_model)
    changed.decoder.norm.weight.data.mul_(2)
    assert not torch.equal(changed(x, t, y), out)


def test_nothing_of_a_forward_pass_stays_on_the_model(tiny_model):
    x, t, y = make_uneven_batch(tiny_model)
    before = {name: set(vars(module)) for name, module in tiny_model.named_modules()}
    tiny_model(x, t, y)
    assert before == {name: set(vars(module)) for name, module in tiny_model.named_modules()}
    assert not any(
        isinstance(value, torch.Tensor)
        for module in tiny_model.modules()
        for value in vars(module).values()
    )


def test_the_straight_through_gate_is_one_and_carries_the_natural_decision():
    prob = torch.tensor([[0.9, 0.2, 0.7]], requires_grad=True)
    routing = adaptok.Routing(prob).with_keep_mask(torch.tensor([[True, False, False]]))
    confidence = natural_confidence(routing)
    # the third cell was dropped by the budget, but its natural decision is to be kept
    assert torch.allclose(confidence, torch.tensor([[0.9, 0.8, 0.7]]))
    gate = pass_gradient(confidence)
    assert (gate == 1).all()
    (gate * torch.tensor([[1.0, 10.0, 100.0]])).sum().backward()
    assert torch.allclose(prob.grad, torch.tensor([[1.0, -10.0, 100.0]]))


def test_dropping_changes_neither_natural_mask_nor_router(tiny_model):
    x, t, y = make_uneven_batch(tiny_model)
    _, free = tiny_model(x, t, y, return_routing=True)
    _, tight = tiny_model(x, t, y, drop=[0.0, 0.5, 0.9], return_routing=True)
    assert torch.equal(free.natural_mask, tight.natural_mask)
    counts = free.natural_mask.sum(1)
    assert tight.kept.tolist() == [
        int(k - (r * k).floor()) for k, r in zip(counts, torch.tensor([0.0, 0.5, 0.9]), strict=True)
    ]


def test_lite_cfg_with_equal_halves_is_guidance(tiny_model):
    x, t, y = make_uneven_batch(tiny_model)
    both = x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, torch.full_like(y, 10)])
    plain = tiny_model.forward_with_cfg(*both, 2.0, drop=0.3)
    assert torch.equal(tiny_model.forward_with_cfg(*both, 2.0, drop=0.3, uncond_drop=0.3), plain)
    lite, routing = tiny_model.forward_with_cfg(
        *both, 2.0, drop=0.0, uncond_drop=0.9, return_routing=True
    )
    assert not torch.allclose(lite, plain, atol=1e-3)
    natural = routing.natural_mask.sum(1)
    assert routing.kept[:3].equal(natural[:3])
    assert routing.kept[3:].equal((natural[3:] - (0.9 * natural[3:]).floor().long()).clamp(min=1))
    out = torch.cat([tiny_model(x, t, y), tiny_model(x, t, torch.full_like(y, 10), drop=0.9)])
    cond, uncond = out.chunk(2)
    guided = uncond[:, :3] + 2.0 * (cond[:, :3] - uncond[:, :3])
    assert torch.allclose(lite[:3, :3], guided, atol=1e-5)
    assert torch.allclose(lite[:3, 3:], cond[:, 3:], atol=1e-5)
    assert torch.allclose(lite[3:, 3:], uncond[:, 3:], atol=1e-5)
    everything = tiny_model.forward_with_cfg(*both, 2.0, guided_channels=None)
    assert torch.equal(everything[:3, :4], everything[3:, :4])
    assert not torch.equal(everything[:3, 4:], everything[3:, 4:])


def test_exact_budgets_of_the_halves(tiny_model):
    x, t, y = make_uneven_batch(tiny_model)
    both = x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, torch.full_like(y, 10)])
    _, routing = tiny_model.forward_with_cfg(
        *both, 2.0, keep=0.5, uncond_keep=0.1, return_routing=True
    )
    assert routing.kept.tolist() == [108] * 3 + [22] * 3
    _, routing = tiny_model.forward_with_cfg(*both, 2.0, tokens=[5, 6, 7], return_routing=True)
    assert routing.kept.tolist() == [5, 6, 7] * 2
    _, routing = tiny_model.forward_with_cfg(
        *both, 2.0, keep=[0.1, 0.2, 0.3], uncond_keep=torch.tensor([0.5]), return_routing=True
    )
    assert routing.kept.tolist() == [22, 43, 65] + [108] * 3
    _, routing = tiny_model.forward_with_cfg(
        *both, 2.0, drop=0.0, uncond_drop=torch.tensor([0.9, 0.5, 0.0]), return_routing=True
    )
    assert (routing.kept[3:] <= routing.natural_mask[3:].sum(1)).all()
    with pytest.raises(BudgetError, match="means 3 values for a half, got 2"):
        tiny_model.forward_with_cfg(*both, 2.0, keep=[0.1, 0.2])
    with pytest.raises(BudgetError, match="the same kind of budget"):
        tiny_model.forward_with_cfg(*both, 2.0, keep=0.5, uncond_drop=0.9)
    with pytest.raises(ShapeError, match="conditional and an unconditional half"):
        tiny_model.forward_with_cfg(x, t, y, 2.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(2, 12, 18)}, ShapeError, r"x needs the shape \(b, c, h, w\)"),
        ({"x": torch.randn(2, 3, 12, 18)}, ShapeError, "x has 3 channels .* made for 4"),
        ({"x": torch.randn(2, 4, 2, 18)}, ShapeError, "2 x 18 cells is smaller than a kernel"),
        ({"t": 5}, DtypeError, r"t needs a tensor, got 5: give one value per sample"),
        ({"y": [0, 9]}, DtypeError, r"y needs a tensor, got \[0, 9\]"),
        ({"t": torch.zeros(3)}, ShapeError, r"t needs one value per sample, the shape \(2,\)"),
        ({"y": torch.zeros(2, 1).long()}, ShapeError, "y needs one value per sample"),
        ({"x": torch.ones(2, 4, 12, 18).long()}, DtypeError, "x needs floating-point"),
        ({"y": torch.zeros(2)}, DtypeError, "y needs integer labels, got torch.float32"),
        ({"y": torch.tensor([0, 11])}, LabelError, "label 11 is out of range: classes .* to 9"),
        ({"y": torch.tensor([-1, 3])}, LabelError, "label -1 is out of range"),
        ({"t": torch.zeros(2, device="meta")}, DeviceError, "t lies on meta and the model on cpu"),
    ],
)
def test_wrong_inputs_are_refused(tiny_model, change, error, message):
    inputs = {"x": torch.randn(2, 4, 12, 18), "t": torch.tensor([1, 2]), "y": torch.tensor([0, 9])}
    tiny_model(**inputs)
    with pytest.raises(error, match=message):
        tiny_model(**(inputs | change))


def run_without_type_checks(code):
    """Run in a fresh process: the annotation checks of these tests cut compiled graphs."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_fixed_layout_compiles_as_one_graph():
    out = run_without_type_checks("""
        import sys, torch
        sys.path.insert(0, "tests")
        from conftest import make_model, make_uneven_batch
        model = make_model(layout="fixed", depth=1, hidden_size=32)
        x, t, y = make_uneven_batch(model)
        compiled = torch.compile(model, fullgraph=True)
        with torch.no_grad():
            ours = compiled(x, t, y, keep=0.25)
            assert torch.allclose(ours, model(x, t, y, keep=0.25), atol=1e-4)
            assert not torch.allclose(ours, model(x, t, y, keep=0.5), atol=1e-2)
        model(x, t, y, keep=0.25).square().mean().backward()
        eager = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        # the gradient's graph without code generation, which takes a minute on two cores
        traced = torch.compile(model, fullgraph=True, backend="aot_eager")
        traced(x, t, y, keep=0.25).square().mean().backward()
        ours = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(ours) == len(eager)
        for a, b in zip(ours, eager):
            assert torch.allclose(a, b, atol=1e-4 * b.abs().max() + 1e-6)
        print("equal")
    """)
    assert "equal" in out


def test_other_latent_sizes_take_the_codes_of_their_own_grid(tiny_model):
    """As a model does that was made for that size and has the same weights."""
    other = DCDiT(tiny_model.config.model_copy(update={"latent_size": (7, 10)})).eval()
    state = {name: v for name, v in tiny_model.state_dict().items() if name != "position"}
    other.load_state_dict(state | {"position": other.position})
    x, t, y = torch.randn(2, 4, 7, 10), torch.tensor([3, 600]), torch.tensor([1, 10])
    with torch.no_grad():
        assert torch.allclose(tiny_model(x, t, y), other(x, t, y), atol=1e-6)
        # the test can fail: codes of another grid are seen
        other.position.zero_()
        assert not torch.allclose(tiny_model(x, t, y), other(x, t, y), atol=1e-2)


def test_time_and_label_reach_every_part(tiny_model):
    """Encoder, router, blocks, decoder and final layer all see the condition."""
    x = torch.randn(1, 4, 12, 18).repeat(3, 1, 1, 1)
    t, y = torch.tensor([0, 999, 0]), torch.tensor([1, 1, 7])
    seen = {}
    for name in ("encoder", "router", "backbone", "decoder", "final_layer"):
        part = getattr(tiny_model, name)
        part.register_forward_hook(lambda _, args, out, name=name: seen.update({name: out}))
    tiny_model(x, t, y, tokens=50)
    seen["router"] = seen["router"].keep_prob
    seen["backbone"] = seen["backbone"].unflatten(0, (3, 50))
    for name, out in seen.items():
        for other in (1, 2):
            assert (out[other] - out[0]).abs().max() > 1e-3 * out.abs().max(), name


def test_weights_of_another_precision_are_refused_by_name(tiny_model):
    half = {name: value.bfloat16() for name, value in tiny_model.state_dict().items()}
    tiny_model.load_state_dict(half, assign=True)
    with pytest.raises(DtypeError, match=r"DCRouter runs in float32 only, .* torch.bfloat16"):
        tiny_model(torch.randn(1, 4, 12, 18), torch.tensor([1]), torch.tensor([1]))
    tiny_model.float()(torch.randn(1, 4, 12, 18), torch.tensor([1]), torch.tensor([1]))
