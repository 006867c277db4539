"""Adapters that are missing, broken or hostile: one clear error, and the model as it was."""

import json
import struct

import pytest
import torch
from adapter_models import is_same, make_trained, state_of
from safetensors.torch import load_file, save_file

import adaptok
from adaptok.adapters import CARD, WEIGHTS, load, save
from adaptok.dc.host import HostRouter
from adaptok.errors import (
    CheckpointError,
    UnknownNameError,
)
from adaptok.testing import make_vit


@pytest.fixture
def folder(tmp_path):
    save(make_trained(), tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture(params=["bare", "wrapped"])
def model(request):
    """A model that an adapter may be loaded into, and that must not change when that fails."""
    vit = make_vit()
    if request.param == "wrapped":
        adaptok.wrap(vit, "dc", budget=0.7)
    before = state_of(vit)
    yield vit
    assert is_same(state_of(vit), before)


def edit(folder, change):
    card = json.loads((folder / CARD).read_text())
    change(card)
    (folder / CARD).write_text(json.dumps(card))


class TestBrokenFolders:
    def test_missing(self, tmp_path, model):
        with pytest.raises(CheckpointError, match=r"is no adapter: there is no adaptok\.json"):
            load(model, tmp_path / "nowhere")

    def test_weights_are_missing(self, folder, model):
        (folder / WEIGHTS).unlink()
        with pytest.raises(CheckpointError, match=r"there is no file .*adaptok\.safetensors"):
            load(model, folder)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "is no adapter that can be read"),
            ("{", "is no adapter that can be read"),
            ("[" * 100_000, "is no adapter that can be read"),
            ("[]", "is no adapter that can be read"),
            ('{"version": 1}', "host: Field required"),
            ("\x00\xff", "is no adapter that can be read"),
        ],
    )
    def test_a_card_that_is_none(self, folder, model, text, message):
        (folder / CARD).write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load(model, folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda card: card.update(version=2), "adapters up to version 1"),
            (lambda card: card["wrap"].update(version=9), "up to version 1"),
            (lambda card: card.update(more=1), "more: this option does not exist"),
            (lambda card: card["host"].update(width="wide"), "host: .*width: .*got 'wide'"),
            (lambda card: card["wrap"].update(span="all"), "wrap: .*span: .*got 'all'"),
        ],
    )
    def test_a_card_with_wrong_values(self, folder, model, change, message):
        edit(folder, change)
        with pytest.raises(CheckpointError, match=message):
            load(model, folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda wrap: wrap.update(budget={"keep": -1}), "keep is a fraction"),
            (lambda wrap: wrap.update(budget={"keep": 0.5, "drop": 0.1}), "exclude each other"),
            (lambda wrap: wrap.update(span=[0, 9]), "lies outside the 3 blocks"),
            (lambda wrap: wrap.update(chunker=None), "nothing was asked for"),
            (lambda wrap: wrap["router"].update(seed=1), "seed: this option does not exist"),
        ],
    )
    def test_a_wrap_that_cannot_be_made(self, folder, change, message):
        edit(folder, lambda card: change(card["wrap"]))
        vit = make_vit()
        with pytest.raises(CheckpointError, match=f"describes no wrap: .*{message}"):
            load(vit, folder)
        assert not adaptok.is_wrapped(vit)

    @pytest.mark.parametrize("kind", ["router", "chunker", "dechunker", "stack"])
    def test_a_part_that_is_not_installed(self, folder, model, kind):
        part = {"name": "no-such-thing"}
        edit(folder, lambda card: card["wrap"].update({kind: [part] if kind == "stack" else part}))
        with pytest.raises(UnknownNameError, match=r"needs a part that is not installed.*no-such"):
            load(model, folder)

    def test_a_backbone_that_is_not_installed(self, folder):
        edit(folder, lambda card: card["wrap"].update(backbone="no-such-host"))
        vit = make_vit()
        with pytest.raises(UnknownNameError, match=r"no-such-host.*install the plug-in"):
            load(vit, folder)
        assert not adaptok.is_wrapped(vit)


def write_raw(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(shape, first, last, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


class TestHostileWeights:
    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\x01\x02",
            struct.pack("<Q", 2**63) + b"{}",
            struct.pack("<Q", 10**9) + b"{}",
            struct.pack("<Q", 2) + b"{",
            struct.pack("<Q", 5) + b"[1,2]",
            struct.pack("<Q", 4) + b"\xff\xfe\x00\x01",
            b"\x80\x04\x95" + b"cos\nsystem\n" * 4,
            b"PK\x03\x04" + b"\x00" * 100,
        ],
    )
    def test_headers_that_are_none(self, folder, model, content):
        (folder / WEIGHTS).write_bytes(content)
        with pytest.raises(CheckpointError, match="is no complete safetensors file"):
            load(model, folder)

    @pytest.mark.parametrize(
        ("header", "data"),
        [
            ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),  # overlap
            ({"a": entry([2], 4, 12)}, bytes(12)),  # a hole
            ({"a": entry([2], 8, 0)}, bytes(8)),  # backwards
            ({"a": entry([2], 0, 8)}, bytes(4)),  # truncated
            ({"a": entry([2**40, 2**40], 0, 8)}, bytes(8)),  # overflow
            ({"a": entry([3], 0, 8)}, bytes(8)),  # another shape than data
            ({"a": entry([2], 0, 8, "X9")}, bytes(8)),
            ({"a": {"shape": [2]}}, bytes(8)),
        ],
    )
    def test_headers_that_lie(self, folder, model, header, data):
        write_raw(folder / WEIGHTS, header, data)
        with pytest.raises(CheckpointError, match="is no complete safetensors file"):
            load(model, folder)

    def test_truncated(self, folder, model):
        path = folder / WEIGHTS
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(CheckpointError, match="is no complete safetensors file"):
            load(model, folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda w: w.pop("blocks.adaptok.dc.router.logit.bias"),
                "router.logit.bias is missing",
            ),
            (lambda w: w.clear(), "is missing; .* more"),
            (lambda w: w.update(head=torch.zeros(2)), "head is none of its weights"),
            (
                lambda w: w.update({"blocks.0.attn.qkv.weight": torch.zeros(288, 96)}),
                "blocks.0.attn.qkv.weight is none of its weights",
            ),
            (
                lambda w: w.update({"blocks.adaptok.dc.router.logit.bias": torch.zeros(2)}),
                r"router.logit.bias has the shape \(2,\), \(1,\) is needed",
            ),
            (
                lambda w: w.update(
                    {"blocks.adaptok.dc.router.logit.bias": torch.zeros(1, dtype=torch.int64)}
                ),
                "router.logit.bias has the dtype torch.int64, torch.float32 is needed",
            ),
        ],
    )
    def test_weights_that_do_not_fit(self, folder, model, change, message):
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS)
        with pytest.raises(CheckpointError, match=rf"do not fit its wrap: .*{message}"):
            load(model, folder)

    def test_a_part_that_fails_while_it_takes_its_weights(self, folder, model, monkeypatch):
        def fail(self, *args, **kwargs):
            raise RuntimeError("no")

        monkeypatch.setattr(HostRouter, "_load_from_state_dict", fail)
        with pytest.raises(RuntimeError, match="no"):
            load(model, folder)
