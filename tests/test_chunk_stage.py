from dataclasses import replace

import pytest
import torch

import adaptok
from adaptok.calls import BlockCall, TokenInput
from adaptok.chunk_stage import ChunkStage
from adaptok.dc.host import HostChunker, HostDechunker
from adaptok.observers import Observer
from adaptok.stages import BlockRange


class Given(adaptok.Router):
    """Answers with probabilities that the test gives."""

    def __init__(self, prob):
        super().__init__()
        self.prob = prob

    def forward(self, tokens, context):
        return adaptok.Routing(self.prob[: tokens.x.shape[0]])


def make_stage(prob, layout="bucketed", buckets=4):
    options = {"buckets": buckets} if layout == "bucketed" else {}
    return ChunkStage(Given(prob), HostChunker(layout, **options), HostDechunker(4), "dc")


def mix(call, first, last):
    """Blocks in which every token sees the others of its sample, its position and the text."""
    x = call.x
    if "rope" in call.token_inputs:
        rope = call.token_inputs["rope"].value
        if rope.ndim == 2:
            rope = rope[None]
        x = x + torch.cat(
            [
                rope.new_zeros(rope.shape[0], x.shape[1] - rope.shape[1], 4).expand(
                    x.shape[0], -1, -1
                ),
                rope.expand(x.shape[0], -1, -1),
            ],
            1,
        )
    text = call.streams.get("text")
    for _ in range(first, last):
        x = x + 0.3 * torch.tanh(x).mean(1, keepdim=True)
        if text is not None:
            x, text = x + 0.1 * text.mean(1, keepdim=True), text + x.mean(1, keepdim=True)
    streams = dict(call.streams) | ({} if text is None else {"text": text})
    return replace(call, x=x, streams=streams)


PROB = torch.rand(3, 12, generator=torch.Generator().manual_seed(3))
PROB[0] *= 0.55
PROB[2] = 1 - 0.6 * PROB[2]


def make_call(batched):
    generator = torch.Generator().manual_seed(4)
    rope = torch.randn(1, 12, 4, generator=generator)
    given = TokenInput(rope if batched else rope[0], (1,) if batched else (0,), 0, batched)
    return BlockCall(
        torch.randn(3, 14, 4, generator=generator),
        (3, 4),
        2,
        streams={"text": torch.randn(3, 5, 4, generator=generator)},
        token_inputs={"rope": given},
    )


@pytest.mark.parametrize("per_sample", [True, False])
@pytest.mark.parametrize(
    "budget", [{}, {"keep": 0.5}, {"keep": [0.2, 0.5, 0.9]}, {"drop": 0.4}, {"tokens": 12}]
)
def test_each_sample_of_a_batch_is_as_if_it_ran_alone(budget, per_sample):
    stage = make_stage(PROB)
    call = make_call(batched=per_sample)
    inner = BlockRange(mix, 0, 2, positions_per_sample=per_sample)
    stage.take_budget(adaptok.Budget(**budget), None)
    with torch.no_grad():
        whole = stage(inner, call)
    for i in range(3):
        one = budget if not isinstance(budget.get("keep"), list) else {"keep": budget["keep"][i]}
        alone = make_stage(PROB[i : i + 1])
        alone.take_budget(adaptok.Budget(**one), None)
        cut = replace(call, x=call.x[i : i + 1], streams={"text": call.streams["text"][i : i + 1]})
        with torch.no_grad():
            out = alone(inner, cut)
        torch.testing.assert_close(out.x[0], whole.x[i], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(
            out.streams["text"][0], whole.streams["text"][i], atol=1e-6, rtol=1e-6
        )


def test_positions_without_a_batch_axis_run_equal_kept_sets_together():
    prob = PROB[[0, 2, 0]]
    stage = make_stage(prob)
    stage.take_budget(adaptok.Budget(keep=0.25), None)
    sizes = []

    def run(call, first, last):
        sizes.append(call.x.shape[0])
        return mix(call, first, last)

    stage(BlockRange(run, 0, 1, positions_per_sample=False), make_call(batched=False))
    assert sorted(sizes) == [1, 2]


def test_bucketed_rounds_up_counts_that_depend_on_the_image_and_only_those():
    stage = make_stage(PROB, buckets=4)
    call = make_call(batched=True)
    plans = []

    class Seen(Observer):
        def note_plan(self, stage, routing, plan):
            plans.append(plan)

    call = replace(call, observers=(Seen(),))
    inner = BlockRange(mix, 0, 1)
    stage(inner, call)
    natural = (PROB > 0.5).sum(1)
    assert plans[-1].requested.tolist() == natural.clamp(min=1).tolist()
    assert plans[-1].computed.tolist() == [-(-int(k) // 3) * 3 for k in natural.clamp(min=1)]
    stage.take_budget(adaptok.Budget(tokens=[1, 5, 7]), None)
    stage(inner, call)
    assert plans[-1].computed.tolist() == [1, 5, 7]


def test_fixed_refuses_counts_that_differ():
    stage = make_stage(PROB, layout="fixed")
    with pytest.raises(ValueError, match="same count for every sample"):
        stage(BlockRange(mix, 0, 1), make_call(batched=True))
    stage.take_budget(adaptok.Budget(keep=0.5), None)
    stage(BlockRange(mix, 0, 1), make_call(batched=True))


def test_guidance_halves_get_their_own_budget_in_the_order_of_the_host():
    prob = PROB[[0, 1, 2, 0]].clamp(min=0.6)  # everything is natural
    for order, kept in ((("uncond", "cond"), [6, 6, 12, 12]), (("cond", "uncond"), [12, 12, 6, 6])):
        stage = make_stage(prob)
        stage.take_budget(adaptok.Budget(drop=0.0), adaptok.Budget(drop=0.5))
        numbers = adaptok.HostNumbers((3, 4), branches=order)
        seen = []

        class Seen(Observer):
            def note_plan(self, stage, routing, plan, seen=seen):
                seen.append(plan)

        call = BlockCall(torch.randn(4, 12, 4), (3, 4), numbers=numbers, observers=(Seen(),))
        stage(BlockRange(mix, 0, 1), call)
        assert seen[0].requested.tolist() == kept
