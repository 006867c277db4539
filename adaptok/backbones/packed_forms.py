"""Which blocks have a packed form: exact classes, or exact attributes and a trial.

Research code copies the blocks of DiT from file to file, so that their class says nothing: there a
form is tried against the block itself.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from adaptok.backbones.block_forms import is_exactly, is_touched
from adaptok.backbones.packed_blocks import PackedDiTBlock, PackedForm, PackedViTBlock, one_run
from adaptok.errors import StackError

VIT_HOME = "timm.models.vision_transformer"
ATTENTION_HOME = "timm.layers.attention"
NORMS = ("LayerNorm", "LayerNormFp32", "RmsNorm", "RmsNormFp32", "SimpleNorm", "SimpleNormFp32")
MLPS = ("Mlp", "GluMlp", "SwiGLU")
DIT_PARTS = {"norm1", "attn", "norm2", "mlp", "adaLN_modulation"}
ATTENTION_PARTS = {"qkv", "proj"}
MORE_ATTENTION_PARTS = {"q_norm", "k_norm", "norm", "gate", "attn_drop", "proj_drop"}
TRIAL_LENGTHS = (3, 5)
TRIAL_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
HALF_TOLERANCE = 5e-2


def find_packed_form(block: nn.Module) -> PackedForm | None:
    """Return the packed form of a block, or None if none is known.

    Args:
        block: any module.

    Returns:
        The form. That of a DiT block has been tried against the block itself, with random
        modulation, since such blocks are known by their attributes only.

    Example:
        >>> find_packed_form(nn.Linear(4, 4)) is None
        True
    """
    form = match_packed_form(block)
    return form if not isinstance(form, PackedDiTBlock) or agrees(form) else None


def pack_blocks(blocks: Sequence[nn.Module]) -> tuple[PackedForm, ...]:
    """Return the packed forms of all blocks of a host.

    Args:
        blocks: the blocks that are to run on packed tokens.

    Returns:
        One form per block; the first of each class is tried.

    Raises:
        StackError: a block has none.
    """
    forms: list[PackedForm] = []
    tried: set[type] = set()
    for index, block in enumerate(blocks):
        form = match_packed_form(block) if type(block) in tried else find_packed_form(block)
        if form is None:
            attention = type(getattr(block, "attn", None)).__name__
            raise StackError(
                f'layout "packed" needs a packed form of each block, and block {index}, a '
                f"{type(block).__name__} with {attention}, has none: known are timm's Block with "
                "Attention and blocks of DiT and SiT, without hooks on them. Use layout "
                '"bucketed" or "fixed", which run blocks as they are'
            )
        tried.add(type(block))
        forms.append(form)
    return tuple(forms)


def match_packed_form(block: nn.Module) -> PackedForm | None:
    """Return the form that fits a block by its class or its attributes, untried."""
    attn = block._modules.get("attn")
    if attn is None or is_touched(block) or is_touched(attn):
        return None
    if is_exactly(block, VIT_HOME, "Block"):
        return PackedViTBlock(block) if fits_vit(block, attn) else None
    return PackedDiTBlock(block) if fits_dit(block, attn) else None


def fits_vit(block: Any, attn: nn.Module) -> bool:  # noqa: ANN401
    """Say whether attention, norms, MLP and scales of timm's `Block` treat each token alike."""
    norms = [norm for norm in (block.norm1, block.norm2) if not is_token_norm(norm)]
    return (
        is_exactly(attn, ATTENTION_HOME, "Attention")
        and not norms
        and any(is_exactly(block.mlp, "timm.layers.mlp", name) for name in MLPS)
        and not any(isinstance(part, nn.Conv2d) for part in block.mlp.children())
        and all(
            isinstance(part, nn.Identity) or is_exactly(part, "timm.layers", name)
            for name, parts in (
                ("LayerScale", (block.ls1, block.ls2)),
                ("DropPath", (block.drop_path1, block.drop_path2)),
            )
            for part in parts
        )
    )


def is_token_norm(norm: nn.Module) -> bool:
    """Say whether a norm looks at the features of one token only."""
    known = isinstance(norm, nn.LayerNorm | nn.RMSNorm)
    return known or any(is_exactly(norm, "timm.layers.norm", name) for name in NORMS)


def fits_dit(block: nn.Module, attn: nn.Module) -> bool:
    """Say whether a block has the attributes of DiT's, and no others."""
    names = {name for name, _ in block.named_children()}
    inside = {name for name, _ in attn.named_children()}
    modulation = block._modules.get("adaLN_modulation")
    return (
        names == DIT_PARTS
        and isinstance(modulation, nn.Sequential)
        and inside >= ATTENTION_PARTS
        and inside <= ATTENTION_PARTS | MORE_ATTENTION_PARTS
        and isinstance(getattr(attn, "num_heads", None), int)
        and not any(module._parameters or module._buffers for module in (block, attn))
    )


class Trial(nn.Module):
    """Runs a DiT block and its packed form on the same tokens."""

    def __init__(self, form: PackedForm) -> None:
        super().__init__()
        self.block = form.block
        self.form = form

    def forward(
        self, x: Float[Tensor, "t d"], condition: Float[Tensor, "b c"]
    ) -> tuple[Float[Tensor, "t d"], Float[Tensor, "t d"]]:
        """Return the tokens after the block, sample by sample, and after its form."""
        pieces = x.split(TRIAL_LENGTHS)
        outs = [
            self.block(piece[None], c[None])[0] for piece, c in zip(pieces, condition, strict=True)
        ]
        return torch.cat(outs), self.form(x, one_run(TRIAL_LENGTHS, x.device), condition)


def agrees(form: PackedDiTBlock) -> bool:
    """Say whether a form computes what its block computes, with random modulation.

    A fresh block has gates of zero and would agree with anything. Random numbers and train modes
    stay as they are.
    """
    block = form.block
    last = block.adaLN_modulation[-1]
    weight = getattr(last, "weight", None)
    if weight is None or weight.is_meta or weight.ndim != 2:
        return False
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(weight)

    width = weight.shape[0] // 6
    noise = {
        f"block.adaLN_modulation.{len(block.adaLN_modulation) - 1}.{name}": (
            draw(*value.shape) / value[0].numel() ** 0.5
        )
        for name, value in last.named_parameters(recurse=False)
    }
    inputs = (draw(sum(TRIAL_LENGTHS), width), draw(len(TRIAL_LENGTHS), weight.shape[1]))
    modes = {module: module.training for module in block.modules()}
    block.eval()
    try:
        with torch.no_grad():
            expected, found = torch.func.functional_call(Trial(form), noise, inputs)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False  # it takes something else, or is put together in another way
    finally:
        for module, mode in modes.items():
            module.training = mode
    allowed = TRIAL_TOLERANCE.get(weight.dtype, HALF_TOLERANCE)
    error = (found - expected).abs().max() / expected.abs().max()
    return bool(error <= allowed)
