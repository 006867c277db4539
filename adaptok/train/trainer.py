"""Training: one function for a CPU, a GPU, several processes and several machines."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from adaptok.dc.folder import CARD_FILE, WEIGHTS_FILE, ModelCard, build_model, save_model
from adaptok.errors import AdaptokError, ConfigError, StorageError
from adaptok.storage import refuse_foreign_files
from adaptok.train.batches import StepBatches, TrainingSet, load_batches, open_training_set
from adaptok.train.checkpoint import (
    Checkpoint,
    RunState,
    check_same_data,
    list_checkpoints,
    load_checkpoint,
    name_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from adaptok.train.config import (
    TrainConfig,
    check_fit,
    check_same_run,
    drop_at,
    learning_rate_at,
)
from adaptok.train.learner import Learner
from adaptok.train.processes import (
    Processes,
    check_processes,
    fingerprint,
    fingerprint_checkpoint,
    fingerprint_data,
    mark_data,
)
from adaptok.train.progress import (
    StepReport,
    StopRequest,
    TrainSummary,
    append_to_log,
    catch_signals,
    cut_log,
)
from adaptok.train.sharding import gather_state

CONFIG_FILE = "config.json"
MODEL_FOLDER = "model"
OnStep = Callable[[StepReport], None]
NOT_LOSS = ("loss", "kept", "natural", "gradient_norm")


def train(
    config: TrainConfig,
    output: str | Path,
    *,
    resume: bool = True,
    stop_after: int | None = None,
    on_step: OnStep | None = None,
) -> TrainSummary:
    """Train a model, or go on with a run that stopped.

    The same call runs on one device and, started by `accelerate launch`, in several processes on
    one or more machines that share the output folder. What is learned does not depend on
    where a run was cut, and apart from rounding not on the number of processes, nor on whether
    each holds the whole model (`accelerate launch --use_fsdp --fsdp_version 2` shares it).

    Args:
        config: options of the run.
        output: folder of the run: `config.json`, `log.jsonl`, `checkpoints/` and at the
            end `model/` (averaged weights, for `adaptok.dc.folder.load_model`).
        resume: go on from the newest checkpoint, if there is one.
        stop_after: do no more than so many steps now; the rest is left for a next call.
        on_step: called with each report, in the main process.

    Returns:
        How the run ended. After Ctrl-C or SIGTERM the step is finished, a checkpoint is written,
        and `interrupted` is set.

    Raises:
        ConfigError: the options do not fit the data, the processes, or the saved run.
        CheckpointError: the newest checkpoint is damaged.
        DataError: the images cannot be read.
        StorageError: the disk is full; earlier checkpoints are intact.
        AdaptokError: the loss is no longer finite; earlier checkpoints are intact.

    Example:
        >>> import tempfile
        >>> from adaptok import DCDiTConfig
        >>> from adaptok.train.config import fit_model_to_data
        >>> config = TrainConfig(model=DCDiTConfig(hidden_size=32, depth=1, num_heads=2),
        ...                      image_size=16, batch_size=4, steps=2)
        >>> train(fit_model_to_data(config, num_classes=8), tempfile.mkdtemp()).step
        2
    """
    if stop_after is not None and stop_after < 1:
        raise ConfigError(f"stop_after is at least 1 step, got {stop_after}")
    data, folder = Path(config.data).absolute(), Path(output).absolute()
    if data.is_dir() and (folder == data or data in folder.parents):
        raise ConfigError(
            f"the output folder {output} lies in the data folder {config.data}, where checkpoints "
            "would count as images: choose a folder outside of it"
        )
    processes = Processes.start()
    check_processes(config, processes.share.ranks)
    images = open_training_set(config)
    check_fit(config, len(images.class_names))
    run = Run(config, Path(output), processes, images, on_step)
    with catch_signals() as stop:
        run.open(resume)
        run.learn(stop, stop_after)
        return run.close(stop)


@dataclass(slots=True, eq=False)
class Run:
    """A run between its start and its end.

    Args:
        config: its options.
        output: its folder.
        processes: who takes part.
        images: what it learns from.
        on_step: called with each report, in the main process.
    """

    config: TrainConfig
    output: Path
    processes: Processes
    images: TrainingSet
    on_step: OnStep | None
    learner: Learner = field(init=False)
    step: int = field(init=False, default=0)
    seconds: float = field(init=False, default=0.0)  # spent before this call
    started: float = field(init=False, default=0.0)
    reported: tuple[int, float] = field(init=False, default=(0, 0.0))  # step and time
    loss: float | None = field(init=False, default=None)
    checkpoint: Path | None = field(init=False, default=None)

    def open(self, resume: bool) -> None:
        """Make the learner, and take over what was saved.

        Args:
            resume: go on from the newest checkpoint.
        """
        folders = list_checkpoints(self.output)
        if folders and not resume:
            raise ConfigError(
                f"{self.output} already holds a run (its newest checkpoint is {folders[-1].name}): "
                "resume it, or choose another folder"
            )
        processes = self.processes
        if processes.share.ranks > 1:
            processes.compare(
                {
                    "options": fingerprint(self.config.to_json().encode()),
                    "data": fingerprint_data(self.config, self.images),
                    "checkpoint": fingerprint_checkpoint(folders[-1] if folders else None),
                }
            )
        self.learner = Learner.start(self.config, processes.device, processes.sharding)
        if folders:
            self.take_over(load_checkpoint(folders[-1]))
        if processes.share.ranks > 1 and processes.sharding is None:
            self.learner.wrap(processes.accelerator.prepare_model)
        processes.wait()
        if processes.is_first:
            self.prepare_output()
        self.started = time.monotonic()
        self.reported = (self.step, self.started)

    def take_over(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint."""
        state = checkpoint.state
        moved = state.data is not None  # its mark says more than where it lies
        check_same_run(self.config, state.config, {"data"} if moved else set())
        check_same_data(mark_data(self.images), state.data, self.config.data)
        if state.step > self.config.steps:
            raise ConfigError(
                f"{checkpoint.folder} has done {state.step} steps and steps={self.config.steps}: "
                "ask for more steps, or choose another folder"
            )
        self.learner.restore(checkpoint)
        self.step, self.seconds, self.checkpoint = state.step, state.seconds, checkpoint.folder

    def prepare_output(self) -> None:
        """Make the folder ready: no leftovers, the options, and a log up to this step."""
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make the folder {self.output}: {error}") from error
        refuse_foreign_files(self.output / MODEL_FOLDER, {WEIGHTS_FILE, CARD_FILE})
        remove_leftovers(self.output)
        self.config.to_json_file(self.output / CONFIG_FILE)
        last = cut_log(self.output, self.step)
        self.loss = None if last is None else last.loss

    def learn(self, stop: StopRequest, stop_after: int | None) -> None:
        """Do the steps that are left, until someone asks to stop.

        Args:
            stop: whether someone did.
            stop_after: do no more than so many steps.
        """
        config, device = self.config, self.processes.device
        last = config.steps if stop_after is None else min(config.steps, self.step + stop_after)
        batches = StepBatches(config, self.images, self.processes.share)
        steps = range(self.step, last)
        for batch in load_batches(batches, steps, pin_memory=device.type == "cuda"):
            self.learner.take_step(batch.to(device), self.step)
            self.step += 1
            stopping = self.processes.agree(stop.requested)
            # what is measured changes behind the distillation: no window spans both
            if self.step % config.log_every == 0 or self.step in (
                config.steps,
                config.distill_steps,
            ):
                self.report()
            if self.step % config.checkpoint_every == 0 or self.step == last or stopping:
                self.save()
            if stopping:
                break

    def check_finite(self) -> None:
        """Raise an `AdaptokError` if a step went wrong since the last check."""
        found = self.processes.gather(self.learner.bad_step).tolist()
        bad = [step for step in found if step >= 0]
        if not bad:
            return
        saved = "no checkpoint was written yet"
        if self.checkpoint is not None:
            saved = f"the last checkpoint {self.checkpoint} is intact"
        raise AdaptokError(
            f"the loss or its gradient is not a finite number at step {min(bad)}: train in a new "
            f"folder with a smaller learning rate than {self.config.learning_rate:g} or in another "
            f"precision than {self.config.precision!r}; {saved}"
        )

    def time_spent(self) -> float:
        """Return the seconds of the run, restarts included."""
        return self.seconds + time.monotonic() - self.started

    def report(self) -> None:
        """Tell how the run stands, and start a new window."""
        self.check_finite()
        window, self.learner.window = self.learner.window, type(self.learner.window)()
        sums = window.read(self.processes.average)
        means = {name: value / window.steps for name, value in sums.items()}
        now = time.monotonic()
        step, since = self.reported
        speed = (self.step - step) / max(now - since, 1e-9)
        self.reported = (self.step, now)
        self.loss = means["loss"]
        report = StepReport(
            step=self.step,
            steps=self.config.steps,
            loss=means["loss"],
            parts={name: value for name, value in means.items() if name not in NOT_LOSS},
            kept=means.get("kept", 1.0),
            natural=means.get("natural", 1.0),
            drop=drop_at(self.config, self.step - 1),
            gradient_norm=means["gradient_norm"],
            learning_rate=learning_rate_at(self.config, self.step - 1),
            seconds=self.time_spent(),
            images_seen=self.step * self.config.batch_size,
            steps_per_second=speed,
            seconds_left=(self.config.steps - self.step) / speed,
        )
        if self.processes.is_first:
            append_to_log(self.output, report)
            if self.on_step is not None:
                self.on_step(report)

    def save(self) -> None:
        """Write a checkpoint of this step."""
        self.check_finite()
        learner, writes = self.learner, self.processes.is_first
        window = learner.window.read(self.processes.average)
        state = RunState(
            step=self.step,
            seconds=self.time_spent(),
            config=self.config.model_dump(mode="json"),
            window=window,
            window_steps=learner.window.steps,
            scaler=learner.scaler.state_dict(),
            data=mark_data(self.images),
        )
        checkpoint = Checkpoint(
            state=state,
            model=gather_state(learner.model.state_dict(), keep=writes),
            ema=gather_state(learner.ema, keep=writes),
            optimizer=gather_state(learner.moments(), keep=writes),
        )
        if writes:
            save_checkpoint(self.output, checkpoint, self.config.keep_checkpoints)
        self.checkpoint = name_checkpoint(self.output, self.step)

    def close(self, stop: StopRequest) -> TrainSummary:
        """Write the model with averaged weights and say how the run ended."""
        folder = self.output / MODEL_FOLDER
        averages = gather_state(self.learner.ema, keep=self.processes.is_first)
        if self.processes.is_first:
            with torch.random.fork_rng(devices=[]):
                model = build_model(self.config.model)
            model.load_state_dict(averages)
            save_model(model, self.make_card(), folder)
        self.processes.wait()
        assert self.checkpoint is not None
        return TrainSummary(
            step=self.step,
            steps=self.config.steps,
            loss=self.loss,
            seconds=self.time_spent(),
            images_seen=self.step * self.config.batch_size,
            output=self.output,
            checkpoint=self.checkpoint,
            model_folder=folder,
            interrupted=stop.requested and self.step < self.config.steps,
        )

    def make_card(self) -> ModelCard:
        """Say how the model was trained."""
        config = self.config
        return ModelCard(
            objective=config.objective,
            image_size=config.image_size,
            space_to_depth=config.space_to_depth,
            class_names=self.images.class_names,
            training={
                "data": self.images.name,
                "images": len(self.images),
                "images_seen": self.step * config.batch_size,
                "seconds": round(self.time_spent(), 1),
                "step": self.step,
                "loss": self.loss,
                "device": describe_device(self.processes.device),
                "processes": self.processes.share.ranks,
                "weights": "exponential moving average",
                "config": config.model_dump(mode="json", exclude={"model", "workers"}),
            },
        )


def describe_device(device: torch.device) -> str:
    """Return what a person calls a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
