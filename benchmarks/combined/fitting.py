"""What stages learn before they are compared: on other seeds, with the host's weights frozen."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from adaptok_exit.tuning import tune_schedule
from adaptok_width.losses import find_stage
from torch import Tensor, nn

import adaptok
from adaptok.config import Config
from adaptok.dc.folder import TrainedModel
from adaptok.diffusion import make_objective, sample
from adaptok.train.batches import Share, draw_batch, make_latents, open_training_set
from adaptok.train.config import TrainConfig
from adaptok.train.data import ImageSet
from adaptok.zoo.models import load_zoo_model

from .settings import COMPUTED, STAGES, Combination

CALIBRATION_SEED = 900_000  # far from every seed that is compared
DEGREE = 1  # on held-out walks a line explains as much as a polynomial of degree 4


class Fitted(Config):
    """What was found for the stages; the weights of adapters and routers lie beside it.

    Args:
        coefficients: polynomial of TeaCache, highest power first.
        r2: of that polynomial on held-out walks.
        thresholds: of TeaCache, by name of the share of computed steps.
        computed: share of steps that each threshold computed on the walks it was chosen on.
        exit_losses: first and last loss of the adapters.
        width_share: share of the operations that the width stage ended with.
    """

    coefficients: tuple[float, ...]
    r2: float
    thresholds: dict[str, float]
    computed: dict[str, float]
    exit_losses: tuple[float, float]
    width_share: float


@dataclass(slots=True, eq=False)
class Subject:
    """The shipped model, and how it draws.

    Args:
        trained: the model and its card.
        steps: of the walk.
    """

    trained: TrainedModel
    steps: int
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, name: str, steps: int) -> "Subject":
        """Load a shipped model or a folder."""
        return cls(load_zoo_model(name), steps)

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self.trained.model

    def draw(self, seeds: Sequence[int], labels: Sequence[int], **options: Any) -> Tensor:
        """Return one latent per seed."""
        drawn = sample(
            self.model, labels, objective=make_objective(self.trained.card.objective),
            scheduler="flow-euler", steps=self.steps, seed=list(seeds), clip=1.0, **options,
        )  # fmt: skip
        return drawn.latents


@dataclass(frozen=True, slots=True, eq=False)
class TrainingBatches:
    """Noisy training images as the model takes them, always the same ones.

    Args:
        trained: model and card.
        count: how many batches.
        size: images of a batch.
    """

    trained: TrainedModel
    count: int
    size: int

    def __iter__(self) -> Any:
        config, images = self.read_run()
        for number in range(self.count):
            yield self.make(config, images, number)[0]

    def read_run(self) -> tuple[TrainConfig, ImageSet]:
        """Return the run that trained the model, and its images."""
        card, model = self.trained.card, self.trained.model
        run = dict(card.training["config"]) | {"batch_size": self.size, "seed": CALIBRATION_SEED}
        config = TrainConfig(model=model.config, **run)
        return config, open_training_set(config)

    def make(
        self, config: TrainConfig, images: ImageSet, number: int
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Return the inputs of a batch, and the velocity that the model should say."""
        batch, objective = draw_batch(config, images, number, Share()), config.make_objective()
        x0 = make_latents(batch.images, config.space_to_depth)
        t = objective.times(batch.u)
        x = objective.noisy(x0, batch.noise, t)
        return (x, objective.model_time(t), batch.labels), batch.noise - x0


def apply(subject: Subject, one: Combination, fitted: Fitted, weights: dict[str, Tensor]) -> None:
    """Wrap the model of a subject as a combination says; its budget goes to the sampler."""
    if not one.stages:
        return
    stack = []
    for name, options in one.stages.items():
        chosen = dict(STAGES[name]) | dict(options)
        if name == "teacache":
            chosen["threshold"] = fitted.thresholds[chosen.pop("computed")]
            chosen["coefficients"] = fitted.coefficients
        stack.append(chosen)
    adaptok.wrap(subject.model, stack=stack, verify=False)
    for name in one.stages:
        own = {k.partition("/")[2]: v for k, v in weights.items() if k.startswith(f"{name}/")}
        if own:
            find(subject.model, STAGES[name]["name"]).load_state_dict(own)


def find(model: nn.Module, name: str) -> nn.Module:
    """Return the stage of that name."""
    return next(m for m in model.modules() if isinstance(m, adaptok.Stage) and m.name == name)


def fit_teacache(subject: Subject, walks: int) -> dict[str, Any]:
    """Fit the polynomial, and choose a threshold for each share of computed steps."""
    adaptok.wrap(subject.model, stack=["teacache"], verify=False)
    stage: Any = find(subject.model, "teacache")

    def walk(number: int, size: int = 4) -> Any:
        seeds = range(CALIBRATION_SEED + number * size, CALIBRATION_SEED + (number + 1) * size)
        return lambda _: subject.draw(seeds, [seed % 8 for seed in seeds])

    profile = adaptok.calibrate(
        subject.model,
        [walk(i) for i in range(walks)],
        holdout=0.5,
        wanted={"teacache": {"degree": DEGREE}},
    )
    found = profile.stages["teacache"]
    stage.apply_settings(found.settings)
    thresholds, computed = {}, {}
    for name, share in COMPUTED.items():
        low, high = 0.0, 2.0
        for _ in range(7):
            stage.threshold = (low + high) / 2
            stage.begin_anew()
            walk(walks, 8)(None)
            got = stage.computed / (stage.computed + stage.reused)
            low, high = (stage.threshold, high) if got > share else (low, stage.threshold)
        thresholds[name], computed[name] = stage.threshold, got
    return {
        "coefficients": tuple(found.settings["coefficients"]),
        "r2": found.figures["r2_held_out"],
        "thresholds": thresholds,
        "computed": computed,
    }


def fit_exit(subject: Subject, batches: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train the adapters of the schedule to answer as the full model does."""
    adaptok.wrap(subject.model, stack=[dict(STAGES["exit"])], verify=False)
    losses = []
    for part in range(0, batches, 50):  # one epoch over other batches each time
        data = list(TrainingBatches(subject.trained, batches, 8))[part : part + 50]
        losses += tune_schedule(subject.model, data).losses
    state = find(subject.model, "schedule").state_dict()
    return {"exit_losses": (losses[0], losses[-1])}, {f"exit/{k}": v for k, v in state.items()}


def fit_width(subject: Subject, batches: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train the routers of heads, channels and tokens; the host stays as it is."""
    adaptok.wrap(subject.model, stack=[dict(STAGES["width"])], verify=False)
    stage = find_stage(subject.model)
    own = list(stage.parameters())
    subject.model.requires_grad_(False)
    stage.requires_grad_(True)
    optimizer = torch.optim.AdamW(own, lr=0.05, weight_decay=0.0)
    data = TrainingBatches(subject.trained, batches, 8)
    config, images = data.read_run()
    subject.model.train()
    share = 1.0
    for number in range(batches):
        stage.anneal(number, steps=batches // 2)
        inputs, velocity = data.make(config, images, number)
        with adaptok.collect_losses(subject.model) as added:
            error = (subject.model(*inputs) - velocity).square().mean()
        (error + sum(added.values())).backward()
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        share = stage.target + float((added["width"].detach() / 2).sqrt())
        print(f"width {number}: error {float(error.detach()):.4f}, {added}", flush=True)
    subject.model.eval()
    state = {f"width/{k}": v for k, v in stage.state_dict().items()}
    return {"width_share": share}, state
