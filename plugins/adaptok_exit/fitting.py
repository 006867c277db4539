"""The exits of a model as the one calibrator sees them."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from adaptok.calibrated import CalibrationRecord, Fitted, RunBatch, check_share, read_wanted
from adaptok.errors import DataError
from adaptok_exit.calibration import fit_thresholds
from adaptok_exit.comparing import SIMILARITY, check_compared, compare, read_answer
from adaptok_exit.confidence import ConfidenceExit


def plan_exits(stage: ConfidenceExit, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is promised of those who leave (see `Calibrated.plan_calibration`)."""
    defaults = {
        "agreement": 0.98,
        "certainty": 0.9,
        "compared": "classes",
        "similarity": SIMILARITY,
    }
    plan = read_wanted(stage.name, wanted, defaults)
    check_compared(plan["compared"])
    for name in ("agreement", "certainty"):
        check_share(name, plan[name])
    return plan


def measure_exits(
    stage: ConfidenceExit, run: RunBatch, wanted: Mapping[str, Any]
) -> list[dict[str, tuple[float, ...]]]:
    """Return how sure each exit is of each sample, and whether it agrees if it leaves there.

    Args:
        stage: the exits.
        run: runs the batch.
        wanted: `compared` and `similarity`.

    Raises:
        DataError: the batch calls the model several times.
    """
    with stage.record() as records:
        full = run()
    if len(records) != 1:
        raise DataError(
            f"exits are judged in single calls, and a batch made {len(records)}: give images, not "
            "walks"
        )
    answer = read_answer(stage.name, full.out)
    sure, same = [], []
    for number, call in enumerate(records[0].exits):
        with stage.replay(number, records[0]):
            early = read_answer(stage.name, run().out)
        same.append(compare(early, answer, wanted["compared"], wanted["similarity"]))
        sure.append(stage.judge(number)(call).sigmoid())
    pairs = zip(torch.stack(sure, 1).tolist(), torch.stack(same, 1).tolist(), strict=True)
    return [
        {"confidence": tuple(c), "agrees": tuple(float(value) for value in a)} for c, a in pairs
    ]


def fit_exits(
    chosen: CalibrationRecord, held_out: CalibrationRecord, wanted: Mapping[str, Any]
) -> Fitted:
    """Choose thresholds (see `choose_thresholds`), and tell what they do to samples held out."""
    found = fit_thresholds(
        gather(chosen, "confidence"),
        gather(chosen, "agrees").bool(),
        gather(held_out, "confidence"),
        gather(held_out, "agrees").bool(),
        wanted["agreement"],
        certainty=wanted["certainty"],
        compared=wanted["compared"],
    )
    figures = {name: getattr(found, name) for name in ("left", "agreed", "measured", "holds")}
    plain = {key: list(x) if isinstance(x, tuple) else x for key, x in figures.items()}
    return Fitted({"threshold": list(found.thresholds)}, plain)


def gather(record: CalibrationRecord, name: str) -> Float[Tensor, "exits n"]:
    """Return the numbers of all samples, exit by exit, in the float32 that exits compare."""
    return torch.tensor(record.column(name), dtype=torch.float32).T
