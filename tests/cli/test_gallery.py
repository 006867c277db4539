"""`adaptok gallery`: all that is installed is on the picture, or named with its reason."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from see_figures import assert_tidy, words_of

import adaptok
from adaptok.cli import galleries
from adaptok.discovery import HOST
from adaptok.errors import BudgetError, ShapeError
from adaptok.see import draw_gallery, find_exhibits
from adaptok.see.gallery import Exhibit
from adaptok.see.pixel_host import make_pixel_host, write_angles
from adaptok.train.emoji import decode_emoji, read_emoji_index


class Broken(adaptok.Stage):
    effects = adaptok.Effects("tokens", changes_count=True)

    def forward(self, inner, call):
        raise ZeroDivisionError("a plug-in's own fault\nwith a second line")


class Silent(adaptok.Stage):
    effects = adaptok.Effects("tokens", changes_count=True)

    def forward(self, inner, call):
        return inner(call)


class LeftHalf(adaptok.Router):
    """Keeps the left half of each row."""

    def forward(self, tokens, context):
        h, w = tokens.grid
        row = torch.linspace(1, 0, w).repeat(h)
        return adaptok.Routing(row.expand(tokens.x.shape[0], -1))


@pytest.fixture(scope="module")
def plugin():
    """A third-party plug-in with a router, a stage that fails and one that tells nothing."""
    parts = {("stage", "a-broken"): Broken, ("stage", "a-silent"): Silent,
             ("router", "left-half"): LeftHalf}  # fmt: skip
    HOST.load_all()
    with HOST.registry.record("somebody"):
        for (kind, name), part in parts.items():
            HOST.registry.add(kind, name, part)
    yield
    for key in parts:
        del HOST.registry.entries[key]


@pytest.fixture(scope="module")
def images():
    index = read_emoji_index()
    names = [entry.name for entry in index.entries]
    chosen = decode_emoji(index)[[names.index("parrot"), names.index("rainbow")]]
    return torch.from_numpy(chosen.copy()).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def exhibits(plugin, images):
    told = []
    found = find_exhibits(
        images, keep=0.25, progress=lambda done, total: told.append((done, total))
    )
    assert told[-1] == (len(found), len(found))
    return {(item.kind, item.name): item for item in found}


def test_every_installed_name_is_there(exhibits):
    for kind in ("chunkers", "stages", "routers"):
        names = adaptok.available(kind)
        assert [name for where, name in exhibits if where == kind] == list(names)


def test_same_budget_for_all(exhibits):
    shown = [item for item in exhibits.values() if item.token is not None]
    assert {item.name for item in shown} >= {
        "dc", "apt", "graph", "hnet", "tome", "tomesd", "evit", "dynamicvit", "covering", "random",
    }  # fmt: skip
    for item in shown:
        assert item.counts == (64, 64), item.name
        assert item.own.sum((1, 2)).tolist() == [64, 64], item.name
        assert item.token.shape == (2, 16, 16)


def test_methods_differ_and_images_do(exhibits):
    shown = {key: item for key, item in exhibits.items() if item.token is not None}
    seen = {item.token.tobytes() for item in shown.values()}
    assert len(seen) >= len(shown) - 2  # dc is chunker and router, and has the prior of covering
    for item in shown.values():
        if item.name not in ("random", "left-half"):
            assert (item.token[0] != item.token[1]).any(), item.name


def test_what_a_router_of_a_plugin_keeps(exhibits):
    own = exhibits["routers", "left-half"].own
    assert own[:, :, :4].all()
    assert not own[:, :, 4:].any()


def test_an_edge_gets_more_tokens_than_the_background(exhibits, images):
    own = exhibits["routers", "predictability"].own
    cells = images.float().reshape(2, 3, 16, 4, 16, 4)
    varied = cells.amax((1, 3, 5)) - cells.amin((1, 3, 5)) > 100
    for kept, edge in zip(own, varied.numpy(), strict=True):
        assert kept[edge].mean() > 1.5 * kept[~edge].mean()


def test_what_is_not_shown_has_a_reason(exhibits):
    broken = exhibits["stages", "a-broken"]
    assert broken.token is None
    assert broken.problem == "ZeroDivisionError: a plug-in's own fault"
    assert "told no trace" in exhibits["stages", "a-silent"].problem
    assert "reuses steps" in exhibits["stages", "teacache"].problem
    assert "blocks" in exhibits["stages", "exit"].problem
    missing = [item for item in exhibits.values() if item.token is None]
    assert all(item.problem and item.kind == "stages" for item in missing)


def test_fresh_weights_are_marked(exhibits):
    assert exhibits["stages", "dynamicvit"].fresh
    assert exhibits["chunkers", "dc"].fresh
    assert not exhibits["stages", "tome"].fresh
    assert not exhibits["chunkers", "apt"].fresh  # only its features have weights
    assert not exhibits["routers", "norm"].fresh


def test_picture(exhibits, images):
    figure = draw_gallery(images, list(exhibits.values()))
    shown = [item for item in exhibits.values() if item.token is not None]
    assert len(figure.axes) == 2 * (1 + len(shown))
    words = words_of(figure)
    for needed in ("64 tokens for 256 cells", "dynamicvit*", "tome", "left-half", "Not shown",
                   "a-broken: ZeroDivisionError", "set by hand", "not trained"):  # fmt: skip
        assert needed in words.replace("\n", " ")
    assert_tidy(figure)
    first_router = next(place for place, item in enumerate(shown) if item.name == "left-half")
    pixels = figure.axes[2 * (1 + first_router)].images[0].get_array()
    plain = images[0].permute(1, 2, 0).numpy()
    assert (pixels[:, :16] == plain[:, :16]).all()
    assert (pixels[:, 16:] != plain[:, 16:]).any(-1).all()


def test_pixel_host_sees_colours_and_nothing_else():
    host, images = make_pixel_host(64, 4), torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    x = write_angles(images)
    tokens = host.patch_embed(x)
    assert tokens.square().sum(-1).std() < 1e-3
    assert tokens.mean(-1).abs().max() < 1e-5
    again = make_pixel_host(64, 4)
    assert all(
        torch.equal(a, b) for a, b in zip(host.parameters(), again.parameters(), strict=True)
    )
    turned = host(write_angles(images.flip(-1)))
    assert torch.allclose(host(x)[:, :16].sum(), turned[:, :16].sum(), atol=1e-3)  # no places


def test_bad_input(images):
    with pytest.raises(BudgetError):
        find_exhibits(images, keep=1.5)
    with pytest.raises(ShapeError, match="square images"):
        find_exhibits(images[:, :, :32])
    with pytest.raises(ShapeError, match="one to six images"):
        draw_gallery(images, [])
    other = Exhibit("x", "stages", np.zeros((1, 16, 16), int), np.ones((1, 16, 16), bool), (1,))
    with pytest.raises(ShapeError, match="that they saw, got 2"):
        draw_gallery(images, [other])


def test_command(run, plugin, tmp_path):
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)).save(
        photo
    )
    path = tmp_path / "new" / "gallery.png"
    result = run("gallery", "--output", path, "--image", photo, "--keep", 0.5, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["picture"] == str(path)
    tokens = {item["name"]: item["tokens"] for item in said["shown"]}
    assert tokens["tome"] == tokens["left-half"] == [128]
    reasons = {item["name"]: item["reason"] for item in said["not_shown"]}
    assert "ZeroDivisionError" in reasons["a-broken"]
    with Image.open(path) as image:
        assert min(image.size) > 500


def test_wrong_options(run, tmp_path, monkeypatch):
    for options, words in (
        (["--emoji", "parot"], "did you mean parrot"),
        (["--image", tmp_path / "none.png"], "cannot read the image"),
        (["--keep", "2"], "keep"),
        ([option for _ in range(7) for option in ("--emoji", "parrot")], "at most 6 images"),
    ):
        result = run("gallery", "--output", tmp_path / "gallery.png", *options)
        assert result.exit_code == 2, options
        assert words in result.stderr
    monkeypatch.setattr(galleries, "find_exhibits", pytest.fail)  # before anything is run
    result = run("gallery", "--output", tmp_path / "gallery.txt")
    assert result.exit_code == 1
    assert "'txt' is no format of pictures" in result.stderr
