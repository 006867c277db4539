"""Counting what runs: against products written out by hand, and what PyTorch's counter misses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from adaptok.counting import count_operations

B, HEADS, N, E = 2, 4, 10, 8
ATTENTION = 2 * B * HEADS * N * N * (E + E)


def attention_inputs(heads=HEADS, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, HEADS, N, E, generator=generator).to(dtype)
    k = torch.randn(B, heads, N, E, generator=generator).to(dtype)
    return q, k, k


def count(call):
    with count_operations() as counter:
        call()
    return counter.get_total_flops()


CASES = {
    "plain": {},
    "dropout": {"dropout_p": 0.5},
    "additive mask": {"attn_mask": torch.zeros(N, N)},
    "mask": {"attn_mask": torch.ones(N, N, dtype=torch.bool)},
    "scale": {"scale": 0.5},
}


class TestAttention:
    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("name", CASES)
    def test_is_seen_in_every_form(self, name, mode):
        with mode():
            q, k, v = attention_inputs()
            options = CASES[name]
            found = count(lambda: F.scaled_dot_product_attention(q, k, v, **options))
        assert found == ATTENTION

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_in_half_precision(self, dtype):
        q, k, v = attention_inputs(dtype=dtype)
        assert count(lambda: F.scaled_dot_product_attention(q, k, v)) == ATTENTION

    def test_shared_keys_count_for_every_query(self):
        q, k, v = attention_inputs(heads=2)
        run = lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)  # noqa: E731
        assert count(run) == ATTENTION

    def test_other_lengths_and_widths(self):
        q, k, v = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 4)
        expected = 2 * 2 * 5 * 7 * (8 + 4)
        assert count(lambda: F.scaled_dot_product_attention(q, k, v)) == expected

    def test_pytorch_alone_misses_it_on_a_cpu(self):
        """If this fails, PyTorch has learned it and our formula may go."""
        q, k, v = attention_inputs()
        with FlopCounterMode(display=False) as counter:
            F.scaled_dot_product_attention(q, k, v)
        assert counter.get_total_flops() == 0


class TestClosedBoxes:
    def test_fused_transformer_layer(self):
        layer = nn.TransformerEncoderLayer(16, 2, 48, batch_first=True).eval()
        x = torch.randn(3, 5, 16)
        products = 2 * 3 * 5 * (4 * 16 * 16 + 2 * 16 * 48)
        attention = 2 * 3 * 5 * 5 * (16 + 16)
        with torch.no_grad():
            assert count(lambda: layer(x)) == products + attention
        assert torch.backends.mha.get_fastpath_enabled()

    def test_compiled_code_runs_uncompiled(self):
        compiled = []

        def backend(graph, inputs):
            compiled.append(graph)
            return graph.forward

        model = torch.compile(nn.Linear(4, 6), backend=backend)
        assert count(lambda: model(torch.randn(3, 4))) == 2 * 3 * 4 * 6
        assert not compiled
        model(torch.randn(3, 4))
        assert len(compiled) == 1

    def test_settings_come_back_after_an_error(self):
        with pytest.raises(ZeroDivisionError):
            count(lambda: 1 / 0)
        assert torch.backends.mha.get_fastpath_enabled()
        calls = []
        torch.compile(nn.Linear(2, 2), backend=lambda g, _: calls.append(g) or g.forward)(
            torch.ones(1, 2)
        )
        assert calls
