import csv
import importlib.util
import io
import json
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adaptok.errors import StorageError
from adaptok.train.emoji import decode_emoji, read_emoji_index

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "convert_emoji", ROOT / "scripts" / "convert_emoji.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def draw(colour, size=(256, 256), hole=None):
    """A coloured rectangle with a transparent border of 32 px, as WebP."""
    image = Image.new("RGBA", size, (0, 0, 0, 0))
    image.paste((*colour, 255), (32, 32, size[0] - 32, size[1] - 32))
    if hole:
        image.paste((0, 0, 0, 0), hole)
    target = io.BytesIO()
    image.save(target, "WEBP", lossless=True)
    return target.getvalue()


PICTURES = {
    "1f468-1f3fd-200d-1f680": (draw((200, 120, 40)), "People & Body", "man astronaut", "1"),
    "1f9d1-200d-1f680": (draw((240, 200, 40)), "People & Body", "astronaut", "0"),
    "1f469-200d-1f33e": (draw((20, 200, 40)), "People & Body", "woman farmer", "0"),
    "1f34e": (draw((220, 20, 30)), "Food & Drink", "red apple", "0"),
    "1fa90": (draw((90, 20, 200), size=(256, 264)), "Travel & Places", "ringed planet", "0"),
    "1f431": (draw((250, 180, 60)), "Animals & Nature", "cat face", "0"),
    "1f63a": (draw((250, 181, 60)), "Smileys & Emotion", "smiling cat", "0"),
    "1f600": (draw((250, 210, 60), hole=(90, 90, 120, 160)), "Smileys & Emotion", "grin", "0"),
    "1f1e9-1f1ea": (draw((0, 0, 0)), "Flags", "germany flag", "0"),
}
UNLABELLED = {"23-fe0f-20e3": draw((1, 2, 3))}


@pytest.fixture
def sources(tmp_path):
    tarball, labels = tmp_path / "set.tgz", tmp_path / "labels.csv"
    with tarfile.open(tarball, "w:gz") as archive:
        contents = {name: row[0] for name, row in PICTURES.items()} | UNLABELLED
        files = {f"package/assets/{name}.webp": data for name, data in contents.items()}
        files["package/README.md"] = b"text"
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    with labels.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "category", "subcategory", "name", "is_skin_variant"])
        for name, (_, category, title, variant) in PICTURES.items():
            writer.writerow([f"{name}.webp", category, "sub", title, variant])
        writer.writerow(["1f999.webp", "Animals & Nature", "sub", "llama", "0"])  # no picture
    return str(tarball), str(labels)


def convert(script, sources, folder, *options):
    return script.main([*sources, "--output", str(folder), *options])


def test_conversion_drops_flags_and_unlabelled(script, sources, tmp_path, capsys):
    assert convert(script, sources, tmp_path / "out") == 0
    assert "8 pictures of 6 base emoji" in (printed := capsys.readouterr().out)
    assert "dropped 1 flags and 1 without a label" in printed
    index = read_emoji_index(tmp_path / "out")
    found = {entry.code_points: entry for entry in index.entries}
    assert set(found) == set(PICTURES) - {"1f1e9-1f1ea"}
    assert found["1f468-1f3fd-200d-1f680"].is_skin_variant
    assert not found["1f34e"].is_skin_variant
    assert found["1fa90"].name == "ringed planet"
    assert index.classes == tuple(sorted({row[1] for row in PICTURES.values()} - {"Flags"}))
    assert [e.category for e in index.entries] == sorted(e.category for e in index.entries)


def test_conversion_keeps_pixels_and_shape(script, sources, tmp_path):
    convert(script, sources, tmp_path / "out")
    index = read_emoji_index(tmp_path / "out")
    for entry, pixels in zip(index.entries, decode_emoji(index, tmp_path / "out"), strict=True):
        colour = pixels[20:44, 40].mean(axis=0)
        source = Image.open(io.BytesIO(PICTURES[entry.code_points][0]))
        assert np.abs(colour - source.getpixel((160, 128))[:3]).max() < 6
        assert (pixels[:4] > 250).all()
        assert (pixels[:, -4:] > 250).all()
        # 32 px of 256 are transparent on each side; a picture of 256x264 is padded, not squeezed,
        # so that there the sides are 4 px wider and the scale is 264 to 64.
        inside = (pixels.astype(int).min(axis=2) < 140).nonzero()
        height, width = (int(np.ptp(axis)) + 1 for axis in inside)
        scale = 64 / max(source.size)
        assert abs(width - 192 * scale) < 1
        assert abs(height - (source.height - 64) * scale) < 1
        assert abs(inside[1].mean() - 31.5) < 1


def test_variants_and_look_alikes_share_base_and_split(script, sources, tmp_path):
    convert(script, sources, tmp_path / "out")
    found = {e.code_points: e for e in read_emoji_index(tmp_path / "out").entries}
    astronauts = [found["1f468-1f3fd-200d-1f680"], found["1f9d1-200d-1f680"]]
    assert astronauts[0].base == astronauts[1].base != found["1f469-200d-1f33e"].base
    assert found["1f431"].base == found["1f63a"].base != found["1f600"].base
    splits = {}
    for entry in found.values():
        assert splits.setdefault(entry.base, entry.split) == entry.split
    assert {e.split for e in found.values() if e.category == "People & Body"} == {"train", "test"}


def test_conversion_is_deterministic(script, sources, tmp_path):
    names = ["LICENSE-emoji.txt", "emoji-cb.webp", "emoji-cr.webp", "emoji-y.webp", "emoji.json"]
    for folder in ("one", "two"):
        convert(script, sources, tmp_path / folder)
        assert sorted(file.name for file in (tmp_path / folder).iterdir()) == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_size_option(script, sources, tmp_path, capsys):
    assert convert(script, sources, tmp_path / "out", "--size", "32") == 0
    index = read_emoji_index(tmp_path / "out")
    assert decode_emoji(index, tmp_path / "out").shape == (8, 32, 32, 3)
    assert convert(script, sources, tmp_path / "out", "--size", "60") == 1
    assert "--size is 60: give a multiple of 16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code_points", "base"),
    [
        ("1f44b-1f3fb", "1f44b"),
        ("1f468", "1f9d1"),
        ("1f469-1f3fd-200d-1f9b0", "1f9d1"),
        ("1f471-1f3fd-200d-2642-fe0f", "1f9d1"),
        ("1f468-200d-1f680", "1f9d1-1f680"),
        ("1f468-200d-2695-fe0f", "1f9d1-2695"),
        ("26f9-1f3fb-200d-2640-fe0f", "26f9"),
        ("26f9-fe0f", "26f9"),
        ("1f468-200d-1f469-200d-1f467-200d-1f466", "1f46a"),
        ("1f46a", "1f46a"),
        ("1f469-1f3fb-200d-2764-fe0f-200d-1f48b-200d-1f468-1f3ff", "1f48f"),
        ("1f469-1f3fb-200d-2764-fe0f-200d-1f468-1f3ff", "1f491"),
        ("1f9d1-1f3fb-200d-1f91d-200d-1f9d1-1f3ff", "1f46b"),
        ("1f46d-1f3fb", "1f46b"),
        ("1f9d1-1f3fb-200d-1f384", "1f385"),
        ("1f936", "1f385"),
        ("1faf1-1f3fb-200d-1faf2-1f3ff", "1f91d"),
        ("1faf2-1f3ff", "1faf1"),
        ("1f408-200d-2b1b", "1f408"),
        ("2764-fe0f-200d-1f525", "2764"),
        ("0035-fe0f-20e3", "0035-20e3"),
        ("2640-fe0f", "2640"),
        ("1f34e", "1f34e"),
    ],
)
def test_base_of_variants(script, code_points, base):
    assert script.find_base(code_points) == base


def test_same_pictures_agree_with_all_pairs(script):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(6)]
    for source, scale in ((0, 2), (1, 4), (2, 6), (3, 40)):
        noise = rng.integers(-scale, scale + 1, (16, 16, 3))
        pictures.append(np.clip(pictures[source] + noise, 0, 255).astype(np.uint8))
    expected = [
        (i, j)
        for i in range(10)
        for j in range(i + 1, 10)
        if np.abs(pictures[i].astype(float) - pictures[j]).mean() / 255 <= script.SAME_PICTURE
    ]
    assert script.find_same_pictures(pictures) == expected
    assert {(0, 6)} <= set(expected) < {(0, 6), (1, 7), (2, 8), (3, 9)}


def test_joined_bases_are_transitive(script):
    bases = ["d", "c", "b", "a", "c"]
    assert script.join_bases(bases, [(0, 1), (4, 3)]) == ["a", "a", "b", "a", "a"]


def test_test_bases_are_a_fixed_share_of_each_category(script):
    bases = [f"{k:x}" for k in range(140)]
    categories = ["big"] * 100 + ["small"] * 39 + ["single"]
    chosen = script.choose_test_bases(bases, categories)
    counts = {
        name: sum(b in chosen for b, c in zip(bases, categories, strict=True) if c == name)
        for name in ("big", "small", "single")
    }
    assert counts == {"big": 15, "small": 6, "single": 1}
    assert chosen == script.choose_test_bases(bases[::-1], categories[::-1])


def test_bad_input_is_one_sentence_and_exit_code_1(script, sources, tmp_path, capsys):
    tarball, labels = sources
    broken = tmp_path / "broken.tgz"
    content = Path(tarball).read_bytes()
    broken.write_bytes(content[: len(content) * 2 // 3])
    damaged = tmp_path / "damaged.tgz"
    damaged.write_bytes(content[:400] + bytes(200) + content[600:])
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("file,category\n", encoding="utf-8")
    other = tmp_path / "other.csv"
    other.write_text("file,category,subcategory,name,is_skin_variant\n", encoding="utf-8")
    cases = {
        (str(broken), labels): "cannot read the tarball .*: run `npm pack",
        (str(damaged), labels): "cannot (read the tarball|be decoded)",
        (labels, labels): "cannot read the tarball .*: run `npm pack",
        (str(tmp_path / "no.tgz"), labels): "cannot read the tarball",
        (tarball, str(tmp_path / "no.csv")): "cannot read the labels .*: give a csv table",
        (tarball, str(wrong)): "has no column subcategory, name, is_skin_variant: it needs file",
        (tarball, str(other)): "no picture of .* has a label: give the two files of one set",
    }
    for arguments, message in cases.items():
        assert convert(script, arguments, tmp_path / "out") == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert re.search(message, error), error
        assert not (tmp_path / "out").exists()


def test_picture_that_is_none_is_named(script, sources, tmp_path, capsys):
    tarball = tmp_path / "bad.tgz"
    with tarfile.open(tarball, "w:gz") as archive:
        member = tarfile.TarInfo("package/assets/1f34e.webp")
        member.size = 5
        archive.addfile(member, io.BytesIO(b"hello"))
    assert convert(script, (str(tarball), sources[1]), tmp_path / "out") == 1
    assert "1f34e.webp in" in capsys.readouterr().err


def test_unwritable_folder(script, sources, tmp_path, capsys):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert convert(script, sources, tmp_path / "file" / "out") == 1
    assert "cannot write to" in capsys.readouterr().err


def test_failed_write_keeps_what_was_there(script, tmp_path, monkeypatch):
    (tmp_path / "emoji.json").write_text("old", encoding="utf-8")

    def fill_disk(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_disk)
    with pytest.raises(StorageError, match="No space left on device"):
        script.write_files({"emoji.json": b"new"}, tmp_path)
    assert (tmp_path / "emoji.json").read_text(encoding="utf-8") == "old"


@pytest.mark.slow
def test_shipped_index_is_what_the_script_writes(script, tmp_path):
    sources = (
        SHARED / "fluent_emoji_3d-1.1.0.tgz",
        SHARED / "fluent_emoji_labels.csv",
    )
    if not all(file.exists() for file in sources):
        pytest.skip("the emoji tarball and labels are not beside the repository")
    assert convert(script, [str(file) for file in sources], tmp_path) == 0
    shipped = ROOT / "adaptok" / "zoo"
    new, old = (json.loads((f / "emoji.json").read_bytes()) for f in (tmp_path, shipped))
    # Another version of Pillow may compress to other bytes; everything else must be equal.
    assert {**new, "sha256": 0} == {**old, "sha256": 0}
    difference = np.abs(
        decode_emoji(read_emoji_index(tmp_path), tmp_path).astype(np.int16)
        - decode_emoji(read_emoji_index())
    )
    assert difference.mean() < 1
