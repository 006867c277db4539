"""Ragged attention as an operator: the same as the rungs themselves, gradients too."""

import pytest
import torch

from adaptok.attention import Ragged, attend_packed
from adaptok.errors import ConfigError, ShapeError
from adaptok.ragged_op import attend_ragged, find_rung

SIZES = (3, 7, 1, 7)


def make(e=8, heads=2, sizes=SIZES):
    torch.manual_seed(1)
    t = sum(sizes)
    counts = torch.tensor(sizes)
    ptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    batch = torch.arange(len(sizes)).repeat_interleave(counts)
    q, k, v = torch.randn(3, t, heads, e).unbind(0)
    return [x.clone().requires_grad_() for x in (q, k, v)], torch.randn(t, heads), batch, ptr


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rung", ["loop", "padded"])
def test_values_and_gradients_in_a_graph_are_those_outside(rung, biased):
    qkv, bias, batch, ptr = make()
    bias = bias.requires_grad_() if biased else None
    ragged = Ragged(batch, ptr, SIZES, rung)

    def attend(q, k, v, bias):
        return attend_packed(q, k, v, ragged, key_bias=bias, scale=0.3)

    leaves = qkv if bias is None else [*qkv, bias]
    results = []
    for run in (attend, torch.compile(attend, backend="aot_eager", fullgraph=True)):
        out = run(*qkv, bias)
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        results.append([out, *torch.autograd.grad((out * weights).sum(), leaves)])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)
    assert results[0][1].abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of opcheck
def test_the_operator_keeps_its_promises_to_the_compiler():
    qkv, bias, *_ = make()
    sizes = torch.tensor(SIZES)
    for key_bias in (None, bias.requires_grad_()):
        torch.library.opcheck(attend_ragged, (*qkv, sizes, key_bias, 0.3, "loop"))


def test_one_graph_serves_other_lengths():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def attend(q, k, v, ragged):
        return attend_packed(q, k, v, ragged)

    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    for sizes in ((3, 7, 1, 7), (4, 4, 2, 9), (1, 1, 30, 2), (5, 6, 7, 8)):
        qkv, _, batch, ptr = make(sizes=sizes)
        ragged = Ragged(batch, ptr, sizes, "loop")
        torch.testing.assert_close(compiled(*qkv, ragged), attend(*qkv, ragged))
    assert len(graphs) <= 2


def test_an_unknown_rung():
    with pytest.raises(ConfigError, match="rung is one of padded, loop, got 'ladder'"):
        find_rung("ladder")


def test_lengths_that_do_not_fit_are_refused_in_a_graph_too():
    qkv, _, batch, ptr = make()
    ragged = Ragged(batch, ptr, (3, 7, 1), "loop")
    run = torch.compile(attend_packed, backend="eager")
    with pytest.raises(ShapeError, match="lengths of 11 tokens came for 18 tokens"):
        run(*(x.detach() for x in qkv), ragged)


def test_gradients_in_double_precision():
    qkv, bias, *_ = make(sizes=(2, 3))
    inputs = [x.detach().double().requires_grad_() for x in (*qkv, bias)]

    def attend(q, k, v, key_bias):
        return attend_ragged(q, k, v, torch.tensor([2, 3]), key_bias, 0.3, "loop")

    assert torch.autograd.gradcheck(attend, inputs)
