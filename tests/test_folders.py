"""Results on unusual disks: calls that a file system does not know, disks without a size, links."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora import files, folders
from lora.errors import BadEnvironment, BadInput
from lora.train import run_state
from tests import cli
from tests.mutation import mutation
from tests.scripts.test_commands import ok


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@mutation("lora/folders.py", "        shutil.copytree(folder, to, symlinks=True, dirs_exist_ok=True)", "        raise")
@mutation("lora/files.py", "        shutil.copyfile(aside, path)", "        raise")
@pytest.mark.parametrize("name", ["EXDEV", "EBUSY", "ENOSYS", "EINVAL"])
def test_where_a_file_system_cannot_rename_files_are_copied(tmp_path, monkeypatch, name):
    def refusing(*args):
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr(os, "rename", refusing)
    monkeypatch.setattr(os, "replace", refusing)
    for number in (b"1", b"2"):
        with folders.new_folder(tmp_path / "out") as folder:
            (folder / "sub").mkdir()
            files.write_bytes(folder / "sub/a", number)
            files.write_bytes(folder / number.decode(), number)
        assert tree(tmp_path) == {"out/sub/a": number, f"out/{number.decode()}": number}


@mutation("lora/folders.py", "_is_empty(path):  # a mount", "not path.exists():  # a mount")
def test_a_folder_that_is_a_mount_point_is_emptied_and_filled_and_what_it_held_comes_back_after_a_failure(
    tmp_path, monkeypatch
):
    path, rename, rmdir = tmp_path / "out", os.rename, os.rmdir
    path.mkdir()
    (path / "old").write_bytes(b"1")

    def busy(function):
        def call(*args, **how):
            if any(str(arg) == str(path) for arg in args):
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            return function(*args, **how)

        return call

    monkeypatch.setattr(os, "rename", busy(rename))
    monkeypatch.setattr(os, "rmdir", busy(rmdir))
    with folders.new_folder(path) as folder:
        files.write_bytes(folder / "new", b"2")
    assert tree(tmp_path) == {"out/new": b"2"}
    copytree, calls = shutil.copytree, []

    def fails_once(source, to, **how):
        calls.append(to)
        if calls.count(path) == 1 and to == path:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return copytree(source, to, **how)

    monkeypatch.setattr(shutil, "copytree", fails_once)
    with pytest.raises(OSError, match="error"), folders.new_folder(path) as folder:
        files.write_bytes(folder / "newer", b"3")
    assert tree(tmp_path) == {"out/new": b"2"}


@mutation(
    "lora/folders.py", "        return None\n    return usage", "        return 0\n    return usage", case="ENOSYS"
)
@mutation("lora/folders.py", "usage.free if usage.free or usage.total else None", "usage.free", case="0")
@pytest.mark.parametrize("fault", ["ENOSYS", "EACCES", "0"])
def test_a_disk_that_cannot_be_measured_is_not_full(tmp_path, monkeypatch, fault):
    def usage(path):
        if fault == "0":
            return SimpleNamespace(total=0, used=0, free=0)
        raise OSError(getattr(errno, fault), os.strerror(getattr(errno, fault)))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    folders.check_room(tmp_path / "new", 2**60, "a model")
    folders.check_out(tmp_path / "new", False, ())
    with (
        pytest.raises(BadEnvironment, match=r"needs [\d,]+ bytes; there is no checkpoint yet"),
        run_state.disk_full(tmp_path, {}),
    ):
        raise OSError(errno.ENOSPC, "no space left", str(tmp_path / "x"))


# ---- links -----------------------------------------------------------------------------------------------------------


@mutation(
    "lora/run/results.py",
    "return files.behind_link(args.out) if args.out else next",
    "return Path(args.out) if args.out else next",
)
@mutation("merge.py", "        out = files.behind_link(out)\n", "", case="merge")
@pytest.mark.parametrize("script", ["train", "merge"])
def test_an_out_that_is_a_link_to_a_folder_fills_that_folder_and_stays_a_link(tmp_path, script):
    """To an empty folder, to one of ours with --overwrite, and to one that is not there yet."""
    (tmp_path / "elsewhere/real").mkdir(parents=True)
    (tmp_path / "out").symlink_to("elsewhere/real")

    def run(*argv):
        if script == "train":
            return cli.train("out", *argv, cwd=tmp_path)
        return cli.call("merge", "--adapter", cli.adapter_folder(), "--out", "out", "--no-receipt", *argv, cwd=tmp_path)

    for argv in ((), ("--overwrite",), ()):
        ok(run(*argv))
        assert (tmp_path / "out").is_symlink() and (tmp_path / "elsewhere/real/README.md").exists()
        assert {p.name for p in tmp_path.iterdir()} == {"elsewhere", "out"}
        assert [p.name for p in (tmp_path / "elsewhere").iterdir()] == ["real"]
        again = run()
        assert again.code == 2 and "the folder is not empty" in again.errors[0]
        if argv:
            shutil.rmtree(tmp_path / "elsewhere/real")
    if script == "train":
        ok(cli.call("train", "--resume", "--out", "out", cwd=tmp_path))
        ok(cli.call("train", "--resume", "out", cwd=tmp_path))


def test_overwrite_deletes_nothing_of_others_behind_a_link(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/photo.jpg").write_text("x")
    (tmp_path / "out").symlink_to("home")
    for argv in (("merge", "--adapter", cli.adapter_folder()), ("train", "--data", cli.data_file())):
        done = cli.call(*argv, "--out", "out", "--overwrite", cwd=tmp_path)
        assert done.code == 2 and "replaces only what this program wrote" in done.errors[0]
    assert tree(tmp_path / "home") == {"photo.jpg": b"x"} and (tmp_path / "out").is_symlink()


@mutation(
    "lora/export/derive.py", "    out = files.behind_link(args.out)\n    terms", "    out = Path(args.out)\n    terms"
)
def test_combined_adapters_go_behind_a_link_too(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    ok(cli.call("merge", "--combine", f"{cli.adapter_folder()}:0.5", "--out", "out", cwd=tmp_path))
    assert (tmp_path / "out").is_symlink() and (tmp_path / "real/adapter_model.safetensors").exists()


@mutation("lora/files.py", "    path = behind_link(path)\n    aside", "    path = Path(path)\n    aside")
@pytest.mark.parametrize("there", [True, False])
def test_a_file_that_is_a_link_is_written_where_it_leads_and_stays_a_link(tmp_path, there):
    (tmp_path / "far").mkdir()
    (tmp_path / "prompts.txt").write_text("Hello.\n")
    if there:
        (tmp_path / "far/answers.jsonl").write_text("")
    (tmp_path / "answers.jsonl").symlink_to("far/answers.jsonl")
    argv = ("--model", cli.model_folder(), "--prompts", "prompts.txt", "--out", "answers.jsonl")
    ok(cli.ask(*argv, cwd=tmp_path))
    assert (tmp_path / "answers.jsonl").is_symlink() and "prediction" in (tmp_path / "far/answers.jsonl").read_text()


def test_a_link_that_leads_to_itself_to_a_pipe_or_into_nowhere_is_refused(tmp_path):
    (tmp_path / "self").symlink_to("self")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "pipe").symlink_to("fifo")
    for name in ("self", "pipe"):
        with pytest.raises(BadInput, match="not a folder"):
            folders.check_place(files.behind_link(tmp_path / name))
    assert files.unwritable("--out", tmp_path / "pipe") == [
        f"wrong --out in {tmp_path / 'pipe'}: it is not a regular file. Choose another name"
    ]
    (tmp_path / "far").symlink_to("no/folder")
    assert "there is no folder" in files.unwritable("--out", tmp_path / "far")[0]
