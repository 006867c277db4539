"""The description of a machine."""

import platform

import torch

from adaptok.measure import Machine, describe_machine
from adaptok.measure.machine import name_processor


def test_this_machine():
    machine = describe_machine("cpu")
    assert machine.device == "cpu"
    assert machine.torch == torch.__version__
    assert machine.threads == torch.get_num_threads()
    assert machine.cores >= 1
    assert machine.cuda is None
    assert machine.name
    assert platform.node() not in (machine.name, machine.system)
    for word in (machine.name, machine.torch, machine.python, machine.adaptok):
        assert word in str(machine)


def test_threads_are_those_of_the_moment():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert describe_machine().threads == 2
        assert "2 threads" in str(describe_machine())
    finally:
        torch.set_num_threads(before)


def test_processor_by_name(tmp_path):
    facts = tmp_path / "cpuinfo"
    facts.write_text("processor\t: 0\nmodel name\t: Some Chip 3000\nmodel name\t: other\n")
    assert name_processor(facts) == "Some Chip 3000"
    assert name_processor(tmp_path / "missing") in (platform.processor(), platform.machine())


def test_through_json():
    machine = describe_machine()
    assert Machine.from_json(machine.to_json()) == machine
