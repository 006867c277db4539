"""The reference model: a diffusion transformer that spends tokens where the image needs them."""

from collections.abc import Callable
from functools import partial
from typing import Literal, overload

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adaptok.attention import Ragged
from adaptok.budgeted import Budgeted, merge_budget, pair_budgets
from adaptok.budgets import Amount, Budget
from adaptok.chunking import ChunkPlan
from adaptok.dc.blocks import (
    Backbone,
    DiTBlock,
    FinalLayer,
    initialise_linear,
    zero_linear,
)
from adaptok.dc.checkpoint import from_reference, to_reference
from adaptok.dc.chunker import DCChunker
from adaptok.dc.config import DCDiTConfig
from adaptok.dc.dechunker import DCDechunker
from adaptok.dc.inputs import check_inputs
from adaptok.dc.position import CellCodes, encode_grid
from adaptok.dc.router import make_router
from adaptok.dc.scaffold import ConvStack, LabelEmbedder, TimestepEmbedder
from adaptok.diffusion.guidance import check_guidance, combine_halves
from adaptok.errors import ShapeError
from adaptok.regions import Regional, mark_dynamic
from adaptok.routing import Context, Routing
from adaptok.tokens import Grid, Tokens


class DCDiT(Regional, Budgeted):
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

    # The chunker, between the first region and the others, waits for the counts.
    regions = ("route", "run_packed", "restore", "run_fixed")
    static_regions = ("run_fixed",)

    def __init__(self, config: DCDiTConfig) -> None:
        super().__init__()
        self.config = config
        d, narrow = config.hidden_size, config.hidden_size // config.narrowing
        self.embed = nn.Conv2d(config.in_channels, narrow, 3, padding=1)
        self.timestep_embedder = TimestepEmbedder(d, config.frequency_shift)
        self.label_embedder = LabelEmbedder(config.num_classes, d)
        codes = encode_grid(config.grid, d, cells=config.position_cells)
        self.position = nn.Parameter(codes[None], requires_grad=False)
        self.cell_codes = CellCodes()
        self.encoder = ConvStack((narrow,) * config.encoder_blocks + (d,), d)
        self.router = make_router(config)
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
        cells = x.shape[2] * x.shape[3]
        budget = self.settle_budget(budget, x.shape[0], cells, self.embed.weight)
        if self.chunker.layout == "fixed":
            if self.compiled_regions and budget.is_uniform:
                budget = budget.carried(cells, x.device)
            fixed: tuple[Tensor, ChunkPlan] = self.region("run_fixed")(x, t, y, budget)
            return fixed
        condition, before, routing = self.region("route")(x, t, y)
        kept, plan = self.chunker(before, routing, budget)
        ragged = plan.ragged(self.config.attention)
        for rows in (kept.x, plan.cells, ragged.batch):
            mark_dynamic(rows, 0)
        x = self.region("run_packed")(kept.x, plan.cells, plan.grid, condition, ragged)
        mark_dynamic(x, 0)
        out: Tensor = self.region("restore")(kept.with_x(x), plan, before, condition)
        return out, plan

    def run_fixed(
        self, x: Tensor, t: Tensor, y: Tensor, budget: Budget
    ) -> tuple[Tensor, ChunkPlan]:
        """Run all parts with one count for all samples: nothing waits for the device."""
        condition, before, routing = self.route(x, t, y)
        kept, plan = self.chunker(before, routing, budget)
        x = self.run_dense(kept.x, plan.cells, plan.grid, condition)
        return self.restore(kept.with_x(x), plan, before, condition), plan

    def route(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tokens, Routing]:
        """Turn latents into cells, and judge those."""
        condition = self.timestep_embedder(t) + self.label_embedder(y)
        encode = self.recomputed(self.encode)
        before = Tokens(encode(x, condition), (x.shape[2], x.shape[3]))
        return condition, before, self.router(before, Context(condition=condition, timestep=t))

    def encode(self, x: Tensor, condition: Tensor) -> Float[Tensor, "b n d"]:
        """Turn a latent into cells."""
        x = x.to(self.embed.weight.dtype).contiguous(memory_format=torch.channels_last)
        embedded = self.embed(x)
        cells: Tensor = self.encoder(embedded, self.condition_norm(condition))
        return cells

    def run_packed(
        self,
        x: Float[Tensor, "t d"],
        cells: Int[Tensor, " t"],
        grid: Grid,
        condition: Float[Tensor, "b d"],
        ragged: Ragged,
    ) -> Float[Tensor, "t d"]:
        """Run the blocks on the kept tokens of all samples in one run."""
        return self.run_blocks(x + self.place(cells, grid).to(x.dtype), condition, ragged)

    def run_dense(
        self,
        x: Float[Tensor, "b m d"],
        cells: Int[Tensor, "b m"],
        grid: Grid,
        condition: Float[Tensor, "b d"],
    ) -> Float[Tensor, "b m d"]:
        """Run the blocks on samples that all keep the same count."""
        return self.run_blocks(x + self.place(cells, grid).to(x.dtype), condition, None)

    def place(self, cells: Int[Tensor, "..."], grid: Grid) -> Float[Tensor, "... d"]:
        """Return the position codes of cells."""
        positions = self.position[0]
        if grid != self.config.grid:
            wide, kind = self.config.hidden_size, self.config.position_cells
            positions = encode_grid(grid, wide, positions.device, kind)
        codes: Tensor = self.cell_codes(cells, grid, positions)
        return codes

    def run_blocks(self, x: Tensor, condition: Tensor, ragged: Ragged | None) -> Tensor:
        """Run the blocks on dense or packed tokens."""
        out: Tensor = self.backbone(x, condition, ragged, recompute=self.recomputes)
        return out

    @property
    def recomputes(self) -> bool:
        """Whether activations of the blocks are computed again for the gradient, and not kept."""
        return self.config.gradient_checkpointing is True and torch.is_grad_enabled()

    def recomputed(self, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a part of the model so that it keeps no activations, where that was asked for."""
        if not self.config.gradient_checkpointing or not torch.is_grad_enabled():
            return run
        return partial(checkpoint, run, use_reentrant=False)

    def restore(self, kept: Tokens, plan: ChunkPlan, before: Tokens, condition: Tensor) -> Tensor:
        """Give all cells their features again, and turn them into a latent."""

        def finish(x: Tensor, cells: Tensor, condition: Tensor) -> Tensor:
            after = self.dechunker(kept.with_x(x), plan, before.with_x(cells))
            return self.decode(after, condition)

        return self.recomputed(finish)(kept.x, before.x, condition)

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
            ShapeError: the batch is odd, another input has the wrong shape, or more channels are
                guided than a latent has.
            ConfigError: the scale is no finite number.
            BudgetError: the halves have different kinds of budgets.
        """
        channels = self.config.in_channels if guided_channels is None else guided_channels
        check_guidance(cfg_scale, channels, self.config.in_channels)
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
