"""A run that is killed and resumed is the run that was not.

Bit for bit on one process; to rounding where the number of processes changes.
`ADAPTOK_KILLS=10 pytest tests/train/test_resume.py` kills ten times.
"""

import multiprocessing
import os
import random
import time
from dataclasses import replace

import pytest
from gloo_processes import SHARDED, Group, train_into_save, train_into_step

from adaptok.dc.folder import load_model
from adaptok.storage import load_tensors
from adaptok.train.checkpoint import list_checkpoints
from adaptok.train.progress import read_log
from adaptok.train.trainer import train

KILLS = int(os.environ.get("ADAPTOK_KILLS", "3"))
STEPS = 24
TENSORS = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


def options(**more):
    values = {"steps": STEPS, "log_every": 1, "checkpoint_every": 3, "budget_warmup": 4}
    return values | {"ema_decay": 0.9, "flip": True} | more


@pytest.fixture(scope="module")
def processes():
    """Fresh processes that have torch imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["adaptok.train.trainer", "accelerate"])
    return context


def same_run(one, other):
    a, b = (list_checkpoints(output)[-1] for output in (one, other))
    assert a.name == b.name == f"step-{STEPS:08d}"
    for name in TENSORS:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    models = [output / "model" / "model.safetensors" for output in (one, other)]
    assert models[0].read_bytes() == models[1].read_bytes()
    plain = {"seconds": 0, "steps_per_second": 0, "seconds_left": 0}
    logs = [[replace(report, **plain) for report in read_log(run)] for run in (one, other)]
    assert logs[0] == logs[1]


def run_until(processes, config, output, step, rest):
    """Train in a process of its own and kill it `rest` seconds after a step."""
    child = processes.Process(target=train, args=(config, output))
    child.start()
    try:
        while child.is_alive():
            reports = read_log(output)
            if reports and reports[-1].step >= step:
                time.sleep(rest)
                break
            time.sleep(0.002)
        child.kill()
        child.join()
    finally:
        child.kill()
    return child.exitcode


def test_kill_at_random_steps(processes, make_config, tmp_path):
    config = make_config(**options())
    unbroken = processes.Process(target=train, args=(config, tmp_path / "unbroken"))
    unbroken.start()
    unbroken.join()
    assert unbroken.exitcode == 0
    draw, killed = random.Random(), 0
    while killed < KILLS:
        output = tmp_path / f"killed-{killed}"
        step, rest = draw.randrange(1, STEPS - 2), draw.uniform(0, 0.04)
        if run_until(processes, config, output, step, rest) != -9:
            continue  # it was faster
        assert not (output / "model").exists()
        resumed = processes.Process(target=train, args=(config, output))
        resumed.start()
        resumed.join()
        assert resumed.exitcode == 0, (step, rest)
        same_run(tmp_path / "unbroken", output)
        killed += 1


def test_stops_between_checkpoints_and_reports_leave_no_trace(make_config, tmp_path):
    config = make_config(**options(log_every=5, checkpoint_every=7))
    train(config, tmp_path / "unbroken")
    for stop_after in (1, 9, 100):
        train(config, tmp_path / "broken", stop_after=stop_after)
    same_run(tmp_path / "unbroken", tmp_path / "broken")


def test_extended_run_is_the_longer_run(make_config, tmp_path):
    train(make_config(**options()), tmp_path / "long")
    short = make_config(**options(steps=10, log_every=1))
    assert train(short, tmp_path / "short").step == 10
    train(make_config(**options()), tmp_path / "short")
    a, b = (list_checkpoints(tmp_path / name)[-1] for name in ("long", "short"))
    for name in TENSORS:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_finished_run_is_left_as_it_is(make_config, tmp_path):
    config = make_config(**options())
    first = train(config, tmp_path)
    log = (tmp_path / "log.jsonl").read_text()
    again = train(config, tmp_path)
    assert (again.step, again.loss, again.checkpoint) == (STEPS, first.loss, first.checkpoint)
    assert (tmp_path / "log.jsonl").read_text() == log


@pytest.fixture(scope="module")
def shared_run(make_config, tmp_path_factory):
    """A run that several processes shall break and continue, and its folder when it is not."""
    config = make_config(**options(steps=12, checkpoint_every=4, learning_rate=3e-4))
    output = tmp_path_factory.mktemp("alone")
    train(config, output)
    return config, output


def same_curve(one, other):
    """Hold loss curves and averaged weights against each other."""
    logs = [read_log(run) for run in (one, other)]
    assert [report.step for report in logs[0]] == [report.step for report in logs[1]]
    for a, b in zip(*logs, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-4)
        assert b.gradient_norm == pytest.approx(a.gradient_norm, rel=1e-2)
        assert (b.kept, b.drop) == pytest.approx((a.kept, a.drop), rel=1e-3)
    losses = [report.loss for report in logs[0]]
    assert max(losses) > 1.02 * min(losses)  # which a curve of other batches would not follow
    weights = [load_tensors(run / "model" / "model.safetensors") for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert (weights[1][name] - value).abs().max() < 5e-3, name


def test_two_processes_killed_in_a_step_go_on_as_one(shared_run, tmp_path):
    config, unbroken = shared_run
    train(config, tmp_path, stop_after=3)
    with Group(train_into_step, config, tmp_path, 6) as group:
        group.kill_where_they_stay(tmp_path)
    assert [report.step for report in read_log(tmp_path)] == [1, 2, 3, 4, 5, 6]
    newest = list_checkpoints(tmp_path)
    assert [path.name for path in newest] == ["step-00000003", "step-00000004"]
    assert load_model(tmp_path / "model").card.training["step"] == 3
    train(config, tmp_path)
    same_curve(unbroken, tmp_path)
    assert load_model(tmp_path / "model").card.training["processes"] == 1


def test_parts_of_two_processes_killed_in_a_save_go_on_as_one(shared_run, tmp_path):
    config, unbroken = shared_run
    with Group(train_into_save, config, tmp_path, 8, environment=SHARDED) as group:
        group.kill_where_they_stay(tmp_path)
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert any(name.startswith(".step-00000008.unfinished") for name in names)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000004"]
    assert not (tmp_path / "model").exists()
    train(config, tmp_path)
    same_curve(unbroken, tmp_path)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000008", "step-00000012"]


def test_one_process_goes_on_as_two_that_share_the_model(shared_run, tmp_path):
    config, unbroken = shared_run
    train(config, tmp_path, stop_after=5)
    with Group(train, config, tmp_path, environment=SHARDED) as group:
        group.finish()
    same_curve(unbroken, tmp_path)
    card = load_model(tmp_path / "model").card.training
    assert (card["processes"], card["step"]) == (2, 12)
