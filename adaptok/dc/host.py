"""Dynamic chunking inside a host's own token grid: starts as the identity, and can be trained."""

import math
from dataclasses import replace

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from adaptok.budgets import Budget, apply_budget
from adaptok.chunking import ChunkPlan, Dechunker, Layout, spread_tokens
from adaptok.dc.chunker import DCChunker, chunk_fixed, chunk_ragged
from adaptok.dc.dechunker import natural_confidence, smooth_and_spread
from adaptok.dc.router import SCORE_GROUPS
from adaptok.discovery import find_part
from adaptok.errors import ConfigError, ShapeError
from adaptok.float32 import Float32Module, without_autocast
from adaptok.losses import ratio_loss
from adaptok.routing import Context, Router, Routing
from adaptok.tokens import Tokens

ROUTER_BIAS = 4.0  # sigmoid(4) = 0.98: every cell is kept at the start
BUCKETS = 16
PRIOR_RANGE = 2.0  # the logits of a fresh router lie in 4 +- 2


class HostRouter(Float32Module, Router):
    """Ranks cells by an untrained router, plus what it learns; a fresh one keeps every cell.

    The logit is `bias + scale (2 s - 1) + learned`, where `s` is the keep probability of the
    untrained router and the learned part, DC-DiT's router, starts at zero. Runs in float32 always.

    Args:
        width: features of a token.
        prior: name of an untrained router; None leaves only the learned part.
        bias: bias of the logit at the start.

    Raises:
        ShapeError: (when called) the tokens do not lie on a grid.

    Example:
        >>> routing = HostRouter(64)(Tokens(torch.randn(2, 12, 64), grid=(3, 4)), Context())
        >>> bool(routing.natural_mask.all())
        True

    Paper: DC-DiT, arXiv 2603.06351.
    """

    starts_full = True

    def __init__(
        self, width: int, prior: str | None = "covering", bias: float = ROUTER_BIAS
    ) -> None:
        super().__init__()
        if not math.isfinite(bias):
            raise ConfigError(f"bias is a finite number, got {bias}")
        inner = -(-width // (4 * SCORE_GROUPS)) * SCORE_GROUPS
        self.project = nn.Conv2d(width, inner, 1)
        self.predict = nn.Conv2d(inner, inner, 3, padding=1)
        self.score = nn.Sequential(
            nn.Conv2d(inner, inner, 3, padding=1),
            nn.GroupNorm(SCORE_GROUPS, inner),
            nn.SiLU(),
        )
        self.logit = nn.Conv2d(inner, 1, 1)
        nn.init.zeros_(self.logit.weight)
        nn.init.constant_(self.logit.bias, bias)  # type: ignore[arg-type]
        self.prior = prior
        self.bias = bias
        self.untrained = None if prior is None else find_part("router", prior)()

    def extra_repr(self) -> str:
        """Show the prior."""
        return f"prior={self.prior!r}"

    def forward(self, tokens: Tokens, context: Context) -> Routing:
        """Judge the cells of a grid (see `Router.forward`); frames of a video one by one."""
        if tokens.grid is None or len(tokens.grid) < 2:
            raise ShapeError(f"this router needs a grid (h, w) or (f, h, w), got {tokens.grid}")
        if tokens.cells is not None or tokens.valid is not None or tokens.is_packed:
            raise ShapeError("this router needs one token per grid cell, without padding")
        if tokens.width != self.project.in_channels:
            raise ShapeError(
                f"this router was made for {self.project.in_channels} features of a token, and the "
                f'host has {tokens.width}: give width={tokens.width}, or the name "dc"'
            )
        self.check_float32()
        with without_autocast(tokens.x):
            logit = self.learned_logit(tokens.x.float(), tokens.grid)
            if self.untrained is not None:
                prob = self.untrained(tokens, context).keep_prob.detach().float()
                logit = logit + PRIOR_RANGE * (2.0 * prob - 1.0)
            return Routing(logit.sigmoid())

    def learned_logit(
        self, x: Float[Tensor, "b n d"], grid: tuple[int, ...]
    ) -> Float[Tensor, "b n"]:
        """Return the trainable part of the logit of each cell."""
        h, w = grid[-2:]
        frames = rearrange(x, "b (f h w) d -> (b f) d h w", h=h, w=w)
        z = self.project(frames)
        logit: Tensor = self.logit(self.score(z - self.predict(z)))
        return rearrange(logit, "(b f) 1 h w -> b (f h w)", b=x.shape[0])


class HostChunker(DCChunker):
    """Keeps the cells that routing and budget choose, in layouts that suit unmodified blocks.

    Args:
        layout: `"bucketed"` rounds counts that depend on the image up to a bucket, fills it with
            the sample's own next most probable cells, and runs equal counts together; exact
            budgets stay exact. `"fixed"` takes only budgets of one exact count for all samples.
            `"packed"` runs exact counts in one run of tokens, where the host's blocks have a
            packed form.
        buckets: number of counts that the bucketed layout allows.
        target: compression that the ratio loss aims at.

    Raises:
        ConfigError: the layout is unknown, there are no buckets, or the target is not above 1.

    Example:
        >>> tokens = Tokens(torch.randn(2, 16, 8), grid=(4, 4))
        >>> kept, plan = HostChunker()(tokens, Routing(torch.rand(2, 16)), Budget(keep=0.25))
        >>> kept.x.shape
        torch.Size([2, 4, 8])

    Paper: DC-DiT, arXiv 2603.06351.
    """

    # What `adaptok.wrap(model, chunker="dc")` puts beside it unless told otherwise.
    router = "dc"
    dechunker = "dc"

    def __init__(
        self, layout: Layout = "bucketed", buckets: int = BUCKETS, target: float = 2.0
    ) -> None:
        super().__init__(layout, buckets)
        if layout != "bucketed" and buckets != BUCKETS:
            raise ConfigError(
                f'buckets={buckets} is for layout "bucketed", and {layout!r} has none'
            )
        if not target > 1.0:
            raise ConfigError(f"target is a compression above 1, got {target:g}")
        self.target = target

    def forward(self, tokens: Tokens, routing: Routing, budget: Budget) -> tuple[Tokens, ChunkPlan]:
        """Keep the chosen cells (see `Chunker.forward`)."""
        kept, plan = self.choose(tokens, routing, budget)
        if plan.routing.keep_prob.requires_grad:
            # A class token sees the kept cells only here: without it, no gradient would reach the
            # router of a host that reads nothing else. Values stay what they are.
            prob = plan.routing.keep_prob.flatten().index_select(0, plan.rows)
            scale = (prob - prob.detach()).view(*kept.x.shape[:-1], 1).to(kept.x.dtype)
            kept = kept.with_x(kept.x + kept.x.detach() * scale)
        return kept, plan

    def choose(self, tokens: Tokens, routing: Routing, budget: Budget) -> tuple[Tokens, ChunkPlan]:
        """Return the kept tokens as they are, and the plan."""
        if self.layout != "bucketed" or not budget.is_exact:
            return super().forward(tokens, routing, budget)
        self.check_tokens(tokens, routing)
        if budget.is_uniform:  # counts are known: no rounding, and nothing waits for the device
            return chunk_fixed(tokens, routing, budget)
        kept, plan = chunk_ragged(tokens, apply_budget(routing, budget))
        return kept, replace(plan, layout="bucketed")

    def waits_for_device(self, budget: Budget) -> bool:
        """Say whether counts depend on the image (see `Chunker.waits_for_device`)."""
        return self.layout == "packed" or (self.layout == "bucketed" and not budget.is_uniform)

    def losses(self, routing: Routing) -> dict[str, Tensor]:
        """Return the ratio loss, unless the router only ranks (see `Chunker.losses`)."""
        if routing.natural_mask is None:
            return {}
        return {"ratio": ratio_loss(routing, self.target)}


class HostDechunker(Float32Module, Dechunker):
    """Kept cells take what came of their token, dropped ones the update of their nearest one.

    With `x` the features before and `h` those after the blocks, a kept cell takes `h`, a dropped
    one `x + (h_rep - x_rep)` of the token that stands for it, and the smoothing of DC-DiT enters
    as `base + gate (smoothed - base)` with a gate of zero at the start. Runs in float32 always.

    Args:
        width: features of a token.
        sigma: width of the smoothing in cells.

    Raises:
        ConfigError: sigma is not positive.

    Example:
        >>> tokens = Tokens(torch.randn(2, 16, 8), grid=(4, 4))
        >>> kept, plan = HostChunker()(tokens, Routing(torch.rand(2, 16)), Budget(keep=0.25))
        >>> same = HostDechunker(8)(kept, plan, tokens)  # blocks that change nothing
        >>> torch.equal(same.x, tokens.x)
        True

    Paper: DC-DiT, arXiv 2603.06351.
    """

    def __init__(self, width: int, sigma: float = 1.0) -> None:
        super().__init__()
        if not sigma > 0:
            raise ConfigError(f"sigma is a positive number of cells, got {sigma:g}")
        self.sigma = sigma
        self.gate = nn.Parameter(torch.zeros(width))

    def extra_repr(self) -> str:
        """Show sigma."""
        return f"sigma={self.sigma:g}"

    def forward(self, chunks: Tokens, plan: ChunkPlan, before: Tokens) -> Tokens:
        """Give every cell its features again (see `Dechunker.forward`)."""
        self.check_float32()
        with without_autocast(chunks.x):
            x = before.x.float()
            base, update = spread_update(chunks, plan, x)
            prob = natural_confidence(plan.routing)
            if prob.requires_grad:  # zeros with the gradient of the probability (straight through)
                base = base + update.detach() * (prob - prob.detach())[..., None]
            smoothed = smooth_and_spread(chunks, plan, self.sigma)
            return before.with_x(base + self.gate * (smoothed - base))


def spread_update(
    chunks: Tokens, plan: ChunkPlan, x: Float[Tensor, "b n d"]
) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"]]:
    """Give every cell the update of the token that stands for it.

    Args:
        chunks: the short tokens after the blocks.
        plan: what the chunker returned.
        x: features of all cells before the blocks.

    Returns:
        The features after it, kept cells exactly as the blocks gave them, and the update itself;
        zero where no token stands for a cell.
    """
    h = chunks.x.float()
    if not chunks.is_packed:
        h = rearrange(h, "b m d -> (b m) d")
    rows, flat = plan.rows, rearrange(x, "b n d -> (b n) d")
    update = spread_tokens(h - flat.index_select(0, rows), plan)
    moved = rearrange(x + update, "b n d -> (b n) d").index_copy(0, rows, h)
    return moved.view_as(x), update
