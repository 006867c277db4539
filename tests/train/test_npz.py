import weakref
import zipfile
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptok.errors import ShapeError, StorageError
from adaptok.train.npz import ArrayPieces, map_npz_array, write_npz

BYTE = np.dtype(np.uint8)


def cut(array, cuts):
    edges = [0, *sorted(cuts), len(array)]
    return (array[a:b] for a, b in pairwise(edges))


@settings(max_examples=30, deadline=None)  # it writes files
@given(st.lists(st.integers(0, 7), max_size=4), st.sampled_from(["u1", "<i8", "<f4"]))
def test_pieces_are_the_array(tmp_path_factory, cuts, dtype):
    array = np.random.default_rng(0).integers(0, 200, (7, 3, 5, 2)).astype(dtype)
    path = tmp_path_factory.mktemp("npz") / "x.npz"
    labels = np.arange(7)
    pieces = ArrayPieces(array.shape, array.dtype, cut(array, cuts))
    write_npz(path, {"arr_0": pieces, "arr_1": ArrayPieces.of(labels)})
    with np.load(path, allow_pickle=False) as content:
        assert sorted(content) == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(content["arr_0"], array)
        assert content["arr_0"].dtype == array.dtype
        np.testing.assert_array_equal(content["arr_1"], labels)
    found = map_npz_array(path, "arr_0")
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, array)
    np.testing.assert_array_equal(map_npz_array(path, "arr_1"), labels)


def test_what_readers_that_stream_rely_on(tmp_path):
    """Evaluators read a stored member in version 1.0 and C order from front to back."""
    path = tmp_path / "x.npz"
    array = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    write_npz(path, {"arr_0": ArrayPieces((2, 2, 2, 3), BYTE, cut(array, [1]))})
    with zipfile.ZipFile(path) as content, content.open("arr_0.npy") as member:
        assert content.testzip() is None
        assert content.getinfo("arr_0.npy").compress_type == zipfile.ZIP_STORED
        assert np.lib.format.read_magic(member) == (1, 0)
        assert np.lib.format.read_array_header_1_0(member) == ((2, 2, 2, 3), False, BYTE)
        assert member.read() == array.tobytes()


def test_same_arrays_same_bytes_and_one_piece_in_memory(tmp_path):
    alive, most = [], []

    def make():
        for value in range(6):
            piece = np.full((1, 40), value, dtype=np.uint8)
            alive.append(weakref.ref(piece))
            yield piece
            del piece
            most.append(sum(ref() is not None for ref in alive))

    for name in ("a.npz", "b.npz"):
        alive.clear()
        write_npz(tmp_path / name, {"x": ArrayPieces((6, 40), BYTE, make())})
    assert max(most) <= 1
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (np.zeros((2, 3), np.uint8), "the pieces of x have 2 rows, not 4"),
        (np.zeros((4, 2), np.uint8), r"a piece of x is uint8 of shape \(4, 2\)"),
        (np.zeros((4, 3), np.float32), "a piece of x is float32"),
    ],
)
def test_wrong_pieces(tmp_path, piece, message):
    with pytest.raises(ShapeError, match=message):
        write_npz(tmp_path / "x.npz", {"x": ArrayPieces((4, 3), BYTE, [piece])})


def test_place_that_cannot_be_written(tmp_path):
    with pytest.raises(StorageError, match=r"cannot write .*x.npz"):
        write_npz(tmp_path / "none" / "x.npz", {"x": ArrayPieces.of(np.zeros(2))})


class TestMapping:
    def test_files_of_numpy(self, tmp_path):
        array = np.asfortranarray(np.arange(12, dtype=np.int32).reshape(3, 4))
        np.savez(tmp_path / "plain.npz", a=array, empty=np.zeros((0, 3)))
        np.savez_compressed(tmp_path / "small.npz", a=array)
        assert isinstance(map_npz_array(tmp_path / "plain.npz", "a"), np.memmap)
        assert not isinstance(map_npz_array(tmp_path / "small.npz", "a"), np.memmap)
        for name in ("plain.npz", "small.npz"):
            np.testing.assert_array_equal(map_npz_array(tmp_path / name, "a"), array)
        assert map_npz_array(tmp_path / "plain.npz", "empty").shape == (0, 3)

    def test_objects_are_refused(self, tmp_path):
        np.savez(tmp_path / "x.npz", a=np.array([{}, 3], dtype=object))
        with pytest.raises(ValueError, match="allow_pickle=False"):
            map_npz_array(tmp_path / "x.npz", "a")

    def test_wrong_files(self, tmp_path):
        np.savez(tmp_path / "x.npz", a=np.arange(500))
        with pytest.raises(KeyError):
            map_npz_array(tmp_path / "x.npz", "b")
        whole = (tmp_path / "x.npz").read_bytes()
        (tmp_path / "x.npz").write_bytes(whole[:-200])
        with pytest.raises(zipfile.BadZipFile):
            map_npz_array(tmp_path / "x.npz", "a")
