"""Drawing many samples into one file, over several processes, from where a run stopped."""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from adaptok.chunking import ChunkPlan
from adaptok.dc.baseline import DiT
from adaptok.dc.folder import TrainedModel
from adaptok.diffusion import Objective, sample
from adaptok.diffusion.solvers import make_solver
from adaptok.errors import ConfigError, ShapeError
from adaptok.measure.latency import wait_for_device
from adaptok.train.batches import Share
from adaptok.train.decoding import Decoder
from adaptok.train.sample_plan import SamplePlan
from adaptok.train.sample_store import Part, SampleCost, SampleStore

LOOK = 0.5  # seconds between two looks at what the other processes have drawn


@dataclass(frozen=True, slots=True)
class SampleProgress:
    """How a run of many samples stands.

    Args:
        drawn: samples that are there, of all processes and of earlier calls.
        count: samples of the whole run.
        before: samples that were there when this call began.
        seconds: since then.
    """

    drawn: int
    count: int
    before: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Of all processes together."""
        return (self.drawn - self.before) / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """What the rest will take at that speed; None before the first sample."""
        if self.drawn == self.before:
            return None
        return (self.count - self.drawn) / self.images_per_second


@dataclass(frozen=True, slots=True)
class SamplingSummary:
    """How a run of many samples ended.

    Args:
        output: the file.
        progress: at the end, so with the speed of this call.
        processes: that drew in this call.
        cost: of one image, restarts included; None where it is no longer known.
    """

    output: Path
    progress: SampleProgress
    processes: int
    cost: SampleCost | None


OnProgress = Callable[[SampleProgress], None]


@dataclass(frozen=True, slots=True, eq=False)
class Painter:
    """A model with all that it takes to draw the samples of a plan.

    Args:
        model: the model, where it computes.
        plan: what is drawn.
        objective: what the model was trained for.
        decoder: turns what the model draws into pixels.
    """

    model: nn.Module
    plan: SamplePlan
    objective: Objective
    decoder: Decoder

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return next(self.model.parameters()).device

    def draw(self, numbers: range, steps: int | None = None) -> Part:
        """Draw some of the samples.

        Args:
            numbers: which ones.
            steps: other steps than those of the plan, to try it out.

        Returns:
            The samples with what they cost.

        Raises:
            AdaptokError: an option does not fit the model.
        """
        plan, b = self.plan, len(numbers)
        is_guided = plan.guidance != 1.0
        wait_for_device()
        started = time.perf_counter()
        autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=plan.precision == "bf16"
        )
        with count_tokens(self.model, b, 2 if is_guided else 1) as counted, autocast:
            latents = sample(
                self.model,
                [plan.label(number) for number in numbers],
                objective=self.objective,
                scheduler=plan.scheduler,
                steps=steps or plan.steps,
                seed=[plan.noise_seed(number) for number in numbers],
                guidance_scale=plan.guidance,
                guided_channels=self.decoder.guided if is_guided else None,
                drop=plan.drop,
                keep=plan.keep,
                tokens=plan.tokens,
                uncond_drop=plan.uncond_drop,
                clip=self.decoder.clip,
            ).latents
        images = self.decoder.decode(latents).permute(0, 2, 3, 1).contiguous()
        if tuple(images.shape) != (b, plan.height, plan.width, 3):
            raise ShapeError(
                f"the decoder made images of shape {tuple(images.shape)}, and {plan.height} x "
                f"{plan.width} pixels were planned: its factor does not fit"
            )
        seconds = (time.perf_counter() - started) / b
        tokens = torch.stack(counted).mean(0).cpu()
        return Part(images, tokens, torch.full((b,), seconds, dtype=torch.float64))

    def try_out(self) -> None:
        """Draw one sample in two steps, so that what cannot work fails before anything is written.

        Raises:
            AdaptokError: an option does not fit the model, or the model's output is not finite.
        """
        make_solver(self.plan.scheduler, self.objective, self.plan.steps)
        self.draw(range(1), steps=min(2, self.plan.steps))


@contextmanager
def count_tokens(model: nn.Module, b: int, halves: int) -> Iterator[list[Tensor]]:
    """Count the tokens of each image while the block runs, and keep nothing else of a step.

    Args:
        model: `DCDiT` or `DiT`.
        b: number of images.
        halves: 2 with guidance, whose halves are added up.

    Yields:
        A list that grows by one `(b)` for each run of the model.
    """
    counted: list[Tensor] = []

    def note_plan(module: nn.Module, given: object, made: tuple[object, ChunkPlan]) -> None:
        counted.append(made[1].computed.float().view(halves, b).sum(0))

    def note_patches(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        counted.append(torch.full((b,), float(halves * given[0].shape[1])))

    if isinstance(model, DiT):
        handle = model.blocks[0].register_forward_pre_hook(note_patches)
    else:
        handle = model.get_submodule("chunker").register_forward_hook(note_plan)
    try:
        yield counted
    finally:
        handle.remove()


def hash_model(trained: TrainedModel, objective: Objective) -> str:
    """Return the SHA-256 of all of a model that decides what it draws.

    Args:
        trained: the model.
        objective: what it was trained for.

    Returns:
        The hash, in hexadecimal.
    """
    model, card = trained.model, trained.card
    digest = hashlib.sha256()
    digest.update(model.config.model_dump_json().encode())
    digest.update(f"{objective!r} {card.space_to_depth} {card.image_size}".encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        plain = value.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def draw_to_file(
    painter: Painter,
    store: SampleStore,
    *,
    batch: int = 32,
    share: Share | None = None,
    meet: Callable[[], object] = lambda: None,
    on_progress: OnProgress = lambda _: None,
) -> SamplingSummary | None:
    """Draw all samples that are missing, and join them into the file.

    A sample depends on the plan and its number alone. Batches of other samples change its bytes by
    no more than the rounding of the kernels does, and with the same batch size not at all,
    whatever the number of processes and restarts.

    Args:
        painter: the model.
        store: where the samples go.
        batch: samples that a process draws at once.
        share: which process this is; None for the only one.
        meet: returns when all processes have called it.
        on_progress: called after each batch, in the first process.

    Returns:
        How the run ended, in the first process; the others return None as soon as their share is
        drawn.

    Raises:
        ConfigError: there are more processes than samples, the file is there already, or the work
            folder is of another run.
        StorageError: the disk is full; what was drawn before is still there.
        AdaptokError: an option does not fit the model.

    Example:
        >>> import tempfile, adaptok
        >>> from adaptok.dc.folder import ModelCard
        >>> from adaptok.diffusion import FlowObjective
        >>> from adaptok.train.decoding import make_decoder
        >>> config = adaptok.DCDiTConfig(hidden_size=32, depth=1, num_heads=2, latent_size=4,
        ...                              in_channels=3, num_classes=2, learn_sigma=False)
        >>> trained = TrainedModel(adaptok.DCDiT(config).eval(), ModelCard(objective="flow"))
        >>> plan = SamplePlan(model="m", weights="", count=3, seed=0, labels=(0, 1), steps=1,
        ...                   scheduler="flow-euler", height=4, width=4)
        >>> painter = Painter(trained.model, plan, FlowObjective(), make_decoder(trained))
        >>> store = SampleStore(Path(tempfile.mkdtemp()) / "samples.npz", plan)
        >>> draw_to_file(painter, store, batch=2).progress.drawn
        3
    """
    share, plan = share or Share(), painter.plan
    check_crew(plan, batch, share)
    store.check()
    painter.try_out()
    meet()
    if share.rank == 0:
        store.prepare()
    meet()
    missing = store.list_missing(batch)
    meet()  # nobody writes before all have seen what is missing
    before = plan.count - sum(map(len, missing))
    started = time.monotonic()

    def look() -> SampleProgress:
        return SampleProgress(store.count_drawn(), plan.count, before, time.monotonic() - started)

    for numbers in missing[share.rank :: share.ranks]:
        store.save(numbers, painter.draw(numbers))
        if share.rank == 0:
            on_progress(look())
    if share.rank != 0:
        return None
    # A look at the folder waits as long as it takes, where a barrier would give up in the end.
    while (now := look()).drawn < plan.count:
        time.sleep(LOOK)
        on_progress(look())
    return SamplingSummary(store.output, now, share.ranks, store.join())


def check_crew(plan: SamplePlan, batch: int, share: Share) -> None:
    """Raise a `ConfigError` unless each process has something to do, in batches of one or more."""
    if batch < 1:
        raise ConfigError(f"a batch has at least 1 sample, got {batch}")
    if share.ranks > plan.count:
        raise ConfigError(
            f"{share.ranks} processes for {plan.count} sample{'s' if plan.count > 1 else ''}: "
            f"start at most {plan.count}"
        )
