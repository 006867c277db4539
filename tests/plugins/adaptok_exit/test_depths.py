"""How deep samples went, told through parts of parts of a batch."""

import torch
from exit_oracles import IMAGES, run_traced, set_apart, wrap_exits

import adaptok
from adaptok.observers import Observer, PartObserver
from adaptok.testing import make_vit
from adaptok.trace_step import SampleNote, join_samples


class Recorder(Observer):
    def __init__(self):
        self.notes = []

    def note_depth(self, stage, depth, samples=None):
        self.notes.append((stage, depth.tolist(), samples))


def test_parts_of_parts_name_the_samples_of_the_batch():
    seen = Recorder()
    outer = PartObserver(seen, (4, 1, 3), 5)
    inner = PartObserver(outer, (2, 0), 3)
    seen.note_depth("a", torch.tensor([9]))
    outer.note_depth("b", torch.tensor([1, 2, 3]))
    inner.note_depth("c", torch.tensor([7, 8]))
    assert seen.notes == [
        ("a", [9], None),
        ("b", [1, 2, 3], (4, 1, 3)),
        ("c", [7, 8], [3, 4]),
    ]


def test_notes_are_joined_and_the_last_one_counts():
    notes = [
        SampleNote(torch.tensor([6, 6]), (0, 3)),
        SampleNote(torch.tensor([12]), (1,)),
        SampleNote(torch.tensor([9]), (3,)),
    ]
    assert join_samples(notes, 5).tolist() == [6, 12, -1, 9, -1]
    assert join_samples([], 5) is None
    assert join_samples([SampleNote(torch.tensor([2, 3]))], 2).tolist() == [2, 3]


class Reuse(adaptok.Stage):
    """Runs every second sample, in two groups, and answers the rest with what came."""

    effects = adaptok.Effects("time")

    def forward(self, inner, call):
        x = call.x
        even = torch.arange(0, x.shape[0], 2)
        for samples in (even[::2].flip(0), even[1::2]):
            x = x.index_copy(0, samples, inner(call.select(samples)).x)
        return call.with_x(x)


def test_a_stage_around_that_runs_groups_of_samples():
    model = wrap_exits()
    alone, step = run_traced(model, IMAGES)
    model = wrap_exits(stack=[Reuse()], leave=False, verify=False)
    assert type(model.blocks.stages[0]) is Reuse
    model.blocks.adaptok["reuse"].aside = True
    set_apart(model)
    model.blocks.adaptok["reuse"].aside = False
    out, found = run_traced(model, IMAGES)
    expected = step.depths.clone()
    expected[[1, 3]] = -1
    assert found.depths.tolist() == expected.tolist()
    torch.testing.assert_close(out[[0, 2, 4]], alone[[0, 2, 4]], rtol=1e-5, atol=1e-5)


def test_without_a_stage_of_depth_there_are_none():
    model = adaptok.wrap(make_vit(), "dc", budget=0.5)
    assert run_traced(model, IMAGES)[1].depths is None
