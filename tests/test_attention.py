import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptok.attention import RUNGS, Ragged, attend_packed, choose_rung
from adaptok.errors import ConfigError, DeviceError, DtypeError, ShapeError


def ragged_of(lengths, rung=None, device="cpu"):
    counts = torch.tensor(lengths, device=device)
    return Ragged(
        torch.repeat_interleave(torch.arange(len(lengths), device=device), counts),
        torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        tuple(lengths),
        rung,
    )


def attend_by_hand(q, k, v, lengths, bias=None, scale=None):
    """Softmax attention with explicit logits, sample by sample."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    outs, start = [], 0
    for length in lengths:
        piece = slice(start, start + length)
        logits = torch.einsum("ihe,jhe->hij", q[piece], k[piece]) * scale
        if bias is not None:
            logits = logits + bias[piece].T[:, None]
        outs.append(torch.einsum("hij,jhe->ihe", logits.softmax(-1), v[piece]))
        start += length
    return torch.cat(outs)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(1, 6), st.integers(60, 140)), min_size=1, max_size=5),
    biased=st.booleans(),
    rung=st.sampled_from(["padded", "loop"]),
    scale=st.sampled_from([None, 0.7]),
)
def test_rungs_agree_with_explicit_softmax_and_so_do_gradients(lengths, biased, rung, scale):
    q, k, v = (torch.randn(sum(lengths), 3, 5, requires_grad=True) for _ in range(3))
    bias = torch.randn(sum(lengths), 3, requires_grad=True) if biased else None
    inputs = [q, k, v] + ([bias] if biased else [])
    out = attend_packed(q, k, v, ragged_of(lengths, rung), key_bias=bias, scale=scale)
    expected = attend_by_hand(q, k, v, lengths, bias, scale)
    assert torch.allclose(out, expected, atol=1e-5)
    probe = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad((out * probe).sum(), inputs),
        torch.autograd.grad((expected * probe).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("rung", ["padded", "loop"])
def test_no_token_sees_another_sample(rung):
    lengths = [3, 70, 65]
    q, k, v = (torch.randn(sum(lengths), 2, 4) for _ in range(3))
    out = attend_packed(q, k, v, ragged_of(lengths, rung))
    k2, v2 = k.clone(), v.clone()
    k2[3:73] += 1.0
    v2[3:73] -= 1.0
    changed = attend_packed(q, k2, v2, ragged_of(lengths, rung)) != out
    assert changed[3:73].any()
    assert not changed[:3].any()
    assert not changed[73:].any()


def test_varlen_form_of_the_bias_is_the_bias(monkeypatch):
    """The kernel runs on a GPU only; what is fed to it is checked on the CPU in its place."""
    from torch.nn.attention import varlen

    lengths = [4, 9]

    def kernel(q, k, v, cu_q, cu_k, max_q, max_k):
        assert q.shape[-1] % 8 == 0
        assert cu_q.dtype == torch.int32
        assert max_q >= max(lengths)
        q, k, v = (part.float() for part in (q, k, v))
        return attend_by_hand(q, k, v, cu_q.diff().tolist())

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    from adaptok.attention import attend_varlen

    class OnGPU(torch.Tensor):
        is_cuda = True

    q, k, v = (torch.randn(13, 2, 5).to(torch.bfloat16) for _ in range(3))
    bias = torch.randn(13, 2).to(torch.bfloat16)
    for given_bias in (None, bias):
        out = attend_varlen(
            q.as_subclass(OnGPU), k, v, ragged_of(lengths), given_bias, scale=0.31
        ).as_subclass(torch.Tensor)
        by_hand = None if given_bias is None else given_bias.float()
        expected = attend_by_hand(q.float(), k.float(), v.float(), lengths, by_hand, 0.31)
        assert out.shape == expected.shape
        assert torch.allclose(out, expected, atol=0.03)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the varlen kernel needs a CUDA device")
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("features", [32, 72, 20])
def test_varlen_agrees_with_the_loop(biased, features):
    lengths = [5, 200, 64, 1]
    make = [torch.randn(sum(lengths), 4, features, device="cuda") for _ in range(3)]
    bias = torch.randn(sum(lengths), 4, device="cuda") if biased else None
    results = []
    for rung, dtype in (("varlen", torch.bfloat16), ("loop", torch.float32)):
        q, k, v = (part.to(torch.bfloat16).to(dtype).requires_grad_() for part in make)
        key_bias = None if bias is None else bias.to(torch.bfloat16).to(dtype)
        out = attend_packed(q, k, v, ragged_of(lengths, rung, "cuda"), key_bias=key_bias)
        grads = torch.autograd.grad(out.float().square().sum(), (q, k, v))
        results.append([out.float(), *(grad.float() for grad in grads)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= 0.03 * theirs.abs().max()


def test_the_best_rung_is_taken():
    assert choose_rung(torch.randn(3, 2, 8)) == "loop"

    class OnGPU(torch.Tensor):
        is_cuda = True

    q = torch.randn(3, 2, 8).as_subclass(OnGPU)
    half = q.to(torch.bfloat16).as_subclass(OnGPU)
    assert choose_rung(q) == "padded"
    assert choose_rung(half) == "varlen"
    wide = torch.randn(3, 2, 256, dtype=torch.float16).as_subclass(OnGPU)
    assert choose_rung(wide) == "varlen"
    assert choose_rung(wide, key_bias=torch.zeros(3, 2)) == "padded"
    assert RUNGS == ("varlen", "padded", "loop")


def test_wrong_inputs_are_refused():
    q = torch.randn(5, 2, 4)
    with pytest.raises(ShapeError, match="q, k and v need one shape"):
        attend_packed(q, q[:, :1], q, ragged_of([5]))
    with pytest.raises(ShapeError, match="1 lengths of 4 tokens together came for 1 samples of 5"):
        attend_packed(q, q, q, ragged_of([4]))
    with pytest.raises(DeviceError, match="needs a GPU"):
        attend_packed(q, q, q, ragged_of([5], "varlen"))
    with pytest.raises(ConfigError, match="rung is one of varlen, padded, loop"):
        attend_packed(q, q, q, ragged_of([5], "fast"))


def test_dtype_of_varlen_is_checked():
    class OnGPU(torch.Tensor):
        is_cuda = True

    from adaptok.attention import attend_varlen

    q = torch.randn(5, 2, 4).as_subclass(OnGPU)
    with pytest.raises(DtypeError, match="float16 or bfloat16, got"):
        attend_varlen(q, q, q, ragged_of([5]), None, 1.0)


def test_flash_attention_in_half_precision_on_the_cpu():
    lengths = [7, 65]
    q, k, v = (torch.randn(72, 2, 8).to(torch.bfloat16) for _ in range(3))
    out = attend_packed(q, k, v, ragged_of(lengths))
    expected = F.scaled_dot_product_attention(
        *(part[7:].transpose(0, 1)[None].float() for part in (q, k, v))
    )[0].transpose(0, 1)
    assert torch.allclose(out[7:].float(), expected, atol=0.03)
