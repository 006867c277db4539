"""Options of the reference model and of its fixed-patch baseline."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from adaptok.attention import Rung
from adaptok.chunking import Layout
from adaptok.config import Config
from adaptok.errors import ConfigError

Scale = Literal["S", "B", "L", "XL"]
Positive = Annotated[int, Field(ge=1)]

# blocks, width, heads
SCALES: dict[str, tuple[int, int, int]] = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
SMALLEST_LATENT = 3  # one convolution kernel


class TransformerConfig(Config):
    """Options that the reference model and the baseline share.

    Args:
        scale: `"S"`, `"B"`, `"L"` or `"XL"`; sets depth, hidden size and heads at once.
        hidden_size: width of the blocks.
        depth: number of blocks.
        num_heads: heads of the attention; they divide the hidden size.
        latent_size: height and width of a latent in cells, or one number for a square; other
            sizes may still be given to `forward`.
        in_channels: channels of a latent.
        num_classes: classes without the null class.
        learn_sigma: also predict the variance (the output has twice the channels).
    """

    scale: Scale | None = None
    hidden_size: Positive = 384
    depth: Positive = 12
    num_heads: Positive = 6
    latent_size: Positive | tuple[Positive, Positive] = 32
    in_channels: Positive = 4
    num_classes: Positive = 1000
    learn_sigma: bool = True

    @model_validator(mode="before")
    @classmethod
    def fill_scale(cls, values: Any) -> Any:  # noqa: ANN401
        """Let the scale set depth, width and heads, and refuse others beside it."""
        scale = values.get("scale") if isinstance(values, dict) else None
        if not isinstance(scale, str) or scale not in SCALES:
            return values
        depth, hidden_size, num_heads = SCALES[scale]
        sizes = {"depth": depth, "hidden_size": hidden_size, "num_heads": num_heads}
        for name, size in sizes.items():
            if values.get(name, size) != size:
                raise ValueError(
                    f"scale {scale!r} means {name}={size}, but {name}={values[name]} came too: "
                    "leave one of them out"
                )
        return {**values, **sizes}

    @model_validator(mode="after")
    def check_sizes(self) -> "TransformerConfig":
        """Refuse sizes that do not fit each other."""
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is no multiple of num_heads={self.num_heads}"
            )
        if self.hidden_size % 32:
            raise ValueError(f"hidden_size is a multiple of 32, got {self.hidden_size}")
        if min(self.grid) < SMALLEST_LATENT:
            raise ValueError(
                f"latent_size={self.latent_size} is smaller than a {SMALLEST_LATENT} x "
                f"{SMALLEST_LATENT} kernel"
            )
        return self

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of a latent in cells."""
        if isinstance(self.latent_size, tuple):
            return self.latent_size
        return (self.latent_size, self.latent_size)

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.in_channels * (2 if self.learn_sigma else 1)


class DCDiTConfig(TransformerConfig):
    """Options of `DCDiT`.

    A hidden size above 128 is advisable: encoder and decoder are `narrowing` times narrower, and
    up to 32 channels a norm group is one channel, which takes out what the condition adds.

    Args:
        narrowing: how much narrower encoder and decoder are than the blocks.
        encoder_blocks: convolution blocks in front of the router.
        decoder_blocks: convolution blocks behind the dechunker.
        dechunk_sigma: width of the smoothing in cells; 1 for a grid of 32 x 32, 2 for 64 x 64.
        target: compression that the ratio loss pulls to; 4 is the counterpart of patch size 2.
        layout: how kept tokens are run: `"packed"`, `"bucketed"` or `"fixed"`.
        buckets: number of counts that the bucketed layout allows.
        attention: rung of packed attention; None takes the best one that fits.
        position_cells: cells per step of the position code: the patch side of the DiT whose
            blocks were taken over (`adaptok.upcycle`).
        frequency_shift: 1 where the last time frequency is the smallest one exactly, as in
            diffusers; 0 as in DiT.
        condition_norm: adapt the condition of encoder, decoder and final layer by a LayerNorm.
        train_embedders: whether the embedders of time and label are trained.
        router: another router by its registered name, or a mapping of name and options; None is
            DC-DiT's own. It needs a threshold, so that cells are kept without a budget.
        gradient_checkpointing: what is computed again for the gradient: True for all of it,
            `"convolutions"` for encoder and decoder only, which work on all cells and so hold
            most activations for their few operations.

    Raises:
        ConfigError: an unknown option, a value out of range, or sizes that do not fit.

    Example:
        >>> DCDiTConfig(scale="XL").depth
        28
        >>> DCDiTConfig(hidden_size=100)
        Traceback (most recent call last):
            ...
        adaptok.errors.ConfigError: DCDiTConfig is not valid: ...
    """

    gradient_checkpointing: bool | Literal["convolutions"] = False
    narrowing: Positive = 4
    encoder_blocks: Positive = 2
    decoder_blocks: Positive = 2
    dechunk_sigma: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    target: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 4.0
    layout: Layout = "packed"
    buckets: Positive = 64
    attention: Rung | None = None
    position_cells: Positive = 1
    frequency_shift: Literal[0, 1] = 0
    condition_norm: bool = False
    train_embedders: bool = True
    router: str | dict[str, Any] | None = None

    @model_validator(mode="after")
    def check_narrowing(self) -> "DCDiTConfig":
        """Refuse a narrow width that does not come out even."""
        if self.hidden_size % self.narrowing:
            raise ValueError(
                f"hidden_size={self.hidden_size} is no multiple of narrowing={self.narrowing}"
            )
        return self


class DiTConfig(TransformerConfig):
    """Options of the fixed-patch baseline `DiT`.

    Args:
        patch_size: cells per side of a patch; it divides the latent size.
        gradient_checkpointing: compute activations of the blocks again for the gradient.

    Example:
        >>> DiTConfig(scale="S", patch_size=2).grid
        (32, 32)
    """

    patch_size: Positive = 2
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def check_patch(self) -> "DiTConfig":
        """Refuse a patch that does not divide the latent."""
        if any(side % self.patch_size for side in self.grid):
            raise ValueError(
                f"patch_size={self.patch_size} does not divide the latent size {self.grid}"
            )
        return self


MODEL_CONFIGS: dict[str, type[TransformerConfig]] = {"DCDiT": DCDiTConfig, "DiT": DiTConfig}


def read_model_config(kind: object, values: dict[str, Any]) -> TransformerConfig:
    """Make the options of a model from its kind and plain values, as a checkpoint names them.

    Args:
        kind: `"DCDiT"` or `"DiT"`.
        values: options by name.

    Returns:
        The configuration.

    Raises:
        ConfigError: the kind is unknown, or the options are not valid.
    """
    if not isinstance(kind, str) or kind not in MODEL_CONFIGS:
        raise ConfigError(
            f"{kind!r} is no kind of model: known are {', '.join(sorted(MODEL_CONFIGS))}"
        )
    return MODEL_CONFIGS[kind](**values)
