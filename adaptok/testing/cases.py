"""How a check makes the part that it is given, and the inputs that it tries it on."""

import copy
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adaptok.budgeted import Budgeted
from adaptok.budgets import Budget
from adaptok.calls import BlockCall, HostNumbers
from adaptok.chunking import ChunkPlan
from adaptok.errors import ConfigError
from adaptok.parts import FACTS, HostFacts, PartConfig, Spec, build_part, read_spec
from adaptok.registry import INTERFACES, Kind
from adaptok.routing import Routing
from adaptok.stages import Stage
from adaptok.testing.models import DEPTH, WIDTH, fill_weights, make_vit
from adaptok.testing.report import ConformanceError, require
from adaptok.tokens import Grid, Tokens
from adaptok.wrapping import wrap

PartSpec = Spec | type[Any] | Callable[..., Any]
Answer = tuple[Tensor, ...]  # each has the batch as its first axis
Variation = Literal["none", "seeded", "state", "elsewhere", "unknown"]

GRID = (4, 6)
# the last one is larger than all others
ODD_GRIDS: tuple[Grid, ...] = ((1, 7), (7, 1), (1, 1), (2, 2), (5, 3), (7, 9))
HALF = Budget(keep=0.5)
ROUNDING = 1e-5  # relative: other batch sizes and graphs sum in another order


class PartMaker:
    """Makes parts from what a user may give for one.

    Args:
        kind: what is made.
        part: a name, a mapping, a configuration, a class, a function that makes one, or an
            instance, of which copies are made.
        facts: what the host is like.
    """

    def __init__(self, kind: Kind, part: PartSpec, facts: HostFacts) -> None:
        self.kind = kind
        self.facts = facts
        self.config: PartConfig | None = None
        self.build = self.read(part)

    def read(self, part: PartSpec) -> Callable[[], object]:
        """Return what makes a part."""
        if isinstance(part, nn.Module):
            return lambda: copy_part(part)
        if callable(part):
            called = part.__init__ if isinstance(part, type) else part  # type: ignore[misc]
            parameters = inspect.signature(called).parameters
            known = {name: getattr(self.facts, name) for name in FACTS if name in parameters}
            return lambda: part(**known)
        config = self.config = read_spec(self.kind, part)
        return lambda: build_part(self.kind, config, self.facts)[0]

    def make(self) -> nn.Module:
        """Return a fresh part as it comes, in eval mode.

        Raises:
            ConfigError: it is of another kind.
        """
        made = self.build()
        if not isinstance(made, INTERFACES[self.kind]):
            raise ConfigError(
                f"a {self.kind} is checked, and {made!r:.80} is none: give a subclass of "
                f"adaptok.{INTERFACES[self.kind].__name__}, its name, or a function that makes one"
            )
        return cast(nn.Module, made).eval()


class PartCase(ABC):
    """A part that is checked: how to make one, and what it answers.

    Args:
        part: see `PartMaker`.
        width: features of a token.

    Raises:
        UnknownNameError: there is no part of that name.
        ConfigError: the part is of another kind, or an option is wrong.
    """

    kind: ClassVar[Kind]

    def __init__(self, part: PartSpec, width: int = WIDTH) -> None:
        self.width = width
        self.facts = HostFacts(width, DEPTH, len(GRID))
        self.maker = PartMaker(self.kind, part, self.facts)
        self.config = self.maker.config
        made = self.make()  # what cannot be made is one error, and not one for each check
        name = self.config.name if self.config else type(made).__name__
        self.title = f"{self.kind} {name!r}"

    def make(self) -> nn.Module:
        """Return a fresh part as it comes, in eval mode."""
        return self.maker.make()

    def make_filled(self, seed: int = 0) -> nn.Module:
        """Return a part whose weights all matter."""
        return fill_weights(self.make(), seed)

    @abstractmethod
    def answer(self, part: nn.Module, tokens: Tokens, budget: Budget = HALF) -> Answer:
        """Return what a part makes of tokens, with the batch in front."""

    @abstractmethod
    def stage(self, part: nn.Module) -> Stage:
        """Return a stage with the part in it."""

    def answer_seeded(
        self, part: nn.Module, tokens: Tokens, budget: Budget = HALF, seed: int = 0
    ) -> Answer:
        """Return the answer after seeding; the generator of the caller stays as it is."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            return self.answer(part, tokens, budget)

    def find_variation(self) -> Variation:
        """Say why a part answers otherwise when the same tokens come once more.

        Returns:
            `"none"`: it does not; `"seeded"`: torch's default generator has another seed;
            `"state"`: it keeps something from call to call; `"elsewhere"`: it draws numbers that
            `torch.manual_seed` does not reach; `"unknown"`: one of both, and it cannot be copied.
        """
        tokens = make_tokens(width=self.width)
        part = self.make_filled()
        twin = copy_part(part)
        first, again, other = (self.answer_seeded(part, tokens, seed=seed) for seed in (1, 1, 2))
        if is_same(first, again) and is_same(first, other):
            return "none"
        if twin is part:
            return "seeded" if is_same(first, again) else "unknown"
        if is_same(first, again):
            fresh = self.answer_seeded(twin, tokens, seed=2)
            return "seeded" if is_same(fresh, other) else "state"
        fresh = self.answer_seeded(twin, tokens, seed=1)
        return "state" if is_same(fresh, first) else "elsewhere"

    def make_host(self, depth: int = DEPTH) -> nn.Module:
        """Return a small host of the right width."""
        return make_vit(depth, width=self.width)

    def attach(self, model: nn.Module, part: nn.Module, budget: Budget = HALF) -> nn.Module:
        """Wrap a host with the part in it, unproven."""
        stage = self.stage(part)
        return wrap(model, stack=[stage], budget=find_budget(stage, budget), verify=False)

    def has_weights(self, part: nn.Module) -> bool:
        """Say whether a part has parameters to train."""
        return any(parameter.requires_grad for parameter in part.parameters())


def copy_part(part: nn.Module) -> nn.Module:
    """Return a copy of an instance, or itself where it cannot be copied: a check says so."""
    try:
        return copy.deepcopy(part)
    except Exception:
        return part


def make_tokens(
    grid: Grid = GRID, b: int = 3, width: int = WIDTH, dtype: torch.dtype = torch.float32
) -> Tokens:
    """Return tokens of up to three samples that differ in scale, offset and roughness.

    Args:
        grid: lengths of the grid axes.
        b: number of samples.
        width: features of a token.
        dtype: of the features.

    Returns:
        The tokens. A sample is the same in batches of every size.
    """
    n = math.prod(grid)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, n, width, generator=generator)
    smooth = torch.randn(3, 1, width, generator=generator)
    share = torch.tensor([1.0, 0.2, 0.5])[:, None, None]
    scale = torch.tensor([1.0, 0.3, 4.0])[:, None, None]
    x = scale * (share * noise + (1 - share) * smooth)
    return Tokens(x[:b].to(dtype), grid)


def make_images(b: int = 3) -> Float[Tensor, "b 3 h w"]:
    """Return images that differ in scale, whose grid in `make_vit` is `GRID`."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, 8 * GRID[0], 8 * GRID[1], generator=generator)
    return (images * torch.tensor([1.0, 0.5, 2.0])[:, None, None, None])[:b]


def make_routing(tokens: Tokens) -> Routing:
    """Return a routing of tokens that depends on each sample alone; counts differ twofold."""
    x = tokens.x.detach().float()
    score = x[..., ::3].mean(-1)
    centred = score - score.mean(1, keepdim=True)
    scaled = centred / (centred.abs().amax(1, keepdim=True) + 1e-6)
    # the share of cells above the threshold differs from sample to sample
    lean = torch.tanh(4 * (x.abs().mean((1, 2)) - 0.6))
    return Routing((4 * scaled + 2 * lean[:, None]).sigmoid())


def find_budget(stage: Stage, budget: Budget) -> Budget | None:
    """Return a budget for a stage that takes one, and None for others."""
    return budget if any(isinstance(part, Budgeted) for part in stage.modules()) else None


def make_call(tokens: Tokens) -> BlockCall:
    """Return what the blocks of a host would get: tokens with others in front, behind and beside.

    Args:
        tokens: dense tokens of a grid.

    Returns:
        A call with two tokens in front of the grid, three behind it, and a stream of text.
    """
    assert tokens.grid is not None
    d, x = tokens.width, tokens.x
    waves = torch.arange(9 * d, dtype=x.dtype, device=x.device).view(1, 9, d).sin()
    others = waves + x.mean(1, keepdim=True)  # each sample's own, whatever its batch mates are
    x = torch.cat([others[:, :2], tokens.x, others[:, 2:5]], dim=1)
    return BlockCall(
        x,
        tokens.grid,
        start=2,
        streams={"text": others[:, 5:]},
        sample_inputs={"scale": others[:, 0]},
        shared={"causal": False},
        condition=others[:, 1],
        numbers=HostNumbers(tokens.grid, start=2),
        timestep=torch.linspace(900.0, 100.0, x.shape[0], device=x.device),
        has_class=True,
    )


def take_sample(tokens: Tokens, sample: int) -> Tokens:
    """Return one sample as a batch of its own."""
    return Tokens(tokens.x[sample : sample + 1], tokens.grid)


def with_budget(stage: nn.Module, budget: Budget) -> nn.Module:
    """Give a budget to every part of a stage that takes one."""
    for module in stage.modules():
        if isinstance(module, Budgeted):
            module.take_budget(budget, None)
    return stage


def is_same(found: Answer, expected: Answer) -> bool:
    """Say whether answers are equal number by number; NaN is equal to NaN."""
    return len(found) == len(expected) and all(map(is_same_tensor, found, expected))


def is_same_tensor(found: Tensor, expected: Tensor) -> bool:
    """Say whether two tensors are equal (see `is_same`)."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    both_nan = (found != found) & (expected != expected)
    return bool(((found == expected) | both_nan).all())


def measure_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value; infinite if not comparable."""
    if found.shape != expected.shape or not bool(found.isfinite().all()):
        return float("inf")
    if not found.numel():
        return 0.0
    difference = (found.double() - expected.double()).abs().max()
    return float(difference) / max(float(expected.double().abs().max()), 1e-12)


def require_close(found: Answer, expected: Answer, tolerance: float, problem: str) -> None:
    """Raise a `ConformanceError` unless answers agree.

    Args:
        found: what a part answered.
        expected: what is needed.
        tolerance: relative to the largest value; 0 means bit for bit.
        problem: what it means if they do not.

    Raises:
        ConformanceError: they do not agree.
    """
    require(len(found) == len(expected), problem)
    for one, other in zip(found, expected, strict=True):
        shapes = tuple(one.shape), tuple(other.shape)
        require(shapes[0] == shapes[1], f"{problem}: the shapes {shapes[0]} and {shapes[1]}")
        require(bool(one.isfinite().all()), f"{problem}: the answer holds what is no finite number")
    errors = [measure_error(*pair) for pair in zip(found, expected, strict=True)]
    if not max(errors) <= tolerance:
        raise ConformanceError(
            f"{problem}: they differ by {max(errors):.2g} (relative), {tolerance:g} is allowed"
        )


def require_finite(answer: Answer, problem: str) -> None:
    """Raise a `ConformanceError` unless all numbers are finite."""
    require(all(bool(x.isfinite().all()) for x in answer), problem)


def require_restored(
    found: Tensor, before: Tokens, plan: ChunkPlan, restores: str, said: str
) -> None:
    """Raise a `ConformanceError` unless cells come back as they were.

    Args:
        found: features of all cells behind the dechunker, `(b n d)`.
        before: the tokens that came.
        plan: which cells were kept.
        restores: what the dechunker promises, `"all"` or `"kept"`.
        said: how tokens were chosen, in words.

    Raises:
        ConformanceError: a cell that should come back has other features.
    """
    shape, needed = tuple(found.shape), tuple(before.x.shape)
    require(shape == needed, f"{said}: cells of the shape {needed} went in, {shape} came back")
    size = max(float(before.x.abs().max()), 1e-12)
    error = (found.float() - before.x.float()).abs().amax(-1) / size
    wrong = ~(error <= ROUNDING)  # NaN too
    kept = plan.keep_mask
    promised = kept if restores == "kept" else torch.ones_like(kept)
    if not bool((wrong & promised).any()):
        return
    counts = [f"{int((wrong & mask).sum())} of {int(mask.sum())}" for mask in (kept, ~kept)]
    advice = (
        'what cannot come back is declared: restores = "kept" on the dechunker, if dropped cells '
        'cannot, "nothing", if none can'
    )
    if restores == "kept":
        advice = 'a dechunker that cannot do even that says restores = "nothing"'
    most = float(error[promised].max())
    raise ConformanceError(
        f"{said}: the blocks changed nothing, and {counts[0]} kept and {counts[1]} dropped cells "
        f"came back with other features than they had, by up to {most:.2g} of the largest one "
        f"({ROUNDING:g} is allowed). With restores = {restores!r}, "
        f"{'every kept cell' if restores == 'kept' else 'every cell'} comes back: add only what "
        f"the blocks changed to the features from before; {advice}"
    )
