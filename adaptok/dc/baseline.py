"""The fixed-patch diffusion transformer that adaptive models are compared with."""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adaptok.budgets import Amount, listed
from adaptok.dc.blocks import DiTBlock, FinalLayer, initialise_linear, zero_linear
from adaptok.dc.config import DiTConfig
from adaptok.dc.inputs import check_inputs
from adaptok.dc.position import encode_grid
from adaptok.dc.scaffold import LabelEmbedder, TimestepEmbedder
from adaptok.diffusion.guidance import check_guidance, combine_halves
from adaptok.errors import BudgetError, ShapeError


class DiT(nn.Module):
    """DiT with a fixed patch size: every image gets the same tokens.

    Args:
        config: options of the model.

    Example:
        >>> config = DiTConfig(hidden_size=64, depth=2, num_heads=4, latent_size=8, patch_size=2)
        >>> x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.tensor([1, 2])
        >>> DiT(config)(x, t, y).shape
        torch.Size([2, 8, 8, 8])

    Paper: Peebles and Xie, Scalable Diffusion Models with Transformers, 2023.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        d, p = config.hidden_size, config.patch_size
        h, w = config.grid
        self.x_embedder = nn.Conv2d(config.in_channels, d, p, stride=p)
        self.t_embedder = TimestepEmbedder(d)
        self.y_embedder = LabelEmbedder(config.num_classes, d)
        codes = encode_grid((h // p, w // p), d)
        self.pos_embed = nn.Parameter(codes[None], requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(d, config.num_heads) for _ in range(config.depth))
        self.final_layer = FinalLayer(d, d, p * p * config.out_channels)
        self.initialise()

    def initialise(self) -> None:
        """Start as the published DiT does: blocks are the identity, the output is zero."""
        initialise_linear(self)
        nn.init.xavier_uniform_(self.x_embedder.weight.flatten(1))
        if self.x_embedder.bias is not None:
            nn.init.zeros_(self.x_embedder.bias)
        nn.init.normal_(self.y_embedder.table.weight, std=0.02)
        for layer in self.t_embedder.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        for block in self.blocks:
            assert isinstance(block, DiTBlock)
            zero_linear(block.modulation)
        zero_linear(self.final_layer)

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.config.out_channels

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
    ) -> Tensor | tuple[Tensor, None]:
        """Predict the noise (and the variance) of noisy latents.

        Args:
            x: noisy latents, `(b c h w)`.
            t: diffusion times, `(b)`.
            y: labels, `(b)`; `num_classes` means no class.
            drop: None or 0: this model keeps all its tokens.
            keep: None.
            tokens: None.
            return_routing: also return None, for callers that ask any model.

        Returns:
            The prediction, `(b 2c h w)` or `(b c h w)`, and None if asked for a routing.

        Raises:
            BudgetError: a budget was asked for.
            ShapeError: an input has the wrong shape.
        """
        refuse_budget(drop, keep, tokens)
        check_inputs(x, t, y, self.config, self.x_embedder.weight.device)
        p = self.config.patch_size
        h, w = x.shape[2] // p, x.shape[3] // p
        if x.shape[2] % p or x.shape[3] % p:
            raise ShapeError(
                f"a latent of {x.shape[2]} x {x.shape[3]} cells is no multiple of the patch "
                f"size {p}"
            )
        condition = self.t_embedder(t) + self.y_embedder(y)
        embedded = self.x_embedder(x.to(self.x_embedder.weight.dtype))
        patches = rearrange(embedded, "b d h w -> b (h w) d")
        positions: Tensor = self.pos_embed
        if (h * p, w * p) != self.config.grid:
            positions = encode_grid((h, w), self.config.hidden_size, x.device)[None]
        patches = patches + positions.to(patches.dtype)
        recompute = self.config.gradient_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            if recompute:
                patches = checkpoint(block, patches, condition, use_reentrant=False)
            else:
                patches = block(patches, condition)
        patches = self.final_layer(patches, condition)
        out = rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=p, q=p)
        return (out, None) if return_routing else out

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
    ) -> Tensor | tuple[Tensor, None]:
        """Predict with classifier-free guidance.

        Args:
            x: noisy latents, `(2b c h w)`; the first half is used for both halves.
            t: diffusion times, `(2b)`.
            y: labels, `(2b)`: the first half conditional, the second one the null class.
            cfg_scale: guidance scale; 1 means none.
            drop: None or 0.
            keep: None.
            tokens: None.
            uncond_drop: None or 0.
            uncond_keep: None.
            uncond_tokens: None.
            guided_channels: how many channels are guided; None means all image channels.
            return_routing: also return None, for callers that ask any model.

        Returns:
            The prediction `(2b 2c h w)` with the guided channels the same in both halves.

        Raises:
            BudgetError: a budget was asked for.
            ShapeError: the batch is odd, another input has the wrong shape, or more channels are
                guided than a latent has.
            ConfigError: the scale is no finite number.
        """
        refuse_budget(uncond_drop, uncond_keep, uncond_tokens)
        channels = self.config.in_channels if guided_channels is None else guided_channels
        check_guidance(cfg_scale, channels, self.config.in_channels)
        if x.ndim != 4 or x.shape[0] % 2:
            raise ShapeError(
                "guidance needs a conditional and an unconditional half, (2b, c, h, w), got "
                f"{tuple(x.shape)}"
            )
        both = x[: x.shape[0] // 2].repeat(2, 1, 1, 1)
        out = self(both, t, y, drop=drop, keep=keep, tokens=tokens)
        guided = combine_halves(out, cfg_scale, channels)
        return (guided, None) if return_routing else guided


def refuse_budget(drop: Amount | None, keep: Amount | None, tokens: Amount | None) -> None:
    """Raise a `BudgetError` if a fixed-patch model is asked to save tokens."""
    if keep is not None or tokens is not None or any(float(value) for value in listed(drop)):
        raise BudgetError(
            "a fixed-patch DiT keeps all its tokens, and a budget came: use DCDiT, or leave the "
            "budget out"
        )
