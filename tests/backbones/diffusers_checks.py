"""Diffusers hosts, held against their own blocks: a loop over samples, tokens picked by hand."""

from dataclasses import replace

import torch
from backbones.host_checks import KEEP, find_case, record_blocks

import adaptok
from adaptok.backbones.diffusers_dit import DiffusersDiT
from adaptok.backbones.diffusers_flux import DiffusersFlux
from adaptok.backbones.diffusers_pixart import DiffusersPixArt
from adaptok.backbones.diffusers_sd3 import DiffusersSD3
from adaptok.backbones.diffusers_wan import DiffusersWan
from adaptok.backbones.diffusers_zimage import DiffusersZImage

HOSTS = {
    "dit": DiffusersDiT,
    "pixart": DiffusersPixArt,
    "sd3": DiffusersSD3,
    "sd3.5": DiffusersSD3,
    "flux": DiffusersFlux,
    "flux-schnell": DiffusersFlux,
    "z_image": DiffusersZImage,
    "wan": DiffusersWan,
    "wan2.2": DiffusersWan,
}


def find(name):
    return find_case(f"diffusers/{name}")


def wrap_host(name, host=None, router="norm", budget=0.5, **options):
    """Build a case and wrap it; norms as the router, so that nothing of it is new."""
    model = find(name).build()
    host = HOSTS[name] if host is None else host
    options = {"budget": budget, "router": router} | options
    return adaptok.wrap(model, "dc", backbone=host.match(model), **options)


def call(name, model, **options):
    """Run a case's batch of three, with further arguments by name."""
    case = find(name)
    inputs = case.inputs(getattr(model, "_orig_mod", model))
    with torch.no_grad():
        return case.output(model(*inputs.args, **(inputs.kwargs | options)))


def take_image(given, sample, cells, end):
    """Return a sample's rows of an input with one row per cell, and perhaps more behind them."""
    if given is None:
        return None
    rows = torch.cat([cells, torch.arange(end, given.shape[1])])
    return given[min(sample, len(given) - 1)][None, rows]


def run_dit(blocks, args, kwargs, sample, cells, n):
    x, given = args[0][sample : sample + 1, cells], {}
    for key, value in kwargs.items():
        given[key] = value[sample : sample + 1] if isinstance(value, torch.Tensor) else value
    if given["attention_mask"] is not None:
        given["attention_mask"] = given["attention_mask"][:, :, cells]
    for block in blocks:
        x = block(x, **given)
    return {"x": x}


def run_sd3(blocks, args, kwargs, sample, cells, n):
    x = kwargs["hidden_states"][sample : sample + 1, cells]
    text = kwargs["encoder_hidden_states"][sample : sample + 1]
    for block in blocks:
        text, x = block(x, text, kwargs["temb"][sample : sample + 1])
    return {"x": x, "text": text}


def run_flux(blocks, args, kwargs, sample, cells, n):
    x = kwargs["hidden_states"][sample : sample + 1, cells]
    text = kwargs["encoder_hidden_states"][sample : sample + 1]
    s = text.shape[1]
    tables = tuple(torch.cat([t[:s], t[s:][cells]]) for t in kwargs["image_rotary_emb"])
    for block in blocks:
        text, x = block(x, text, kwargs["temb"][sample : sample + 1], tables)
    return {"x": x, "text": text}


def run_z_image(blocks, args, kwargs, sample, cells, n):
    x, mask, freqs = (take_image(args[i], sample, cells, n) for i in range(3))
    if mask is not None:  # the padding behind the longest text is no part of a call alone
        length = int(mask.sum())
        assert bool(mask[:, :length].all())
        x, mask, freqs = x[:, :length], None, freqs[:, :length]
    for block in blocks:
        x = block(x, mask, freqs, args[3][sample : sample + 1])
    return {"x": x[:, : len(cells)], "rest": x[:, len(cells) :]}


def run_wan(blocks, args, kwargs, sample, cells, n):
    x, text, temb, tables = args
    temb = temb[sample : sample + 1]
    temb = temb[:, cells] if temb.ndim == 4 else temb
    x, tables = x[sample : sample + 1, cells], tuple(t[:, cells] for t in tables)
    for block in blocks:
        x = block(x, text[sample : sample + 1], temb, tables)
    return {"x": x}


BY_HAND = {
    "dit": run_dit,
    "pixart": run_dit,
    "sd3": run_sd3,
    "sd3.5": run_sd3,
    "flux": run_flux,
    "flux-schnell": run_flux,
    "z_image": run_z_image,
    "wan": run_wan,
    "wan2.2": run_wan,
}


def read_parts(out, sample, cells, n):
    """Return what left the block list of a sample: kept cells, text, and what follows the cells."""
    if isinstance(out, tuple):
        text, x = out
        text = None if text is None else text[sample : sample + 1]
        return {"x": x[sample : sample + 1, cells], "text": text}
    return {"x": out[sample : sample + 1, cells], "rest": out[sample : sample + 1, n:]}


def check_oracle(name, model, keep, **options):
    """Compare kept tokens, text and all else of each sample with a loop over its blocks by hand."""
    case = find(name)
    path = case.containers[0]
    blocks = model.get_submodule(path).all_blocks
    with adaptok.budget(model, keep=keep), adaptok.trace(model) as trace:
        args, kwargs, out, kept = record_blocks(model, path, lambda: call(name, model, **options))
    assert trace.steps[0].grid == case.cells
    n = kept.shape[1]
    for sample in range(len(kept)):
        cells = kept[sample].nonzero().flatten()
        with torch.no_grad():
            expected = BY_HAND[name](blocks, args, kwargs, sample, cells, n)
        found = read_parts(out, sample, cells, n)
        for key, value in expected.items():
            if value is None:
                assert found[key] is None
                continue
            part = found[key][:, : value.shape[1]]
            torch.testing.assert_close(part, value, rtol=0, atol=2e-5)
    return kept


def check_oracles(name, model, **options):
    """The oracle with counts that differ, and with equal ones of different cells."""
    kept = check_oracle(name, model, list(KEEP), **options)
    assert kept.sum(1).max() >= 2 * kept.sum(1).min()
    kept = check_oracle(name, model, 0.5, **options)
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[1], kept[2])


def change_inputs(cls, change):
    """Return a twin of an adapter whose calls are changed after they were read."""

    class Twin(cls):
        def read(self, numbers, args, kwargs):
            return change(super().read(numbers, args, kwargs))

    return Twin


def change_token_inputs(cls, change):
    """Return a twin of an adapter whose per-token inputs are changed."""

    def change_call(call):
        inputs = {key: change(value) for key, value in call.token_inputs.items()}
        return replace(call, token_inputs=inputs)

    return change_inputs(cls, change_call)
