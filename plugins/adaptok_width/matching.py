"""Which blocks have heads and channels that can run apart.

Research code copies the block of DiT from file to file, so that its class says nothing: there a
form is found by the block's attributes, and tried against the block itself.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from adaptok import BlockCall, BlockRange
from adaptok.errors import StackError
from adaptok.float32 import without_autocast
from adaptok_width.forms import DiffusersForm, ResearchForm, WidthForm, gelu_tanh, is_touched
from adaptok_width.running import run_whole

MODULATIONS = ("adaLN_modulation", "modulation")
PARTS = {"norm1", "attn", "norm2", "mlp"}
ATTENTION_PARTS = {"qkv", "proj"}
MORE_ATTENTION_PARTS = {"q_norm", "k_norm", "attn_drop", "proj_drop"}
MLP_PARTS = {"fc1", "fc2"}
MORE_MLP_PARTS = {"act", "drop1", "drop2", "drop"}
BASIC = "diffusers.models.attention"
TOKENS = 5
TOLERANCE, HALF_TOLERANCE = 1e-4, 5e-2
KNOWN = (
    "known are blocks of DiT and SiT in the layout of their research code (norm1, attn with qkv "
    "and proj, norm2, mlp of two layers, adaLN_modulation) and BasicTransformerBlock of diffusers "
    "with ada_norm_zero, without hooks and without adapters on their layers"
)


def find_forms(inner: BlockRange) -> tuple[WidthForm, ...]:
    """Return the forms of all blocks of a range; the first one of each class is tried.

    Args:
        inner: the blocks.

    Returns:
        One form per block.

    Raises:
        StackError: a block has none.
    """
    forms: list[WidthForm] = []
    tried: dict[type, WidthForm] = {}
    for index in range(inner.first, inner.last):
        block = inner.module(index)
        like = tried.get(type(block))
        form = match_form(block, like) if like is not None else find_form(block)
        if form is None:
            raise StackError(
                f"'width' cuts heads and channels out of the layers of a block, and block {index}, "
                f"a {type(block).__name__}, has no form for that: {KNOWN}"
            )
        tried[type(block)] = form
        forms.append(form)
    return tuple(forms)


def find_form(block: nn.Module) -> WidthForm | None:
    """Return the form of a block, or None if none is known.

    Args:
        block: any module.

    Example:
        >>> find_form(nn.Linear(4, 4)) is None
        True
    """
    return next((form for form in list_forms(block) if is_proved(form)), None)


def match_form(block: nn.Module, like: WidthForm) -> WidthForm | None:
    """Return the form of a block of a class whose first block was tried."""
    same = (type(like), getattr(like.activation, "__name__", type(like.activation)))
    for form in list_forms(block):
        if (type(form), getattr(form.activation, "__name__", type(form.activation))) == same:
            return form
    return None


def list_forms(block: Any) -> Iterator[WidthForm]:  # noqa: ANN401
    """Give the forms that fit the attributes of a block, untried."""
    if is_touched(block):
        return
    if fits_basic(block):
        yield DiffusersForm(block, block.ff.net[0].gelu)
        return
    found = read_mlp(block._modules.get("mlp")) if fits_research(block) else None
    if found is None:
        return
    layers, drops, activations = found
    modulation = next(name for name in MODULATIONS if name in block._modules)
    for activation in activations:
        yield ResearchForm(block, activation, modulation, layers, drops)


def fits_research(block: nn.Module) -> bool:
    """Say whether a block has the attributes of DiT's, and no others."""
    names = set(block._modules)
    if not any(names == PARTS | {modulation} for modulation in MODULATIONS):
        return False
    attn: Any = block._modules["attn"]
    inside = {name for name, part in attn._modules.items() if not isinstance(part, nn.Identity)}
    layers = [attn._modules.get(name) for name in ATTENTION_PARTS]
    return (
        set(attn._modules) >= ATTENTION_PARTS
        and inside <= ATTENTION_PARTS | MORE_ATTENTION_PARTS
        and all(type(layer) is nn.Linear for layer in layers)
        and isinstance(getattr(attn, "num_heads", None), int)
        and not any(module._parameters or module._buffers for module in (block, attn))
    )


def read_mlp(mlp: Any) -> tuple[tuple[str, str], tuple[str, str], tuple[Any, ...]] | None:  # noqa: ANN401
    """Return the names of an MLP's layers and dropouts, and what may stand between them."""
    parts = {name: p for name, p in mlp._modules.items() if not isinstance(p, nn.Identity)}
    if any(mlp._parameters) or is_touched(mlp):
        return None
    if type(mlp) is nn.Sequential:
        layers = [name for name, part in parts.items() if type(part) is nn.Linear]
        drops = [name for name, part in parts.items() if isinstance(part, nn.Dropout)]
        others = [name for name in parts if name not in (*layers, *drops)]
        if len(layers) != 2 or len(others) != 1:
            return None
        between, behind = ([*drops, "", ""])[:2]
        if len(drops) == 1 and list(parts).index(drops[0]) > list(parts).index(layers[1]):
            between, behind = "", drops[0]
        return (layers[0], layers[1]), (between, behind), (parts[others[0]],)
    names = set(parts)
    if not MLP_PARTS <= names <= MLP_PARTS | MORE_MLP_PARTS:
        return None
    if any(type(parts[name]) is not nn.Linear for name in MLP_PARTS):
        return None
    known = (parts["act"],) if "act" in parts else (gelu_tanh, F.gelu)
    drops_of = ("drop", "drop") if "drop" in parts else ("drop1", "drop2")
    return ("fc1", "fc2"), drops_of, known


def fits_basic(block: Any) -> bool:  # noqa: ANN401
    """Say whether a block is exactly that of diffusers' DiT."""
    if type(block) is not getattr(sys.modules.get(BASIC), "BasicTransformerBlock", None):
        return False
    attn, net = block.attn1, block.ff.net
    plain = {"to_q", "to_k", "to_v", "to_out"} == set(attn._modules)
    return (
        block.norm_type == "ada_norm_zero"
        and block.attn2 is None
        and block.pos_embed is None
        and not block.only_cross_attention
        and getattr(block, "_chunk_size", None) is None
        and getattr(block, "fuser", None) is None
        and plain
        and not attn.residual_connection
        and attn.rescale_output_factor == 1.0
        and type(net[0]).__name__ == "GELU"
        and type(attn.processor).__name__ in ("AttnProcessor2_0", "AttnProcessor")
    )


def is_proved(form: WidthForm) -> bool:
    """Say whether a form computes what its block computes.

    That of diffusers is known by its exact class. For the others random numbers take the place of
    the modulation: a fresh block has gates of zero, and would agree with anything. The block itself
    stays as it is.
    """
    if not isinstance(form, ResearchForm):
        return True
    block = form.block
    children = block._modules[form.modulation]
    last = children[-1] if isinstance(children, nn.Sequential) else children
    weight = getattr(last, "weight", None)
    if weight is None or weight.ndim != 2 or weight.shape[0] % 6:
        return False
    if weight.is_meta:
        return True  # tried by the first call: the identity does not hold if it is wrong
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(weight)

    path = f"block.{form.modulation}" + (f".{len(children) - 1}" if last is not children else "")
    noise = {
        f"{path}.{name}": draw(*value.shape) / value[0].numel() ** 0.5
        for name, value in last.named_parameters(recurse=False)
    }
    inputs = (draw(2, TOKENS, weight.shape[0] // 6), draw(2, weight.shape[1]))
    modes = {module: module.training for module in block.modules()}
    block.eval()
    try:
        with torch.no_grad(), without_autocast(weight):
            expected, found = torch.func.functional_call(Trial(form), noise, inputs)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False  # it takes something else, or is put together in another way
    finally:
        for module, mode in modes.items():
            module.training = mode
    if expected.shape != found.shape:
        return False
    allowed = TOLERANCE if weight.dtype in (torch.float32, torch.float64) else HALF_TOLERANCE
    return bool((found - expected).abs().max() <= allowed * expected.abs().max())


class Trial(nn.Module):
    """Runs a block and its form on the same tokens."""

    def __init__(self, form: WidthForm) -> None:
        super().__init__()
        self.block = form.block
        self.form = form

    def forward(
        self, x: Float[Tensor, "b s d"], condition: Float[Tensor, "b c"]
    ) -> tuple[Float[Tensor, "b s d"], Float[Tensor, "b s d"]]:
        """Return the tokens after the block, and after its form."""
        call = BlockCall(x, (x.shape[1],), condition=condition)
        return self.block(x, condition), run_whole(self.form, call)
