"""Scheduled exit: how noisy a sample is says how many blocks of a diffusion transformer it runs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

from torch import nn

from adaptok import BlockCall, BlockRange, Effects, Stage
from adaptok.errors import ConfigError, HandOverError
from adaptok_exit.leaving import ExitAdapter, adapt, join_samples, select_samples, tell_depths
from adaptok_exit.schedules import count_blocks, find_row, measure_noise, read_schedule


class ScheduledExit(Stage):
    """Runs fewer blocks for a sample the noisier it is, by a table.

    Each sample has its own step, and leaves after as many blocks as its row of the table says; the
    host's own final layer reads what left. At least two blocks run. Samples that leave alike run
    together, so that what becomes of one does not depend on the others. This is ASE with any table.

    A host that was not trained for it gets worse by every block that is left out: train it with
    `adaptok_exit.tuning.scheduled_loss`, or adapters alone with `tune_schedule`.

    Args:
        width: features of a token; filled by the host.
        schedule: `"ase"`, `"full"` (everybody runs all blocks), or pairs of the share of noise from
            which on a row holds (the first is 0, a clean image), and the share of the blocks.
        scale: the step of pure noise and that of a clean image on the host's own scale, such as
            (999, 0); None takes what is known of the host's family.
        adapt: map what leaves early by a linear layer per row, which starts as the identity.

    Raises:
        ConfigError: the schedule or the scale is none.
        HandOverError: (when called) the host told no step, or one beyond its scale, or its scale is
            not known.

    Example:
        >>> ScheduledExit(64, schedule=((0.0, 1.0), (0.5, 0.6))).table
        ((0.0, 1.0), (0.5, 0.6))

    Paper: Moon et al., A Simple Early Exiting Framework for Accelerated Sampling in Diffusion
    Models, arXiv 2408.05927 (written from its description).
    """

    effects: ClassVar[Effects] = Effects("depth", needs_step=True)
    name = "schedule"

    def __init__(
        self,
        width: int,
        schedule: str | tuple[tuple[float, float], ...] = "ase",
        scale: tuple[float, float] | None = None,
        adapt: bool = False,
    ) -> None:
        super().__init__()
        self.table = read_schedule(schedule)
        self.schedule = schedule if isinstance(schedule, str) else self.table
        self.scale = check_scale(scale)
        self.adapt = adapt
        rows = [row for row, (_, share) in enumerate(self.table) if share < 1.0 and adapt]
        self.adapters = nn.ModuleDict({str(row): ExitAdapter(width) for row in rows})
        self.paused = False

    def describe(self) -> Mapping[str, str]:
        """Return what `repr` of a wrapped model shows."""
        rows = ", ".join(f"{share:.2g} from {noise:.2g}" for noise, share in self.table)
        return {"schedule": f"blocks {rows} of the noise"}

    def forward(self, inner: BlockRange, call: BlockCall) -> BlockCall:
        """Run as many blocks for each sample as its step says (see `Stage.forward`)."""
        b, blocks = call.x.shape[0], inner.last - inner.first
        rows = self.choose_rows(call)
        counts = [count_blocks(self.table[row][1], blocks) for row in rows]
        groups: dict[tuple[int, int], list[int]] = {}
        for sample in range(b):
            row, count = rows[sample], blocks if self.paused else counts[sample]
            key = (count, row if count < blocks and str(row) in self.adapters else -1)
            groups.setdefault(key, []).append(sample)
        if not groups:
            return inner(call)
        parts, depths = [], [0] * b
        for (count, row), samples in groups.items():
            part = inner.run(select_samples(call, samples), inner.first, inner.first + count)
            parts.append(part if row < 0 else adapt(part, self.adapters[str(row)]))
            for sample in samples:
                depths[sample] = inner.first + count
        tell_depths(call, self.name, depths)
        return join_samples(call, parts, list(groups.values()))

    def choose_rows(self, call: BlockCall) -> list[int]:
        """Return the row of the table for each sample."""
        return [find_row(share, self.table) for share in self.measure_noise(call)]

    def measure_noise(self, call: BlockCall) -> list[float]:
        """Return how noisy each sample is, from 0 to 1."""
        if call.timestep is None:
            raise HandOverError(
                "'schedule' goes by the diffusion step, and this host told none for each sample: "
                "it is for diffusion transformers (for a host described by adaptok.ListBackbone, "
                "give it timestep=); a Vision Transformer leaves by stack=['exit']"
            )
        # told by the host's adapter, where its family has one scale
        known: tuple[float, float] | None = getattr(call, "timestep_scale", None)
        scale = self.scale or known
        if scale is None:
            raise HandOverError(
                "'schedule' must know which diffusion steps are noise and which are clean, and "
                "the models of this family differ in that: give it the ends, as in "
                '{"name": "schedule", "scale": (999, 0)}'
            )
        return measure_noise(call.timestep, scale)

    @contextmanager
    def at_full_depth(self) -> Iterator[None]:
        """Run all blocks for everybody inside a `with` block, as a teacher.

        Yields:
            Nothing.
        """
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before


def check_scale(scale: tuple[float, float] | None) -> tuple[float, float] | None:
    """Return the ends of the steps as numbers, or raise a `ConfigError`."""
    if scale is None:
        return None
    try:
        noise, clean = (float(end) for end in scale)
    except (TypeError, ValueError):
        raise ConfigError(
            f"scale is a pair (step of pure noise, step of a clean image), got {scale!r:.80}"
        ) from None
    if not abs(noise - clean) < float("inf") or noise == clean:
        raise ConfigError(f"the ends of scale are two different numbers, got ({noise}, {clean})")
    return (noise, clean)
