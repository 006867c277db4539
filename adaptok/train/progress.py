"""What a run tells while it runs and at its end: reports, the log, and requests to stop."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType

from adaptok.errors import StorageError

LOG_FILE = "log.jsonl"
PATIENCE = 1.0  # launchers pass a Ctrl-C on, so that one of them may arrive twice


@dataclass(frozen=True, slots=True)
class StepReport:
    """How a run stands; measures are means over the steps since the report before.

    Args:
        step: optimiser steps done.
        steps: optimiser steps of the whole run.
        loss: what is trained on, the weighted ratio loss included.
        parts: the terms of the loss by name, without weights.
        kept: share of the cells that was kept after the drop; 1 for a model without routing.
        natural: share of the cells that the router keeps of itself.
        drop: tail-drop fraction of the last step.
        gradient_norm: norm of the gradient before clipping.
        learning_rate: of the last step.
        seconds: time spent on the run, restarts included.
        images_seen: images trained on, each counted as often as it came.
        steps_per_second: since the report before.
        seconds_left: what the rest will take at that speed.
    """

    step: int
    steps: int
    loss: float
    parts: Mapping[str, float]
    kept: float
    natural: float
    drop: float
    gradient_norm: float
    learning_rate: float
    seconds: float
    images_seen: int
    steps_per_second: float
    seconds_left: float


@dataclass(frozen=True, slots=True)
class TrainSummary:
    """How a run ended.

    Args:
        step: optimiser steps done.
        steps: optimiser steps of the whole run.
        loss: of the last report; None if there was none.
        seconds: time spent on the run, restarts included.
        images_seen: images trained on, each counted as often as it came.
        output: folder of the run.
        checkpoint: the newest checkpoint.
        model_folder: the model with averaged weights, for `load_model`.
        interrupted: a signal asked to stop, and steps are left.
    """

    step: int
    steps: int
    loss: float | None
    seconds: float
    images_seen: int
    output: Path
    checkpoint: Path
    model_folder: Path
    interrupted: bool


def append_to_log(output: Path, report: StepReport) -> None:
    """Write a report as one line of `log.jsonl`.

    Args:
        output: folder of the run.
        report: the report.

    Raises:
        StorageError: the line cannot be written.
    """
    path = output / LOG_FILE
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(report)) + "\n")
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error}. Free some space and go on with the same command; "
            "what was saved before is still there"
        ) from error


def read_log(output: Path) -> list[StepReport]:
    """Read all whole lines of the log of a run.

    Args:
        output: folder of the run.

    Returns:
        The reports in the order of the steps; a line cut by a kill is left out.
    """
    path = output / LOG_FILE
    if not path.exists():
        return []
    reports = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            reports.append(StepReport(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return reports


def cut_log(output: Path, step: int) -> StepReport | None:
    """Take everything after a step out of the log, so that no step is told twice.

    Args:
        output: folder of the run.
        step: the last step that stays.

    Returns:
        The last report that stays.

    Raises:
        StorageError: the log cannot be written.
    """
    path, unfinished = output / LOG_FILE, output / f".{LOG_FILE}.unfinished-{os.getpid()}"
    kept = [report for report in read_log(output) if report.step <= step]
    try:
        text = "".join(json.dumps(asdict(report)) + "\n" for report in kept)
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error}") from error
    return kept[-1] if kept else None


@dataclass(slots=True)
class StopRequest:
    """Whether someone asked the run to stop after its step.

    Args:
        requested: a signal has come.
        since: when, on the monotonic clock.
    """

    requested: bool = False
    since: float = field(default=0.0)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Note a signal; a Ctrl-C that comes again later stops at once."""
        if not self.requested:
            self.requested, self.since = True, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.since > PATIENCE:
            raise KeyboardInterrupt


@contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Turn Ctrl-C and SIGTERM into a request to stop, as long as the block runs.

    Yields:
        The request. Outside the main thread, where Python delivers no signals, it stays unmet.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, stop.receive) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
