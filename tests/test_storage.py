import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from adaptok.errors import CheckpointError, StorageError
from adaptok.storage import (
    load_json,
    load_tensors,
    restore_folder,
    save_json,
    save_tensors,
    write_folder,
)


def run_process(code, folder):
    """Run code in a fresh process with the folder as its argument; returns the finished process."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def contents(folder):
    """Every file and folder below, hidden ones too, with the text of the files."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def test_a_folder_appears_only_when_the_block_ends(tmp_path):
    target = tmp_path / "new" / "deep"
    with write_folder(target) as unfinished:
        (unfinished / "a.txt").write_text("first")
        assert unfinished.parent == target.parent
        assert unfinished.name.startswith(".")
        assert not target.exists()
    assert contents(tmp_path) == {"new": None, "new/deep": None, "new/deep/a.txt": "first"}


def test_files_reach_the_disk_before_the_folder_appears(tmp_path, monkeypatch):
    target, synced = tmp_path / "model", []

    def record(handle):
        synced.append((os.fstat(handle).st_ino, target.exists()))

    monkeypatch.setattr(os, "fsync", record)
    with write_folder(target) as unfinished:
        (unfinished / "a.txt").write_text("a")
        (unfinished / "b.txt").write_text("b")
    for name in ("a.txt", "b.txt"):
        assert ((target / name).stat().st_ino, False) in synced
    assert synced[-1] == (tmp_path.stat().st_ino, True)


def test_a_folder_is_replaced_and_nothing_of_the_old_one_stays(tmp_path):
    target = tmp_path / "model"
    with write_folder(target) as unfinished:
        (unfinished / "a.txt").write_text("old")
        (unfinished / "b.txt").write_text("old")
    with write_folder(str(target)) as unfinished:
        assert list(unfinished.iterdir()) == []
        (unfinished / "a.txt").write_text("new")
        (unfinished / "b.txt").write_text("new")
        assert (target / "a.txt").read_text() == "old"
    assert contents(tmp_path) == {"model": None, "model/a.txt": "new", "model/b.txt": "new"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("existed", [True, False])
def test_an_error_in_the_block_leaves_what_was_there(tmp_path, error, existed):
    target = tmp_path / "model"
    if existed:
        with write_folder(target) as unfinished:
            (unfinished / "a.txt").write_text("old")
    before = contents(tmp_path)

    def fail():
        with write_folder(target) as unfinished:
            (unfinished / "a.txt").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert contents(tmp_path) == before


def test_a_kill_in_the_middle_leaves_what_was_there(tmp_path):
    with write_folder(tmp_path / "old") as unfinished:
        (unfinished / "a.txt").write_text("old")
    done = run_process(
        """
        import os, signal, sys
        from pathlib import Path
        from adaptok.storage import write_folder
        for name in ("old", "new"):
            child = os.fork()
            if child == 0:
                with write_folder(Path(sys.argv[1]) / name) as unfinished:
                    (unfinished / "a.txt").write_text("half")
                    os.kill(os.getpid(), signal.SIGKILL)
            assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        print("killed twice")
        """,
        tmp_path,
    )
    assert done.stdout == "killed twice\n", done.stderr
    hidden = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    left = sorted(name.partition("-")[0] for name in hidden)
    assert left == [".new.unfinished", ".old.unfinished"]
    assert contents(tmp_path / "old") == {"a.txt": "old"}
    assert not (tmp_path / "new").exists()
    for name in ("old", "new"):  # the next process is not stopped by what is left
        with write_folder(tmp_path / name) as unfinished:
            (unfinished / "a.txt").write_text("next")
        assert contents(tmp_path / name) == {"a.txt": "next"}


def test_a_full_disk_leaves_what_was_there(tmp_path):
    target = tmp_path / "model"
    with write_folder(target) as unfinished:
        (unfinished / "a.txt").write_text("old")
    done = run_process(
        """
        import resource, signal, sys, torch
        from adaptok.errors import StorageError
        from adaptok.storage import save_json, save_tensors, write_folder
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        for write in (
            lambda folder: save_tensors(folder / "w.safetensors", {"w": torch.zeros(100_000)}),
            lambda folder: save_json(folder / "w.json", {"text": "x" * 100_000}),
            lambda folder: (folder / "w.bin").write_bytes(b"x" * 100_000),
        ):
            try:
                with write_folder(sys.argv[1]) as unfinished:
                    (unfinished / "a.txt").write_text("half")
                    write(unfinished)
            except StorageError as error:
                print("refused:", error)
        """,
        target,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line.startswith(f"refused: cannot write {target}: ")
        assert "Free some space or choose another place" in line
    assert contents(tmp_path) == {"model": None, "model/a.txt": "old"}


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with (
        pytest.raises(StorageError, match=r"cannot write .*model.*choose another place"),
        write_folder(tmp_path / "file" / "model"),
    ):
        pytest.fail("the block ran without a folder to write to")


def test_tensors_come_back_with_names_shapes_dtypes_and_values(tmp_path):
    tensors = {
        "a.weight": torch.randn(3, 5),
        "half": torch.randn(7).to(torch.bfloat16),
        "count": torch.tensor(12),
        "mask": torch.tensor([[True, False]]),
        "turned": torch.randn(4, 6).T,
        "with_grad": torch.randn(2, requires_grad=True),
    }
    save_tensors(tmp_path / "w.safetensors", tensors, {"note": "hello"})
    loaded = load_tensors(str(tmp_path / "w.safetensors"))
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype, name
        assert torch.equal(loaded[name], value), name
        assert not loaded[name].requires_grad
    header = (tmp_path / "w.safetensors").read_bytes()[8:200]
    assert b'"note":"hello"' in header


def test_a_missing_tensor_file_is_named(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):  # a folder is no file either
        with pytest.raises(CheckpointError, match=rf"there is no file {path}"):
            load_tensors(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_tensor_file_is_refused(tmp_path, share):
    path = tmp_path / "w.safetensors"
    save_tensors(path, {"w": torch.randn(1000)})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"no complete safetensors file .* truncated"):
        load_tensors(path)


def test_a_pickle_is_refused_and_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    path = tmp_path / "w.pt"
    for zipped in (True, False):
        content = {"w": torch.randn(3), "trap": Trap()}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match="pickle, which is never loaded; save it again"):
            load_tensors(path)
    assert not (tmp_path / "sprung").exists()


def test_tensors_that_cannot_be_written_are_refused(tmp_path):
    with pytest.raises(StorageError, match=r"cannot write .*missing"):
        save_tensors(tmp_path / "missing" / "w.safetensors", {"w": torch.zeros(1)})


def test_json_comes_back(tmp_path):
    content = {"name": "Grün", "list": [1, 2.5, None, True], "inner": {"a": "b"}}
    save_json(tmp_path / "c.json", content)
    assert load_json(str(tmp_path / "c.json")) == content
    assert json.loads((tmp_path / "c.json").read_text(encoding="utf-8")) == content


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "is no JSON: "),
        (b"", "is no JSON: "),
        (b"\xff\xfe{}", "is no JSON: "),
        (b"[1, 2]", "needs a JSON object, got a list"),
        (b"null", "needs a JSON object, got a NoneType"),
    ],
)
def test_json_that_is_no_object_is_refused(tmp_path, data, message):
    (tmp_path / "c.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=f"c.json {message}"):
        load_json(tmp_path / "c.json")


def test_json_that_is_missing_or_cannot_be_written_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*c.json"):
        load_json(tmp_path / "c.json")
    with pytest.raises(StorageError, match=r"cannot write .*c.json"):
        save_json(tmp_path / "missing" / "c.json", {})


def test_a_replacement_that_fails_leaves_the_old_folder(tmp_path, monkeypatch):
    with write_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("old")
    rename, calls = Path.rename, []

    def fail_second(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_second)
    with (
        pytest.raises(StorageError, match="what was saved before is still there"),
        write_folder(tmp_path / "model") as folder,
    ):
        (folder / "a").write_text("new")
    assert (tmp_path / "model" / "a").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_folder_that_a_killed_process_moved_aside_comes_back(tmp_path):
    (tmp_path / ".model.outdated-123").mkdir()
    (tmp_path / ".model.outdated-123" / "a").write_text("old")
    restore_folder(tmp_path / "model")
    assert (tmp_path / "model" / "a").read_text() == "old"
    restore_folder(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    (tmp_path / "model").write_text("a file")
    with (
        pytest.raises(StorageError, match="a file of that name is there"),
        write_folder(tmp_path / "model"),
    ):
        pass
    assert (tmp_path / "model").read_text() == "a file"


def test_a_folder_with_other_files_is_never_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with (
        pytest.raises(StorageError, match=r"holds other files \(thesis\.txt\).*new folder"),
        write_folder(tmp_path / "mine") as folder,
    ):
        (folder / "a").write_text("new")
    assert contents(tmp_path) == {"mine": None, "mine/thesis.txt": "precious"}


def test_files_are_readable_as_the_umask_says(tmp_path):
    save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    (tmp_path / "b").touch()
    modes = {(tmp_path / name).stat().st_mode for name in ("a.safetensors", "b")}
    assert len(modes) == 1
