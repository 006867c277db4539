"""Several real processes on one CPU, connected by gloo, for tests that start and kill them."""

import multiprocessing
import os
import socket
import time
from pathlib import Path

import adaptok.train.checkpoint
from adaptok.errors import AdaptokError
from adaptok.train.learner import Learner
from adaptok.train.trainer import train

# Imported once and not by each process; the server of forks does not look into tests/.
PRELOAD = ["adaptok.train.trainer", "accelerate", "torch.distributed.fsdp"]
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def describe_process(rank, ranks, port):
    """What a launcher tells each process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }


def run_rank(environment, work, arguments):
    os.environ.update(environment)
    work(*arguments)


class Group:
    """Processes that do the same work, each with its rank."""

    def __init__(self, work, *arguments, ranks=2, environment=None):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.children = [
            context.Process(
                target=run_rank,
                args=(describe_process(rank, ranks, port) | (environment or {}), work, arguments),
            )
            for rank in range(ranks)
        ]
        for child in self.children:
            child.start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()

    def kill(self):
        for child in self.children:
            child.kill()
        for child in self.children:
            child.join()

    def kill_where_they_stay(self, output):
        """Kill all with signal 9 once one of them has come where it stays."""
        while not (Path(output) / "staying").exists():
            assert all(child.is_alive() for child in self.children), "ended by itself"
            time.sleep(0.01)
        self.kill()
        assert [child.exitcode for child in self.children] == [-9] * len(self.children)
        (Path(output) / "staying").unlink()

    def finish(self, seconds=120):
        for child in self.children:
            child.join(seconds)
        assert [child.exitcode for child in self.children] == [0] * len(self.children)


def stay(output):
    (Path(output) / "staying").touch()
    time.sleep(600)


def train_into_step(config, output, number):
    """Train, and stay in the middle of a step: gradients are exchanged, weights are not changed."""
    update = Learner.update_weights

    def update_slowly(learner, step):
        if step == number:
            stay(output)
        update(learner, step)

    Learner.update_weights = update_slowly
    train(config, output)


def train_into_save(config, output, number):
    """Train, and stay in the middle of the save of a step: the last file is not yet written."""
    write = adaptok.train.checkpoint.save_json

    def write_slowly(path, content):
        if content["step"] == number:
            stay(output)
        write(path, content)

    adaptok.train.checkpoint.save_json = write_slowly
    train(config, output)


def note_refusals(notes, cases):
    """Try to train with what each rank is given, and write down why it is refused."""
    rank = int(os.environ["RANK"])
    for name, given in cases.items():
        config, output = given[rank]
        try:
            train(config, output)
        except AdaptokError as error:
            (Path(notes) / f"{name}-{rank}").write_text(str(error))
        # One that is gone takes the connection from one that is still on its way to the refusal.
        others = [Path(notes) / f"{name}-{other}" for other in range(len(given))]
        end = time.monotonic() + 60
        while not all(path.exists() for path in others) and time.monotonic() < end:
            time.sleep(0.01)
