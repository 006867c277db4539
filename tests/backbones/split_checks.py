"""What the split form of every block must pass: the host's own block, and oracles in loops."""

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

from adaptok.backbones.split_forms import split_blocks
from adaptok.errors import UnsupportedModelError
from adaptok.stages import Effects, Stage
from adaptok.wrapping import attach, detach, resolve_backbone

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is a folder of scripts

from benchmarks.architectures import CASES, find_case

__all__ = ["CASES", "find_case"]

KERNEL = F.scaled_dot_product_attention


class Between(Stage):
    """Runs the host's blocks one by one, and something of ours at each."""

    effects = Effects("tokens")

    def __init__(self, visit, places):
        super().__init__()
        self.visit = visit
        self.places = places

    def forward(self, inner, call):
        whole, few = call, call.take(self.places) if self.places is not None else call
        for index in range(inner.first, inner.last):
            few = self.visit(few, index, lambda c, i=index: inner.run(c, i, i + 1))
        return whole


def visit_blocks(model, inputs, visit, *, few=False, grad=False):
    """Run a host with a visitor at each block.

    Args:
        model: a bare host.
        inputs: of the host.
        visit: called with the call, the index of the block, and what runs the host's own block;
            returns the call for the next one.
        few: whether blocks get some cells only, other ones of each sample, out of order.
        grad: whether gradients are recorded.
    """
    host = resolve_backbone(model, "auto")
    places = draw_places(model, inputs) if few else None
    attach(model, host, {"between": Between(visit, places)}, (0, host.depth))
    try:
        with contextlib.nullcontext() if grad else torch.no_grad():
            return model(*inputs.args, **inputs.kwargs)
    finally:
        detach(model)


def draw_places(model, inputs):
    """Other cells of each sample, half of them."""
    seen = []

    def look(call, index, run):
        seen.append((call.x.shape[0], call.num_cells))
        return run(call)

    visit_blocks(model, inputs, look)
    b, n = seen[0]
    generator = torch.Generator().manual_seed(3)
    return torch.rand(b, n, generator=generator).argsort(1)[:, : n // 2]


def split_model(model, case):
    (path,) = case.containers
    return split_blocks(list(model.get_submodule(path).children()))


def attend_by_hand(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, bias=None):
    """Softmax attention, sample by sample and head by head."""
    assert dropout_p == 0.0
    assert not is_causal
    out = torch.zeros_like(q)
    weights = q.new_zeros(*q.shape[:3], k.shape[2])
    for sample in range(len(q)):
        for head in range(q.shape[1]):
            logits = q[sample, head] @ k[sample, head].T * (scale or q.shape[-1] ** -0.5)
            if attn_mask is not None:
                mask = attn_mask.expand(*weights.shape)[sample, head]
                hidden = mask.dtype == torch.bool
                logits = logits.masked_fill(~mask, -torch.inf) if hidden else logits + mask
            if bias is not None:
                logits = logits + (bias[sample] if bias.ndim == 2 else bias[sample, head])
            weights[sample, head] = logits.softmax(-1)
            out[sample, head] = weights[sample, head] @ v[sample, head]
    return out, weights


class Kernel:
    """Stands where the fused kernel stood, sees what a host gives it, and adds a bias of keys."""

    def __init__(self, bias=None):
        self.bias = bias
        self.calls = []

    def __call__(self, q, k, v, **options):
        out, weights = attend_by_hand(q, k, v, **options, bias=self.bias)
        self.calls.append((k, weights))
        return out


def watch(run, call, bias=None):
    """Run a host's own block by an explicit softmax; return it, its keys and its weights."""
    kernel = Kernel(bias)
    with patch.object(F, "scaled_dot_product_attention", kernel):
        after = run(call)
    ((keys, weights),) = kernel.calls
    return after, keys, weights


def without_rotation(call):
    """The call with rotations by nothing."""
    inputs = dict(call.token_inputs)
    depth = {}
    for name, given in inputs.items():
        if name in ("rope", "cos", "sin"):
            inputs[name] = replace(given, value=rest_of(name, given.value))
    for name, given in call.depth_inputs.items():
        depth[name] = [
            replace(given[i], value=rest_of(name, given[i].value)) for i in range(len(given))
        ]
    return replace(call, token_inputs=inputs, depth_inputs=depth)


def rest_of(name, value):
    if name == "rope":  # sines, then cosines
        half = value.shape[-1] // 2
        return torch.cat(
            [torch.zeros_like(value[..., :half]), torch.ones_like(value[..., half:])], -1
        )
    return torch.ones_like(value) if name == "cos" else torch.zeros_like(value)


def draw_bias(call, heads=None):
    shape = (
        (call.x.shape[0], call.x.shape[1])
        if heads is None
        else (len(call.x), heads, call.x.shape[1])
    )
    generator = torch.Generator().manual_seed(5)
    return (1 + torch.randint(0, 9, shape, generator=generator)).to(call.x.dtype).log()


def relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def check_whole(forms, tolerance=0.0):
    """A visitor: both halves are the block itself; 0 means bit for bit."""

    def visit(call, index, run):
        expected = run(call)
        attended = forms[index].attend(call)
        assert attended.keys is None
        assert attended.class_attention is None
        assert relative(attended.call.x, call.x) > 0.01  # or else nothing is tried
        assert relative(attended.call.x, expected.x) > 0.01
        found = forms[index].finish(attended.call)
        assert found.x.dtype == expected.x.dtype
        assert relative(found.x, expected.x) <= tolerance, relative(found.x, expected.x)
        return expected

    return visit


def check_oracles(forms):
    """A visitor: bias of keys, keys and class attention are those of an explicit softmax."""

    def visit(call, index, run):
        form = forms[index]
        for bias in (None, draw_bias(call), draw_bias(call, heads=2)):
            expected, _, weights = watch(run, call, bias)
            wanted = {"keys": True, "class_attention": call.start > 0}
            attended = form.attend(call, key_bias=bias, **wanted)
            found = form.finish(attended.call)
            assert relative(found.x, expected.x) <= 2e-6, relative(found.x, expected.x)
            if call.start > 0:
                error = (attended.class_attention - weights[:, :, 0]).abs().max()
                assert error <= 2e-6, error
        assert relative(expected.x, run(call).x) > 1e-3  # the bias matters
        _, keys, _ = watch(run, without_rotation(call))
        repeats = keys.shape[1] // attended.keys.shape[1]
        assert relative(attended.keys.repeat_interleave(repeats, 1), keys) <= 1e-6
        return run(call)

    return visit


def refuses(model, path):
    try:
        split_blocks(list(model.get_submodule(path).children()))
    except UnsupportedModelError:
        return True
    return False
