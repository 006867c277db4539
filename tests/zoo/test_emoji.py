import dataclasses
import json
import re
from collections import Counter, defaultdict
from importlib.resources import files

import numpy as np
import pytest
import torch

from adaptok.errors import DataError
from adaptok.train.data import load_emoji
from adaptok.train.emoji import decode_emoji, read_emoji_index

ZOO = files("adaptok").joinpath("zoo")
CLASSES = (
    "Activities",
    "Animals & Nature",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)
PEOPLE = {
    "man", "woman", "men", "women", "person", "people", "adult", "boy", "girl", "child", "male",
    "female", "old", "older",
}  # fmt: skip
FILLERS = {"with", "and", "the", "in", "a", "of", "getting", "two"}
TONES = {"light", "medium", "dark", "skin", "tone", "type", "fitzpatrick"}


@pytest.fixture(scope="module")
def index():
    return read_emoji_index()


@pytest.fixture(scope="module")
def pixels(index):
    return decode_emoji(index)


def strip_code_points(code_points):
    """An independent, coarser rule: without tones, genders and joiners."""
    kept = [
        part
        for part in code_points.split("-")
        if not re.fullmatch("1f3f[b-f]|fe0f|200d|2640|2642|1f9b[0-3]", part)
    ]
    return tuple("1f9d1" if part in ("1f468", "1f469") else part for part in kept)


def count_leaks(entries, key):
    splits = defaultdict(set)
    for entry in entries:
        splits[key(entry)].add(entry.split)
    return [name for name, found in splits.items() if name and len(found) > 1]


def test_counts(index):
    assert index.classes == CLASSES
    assert len(index.entries) == 3121
    assert sum(not entry.is_skin_variant for entry in index.entries) == 1601
    counts = Counter((entry.category, entry.split) for entry in index.entries)
    for category in CLASSES:
        train, test = counts[category, "train"], counts[category, "test"]
        assert test >= 10
        assert 0.12 < test / (train + test) < 0.18
    assert counts.total() == 3121
    assert len({entry.code_points for entry in index.entries}) == 3121


def test_no_base_emoji_is_in_both_splits(index):
    assert count_leaks(index.entries, lambda entry: entry.base) == []
    assert count_leaks(index.entries, lambda entry: strip_code_points(entry.code_points)) == []


def test_no_name_is_in_both_splits(index):
    def strip(entry):
        words = re.findall("[a-z0-9-]+", entry.name.lower())
        return entry.category, " ".join(w for w in words if w not in PEOPLE | FILLERS | TONES)

    assert count_leaks(index.entries, lambda entry: entry.name) == []
    assert count_leaks(index.entries, strip) == []


def test_leak_check_finds_a_leak(index):
    """The checks above can fail: a moved skin variant is found by all of them."""
    moved = [
        dataclasses.replace(entry, split="test")
        if entry.code_points == "1f44b-1f3fb"
        else dataclasses.replace(entry, split="train")
        for entry in index.entries
    ]
    assert count_leaks(moved, lambda entry: entry.base) == ["1f44b"]
    assert count_leaks(moved, lambda entry: strip_code_points(entry.code_points)) == [("1f44b",)]
    assert count_leaks(moved, lambda entry: entry.name) == ["waving hand sign"]


def test_no_test_picture_has_a_copy_in_train(index, pixels):
    flat = torch.from_numpy(pixels.reshape(len(pixels), -1)).float() / 255
    # The difference of means is at most the mean difference: it finds all candidates.
    blocks = pixels.reshape(-1, 8, 8, 8, 8, 3).mean(axis=(2, 4)).reshape(len(pixels), -1)
    blocks = torch.from_numpy(blocks).float() / 255
    near = torch.cdist(blocks, blocks, p=1) / blocks.shape[1] < 0.01
    in_test = torch.tensor([entry.split == "test" for entry in index.entries])

    def differ(first, second):
        rows, columns = (near & first[:, None] & second[None, :]).triu(1).nonzero(as_tuple=True)
        return (flat[rows] - flat[columns]).abs().mean(dim=1)

    across = torch.cat([differ(in_test, ~in_test), differ(~in_test, in_test)])
    assert len(across) > 0
    assert across.min() > 0.01
    assert differ(in_test, in_test).min() < 0.01  # variants of one emoji do lie that near


def test_no_flags(index):
    assert not [entry for entry in index.entries if entry.category == "Flags"]
    regional = [e for e in index.entries if re.search("1f1[ef][0-9a-f]", e.code_points)]
    assert regional == []


def test_all_pictures_are_there_and_not_blank(index, pixels):
    assert pixels.shape == (3121, 64, 64, 3)
    drawn = (pixels < 250).any(axis=3).mean(axis=(1, 2))
    assert drawn.min() > 0.01
    assert drawn.max() < 1
    assert pixels.reshape(3121, -1).std(axis=1).min() > 5


def test_atlas_has_the_cells_of_the_index_and_the_rest_is_white(index):
    image = pytest.importorskip("PIL.Image")
    for name in index.sha256:
        with ZOO.joinpath(name).open("rb") as file, image.open(file) as atlas:
            assert atlas.size[0] == index.columns * index.size
            rows, rest = divmod(atlas.size[1], index.size)
            assert rest == 0
            assert 0 <= rows * index.columns - len(index.entries) < index.columns
    spare = rows * index.columns - len(index.entries)
    longer = dataclasses.replace(index, entries=index.entries + index.entries[:spare])
    assert decode_emoji(longer)[len(index.entries) :].min() > 250


def test_pictures_lie_in_their_own_cells(index, pixels):
    """Colours of well-known emoji, so that a shifted or transposed atlas is noticed."""
    cells = {entry.code_points: cell for cell, entry in enumerate(index.entries)}

    def mean_colour(code_points):
        image = pixels[cells[code_points]].reshape(-1, 3).astype(float)
        return image[image.min(axis=1) < 240].mean(axis=0)

    red, green, blue = mean_colour("1f34e")  # red apple
    assert red > 1.5 * max(green, blue)
    red, green, blue = mean_colour("1f966")  # broccoli
    assert green > 1.2 * max(red, blue)
    red, green, blue = mean_colour("1f535")  # blue circle
    assert blue > 1.5 * red
    assert mean_colour("1f5a4").max() < 100  # black heart


def test_set_is_small_and_licensed():
    names = {file.name for file in ZOO.iterdir() if "emoji" in file.name}
    names -= {"emoji.py"}
    assert {"emoji.json", "emoji-y.webp", "emoji-cb.webp", "emoji-cr.webp"} <= names
    data = [file for file in ZOO.iterdir() if file.name.startswith("emoji")]
    assert sum(len(file.read_bytes()) for file in data) < 5_000_000
    text = ZOO.joinpath("LICENSE-emoji.txt").read_text(encoding="utf-8")
    for owner in ("Microsoft Corporation", "2023 LobeHub", "2013 Cal Henderson"):
        assert f"Copyright (c) {owner}" in text
    assert "Permission is hereby granted" in text


def test_load_splits_partition_the_set():
    loaded = {split: load_emoji(split=split) for split in ("train", "test", "all")}
    assert len(loaded["train"]) + len(loaded["test"]) == len(loaded["all"]) == 3121
    assert loaded["test"].class_names == CLASSES
    assert loaded["test"].labels.unique().tolist() == list(range(8))
    assert loaded["train"].name == "emoji-train"
    assert loaded["all"].images.dtype == torch.uint8
    assert loaded["all"].image_size == (64, 64)


def test_load_selects_categories_and_variants(index, pixels):
    chosen = load_emoji(
        split="all", categories=["Symbols", "People & Body"], skin_variants=False, size=64
    )
    cells = [
        cell
        for cell, entry in enumerate(index.entries)
        if entry.category in ("Symbols", "People & Body") and not entry.is_skin_variant
    ]
    assert chosen.class_names == ("People & Body", "Symbols")
    assert chosen.labels.tolist() == [
        int(index.entries[cell].category == "Symbols") for cell in cells
    ]
    assert torch.equal(chosen.images, torch.from_numpy(pixels[cells]).permute(0, 3, 1, 2))


def test_load_resizes_each_picture_on_its_own():
    large = load_emoji(split="test", skin_variants=False)
    small = load_emoji(split="test", skin_variants=False, size=32)
    assert small.images.shape == (len(large), 3, 32, 32)
    mean = torch.nn.functional.avg_pool2d(large.images.float(), 2)
    assert (small.images - mean).abs().mean() < 3
    assert torch.equal(small.labels, large.labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 65}, "the emoji are 64 px: size 65 must lie in 1 to 64"),
        ({"size": 0}, "size 0 must lie in 1 to 64"),
        ({"split": "val"}, "have no split 'val': give train, test or all"),
        ({"categories": ["Food"]}, "have no category Food: give one or more of Activities"),
        ({"categories": []}, r"have no category \(none given\)"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(DataError, match=message):
        load_emoji(**options)


def copy_zoo(folder):
    for file in ZOO.iterdir():
        if file.name.startswith("emoji"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_damaged_files(tmp_path):
    with pytest.raises(DataError, match=r"cannot read the emoji index .*install adaptok again"):
        load_emoji(folder=tmp_path)
    folder = copy_zoo(tmp_path)
    assert len(load_emoji(folder=folder, split="test")) > 400
    atlas = folder / "emoji-cb.webp"
    atlas.write_bytes(atlas.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"emoji-cb.webp is not the file that emoji.json describes"):
        load_emoji(folder=folder)
    atlas.unlink()
    with pytest.raises(DataError, match="cannot read the emoji atlas"):
        load_emoji(folder=folder)
    table = folder / "emoji.json"
    content = json.loads(table.read_text(encoding="utf-8"))
    for change, message in (
        ({"format": 2}, "has format 2, not 1"),
        ({"entries": [["1f34e"]]}, "cannot read the emoji index"),
        ({"fields": None}, "cannot read the emoji index"),
    ):
        table.write_text(json.dumps({**content, **change}), encoding="utf-8")
        with pytest.raises(DataError, match=message):
            read_emoji_index(folder)
    table.write_text(table.read_text(encoding="utf-8")[:500], encoding="utf-8")
    with pytest.raises(DataError, match="cannot read the emoji index"):
        read_emoji_index(folder)


def test_pictures_have_flat_parts_and_not_all_equally(pixels):
    """Content-adaptive counts need pictures of which parts are flat, and not all equally."""
    patches = pixels.reshape(-1, 8, 8, 8, 8, 3).swapaxes(2, 3).reshape(3121, 64, 64, 3)
    flat = (np.ptp(patches, axis=2).max(axis=2) <= 2).mean(axis=1)
    assert 0.2 < flat.mean() < 0.4
    assert flat.std() > 0.05
