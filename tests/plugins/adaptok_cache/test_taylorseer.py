"""TaylorSeer against an oracle of one sample, and what really runs."""

import math

import pytest
import torch
from adaptok_cache import TaylorSeer

import adaptok
from adaptok.tracing import plain


def run_oracle(model, steps, interval, order, last):
    """TaylorSeer of one sample, on a model that is not wrapped."""
    computed, outs, decisions = [], [], []
    for i, (x, t, y) in enumerate(steps):
        tokens = model.x_embedder(x).flatten(2).transpose(1, 2) + model.pos_embed
        condition = model.t_embedder(t) + model.y_embedder(y)
        compute = i < 2 or i - computed[-1][0] >= interval or (last and i == len(steps) - 1)
        if compute:
            z = tokens
            for block in model.blocks:
                z = block(z, condition)
            terms = [(z - tokens).double()]
            if computed:
                before, old = computed[-1]
                for known in old[:order]:
                    terms.append((terms[-1] - known) / (i - before))
            computed.append((i, terms))
            outs.append(z[0])
        else:
            before, terms = computed[-1]
            k = i - before
            change = sum(term * k**j / math.factorial(j) for j, term in enumerate(terms))
            outs.append((tokens + change.float())[0])
        decisions.append(compute)
    return decisions, outs


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("steps", [None, 9])
def test_each_sample_follows_the_oracle(wrapped, dit, tools, order, steps):
    stage = TaylorSeer(interval=3, order=order, steps=steps)
    model, walk, found, decisions = wrapped(stage), tools.Walk(), [], []
    model.final_layer.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    for step in walk.steps:
        tools.run_steps(model, [step])
        decisions.append(stage.last_computed)
    for i in range(walk.b):
        with torch.no_grad():
            expected, outs = run_oracle(dit, walk.sample(i), 3, order, steps == 9)
        assert [flags[i] for flags in decisions] == expected
        for seen, out in zip(found, outs, strict=True):
            torch.testing.assert_close(seen[i], out, atol=1e-4, rtol=1e-4)
    assert stage.reused == 3 * (5 if steps is None else 4)


def test_interval_1_is_bit_exact(wrapped, dit, tools):
    walk = tools.Walk()
    with torch.no_grad():
        expected = [dit(*step) for step in walk.steps]
    found = tools.run_steps(wrapped(TaylorSeer(interval=1, order=2)), walk.steps)
    assert all(map(torch.equal, found, expected))


def test_a_straight_line_is_predicted(wrapped, tools):
    """What changes evenly from step to step is met by order 1, and missed by order 0."""

    errors = []
    for order in (0, 1):
        model = tools.make_dit()
        for i in range(tools.DEPTH):
            model.blocks[i] = Line()
        model.t_embedder = Even()
        adaptok.wrap(model, stack=[TaylorSeer(interval=4, order=order)], verify=False)
        walk = tools.Walk()
        with plain(model):
            expected = tools.run_steps(model, walk.steps)
        found = tools.run_steps(model, walk.steps)
        errors.append(max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)))
    assert errors[1] < 1e-3 < 1e-1 < errors[0]


class Line(torch.nn.Module):
    """A block that adds what the condition says."""

    def forward(self, x, c):
        return x + c[:, None, :1] * torch.linspace(-1, 1, x.shape[-1])


class Even(torch.nn.Module):
    """A time embedding that is a straight line."""

    def __init__(self):
        super().__init__()
        self.mlp = torch.nn.Sequential()

    def forward(self, t):
        return (t / 100)[:, None].expand(-1, 64)
