"""Numbers of a forward pass: joined from several entrances, spread over samples."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaptok.host_numbers import HostNumbers, join_numbers


def grid_part(number):
    return HostNumbers((number, 2), start=number)


def step_part(number):
    return HostNumbers((), timestep=torch.tensor([number]))


def join(*parts):
    """Join parts in the order in which they come, g1 being the grid of pass 1, s1 its step."""
    numbers = None
    for part in parts:
        make = grid_part if part[0] == "g" else step_part
        numbers = join_numbers(numbers, make(int(part[1:])))
    step = None if numbers.timestep is None else numbers.timestep.item()
    return (numbers.grid[0] if numbers.grid else None, step)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ("g1", (1, None)),
        ("s1", (None, 1)),
        ("g1 s1", (1, 1)),
        ("s1 g1", (1, 1)),
        ("g1 s1 s9", (1, 1)),  # a second time is embedded: the first counts
        ("g1 s1 g2", (2, None)),  # pass 1 failed
        ("g1 g2 s2", (2, 2)),
        ("g1 s1 g2 s2", (2, 2)),
        ("g1 s1 s9 g2 s2", (2, 2)),
        ("s1 s2 g2", (2, 2)),
        ("s1 g1 s2 g2", (2, 2)),
        ("s1 g1 s2 s3 g3", (3, 3)),
        ("s1 g1 g2", (2, None)),
        ("s1 g1 s9", (1, 9)),
    ],
)
def test_parts_of_one_pass_are_joined_and_those_of_a_failed_one_forgotten(parts, expected):
    assert join(*parts.split()) == expected


@given(
    first=st.sampled_from(["g", "s"]),
    failed=st.lists(st.integers(1, 2), max_size=5),
)
def test_the_last_pass_wins_after_any_passes_that_failed(first, failed):
    second = "s" if first == "g" else "g"
    parts = []
    for number, length in enumerate(failed, 1):  # after one entrance, or after both
        parts += [f"{first}{number}", f"{second}{number}"][:length]
    last = len(failed) + 1
    assert join(*parts, f"{first}{last}", f"{second}{last}") == (last, last)


def test_an_entrance_with_both_replaces_everything():
    both = HostNumbers((3, 3), branches=("cond",), timestep=torch.tensor([5]))
    for before in (None, grid_part(1), step_part(1), both):
        found = join_numbers(before, both)
        assert found == both
        assert found.timestep is both.timestep
    kept = join_numbers(join_numbers(None, both), HostNumbers((3, 3)))
    assert kept.timestep is None


def test_other_numbers_stay():
    numbers = HostNumbers((3, 3), start=2, branches=("cond",), notes=(4,))
    for parts in ((numbers, step_part(7)), (step_part(7), numbers)):
        found = None
        for part in parts:
            found = join_numbers(found, part)
        assert found == numbers
        assert found.timestep.tolist() == [7]


X = torch.zeros(3, 4, 2)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (None, None),
        (torch.tensor(7), [7, 7, 7]),
        (torch.tensor([7]), [7, 7, 7]),
        (torch.tensor([[7.5]]), [7.5, 7.5, 7.5]),
        (torch.tensor([1, 2, 3]), [1, 2, 3]),
        (torch.tensor([[1.0], [2.0], [3.0]]), [1, 2, 3]),
        (torch.tensor([1, 2]), None),
        (torch.arange(6).view(3, 2), None),
        (torch.arange(3).view(1, 3), None),
    ],
)
def test_one_step_per_sample_or_none(step, expected):
    found = HostNumbers((2, 2), timestep=step).spread_timestep(X)
    assert (None if found is None else found.tolist()) == expected
    if expected is not None:
        assert found.dtype == step.dtype


def test_copies_leave_the_step_out():
    step = torch.ones(2, requires_grad=True) * 2  # which deepcopy refuses
    numbers = HostNumbers((2, 3), start=1, notes=(5,), timestep=step)
    for other in (copy.deepcopy(numbers), pickle.loads(pickle.dumps(numbers))):
        assert other == numbers
        assert other.timestep is None
