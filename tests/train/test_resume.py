"""A run that is killed and resumed is the run that was not, bit for bit.

`ADAPTOK_KILLS=10 pytest tests/train/test_resume.py` kills ten times.
"""

import multiprocessing
import os
import random
import time
from dataclasses import replace

import pytest

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
