"""EViT: tokens that the class token does not look at are dropped, or fused into one."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from adaptok import BlockCall, BlockRange, Moment, Reduction, Site
from adaptok.calibrated import read_setting
from adaptok.errors import ConfigError, StackError
from adaptok.reductions import Restore
from adaptok_prune.placed_stage import PlacedStage
from adaptok_prune.ranking import choose_tokens

ROUNDING = 1e-9  # 0.55 * 100 is a little more than 55, and 55 tokens are meant


class EViT(PlacedStage):
    """Keeps the tokens that the class token attends to most, at some blocks.

    Between attention and MLP of each of the blocks a token's score is its share of the class
    token's attention, averaged over the heads. Of m tokens the `ceil(keep_rate * m)` best ones
    stay; with `fuse` one more takes the place of all others, their sum weighted by their scores.
    Under a budget as many are left as it says, the fused one among them, and each site takes the
    same share. Where all or all but one of the tokens would stay beside the fused one, nothing
    happens.

    Args:
        blocks: indices of the blocks; None takes a quarter, a half and three quarters of the
            depth: `(3, 6, 9)` of 12.
        keep_rate: share of its tokens that each site keeps without a budget, in (0, 1]; may be
            set at any time, see `anneal_keep_rate`.
        fuse: whether the others are fused into one token; without, they are dropped, and their
            cells keep their last features.
        restore: see `adaptok.ReduceStage`.
        fill: see `adaptok.ReduceStage`.

    Raises:
        ConfigError: an option is out of range.
        StackError: (when called) there is no class token, the blocks have no split form, or
            there is no such block.

    Example:
        >>> import adaptok
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), stack=["evit"])
        >>> with adaptok.trace(vit) as seen:
        ...     out = vit(torch.randn(2, 3, 32, 48))
        >>> [event.counts for event in seen.steps[0].plans[0].events]
        [(18, 18), (14, 14), (11, 11)]

    Paper: Liang et al., Not All Patches are What You Need: Expediting Vision Transformers via Token
    Reorganizations, 2022.
    """

    reads_class_attention: ClassVar[bool] = True

    def __init__(
        self,
        blocks: Sequence[int] | None = None,
        keep_rate: float = 0.7,
        fuse: bool = True,
        restore: Restore = "copy",
        fill: float | None = None,
    ) -> None:
        super().__init__("evit", blocks, restore, fill)
        self.keep_rate = keep_rate
        self.fuse = fuse
        self.drops = not fuse  # a fused token stands for what was dropped

    @property
    def keep_rate(self) -> float:
        """Share of its tokens that each site keeps without a budget."""
        return self.rate

    @keep_rate.setter
    def keep_rate(self, rate: float) -> None:
        if not 0.0 < rate <= 1.0:
            raise ConfigError(f"keep_rate is a share in (0, 1], got {rate:g}")
        self.rate = rate

    def read_settings(self) -> dict[str, Any]:
        """Return the rate, which may change while a model learns (see `adaptok.save`)."""
        return {"keep_rate": self.keep_rate}

    def apply_settings(self, settings: Mapping[str, Any]) -> None:
        """Keep another share."""
        (self.keep_rate,) = read_setting(self.name, settings, ("keep_rate",))

    def describe(self) -> dict[str, str]:
        """Return the rate, what becomes of the others, and the budget in words."""
        own = {"keep_rate": f"{self.keep_rate:g}", "fuse": str(self.fuse)}
        return {**super().describe(), **own}

    def extra_repr(self) -> str:
        """Show the options."""
        return f"blocks={self.blocks}, keep_rate={self.keep_rate:g}, fuse={self.fuse}"

    def find_sites(self, inner: BlockRange) -> Sequence[Site]:
        """Return the sites between attention and MLP (see `ReduceStage.find_sites`)."""
        chosen = self.list_blocks(inner)
        if not inner.can_split:
            raise StackError(
                f"evit acts between attention and MLP, and here it cannot: {inner.whole}. "
                'stack=["dynamicvit"] acts in front of blocks and takes any'
            )
        return tuple(Site(block, "between") for block in chosen)

    def count_tokens(self, call: BlockCall, steps: int) -> tuple[tuple[int, ...], ...] | None:
        """Return the counts of a call that has a class token (see `ReduceStage.count_tokens`)."""
        if not call.has_class:
            raise StackError(
                "evit ranks tokens by the attention of the class token, and this model has none: "
                'stack=["tome"] merges tokens by their keys, and stack=["dynamicvit"] learns a '
                "score of its own"
            )
        return super().count_tokens(call, steps)

    def count_naturally(self, n: int, steps: int) -> int:
        """Return what `keep_rate` leaves, fused tokens among them."""
        for _ in range(steps):
            n = self.leave(n)
        return n

    def leave(self, m: int) -> int:
        """Return how many of m tokens a site leaves without a budget, the fused one among them."""
        return min(m, math.ceil(self.keep_rate * m - ROUNDING) + self.fuse)

    def reduce(self, moment: Moment) -> Reduction:
        """Keep the tokens that the class token attends to (see `ReduceStage.reduce`)."""
        assert moment.class_attention is not None
        score = moment.class_attention.mean(1)
        counts = moment.counts
        if counts is None:
            choice = choose_tokens(score, self.leave(score.shape[1]), fuse=self.fuse)
        elif moment.count is not None:
            choice = choose_tokens(score, moment.count, fuse=self.fuse)
        else:
            choice = choose_tokens(score, counts, fuse=self.fuse)
        x = None
        if self.fuse:
            rows = choice.places[..., None].expand(-1, -1, moment.x.shape[-1])
            sums = fuse_tokens(moment.x, score, ~choice.keep)
            x = torch.where(choice.fused[..., None], sums, moment.x.gather(1, rows))
        return Reduction(choice.places, choice.owner, x, choice.lengths)


def fuse_tokens(
    x: Float[Tensor, "b m d"], score: Float[Tensor, "b m"], rest: Bool[Tensor, "b m"]
) -> Float[Tensor, "b 1 d"]:
    """Return the sum of some tokens, each weighted by its score.

    Args:
        x: features of all tokens.
        score: attention of the class token; not made to sum to one, as in the paper.
        rest: the tokens to sum.

    Example:
        >>> x, score = torch.tensor([[[1.0], [2.0], [4.0]]]), torch.tensor([[0.5, 0.25, 0.125]])
        >>> fuse_tokens(x, score, torch.tensor([[False, True, True]]))
        tensor([[[1.]]])
    """
    weight = torch.where(rest, score, 0.0).to(x.dtype)
    return (weight[:, None] @ x).to(x.dtype)
