"""DynamicViT: a small predictor in front of some blocks learns which tokens may go."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from adaptok import BlockCall, BlockRange, Moment, Reduction, Site
from adaptok.errors import ConfigError, StackError
from adaptok.reductions import Restore
from adaptok_prune.placed_stage import PlacedStage
from adaptok_prune.places import QUARTERS
from adaptok_prune.predictor import KeepPredictor, draw_kept
from adaptok_prune.ranking import choose_tokens

EPSILON = 1e-6  # what is left of the attention to a token that is gone, in training
ROUNDING = 1e-9
WEIGHT = 2.0  # of the ratio loss
MASK = "mask"


class DynamicViT(PlacedStage):
    """Drops the tokens that a predictor in front of some blocks gives the lowest score.

    In eval mode the tokens with the highest scores go on: `base_rate` of all cells behind the
    first site, its square behind the second and so on, or what a budget says. Cells whose token
    went keep their last features.

    In training nothing is removed and no budget counts: at each site a bit is drawn for each
    token (Gumbel-softmax), times that of the site before; tokens that are gone are hidden from
    the attention of all blocks behind, through which a gradient reaches the predictors. The loss
    `"ratio"` of `adaptok.collect_losses` pulls the kept share to `base_rate`. Random numbers come
    from torch's default generator, as those of dropout.

    Args:
        width: features of a token; filled by the host.
        blocks: indices of the blocks; None takes a quarter, a half and three quarters of the
            depth: `(3, 6, 9)` of 12.
        base_rate: share of its tokens that each site keeps without a budget, in (0, 1].
        restore: see `adaptok.ReduceStage`.
        fill: see `adaptok.ReduceStage`.

    Raises:
        ConfigError: an option is out of range.
        StackError: (when called) there is no such block; or in training, the blocks have no
            split form.

    Example:
        >>> import adaptok
        >>> from adaptok.testing import make_vit
        >>> vit = adaptok.wrap(make_vit(), stack=["dynamicvit"])
        >>> with adaptok.trace(vit) as seen:
        ...     out = vit(torch.randn(2, 3, 32, 48))
        >>> [event.counts for event in seen.steps[0].plans[0].events]
        [(16, 16), (11, 11), (8, 8)]

    Paper: Rao et al., DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification,
    2021.
    """

    def __init__(
        self,
        width: int,
        blocks: Sequence[int] | None = None,
        base_rate: float = 0.7,
        restore: Restore = "copy",
        fill: float | None = None,
    ) -> None:
        super().__init__("dynamicvit", blocks, restore, fill)
        if not 0.0 < base_rate <= 1.0:
            raise ConfigError(f"base_rate is a share in (0, 1], got {base_rate:g}")
        self.base_rate = base_rate
        count = len(QUARTERS if self.blocks is None else self.blocks)
        self.predictors = nn.ModuleList(KeepPredictor(width) for _ in range(count))
        self.masks: list[Tensor] | None = None  # the caller's, inside `collect_masks`

    def describe(self) -> dict[str, str]:
        """Return the rate and the budget in words."""
        return {**super().describe(), "base_rate": f"{self.base_rate:g}"}

    def extra_repr(self) -> str:
        """Show the options."""
        return f"blocks={self.blocks}, base_rate={self.base_rate:g}"

    def find_sites(self, inner: BlockRange) -> Sequence[Site]:
        """Return the sites in front of blocks (see `ReduceStage.find_sites`)."""
        chosen = self.list_blocks(inner)
        if self.training and not inner.can_split:
            raise StackError(
                "training dynamicvit hides tokens from attention, which needs the blocks in two "
                f"halves: {inner.whole}. Inference works here (model.eval()); or train on a model "
                "whose blocks have a split form"
            )
        return tuple(Site(block) for block in chosen)

    def count_naturally(self, n: int, steps: int) -> int:
        """Return what `base_rate` leaves behind some sites."""
        return max(1, int(n * self.base_rate**steps + ROUNDING))

    def count_tokens(self, call: BlockCall, steps: int) -> tuple[tuple[int, ...], ...] | None:
        """Return the counts of a call (see `ReduceStage.count_tokens`); none in training."""
        if self.training:
            return None
        counts = super().count_tokens(call, steps)
        if counts is None and steps:
            natural = (self.count_naturally(call.num_cells, step + 1) for step in range(steps))
            counts = (tuple(natural),) * call.x.shape[0]
        return counts

    def biases_keys(self, sites: Sequence[Site], block: int) -> bool:
        """Say whether tokens are hidden from a block: in training, behind the first site."""
        return self.training and any(site.block <= block for site in sites)

    def bias_keys(self, moment: Moment) -> Float[Tensor, "b m"] | None:
        """Return the logarithm of what is left of each token (see `ReduceStage.bias_keys`)."""
        mask = moment.marks.get(MASK)
        # exactly zero where a token is left
        return None if mask is None else (mask + EPSILON * (1.0 - mask)).log()

    def reduce(self, moment: Moment) -> Reduction:
        """Let tokens go, or draw which ones would, in training (see `ReduceStage.reduce`)."""
        known = self.blocks or self.met
        number = known.index(moment.site.block) if known else moment.step
        mask = moment.marks.get(MASK)
        if mask is None:
            mask = torch.ones_like(moment.sizes)
        log_prob = self.predictors[number](moment.x, mask)
        if self.training:
            return self.draw(moment, draw_kept(log_prob) * mask)
        assert moment.counts is not None
        counts = moment.counts if moment.count is None else moment.count
        choice = choose_tokens(log_prob[..., 0], counts)
        return Reduction(choice.places, choice.owner, lengths=choice.lengths)

    def draw(self, moment: Moment, mask: Float[Tensor, "b m"]) -> Reduction:
        """Keep every token with a note of which are left, and tell what it costs."""
        share = self.base_rate ** (moment.step + 1)
        loss = WEIGHT / moment.steps * ((mask.mean(1) - share) ** 2).mean()
        for observer in moment.call.observers:
            if observer.wants_losses:
                observer.note_losses({"ratio": loss})
        recomputed = torch._C._current_graph_task_id() != -1
        if self.masks is not None and not recomputed:
            self.masks.append(mask)
        b, m = mask.shape
        all_cells = torch.arange(m, device=mask.device).expand(b, m)
        marks: dict[str, Shaped[Tensor, "b m ..."]] = {MASK: mask}
        return Reduction(all_cells, all_cells, marks=marks)

    @contextmanager
    def collect_masks(self) -> Iterator[list[Float[Tensor, "b m"]]]:
        """Collect the masks of the calls in training mode inside a `with` block.

        Yields:
            A list that gets one mask per site of each call, 1 for tokens that are left.
        """
        before, self.masks = self.masks, []
        try:
            yield self.masks
        finally:
            self.masks = before
