"""Small models to prune, and pruning written as plain loops over samples and tokens."""

import math

import torch
import torch.nn.functional as F

from adaptok.testing import make_vit

IMAGES = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(5))
IMAGES = IMAGES * torch.tensor([1.0, 0.4, 2.0])[:, None, None, None]
CELLS = 24
DEPTH = 5
BLOCKS = (1, 2, 3)


def make_model(depth=DEPTH):
    return make_vit(depth=depth)


def enter(vit, images):
    """The tokens in front of the first block, class token first."""
    x = vit.patch_embed(images)
    return vit.norm_pre(vit._pos_embed(x))


def attend(block, x):
    """Attention of one sample `(s d)` with its residual, written out; and that of the class."""
    attn = block.attn
    y = block.norm1(x)
    heads = attn.num_heads
    q, k, v = attn.qkv(y).view(len(y), 3, heads, -1).permute(1, 2, 0, 3)
    weights = torch.stack(
        [(q[head] @ k[head].T * q.shape[-1] ** -0.5).softmax(-1) for head in range(heads)]
    )
    mixed = torch.cat([weights[head] @ v[head] for head in range(heads)], dim=-1)
    return x + block.ls1(attn.proj(mixed)), weights[:, 0]


def finish(block, x):
    return x + block.ls2(block.mlp(block.norm2(x)))


def leave(vit, x):
    return vit.forward_head(vit.norm(x))


def sort_down(scores):
    """Indices from the highest score to the lowest, the first of equal ones first."""
    return sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))


@torch.no_grad()
def prune_evit(vit, image, counts, *, fuse):
    """EViT on one image: the output, and for each cell its token behind each site."""
    x = enter(vit, image[None])[0]
    owner = list(range(CELLS))
    events, lost = [], {}
    for number, block in enumerate(vit.blocks):
        x, weights = attend(block, x)
        if number in counts:
            score = weights.mean(0)[1:]
            count = counts[number]
            m = len(score)
            stay = count - 1 if fuse and count < m else count
            order = sort_down(score)
            kept = sorted(order[:stay])
            rows = [x[0], *(x[1 + i] for i in kept)]
            new = {old: place for place, old in enumerate(kept)}
            if fuse and count < m:
                fused = torch.zeros_like(x[0])
                for i in order[stay:]:
                    fused = fused + score[i] * x[1 + i]
                    new[i] = stay
                rows.append(fused)
            for cell in range(CELLS):
                if owner[cell] >= 0:
                    now = new.get(owner[cell], -1)
                    if now < 0:
                        lost[cell] = x[1 + owner[cell]]
                    owner[cell] = now
            x = torch.stack(rows)
            events.append(tuple(owner))
        x = finish(block, x)
    cells = [lost[i] if owner[i] < 0 else x[1 + owner[i]] for i in range(CELLS)]
    return torch.stack([x[0], *cells]), events


def count_evit(rate, m, *, fuse):
    return min(m, math.ceil(rate * m) + fuse)


def predict(predictor, x):
    """DynamicViT's predictor on the tokens of one sample that are left, `(m d)`."""
    y = F.gelu(predictor.enter(predictor.norm(x)))
    half = y.shape[1] // 2
    mean = y[:, half:].sum(0) / len(y)
    rows = [torch.cat([row[:half], mean]) for row in y]
    z = F.gelu(predictor.narrow(torch.stack(rows)))
    return F.log_softmax(predictor.decide(F.gelu(predictor.narrower(z))), dim=-1)


@torch.no_grad()
def prune_dynamic(vit, predictors, image, counts):
    """DynamicViT's inference on one image: all tokens in the end, and owners at each site."""
    x = enter(vit, image[None])[0]
    owner = list(range(CELLS))
    events, lost = [], {}
    sites = list(counts)
    for number, block in enumerate(vit.blocks):
        if number in counts:
            score = predict(predictors[sites.index(number)], x[1:])[:, 0]
            kept = sorted(sort_down(score)[: counts[number]])
            new = {old: place for place, old in enumerate(kept)}
            for cell in range(CELLS):
                if owner[cell] >= 0:
                    now = new.get(owner[cell], -1)
                    if now < 0:
                        lost[cell] = x[1 + owner[cell]]
                    owner[cell] = now
            x = torch.stack([x[0], *(x[1 + i] for i in kept)])
            events.append(tuple(owner))
        x, _ = attend(block, x)
        x = finish(block, x)
    cells = [lost[i] if owner[i] < 0 else x[1 + owner[i]] for i in range(CELLS)]
    return torch.stack([x[0], *cells]), events


@torch.no_grad()
def run_traced(vit, images=IMAGES):
    """All tokens behind the last block (norm undone by none), and the plan."""
    import adaptok

    with adaptok.trace(vit) as seen:
        found = vit.forward_features(images)
    return found, seen.steps[0].plans[0]
