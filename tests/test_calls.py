import pytest
import torch

from adaptok.calls import BlockCall, TokenInput, merge_samples
from adaptok.errors import HandOverError, ShapeError


def make_call(b=3, start=2, grid=(2, 3), tail=4, **options):
    s = start + grid[0] * grid[1] + tail
    x = torch.arange(b * s * 2.0).view(b, s, 2)
    return BlockCall(x, grid, start, **options)


def test_take_gathers_cells_of_each_sample_and_keeps_what_is_around_them():
    places = torch.tensor([[0, 5], [1, 2], [3, 4]])
    call = make_call()
    short = call.take(places)
    for i in range(3):
        rows = [0, 1, *(2 + places[i]).tolist(), 8, 9, 10, 11]
        assert torch.equal(short.x[i], call.x[i, rows])
    assert short.num_cells == 2
    assert torch.equal(short.cells, places)
    assert torch.equal(short.cell_x, call.x.gather(1, (places + 2)[..., None].expand(-1, -1, 2)))


def test_take_of_a_taken_call_keeps_the_cells_of_the_grid():
    call = make_call().take(torch.tensor([[0, 3, 5], [1, 2, 4], [3, 4, 5]]))
    again = call.take(torch.tensor([[2], [0]]), samples=torch.tensor([2, 0]))
    assert again.cells.tolist() == [[5], [0]]
    assert torch.equal(again.x[:, 2], torch.stack([call.x[2, 4], call.x[0, 2]]))


@pytest.mark.parametrize("batch", [1, 3])
def test_inputs_per_token_are_gathered_for_each_sample(batch):
    rope = torch.randn(batch, 1, 6, 4)  # cells only, a head axis in front
    pairs = torch.randn(batch, 2, 12, 12)
    call = make_call(
        token_inputs={
            "rope": TokenInput(rope, (2,), start=0),
            "mask": TokenInput(pairs, (2, 3), start=2),
            "row": TokenInput(torch.randn(batch, 1, 1, 12), (2, 3), start=2),
        },
        depth_inputs={"rope": [TokenInput(rope + i, (2,)) for i in range(2)]},
    )
    places, samples = torch.tensor([[0, 5], [4, 2]]), torch.tensor([2, 0])
    short = call.take(places, samples=samples)
    for row, sample in enumerate([2, 0]):
        source = 0 if batch == 1 else sample
        cells = places[row]
        full = [0, 1, *(2 + cells).tolist(), 8, 9, 10, 11]
        assert torch.equal(short.token_inputs["rope"].value[row], rope[source][:, cells])
        assert torch.equal(short.depth_inputs["rope"][1].value[row], (rope + 1)[source][:, cells])
        wanted = pairs[source][:, full][:, :, full]
        assert torch.equal(short.token_inputs["mask"].value[row], wanted)
        assert short.token_inputs["row"].value.shape[2:] == (1, 8)


def test_inputs_without_a_batch_axis_take_the_rows_of_the_one_kept_set():
    table = torch.randn(10, 4)  # four rows of text in front
    call = make_call(token_inputs={"rope": TokenInput(table, (0,), start=4, batched=False)})
    short = call.take(torch.tensor([[1, 3]]), samples=torch.tensor([1]))
    assert torch.equal(short.token_inputs["rope"].value, table[[0, 1, 2, 3, 5, 7]])


def test_inputs_per_sample_and_streams_follow_their_samples():
    call = make_call(
        sample_inputs={"t": torch.arange(3.0), "one": torch.ones(1, 4)},
        streams={"text": torch.arange(6.0).view(3, 2, 1), "none": None},
        condition=torch.arange(3.0)[:, None],
    )
    short = call.take(torch.tensor([[0]]), samples=torch.tensor([2]))
    assert short.sample_inputs["t"].tolist() == [2.0]
    assert short.sample_inputs["one"].shape == (1, 4)
    assert short.streams["text"].flatten().tolist() == [4.0, 5.0]
    assert short.streams["none"] is None
    assert short.condition.item() == 2.0


def test_the_step_follows_its_samples_into_the_context():
    call = make_call(timestep=torch.tensor([5, 6, 7]), has_class=True)
    short = call.take(torch.tensor([[0], [1]]), samples=torch.tensor([2, 0]))
    assert short.timestep.tolist() == [7, 5]
    assert short.context.timestep is short.timestep
    assert call.take(torch.tensor([[0], [1], [2]])).timestep is call.timestep
    assert short.has_class
    plain = make_call()
    assert not plain.has_class
    assert plain.take(torch.tensor([[0]]), samples=torch.tensor([1])).context.timestep is None


def test_put_and_merge_are_the_way_back_in_any_order_of_samples():
    text = torch.randn(3, 2, 1)
    call = make_call(streams={"text": text, "none": None})
    groups = [[2], [0, 1]]
    everything = torch.arange(6)
    parts = [call.take(everything.expand(len(g), 6), samples=torch.tensor(g)) for g in groups]
    rest, streams = merge_samples(parts, groups)
    back = call.put(call.cell_x, rest, streams)
    assert torch.equal(back.x, call.x)
    assert torch.equal(back.streams["text"], text)
    assert back.streams["none"] is None


def test_tokens_that_cannot_be_the_grid_are_refused():
    with pytest.raises(HandOverError, match="cannot hold 2 in front and 6 of the grid"):
        BlockCall(torch.zeros(1, 7, 2), (2, 3), 2)
    call = make_call()
    with pytest.raises(ShapeError, match="6 grid tokens are needed again, and 5 came back"):
        call.put(torch.zeros(3, 5, 2), call.rest_x, {})
