"""DyDiT in loops: everything runs, and what is off is multiplied by zero."""

import torch
import torch.nn.functional as F

import adaptok
from adaptok.dc.baseline import DiT
from adaptok.dc.config import DiTConfig
from benchmarks.architectures.facebook_models import DiT as ResearchDiT

WIDTH, DEPTH, HEADS = 96, 4, 6


def fill(model, seed=0, skip=()):
    """Give every parameter a value that matters: fresh blocks have gates of zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".adaptok." in name or name in skip or not p.requires_grad:
                continue
            fan = p.shape[-1] if p.ndim > 1 else 9
            p.copy_(torch.randn(p.shape, generator=generator) / fan**0.5)
    return model


def make_dc(seed=0):
    config = DiTConfig(
        hidden_size=WIDTH, depth=DEPTH, num_heads=HEADS, latent_size=8, num_classes=5
    )
    return fill(DiT(config), seed).eval()


def make_dcdit(layout="packed", seed=0):
    config = adaptok.DCDiTConfig(
        hidden_size=WIDTH, depth=DEPTH, num_heads=HEADS, latent_size=8, num_classes=5, layout=layout
    )
    return fill(adaptok.DCDiT(config), seed).eval()


def make_research(seed=0):
    model = ResearchDiT((8, 12), hidden_size=WIDTH, depth=DEPTH, num_heads=HEADS)
    return fill(model, seed).eval()


def make_diffusers(seed=0):
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
        num_layers=DEPTH,
        in_channels=4,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    return fill(model, seed).eval()


def make_inputs(model, b=3, seed=1, times=(900.0, 420.0, 30.0)):
    generator = torch.Generator().manual_seed(seed)
    shape = (8, 12) if isinstance(model, ResearchDiT) else (8, 8)
    x = torch.randn(b, 4, *shape, generator=generator)
    t = torch.tensor([times[i % len(times)] for i in range(b)])
    return x, t, torch.arange(b) % 4


def fill_gates(stage, seed=3, bias=0.0):
    """Give routers weights with which every block, step and token is judged differently."""
    generator = torch.Generator().manual_seed(seed)

    def draw(p, scale):
        return torch.randn(p.shape, generator=generator) * scale

    with torch.no_grad():
        stage.gates.step.weight.copy_(draw(stage.gates.step.weight, 0.3))
        stage.gates.step.bias.copy_(bias + draw(stage.gates.step.bias, 0.3))
        for router in stage.gates.tokens:
            router.squeeze.weight.copy_(draw(router.squeeze.weight, 0.4))
            router.squeeze.bias.copy_(draw(router.squeeze.bias, 0.2))
            router.score.weight.copy_(draw(router.score.weight, 1.0))
            router.score.bias.fill_(bias)
    return stage


def wrap_width(model, budget=None, bias=0.0, seed=3, stack=(), verify=True, **options):
    """Wrap a model, and fill the routers of its width stage."""
    stack = [{"name": "width"} | options, *stack]
    adaptok.wrap(model, stack=stack, budget=budget, verify=verify)
    stage = next(m for m in model.modules() if type(m).__name__ == "DynamicWidth")
    fill_gates(stage, seed, bias)
    return model, stage


def step_waves(t, steps):
    """The waves of a step, one by one."""
    ratio = (32.0 / 0.5) ** (1 / 15)
    angles = [2 * torch.pi * 0.5 * ratio**i * t / steps for i in range(16)]
    angles = torch.tensor(angles)
    return torch.cat([angles.cos(), angles.sin()])


def step_masks(stage, block, t):
    """Which heads and groups of a block run at a step, as zeros and ones."""
    shape, router = stage.gates.shape, stage.gates.step
    logits = router.weight[block] @ step_waves(t, stage.steps) + router.bias[block]
    logits = logits.detach()
    count = shape.heads - 1 if stage.gate_heads else 0
    heads, groups = torch.ones(shape.heads), torch.ones(shape.groups)
    if stage.gate_heads:
        heads[1:] = (logits[:count] > 0).float()
    groups[1:] = (logits[count:] > 0).float()
    return heads, groups


def token_mask(stage, block, y, keep=None):
    """Which of the tokens (n d) of one sample run the MLP."""
    if not stage.gate_tokens:
        return torch.ones(len(y))
    router = stage.gates.tokens[block]
    logits = []
    for token in y:
        normed = (token - token.mean()) / (token.var(unbiased=False) + 1e-5).sqrt()
        hidden = F.gelu(router.squeeze.weight @ normed + router.squeeze.bias)
        logits.append((hidden * router.score.weight).sum() + router.score.bias)
    logits = torch.stack(logits).detach()
    if keep is None:
        return (logits > 0).float()
    count = max(1, int(keep * len(y) + 0.5))
    order = sorted(range(len(y)), key=lambda i: (-float(logits[i].sigmoid()), i))
    mask = torch.zeros(len(y))
    mask[order[:count]] = 1
    return mask


def run_block(block, index, x, c, t, stage, keep=None):
    """One block on one sample (n d) with its condition (c)."""
    modulation = getattr(block, "adaLN_modulation", None) or block.modulation
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation(c[None])[0].chunk(6)
    heads, groups = step_masks(stage, index, t)
    y = block.norm1(x[None])[0] * (1 + scale1) + shift1
    q, k, v = block.attn.qkv(y).chunk(3, dim=1)
    size = q.shape[1] // len(heads)
    mixed = []
    for head, on in enumerate(heads):
        part = slice(head * size, (head + 1) * size)
        weights = (q[:, part] @ k[:, part].T / size**0.5).softmax(1)
        mixed.append(on * (weights @ v[:, part]))
    x = x + gate1 * block.attn.proj(torch.cat(mixed, dim=1))
    y = block.norm2(x[None])[0] * (1 + scale2) + shift2
    first, last = (
        (block.mlp[0], block.mlp[2])
        if isinstance(block.mlp, torch.nn.Sequential)
        else (block.mlp.fc1, block.mlp.fc2)
    )
    hidden = F.gelu(first(y), approximate="tanh")
    hidden = hidden * groups.repeat_interleave(hidden.shape[1] // len(groups))
    return x + token_mask(stage, index, y, keep)[:, None] * gate2 * last(hidden), (heads, groups)


class OracleBlock(torch.nn.Module):
    """Stands in a model for one of its blocks, and runs it in loops."""

    def __init__(self, block, index, stage, times, keep=None):
        super().__init__()
        self.inner = (block, stage)
        self.index, self.times, self.keep = index, times, keep

    def forward(self, x, c):
        block, stage = self.inner
        keeps = self.keep if isinstance(self.keep, list) else [self.keep] * len(x)
        outs = [
            run_block(block, self.index, *one, stage, keep)[0]
            for *one, keep in zip(x, c, self.times.tolist(), keeps, strict=True)
        ]
        return torch.stack(outs)


def run_oracle(model, stage, inputs, keep=None):
    """The model with each block in loops; the model is left as it was."""
    blocks = model.blocks
    model.blocks = torch.nn.ModuleList(
        OracleBlock(block, index, stage, inputs[1], keep) for index, block in enumerate(blocks)
    )
    try:
        with torch.no_grad():
            return model(*inputs)
    finally:
        model.blocks = blocks
