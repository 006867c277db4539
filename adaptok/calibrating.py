"""One calibrator: a model runs over its user's inputs, and each stage fits what depends on data."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from adaptok.adapters import name_stages
from adaptok.calibrated import BatchRun, CalibrationRecord, Item, Row, as_calibrated
from adaptok.calls import BlockCall
from adaptok.chunking import ChunkPlan
from adaptok.discovery import name_of_part
from adaptok.errors import ConfigError, DataError
from adaptok.observers import Observer
from adaptok.probing import undisturbed
from adaptok.profile_marks import mark_profile
from adaptok.profiles import Profile, fit_stage
from adaptok.reductions import ReducePlan
from adaptok.routing import Routing
from adaptok.stages import Stage
from adaptok.tracing import observe, require_adaptive

Walk = Callable[[nn.Module], Any]
CalibrationBatch = Tensor | Sequence[Any] | Mapping[str, Any] | Walk
Wishes = Mapping[str, Mapping[str, Any]]


def calibrate(
    model: nn.Module,
    batches: Iterable[CalibrationBatch],
    *,
    wanted: Wishes | None = None,
    holdout: float = 0.5,
    sampler: str | None = None,
    steps: int | None = None,
    shard: tuple[int, int] | None = None,
) -> Profile:
    """Fit the settings of all stages that depend on data, to inputs of the user.

    Each stage is measured with those inside it as they are set now, and with those around it set
    aside. Nothing changes on the model: see `Profile.apply`.

    Args:
        model: a wrapped model.
        batches: images, a tuple of arguments, arguments by name, or a function that takes the model
            and runs a whole sampling walk; it is run several times with the same random numbers.
        wanted: by name of a stage what is to be reached, such as `{"tome": {"keep": 0.5}}`.
        holdout: share of the batches (of one batch: of its samples) that figures are measured on
            and that nothing is fitted to, in (0, 1).
        sampler: name of the sampler, noted in the profile.
        steps: number of its steps, noted in the profile.
        shard: `(i, n)` runs every n-th batch from the i-th on; see `Profile.merge`.

    Returns:
        The profile; `unfit` lists stages that have nothing to fit.

    Raises:
        NotWrappedError: the model is not wrapped.
        DataError: there are too few samples, or a batch holds NaN; it is named.
        ConfigError: an option is wrong.

    Example:
        >>> import adaptok
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), stack=[{"name": "tome", "r": 2}, "evit"], budget=0.5)
        >>> profile = calibrate(vit, [torch.randn(4, 3, 32, 48)])
        >>> list(profile.stages), profile.unfit, profile.stages["tome"].figures["held_out"]
        (['tome'], ('evit',), 2)
    """
    blocks = require_adaptive(model)
    check_options(holdout, shard)
    stages = name_stages(blocks)
    plans = plan_stages(stages, wanted or {})
    kinds: dict[str, Any] = {name: type(stages[name]) for name in plans}
    rows: dict[str, dict[Item, Row]] = {name: {} for name in plans}
    grids: set[tuple[int, ...]] = set()
    samples = 0
    with undisturbed(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for number, batch in enumerate(batches if plans else ()):
            if shard is not None and number % shard[1] != shard[0]:
                continue
            check_batch(batch, number)
            most = 0
            for name, plan in plans.items():
                watches: list[Watch] = []
                run = partial(run_batch, model, batch, number, watches)
                stage = as_calibrated(stages[name])
                assert stage is not None
                with outer_aside(stages, name):
                    measured = stage.measure_batch(run, plan)
                for sample, row in enumerate(measured):
                    check_row(row, number, name)
                    rows[name][number, sample] = row
                grids |= {grid for watch in watches for grid in watch.grids}
                most = max([most, *(watch.samples for watch in watches)])
            samples += most
    records = {name: CalibrationRecord(found) for name, found in rows.items()}
    return Profile(
        adaptok=version("adaptok"),
        torch=torch.__version__,
        host=mark_profile(model, blocks),
        grids=tuple(sorted(grids)),
        sampler=sampler,
        steps=steps,
        samples=samples,
        holdout=holdout,
        stages={
            name: fit_stage(
                kinds[name], name_of_part("stage", kinds[name]), records[name], holdout, plan
            )
            for name, plan in plans.items()
        },
        unfit=tuple(name for name in stages if name not in plans),
        shard=shard,
    ).with_records(records)


def check_options(holdout: float, shard: tuple[int, int] | None) -> None:
    """Raise a `ConfigError` unless the options of a calibration make sense."""
    if not 0.0 < holdout < 1.0:
        raise ConfigError(f"holdout is a share in (0, 1), got {holdout!r}")
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise ConfigError(f"shard is (i, n) with i from 0 to n - 1, got {shard!r}")


def plan_stages(stages: Mapping[str, Stage], wanted: Wishes) -> dict[str, dict[str, Any]]:
    """Return what is to be reached for each stage that has something to fit.

    Args:
        stages: by name.
        wanted: what the user asked for.

    Raises:
        ConfigError: a wish is wrong, or for a stage that is not there or has nothing to fit.
    """
    plans = {}
    for name, wish in wanted.items():
        if not isinstance(wish, Mapping):
            raise ConfigError(
                f"what is wanted of {name!r} is a mapping such as {{'keep': 0.5}}, got {wish!r}"
            )
    for name, stage in stages.items():
        fitting = as_calibrated(stage)
        found = None if fitting is None else fitting.plan_calibration(wanted.get(name, {}))
        if found is not None:
            plans[name] = dict(found)
    lost = [name for name in wanted if name not in plans]
    if lost:
        raise ConfigError(
            f"something is wanted of {lost[0]!r}, and this model has "
            f"{', '.join(plans) or 'nothing'} to fit (stages: {', '.join(stages)})"
        )
    return plans


class Watch(Observer):
    """Notes grids, samples and shares of kept cells of one run, and stops at NaN.

    Args:
        number: of the batch.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.grids: set[tuple[int, ...]] = set()
        self.samples = 0
        self.calls = 0
        self.shares: dict[str, dict[int, list[float]]] = {}

    def note_entry(self, call: BlockCall) -> None:
        """Take in what came."""
        self.calls += 1
        self.samples = max(self.samples, call.x.shape[0])
        image = call.numbers.cell_grid if call.numbers is not None else ()
        self.grids.add(tuple(image or call.grid))  # not of a host's own, ever-changing choice
        self.check(call, "brings NaN or infinity into the blocks")

    def note_exit(self, call: BlockCall) -> None:
        """Look at what comes out."""
        self.check(call, "makes the blocks answer with NaN or infinity")

    def check(self, call: BlockCall, what: str) -> None:
        """Raise a `DataError` if tokens hold NaN or infinity."""
        if not bool(call.x.isfinite().all()):
            raise DataError(
                f"batch {self.number} {what}, from which nothing can be fitted: leave it out, or "
                "mend it"
            )

    def note_plan(self, stage: str, routing: Routing, plan: ChunkPlan) -> None:
        """Take in how many cells were kept."""
        self.note_part(stage, routing, plan, range(plan.keep_mask.shape[0]))

    def note_part(
        self, stage: str, routing: Routing, plan: ChunkPlan, samples: Sequence[int]
    ) -> None:
        """Take in how many cells of some samples were kept."""
        for name, shares in split_shares(stage, plan).items():
            known = self.shares.setdefault(name, {})
            for sample, share in zip(samples, shares, strict=True):
                known.setdefault(sample, []).append(share)

    @property
    def kept(self) -> dict[str, tuple[float, ...]]:
        """Mean share of kept cells of each sample, by stage."""
        return {
            name: tuple(sum(found[sample]) / len(found[sample]) for sample in sorted(found))
            for name, found in self.shares.items()
        }


def split_shares(stage: str, plan: ChunkPlan) -> dict[str, list[float]]:
    """Return which share of its cells each stage left to each sample.

    Args:
        stage: the name, or names joined by `+` where stages share a loop.
        plan: what they decided; of a loop, with what happened site by site.

    Returns:
        Shares by name; those of a loop multiply to that of all of it.
    """
    names = stage.split("+")
    if not isinstance(plan, ReducePlan):
        share: list[float] = plan.keep_mask.float().mean(1).tolist()
        return dict.fromkeys(names, share)
    b, n = plan.keep_mask.shape
    shares = {name: [1.0] * b for name in names}
    before = (n,) * b
    for event in plan.events:
        own = shares[event.stage]
        for sample, (left, came) in enumerate(zip(event.counts, before, strict=True)):
            own[sample] *= left / came
        before = event.counts
    return shares


def run_batch(
    model: nn.Module, batch: CalibrationBatch, number: int, watches: list[Watch]
) -> BatchRun:
    """Run one batch with random numbers that follow from its number alone.

    Args:
        model: the model.
        batch: what it is called with, or what calls it.
        number: of the batch.
        watches: gets what was seen.
    """
    seed_all(model, number)
    watch = Watch(number)
    watches.append(watch)
    with observe(model, watch):
        out = call_batch(model, batch)
    if not watch.calls:
        raise DataError(f"batch {number} did not call the model: a walk takes it as its argument")
    return BatchRun(out, watch.samples, watch.calls, watch.kept)


def call_batch(model: nn.Module, batch: CalibrationBatch) -> Any:  # noqa: ANN401
    """Call a model with a batch, or let a walk call it."""
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return model(*batch)
    if callable(batch):
        return batch(model)
    raise ConfigError(
        f"a batch is a tensor, a tuple of arguments, arguments by name, or a function of the "
        f"model, got a {type(batch).__name__}"
    )


def seed_all(model: nn.Module, seed: int) -> None:
    """Seed the CPU and the devices of a model; `undisturbed` puts their states back."""
    torch.default_generator.manual_seed(seed)
    for index in {p.device.index for p in model.parameters() if p.is_cuda}:
        torch.cuda.default_generators[index].manual_seed(seed)


def check_batch(batch: CalibrationBatch, number: int) -> None:
    """Raise a `DataError` if the numbers of a batch are none."""
    if isinstance(batch, Tensor):
        values: list[Any] = [batch]
    elif isinstance(batch, Mapping):
        values = list(batch.values())
    else:
        values = list(batch) if isinstance(batch, Sequence) else []
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
            raise DataError(
                f"batch {number} holds NaN or infinity, from which nothing can be fitted: leave it "
                "out, or mend it"
            )


def check_row(row: Row, number: int, stage: str) -> None:
    """Raise a `DataError` if what a stage measured is no number."""
    for name, values in row.items():
        if not torch.tensor(values, dtype=torch.float64).isfinite().all():
            raise DataError(
                f"batch {number} gives {stage!r} a {name} of NaN or infinity: leave it out, or "
                "mend it"
            )


@contextmanager
def outer_aside(stages: Mapping[str, Stage], name: str) -> Iterator[None]:
    """Set all stages around one aside for a while, and let that one take part."""
    before = {stage: stage.aside for stage in stages.values()}
    outside = list(stages)[: list(stages).index(name)]
    try:
        for place in outside:
            stages[place].aside = True
        stages[name].aside = False
        yield
    finally:
        for stage, aside in before.items():
            stage.aside = aside
