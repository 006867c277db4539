"""Which blocks have a split form: exact classes, or the attributes of DiT and a trial."""

import sys
from collections.abc import Sequence

from torch import nn

from adaptok.backbones.block_forms import is_exactly
from adaptok.backbones.packed_blocks import PackedDiTBlock
from adaptok.backbones.packed_forms import find_packed_form, is_token_norm, match_packed_form
from adaptok.backbones.split_blocks import BlockLayout, SplitForm, is_heard
from adaptok.backbones.split_timm import LAYOUTS as TIMM
from adaptok.backbones.split_timm import SplitDiTBlock, SplitTimmBlock
from adaptok.backbones.split_towers import LAYOUTS as TOWERS
from adaptok.backbones.split_towers import SplitTowerLayer
from adaptok.errors import UnsupportedModelError

ROTATION = ("timm.layers.pos_embed_sincos", "apply_rot_embed_cat")
ALIKE = (nn.Identity, nn.Dropout)


def can_split(block: nn.Module) -> bool:
    """Say whether a block has a split form.

    Args:
        block: any module.

    Example:
        >>> from timm.models.vision_transformer import Block, ParallelScalingBlock
        >>> can_split(Block(32, num_heads=2)), can_split(ParallelScalingBlock(32, num_heads=2))
        (True, False)
    """
    return find_split_form(block) is not None


def split_blocks(blocks: Sequence[nn.Module], first: int = 0) -> tuple[SplitForm, ...]:
    """Return the split forms of some blocks of a host.

    Args:
        blocks: the blocks that are to run in two halves.
        first: place of the first of them in the host.

    Returns:
        One form per block; the first block of DiT of each class is tried.

    Raises:
        UnsupportedModelError: a block has none; the message names its class, and the known ones.

    Example:
        >>> split_blocks([nn.Linear(4, 4)])
        Traceback (most recent call last):
        ...
        adaptok.errors.UnsupportedModelError: block 0 is a Linear, ...
    """
    forms: list[SplitForm] = []
    tried: set[type] = set()
    for index, block in enumerate(blocks, first):
        form = find_split_form(block, index, tried=type(block) in tried)
        if form is None:
            raise UnsupportedModelError(refuse(block, index))
        tried.add(type(block))
        forms.append(form)
    return tuple(forms)


def find_split_form(block: nn.Module, index: int = 0, *, tried: bool = False) -> SplitForm | None:
    """Return the split form of a block, or None if none is known.

    Args:
        block: any module.
        index: its place in the host.
        tried: whether a block of its class has been tried.

    Returns:
        The form. A block of DiT is known by its attributes only, and has been tried with random
        modulation.
    """
    for layout in TIMM:
        if is_exactly(block, *layout.name):
            rotate = getattr(sys.modules.get(ROTATION[0]), ROTATION[1], None)
            return SplitTimmBlock(block, index, layout, rotate) if fits(block, layout) else None
    for tower in TOWERS:
        if is_exactly(block, *tower.block.name):
            found = fits(block, tower.block)
            return SplitTowerLayer(block, index, tower.block, tower) if found else None
    find = match_packed_form if tried else find_packed_form
    return SplitDiTBlock(block, index) if isinstance(find(block), PackedDiTBlock) else None


def fits(block: nn.Module, layout: BlockLayout) -> bool:
    """Say whether the parts of a block are those of its layout, and treat each token alike."""
    attn, mlp = block._modules.get(layout.attention), block._modules.get("mlp")
    if attn is None or mlp is None or is_heard(block) or is_heard(attn):
        return False
    norms = [name for name in layout.norms if name]
    after = [name for names in layout.after for name in names]
    known = {layout.attention, "mlp", *norms, *after, *layout.more}
    parts = [block._modules[name] for name in after if block._modules.get(name) is not None]
    return (
        {name for name, _ in block.named_children()} <= known
        and any(is_exactly(attn, *name) for name in layout.attentions)
        and any(is_exactly(mlp, *name) for name in layout.mlps)
        and not any(isinstance(part, nn.Conv2d) for part in mlp.children())
        and all(is_token_norm(block.get_submodule(name)) for name in norms)
        and all(
            isinstance(part, ALIKE)
            or is_token_norm(part)
            or any(is_exactly(part, *name) for name in layout.parts)
            for part in parts
            if part is not None
        )
    )


def refuse(block: nn.Module, index: int) -> str:
    """Return why a block has no split form, and which have one."""
    found = type(block).__name__
    known: dict[str, list[str]] = {}
    for home, name in [layout.name for layout in TIMM] + [tower.block.name for tower in TOWERS]:
        package, _, module = home.partition(".models.")
        known.setdefault(package, []).append(f"{module.partition('.')[0]}.{name}")
    listed = "; ".join(f"{package}: {', '.join(names)}" for package, names in known.items())
    parts = [name for name in ("attn", "attention", "self_attn") if name in block._modules]
    inside = f" with {type(block._modules[parts[0]]).__name__}" if parts else ""
    return (
        f"block {index} is a {found}{inside}, and it is not known where its attention ends and its "
        "MLP begins (blocks that run both side by side have no such place). Known are exactly, "
        f"with their own parts and without hooks on them, {listed}; and blocks of DiT and SiT. Act "
        "in front of the block instead"
    )
