"""Checks of chunkers, and of their plans."""

from collections.abc import Collection, Iterator, Mapping
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from adaptok.budgets import Budget, apply_budget
from adaptok.chunk_stage import ChunkStage
from adaptok.chunking import Chunker, ChunkPlan, Dechunker, spread_tokens
from adaptok.errors import BudgetError
from adaptok.registry import Kind
from adaptok.routing import Router
from adaptok.stages import Stage
from adaptok.testing.cases import (
    GRID,
    HALF,
    ODD_GRIDS,
    ROUNDING,
    Answer,
    PartCase,
    PartMaker,
    PartSpec,
    make_images,
    make_routing,
    make_tokens,
    require_close,
    require_restored,
    take_sample,
)
from adaptok.testing.host_checks import HOST_CHECKS, check_prefix
from adaptok.testing.models import DEPTH, WIDTH, fill_weights
from adaptok.testing.module_checks import MODULE_CHECKS
from adaptok.testing.partners import OwnFeatures
from adaptok.testing.report import NotRun, Report, require, run_checks
from adaptok.testing.router_checks import require_gradients
from adaptok.tokens import Tokens
from adaptok.wrapping import wrap

EXACT = (Budget(keep=0.5), Budget(keep=0.13), Budget(tokens=5), Budget(tokens=1), Budget(keep=1.0))
UNEVEN = (Budget(keep=[0.2, 1.0, 0.55]), Budget(tokens=[24, 1, 7]))
BY_IMAGE = (Budget(), Budget(drop=0.4), Budget(drop=[0.0, 0.9, 0.5]))
WITHOUT_WEIGHTS = "predictability"


class ChunkerCase(PartCase):
    """A chunker that is checked (see `PartCase`).

    Args:
        part: the chunker.
        width: features of a token.
        router: the router beside it; None takes its own, else one without weights.
        dechunker: the dechunker beside it; None takes its own, else one without weights.
    """

    kind: ClassVar[Kind] = "chunker"

    def __init__(
        self,
        part: PartSpec,
        width: int = WIDTH,
        router: PartSpec | None = None,
        dechunker: PartSpec | None = None,
    ) -> None:
        super().__init__(part, width)
        made = self.make()
        self.router = router or getattr(made, "router", None) or WITHOUT_WEIGHTS
        self.dechunker = dechunker or getattr(made, "dechunker", None) or OwnFeatures
        self.make_router()  # what cannot be made is one error, and not one for each check
        self.make_dechunker()

    def answer(self, part: nn.Module, tokens: Tokens, budget: Budget = HALF) -> Answer:
        """Return for each cell its token's features and index, and whether it is kept."""
        chunks, plan = part(tokens, make_routing(tokens), budget)
        spread = spread_tokens(flatten_rows(chunks), plan)
        return (spread, plan.keep_mask, plan.provenance.token)

    def stage(self, part: nn.Module) -> Stage:
        """Return a stage with the parts that belong to the chunker."""
        assert isinstance(part, Chunker)
        return ChunkStage(self.make_router(), part, self.make_dechunker(), "chunker")

    def make_router(self) -> Router:
        """Return the router beside it."""
        made = PartMaker("router", self.router, self.facts).make()
        assert isinstance(made, Router)
        return made

    def make_dechunker(self) -> Dechunker:
        """Return the dechunker beside it."""
        made = PartMaker("dechunker", self.dechunker, self.facts).make()
        assert isinstance(made, Dechunker)
        return made


def flatten_rows(chunks: Tokens) -> Tensor:
    """Return the features of all tokens of a batch in one run."""
    return chunks.x if chunks.is_packed else rearrange(chunks.x, "b m d -> (b m) d")


def make_plans(
    case: ChunkerCase, fresh: bool = False
) -> Iterator[tuple[Tokens, Budget, Tokens, ChunkPlan]]:
    """Chunk tokens with many budgets; one that a chunker refuses is left out."""
    part = case.make() if fresh else case.make_filled()
    tokens = make_tokens(width=case.width)
    for budget in (*EXACT, *UNEVEN, *BY_IMAGE):
        try:
            with torch.no_grad():
                answer: object = part(tokens, make_routing(tokens), budget)
        except BudgetError:
            if budget in EXACT:
                raise
            continue  # a layout of one static count refuses it, which is allowed
        match answer:
            case (Tokens() as chunks, ChunkPlan() as plan):
                yield tokens, budget, chunks, plan
            case _:
                require(False, f"(Tokens, ChunkPlan) is needed, got a {type(answer).__name__}")


def check_answer(case: ChunkerCase) -> None:
    """It answers with tokens and a plan that belong together."""
    for tokens, budget, chunks, plan in make_plans(case):
        said = f"with {budget.describe()}"
        rows, cells = tuple(chunks.x.shape[:-1]), tuple(plan.cells.shape)
        require(rows == cells, f"{said} there are tokens {rows} and cells of tokens {cells}")
        require(chunks.width == case.width, f"{said} a token has {chunks.width} features")
        require(plan.grid == tokens.grid, f"{said} the plan's grid is {plan.grid}")
        require(bool(chunks.x.isfinite().all()), f"{said} a token is not finite")
        require(
            plan.routing.keep_mask is not None,
            f"{said} the plan's routing has no keep_mask: apply_budget(routing, budget) makes it",
        )
        counts = plan.computed.tolist()
        if chunks.is_packed:
            require(
                list(plan.lengths or ()) == counts and chunks.counts.tolist() == counts,
                f"{said} the plan computes {counts} cells, and its lengths are {plan.lengths}",
            )
        else:
            require(
                set(counts) == {chunks.x.shape[1]},
                f"{said} the plan computes {counts} cells, and {chunks.x.shape[1]} tokens came",
            )


def check_provenance(case: ChunkerCase) -> None:
    """Each cell names a token of its sample, each token stands for a cell, kept ones for theirs."""
    for tokens, budget, chunks, plan in make_plans(case):
        said = f"with {budget.describe()}, sample"
        counts = chunks.counts.tolist()
        runs = torch.split(plan.cells, counts) if chunks.is_packed else plan.cells.unbind()
        require(plan.provenance.token.shape == tokens.x.shape[:2], "provenance is not of all cells")
        for sample, cells in enumerate(runs):
            token = plan.provenance.token[sample]
            low, high = int(token.min()), int(token.max())
            require(
                low >= -1 and high < counts[sample],
                f"{said} {sample}: tokens {low} to {high} stand for cells, there are "
                f"{counts[sample]}",
            )
            places = torch.arange(counts[sample])
            missing = set(places.tolist()) - set(token.tolist())
            require(not missing, f"{said} {sample}: tokens {sorted(missing)} stand for no cell")
            require(
                torch.equal(token[cells], places),
                f"{said} {sample}: a kept cell is stood for by another token than its own",
            )
            require(
                bool(plan.keep_mask[sample][cells].all()),
                f"{said} {sample}: keep_mask and cells of the plan name different cells",
            )


def check_budgets(case: ChunkerCase) -> None:
    """The plan keeps what the budget asks for, exactly, also sample by sample."""
    bucketed = getattr(case.make(), "layout", None) == "bucketed"
    for tokens, budget, chunks, plan in make_plans(case):
        needed = apply_budget(make_routing(tokens), budget).kept.tolist()
        asked, computed = plan.requested.tolist(), chunks.counts.tolist()
        said = budget.describe()
        require(asked == needed, f"{said} asks for {needed} tokens, the plan for {asked}")
        enough = all(c >= n for c, n in zip(computed, needed, strict=True))
        require(
            computed == needed or (bucketed and enough),
            f"{said} asks for {needed} tokens, and {computed} came",
        )


def check_extremes(case: ChunkerCase) -> None:
    """With every cell kept a fresh one gives all tokens as they are; tokens=1 gives one."""
    part = case.make()
    allowed = ROUNDING if list(part.parameters()) else 0.0
    for grid in (*ODD_GRIDS, GRID):
        tokens = make_tokens(grid, width=case.width)
        with torch.no_grad():
            full, _ = part(tokens, make_routing(tokens), Budget(keep=1.0))
            one, _ = part(tokens, make_routing(tokens), Budget(tokens=1))
        require_close(
            (flatten_rows(full),),
            (rearrange(tokens.x, "b n d -> (b n) d"),),
            allowed,
            f"on a grid {grid} with every cell kept, the tokens are not those that came",
        )
        counts = one.counts.tolist()
        require(counts == [1, 1, 1], f"on a grid {grid} tokens=1 gave {counts} tokens")


def check_uneven_batch(case: ChunkerCase) -> None:
    """With budgets that keep other counts in each sample, a sample is the same alone."""
    part = case.make_filled()
    tokens = make_tokens(width=case.width)
    ran = 0
    for budget in (*UNEVEN, *BY_IMAGE):
        try:
            together = case.answer_seeded(part, tokens, budget)
        except BudgetError:
            continue
        ran += 1
        for sample in range(tokens.num_samples):
            alone = case.answer_seeded(part, *pick_sample(tokens, budget, sample))
            beside = tuple(x[sample : sample + 1] for x in together)
            require_close(
                beside, alone, ROUNDING, f"{budget.describe()}: sample {sample} differs alone"
            )
    if not ran:
        raise NotRun("it takes budgets of one exact count only")


def pick_sample(tokens: Tokens, budget: Budget, sample: int) -> tuple[Tokens, Budget]:
    """Return one sample and its budget."""
    amounts = [budget.keep, budget.tokens, budget.drop]
    keep, count, drop = (a[sample] if isinstance(a, list) else a for a in amounts)
    return take_sample(tokens, sample), Budget(keep, count, drop)


def check_round_trip(case: ChunkerCase) -> None:
    """A fresh one, and blocks that change nothing, give back what came, at least in kept cells."""
    back = case.make_dechunker()
    restores = getattr(back, "restores", "all")
    if restores == "nothing":
        raise NotRun('its dechunker says restores = "nothing"')
    for tokens, budget, chunks, plan in make_plans(case, fresh=True):
        with torch.no_grad():
            found = back(chunks, plan, tokens).x
        said = f"with {budget.describe()} and the dechunker {type(back).__name__}"
        require_restored(found, tokens, plan, restores, said)


def check_gradient(case: ChunkerCase) -> None:
    """In training, a gradient reaches tokens, a router with weights, and the chunker's weights."""
    part = case.make_filled()
    require_token_gradient(case, part)
    made = [PartMaker("router", "dc", case.facts).make(), case.make_dechunker()]
    if isinstance(made[1], OwnFeatures):  # it has no use for probabilities
        made[1] = PartMaker("dechunker", "dc", case.facts).make()
    router, dechunker = (fill_weights(module) for module in made)
    assert isinstance(part, Chunker)
    assert isinstance(router, Router)
    assert isinstance(dechunker, Dechunker)
    model = case.make_host().train()
    # a block behind the span, so that a host that reads its class token only sees all cells
    stage = ChunkStage(router, part, dechunker, "chunker")
    wrap(model, stack=[stage], budget=HALF, span=(0, DEPTH - 1), verify=False)
    (model(make_images()) ** 2).sum().backward()
    require_gradients(router)
    if case.has_weights(part):
        require_gradients(part)


def require_token_gradient(case: ChunkerCase, part: nn.Module) -> None:
    """Require that a gradient goes through a chunker to the tokens that it is given."""
    tokens = make_tokens(width=case.width)
    x = tokens.x.detach().clone().requires_grad_()
    given = tokens.with_x(1.0 * x)
    chunks, _ = part(given, make_routing(given), HALF)
    words = "no gradient reaches the tokens, so that nothing in front of the blocks can be trained"
    require(chunks.x.requires_grad, words)
    (chunks.x**2).sum().backward()
    require(x.grad is not None and bool(x.grad.any()), words)


CHUNKER_CHECKS = (
    check_answer,
    check_provenance,
    check_budgets,
    check_extremes,
    check_uneven_batch,
    check_round_trip,
    check_gradient,
    check_prefix,
    *MODULE_CHECKS,
    *HOST_CHECKS,
)


def check_chunker(
    part: PartSpec,
    *,
    router: PartSpec | None = None,
    dechunker: PartSpec | None = None,
    width: int = WIDTH,
    skip: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
) -> Report:
    """Check whether a chunker does what `adaptok.wrap` and its user rely on.

    Args:
        part: a registered name, a mapping with options, a class, a function that makes a chunker,
            or an instance, of which copies are checked. A parameter called `width` is filled.
        router: the router beside it; None takes its attribute `router`, else one without weights.
        dechunker: the dechunker beside it; None takes its attribute `dechunker`, else one without
            weights, which leaves dropped cells as they are.
        width: features of a token, where an instance has weights of another width.
        skip: names of checks that are not run, and why.
        only: names of the only checks to run.

    Returns:
        The report; print it, or `report.raise_failed()`.

    Raises:
        ConfigError: the part is no chunker, or there is no check of a name.
        UnknownNameError: there is no chunker of that name.

    Example:
        >>> check_chunker("dc", only=["budgets", "provenance", "round_trip"]).failed
        ()
    """
    case = ChunkerCase(part, width, router, dechunker)
    return run_checks(case.title, CHUNKER_CHECKS, case, skip, only)
