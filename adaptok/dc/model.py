"""The reference model: a diffusion transformer that spends tokens where the image needs them."""

from typing import Literal, overload

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from adaptok.attention import Ragged
from adaptok.budgeted import Budgeted, merge_budget, pair_budgets
from adaptok.budgets import Amount, Budget
from adaptok.chunking import ChunkPlan
from adaptok.dc.blocks import (
    Backbone,
    DiTBlock,
    FinalLayer,
    initialise_linear,
    run_in_buckets,
    zero_linear,
)
from adaptok.dc.checkpoint import from_reference, to_reference
from adaptok.dc.chunker import DCChunker
from adaptok.dc.config import DCDiTConfig
from adaptok.dc.dechunker import DCDechunker
from adaptok.dc.inputs import check_inputs
from adaptok.dc.position import encode_grid
from adaptok.dc.router import DCRouter
from adaptok.dc.scaffold import ConvStack, LabelEmbedder, TimestepEmbedder
from adaptok.diffusion.guidance import combine_halves
from adaptok.errors import ShapeError
from adaptok.routing import Context, Routing
from adaptok.tokens import Tokens


class DCDiT(Budgeted):
    """DC-DiT: latent -> cells -> router -> kept tokens -> DiT blocks -> cells -> latent.

    Args:
        config: options of the model.

    Example:
        >>> config = DCDiTConfig(hidden_size=64, depth=2, num_heads=4, latent_size=8)
        >>> model = DCDiT(config)
        >>> x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.tensor([1, 2])
        >>> out, routing = model(x, t, y, keep=0.25, return_routing=True)
        >>> out.shape, routing.kept
        (torch.Size([2, 8, 8, 8]), tensor([16, 16]))

    Paper: DC-DiT: Adaptive Compute and Elastic Inference for Visual Generation via Dynamic
    Chunking, arXiv 2603.06351.
    """

    def __init__(self, config: DCDiTConfig) -> None:
        super().__init__()
        self.config = config
        d, narrow = config.hidden_size, config.hidden_size // config.narrowing
        self.embed = nn.Conv2d(config.in_channels, narrow, 3, padding=1)
        self.timestep_embedder = TimestepEmbedder(d, config.frequency_shift)
        self.label_embedder = LabelEmbedder(config.num_classes, d)
        codes = encode_grid(config.grid, d, cells=config.position_cells)
        self.position = nn.Parameter(codes[None], requires_grad=False)
        self.encoder = ConvStack((narrow,) * config.encoder_blocks + (d,), d)
        self.router = DCRouter(d)
        self.chunker = DCChunker(config.layout, config.buckets)
        self.backbone = Backbone(d, config.depth, config.num_heads)
        self.dechunker = DCDechunker(d, config.dechunk_sigma)
        self.condition_norm = nn.LayerNorm(d) if config.condition_norm else nn.Identity()
        self.decoder = ConvStack((d,) + (narrow,) * config.decoder_blocks, d)
        self.final_layer = FinalLayer(narrow, d, config.out_channels)
        self.initialise()
        for embedder in (self.timestep_embedder, self.label_embedder):
            embedder.requires_grad_(config.train_embedders)

    def initialise(self) -> None:
        """Start as DiT does: each block is the identity, and the output is zero."""
        initialise_linear(self.backbone)
        initialise_linear(self.final_layer)
        nn.init.xavier_uniform_(self.embed.weight.flatten(1))
        if self.embed.bias is not None:
            nn.init.zeros_(self.embed.bias)
        nn.init.normal_(self.label_embedder.table.weight, std=0.02)
        for layer in self.timestep_embedder.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        for block in self.backbone.blocks:
            assert isinstance(block, DiTBlock)
            zero_linear(block.modulation)
        zero_linear(self.final_layer)

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.config.out_channels

    @overload
    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        drop: Amount | None = None,
        keep: Amount | None = None,
        tokens: Amount | None = None,
        return_routing: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        drop: Amount | None = None,
        keep: Amount | None = None,
        tokens: Amount | None = None,
        return_routing: Literal[True],
    ) -> tuple[Tensor, Routing]: ...

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        t: Float[Tensor, " b"] | Int[Tensor, " b"],
        y: Int[Tensor, " b"],
        *,
        drop: Amount | None = None,
        keep: Amount | None = None,
        tokens: Amount | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Routing]:
        """Predict the noise (and the variance) of noisy latents.

        Args:
            x: noisy latents, `(b c h w)`.
            t: diffusion times, 0 to 999 (fractions allowed), `(b)`.
            y: labels, `(b)`; `num_classes` means no class.
            drop: tail-drop fraction, one number or one per sample.
            keep: fraction of the cells to keep, one number or one per sample.
            tokens: exact number of tokens, one number or one per sample.
            return_routing: also return what the router said and what the budget kept.

        Returns:
            The prediction `(b 2c h w)` (`(b c h w)` without `learn_sigma`), and the routing
            if asked for.

        Raises:
            ShapeError: an input has the wrong shape.
            DtypeError: an input has the wrong dtype.
            DeviceError: an input lies on another device than the model.
            LabelError: a label is out of range.
            BudgetError: the budget is not valid, or does not fit the layout.
        """
        budget = merge_budget(self.budget_setting, keep=keep, tokens=tokens, drop=drop)
        out, plan = self.run(x, t, y, budget)
        return (out, plan.routing) if return_routing else out

    def run(self, x: Tensor, t: Tensor, y: Tensor, budget: Budget) -> tuple[Tensor, ChunkPlan]:
        """Run all parts and return the prediction with the plan of its tokens.

        Args:
            x: noisy latents, `(b c h w)`.
            t: diffusion times, `(b)`.
            y: labels, `(b)`.
            budget: how many cells to keep.

        Returns:
            The prediction and the plan.
        """
        check_inputs(x, t, y, self.config, self.embed.weight.device)
        grid = (x.shape[2], x.shape[3])
        condition = self.timestep_embedder(t) + self.label_embedder(y)
        cells = self.encode(x, condition)
        before = Tokens(cells, grid)
        routing = self.router(before, Context(condition=condition, timestep=t))
        kept, plan = self.chunker(before, routing, budget)
        kept = self.run_backbone(kept, plan, condition)
        after = self.dechunker(kept, plan, before)
        return self.decode(after, condition), plan

    def encode(self, x: Tensor, condition: Tensor) -> Float[Tensor, "b n d"]:
        """Turn a latent into cells."""
        embedded = self.embed(x.to(self.embed.weight.dtype))
        cells: Tensor = self.encoder(embedded, self.condition_norm(condition))
        return cells

    def run_backbone(self, kept: Tokens, plan: ChunkPlan, condition: Tensor) -> Tokens:
        """Run the blocks on the kept tokens, in the layout of their plan."""
        positions = self.position[0]
        if plan.grid != self.config.grid:
            cells = self.config.position_cells
            positions = encode_grid(plan.grid, self.config.hidden_size, positions.device, cells)
        assert kept.cells is not None
        kept = kept.with_x(kept.x + positions.to(kept.x.dtype)[kept.cells])
        recompute = self.config.gradient_checkpointing and torch.is_grad_enabled()

        def run_blocks(x: Tensor, condition: Tensor, ragged: Ragged | None) -> Tensor:
            out: Tensor = self.backbone(x, condition, ragged, recompute=recompute)
            return out

        if plan.layout == "fixed":
            return kept.with_x(run_blocks(kept.x, condition, None))
        ragged = plan.ragged(self.config.attention)
        if plan.layout == "bucketed":
            return kept.with_x(run_in_buckets(run_blocks, kept, condition, ragged.lengths))
        return kept.with_x(run_blocks(kept.x, condition, ragged))

    def decode(self, after: Tokens, condition: Tensor) -> Float[Tensor, "b c h w"]:
        """Turn cells into the channels of a latent."""
        assert after.grid is not None
        h, w = after.grid
        x = rearrange(after.x.to(self.embed.weight.dtype), "b (h w) d -> b d h w", h=h, w=w)
        condition = self.condition_norm(condition)
        cells: Tensor = self.final_layer(self.decoder(x, condition), condition)
        return rearrange(cells, "b (h w) c -> b c h w", h=h, w=w)

    def forward_with_cfg(
        self,
        x: Float[Tensor, "b c h w"],
        t: Float[Tensor, " b"] | Int[Tensor, " b"],
        y: Int[Tensor, " b"],
        cfg_scale: float,
        *,
        drop: Amount | None = None,
        keep: Amount | None = None,
        tokens: Amount | None = None,
        uncond_drop: Amount | None = None,
        uncond_keep: Amount | None = None,
        uncond_tokens: Amount | None = None,
        guided_channels: int | None = 3,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Routing]:
        """Predict with classifier-free guidance; the two halves may have their own budgets.

        With a larger drop for the unconditional half this is Lite-CFG.

        Args:
            x: noisy latents, `(2b c h w)`; the first half is used for both halves.
            t: diffusion times, `(2b)`.
            y: labels, `(2b)`: the first half conditional, the second one the null class.
            cfg_scale: guidance scale; 1 means none.
            drop: tail-drop fraction of the conditional half.
            keep: fraction of the cells that the conditional half keeps.
            tokens: exact number of tokens of the conditional half.
            uncond_drop: tail-drop fraction of the unconditional half; None means as the other.
            uncond_keep: fraction of the cells that the unconditional half keeps.
            uncond_tokens: exact number of tokens of the unconditional half.
            guided_channels: how many channels are guided, as in DiT the first three; None
                means all image channels.
            return_routing: also return the routing of both halves.

        Returns:
            The prediction `(2b 2c h w)` with the guided channels the same in both halves, and
            the routing if asked for.

        Raises:
            ShapeError: the batch is odd, or another input has the wrong shape.
            BudgetError: the halves have different kinds of budgets.
        """
        if x.ndim != 4 or x.shape[0] % 2:
            raise ShapeError(
                "guidance needs a conditional and an unconditional half, (2b, c, h, w), got "
                f"{tuple(x.shape)}"
            )
        half = x.shape[0] // 2
        cond = merge_budget(self.budget_setting, keep=keep, tokens=tokens, drop=drop)
        uncond = merge_budget(cond, keep=uncond_keep, tokens=uncond_tokens, drop=uncond_drop)
        budget = pair_budgets(cond, uncond, half)
        out, plan = self.run(x[:half].repeat(2, 1, 1, 1), t, y, budget)
        channels = self.config.in_channels if guided_channels is None else guided_channels
        guided = combine_halves(out, cfg_scale, channels)
        return (guided, plan.routing) if return_routing else guided

    def load_reference_state_dict(self, weights: dict[str, Tensor]) -> None:
        """Load weights that carry the names of the published checkpoints.

        Args:
            weights: tensors by published name.

        Raises:
            CheckpointError: names or shapes do not fit this model.
        """
        self.load_state_dict(from_reference(weights, self))

    def reference_state_dict(self) -> dict[str, Tensor]:
        """Return the weights under the names of the published checkpoints."""
        return to_reference(self.state_dict())
