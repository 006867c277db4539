"""Two real processes that run the same samples never disagree about what is computed."""

import sys
from pathlib import Path

import pytest
import torch
from adaptok_cache import TeaCache
from torch import distributed, multiprocessing

import adaptok

HERE = Path(__file__).parent
STEPS = 40


def run_process(rank, folder, agree):
    """Sample with inputs that differ by noise near the threshold, and write down the decisions."""
    sys.path[:0] = [str(HERE), str(HERE.parents[1])]
    import conftest as tools

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    try:
        stage = TeaCache(0.3, agree=agree)
        model = adaptok.wrap(tools.make_dit(), stack=[stage])
        times = tuple(999.0 - 20 * i for i in range(STEPS))
        walk = tools.Walk(times=times, speeds=(0.02, 0.1, 0.3))
        generator = torch.Generator().manual_seed(rank)
        decisions = []
        for x, t, y in walk.steps:
            loud = 0.1 * torch.rand(3, 1, 1, 1, generator=generator)
            noise = loud * torch.randn(x.shape, generator=generator)
            tools.run_steps(model, [(x + noise, t, y)])
            decisions.append(stage.last_computed)
        torch.save(decisions, folder / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


@pytest.fixture
def run_both(tmp_path):
    def run(agree):
        folder = tmp_path / str(agree)
        folder.mkdir()
        multiprocessing.spawn(run_process, (folder, agree), nprocs=2)
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]

    return run


def test_processes_agree(run_both):
    first, second = run_both(True)
    assert first == second
    flat = [flag for flags in first for flag in flags]
    assert any(flat)
    assert not all(flat)


def test_without_agreeing_they_differ(run_both):
    """The failing twin: the noise is enough to decide otherwise."""
    first, second = run_both(False)
    assert first != second


def test_alone_agreeing_changes_nothing(wrapped, tools):
    walk = tools.Walk().steps
    outs = [tools.run_steps(wrapped(TeaCache(0.11, agree=agree)), walk) for agree in (False, True)]
    assert all(map(torch.equal, *outs))
