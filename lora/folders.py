"""Folders of results: written whole, or filled while others read them; locked, checked before a run, cleaned up."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout

from lora.errors import BadEnvironment, BadInput, say
from lora.files import NO_RENAME, UNSUPPORTED, sync


def make_folder(path: Path) -> None:
    """A folder and those above it, where they are missing; their names survive a power loss."""
    path = Path(path)
    for folder in reversed([p for p in (path, *path.parents) if not p.exists()]):
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def _beside(path: Path, kind: str) -> Path:
    """A hidden name that is free. In a container our number may be that of a process that was killed there."""
    names = (path.with_name(f".{path.name}.{number}.{kind}") for number in count(os.getpid()))
    return next(name for name in names if not name.exists())


def _move(folder: Path, to: Path) -> None:
    """`os.rename`; file by file where a file system cannot do it: mount points, the layers of a container, networks."""
    try:
        os.rename(folder, to)
    except OSError as error:
        if error.errno not in NO_RENAME:
            raise
        shutil.copytree(folder, to, symlinks=True, dirs_exist_ok=True)
        for path in (*filter(Path.exists, to.rglob("*")), to):
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)


def _is_empty(path: Path) -> bool:
    return not path.exists() or not any(path.iterdir())


@contextmanager
def new_folder(path: Path, overwrite: bool = True):
    """A folder that appears under `path` only when the block has ended well; yields the folder to fill.

    An existing `path` is replaced if `overwrite`. Else it was empty when `check_out` saw it; if another program has
    filled it meanwhile, both results are kept and BadEnvironment says where.
    """
    path = Path(path)
    make_folder(path.parent)
    aside, old = (_beside(path, kind) for kind in ("partial", "old"))
    try:
        aside.mkdir()
        yield aside
        for file in aside.iterdir():  # what was appended to is not synced yet
            sync(file)
        sync(aside)
        if not overwrite and path.is_dir() and any(path.iterdir()):
            other = path.with_name(f"{path.name}-{os.getpid()}")
            _move(aside, other)
            raise BadEnvironment(f"taken --out in {path}: another program has written it. This result is in {other}")
        if path.exists():
            _move(path, old)
        _move(aside, path)
        sync(path.parent)
    except BaseException:
        if old.exists() and _is_empty(path):  # a mount point stays
            _move(old, path)
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def live_folder(path: Path, overwrite: bool, saved: Callable[[], bool]):
    """A new folder that fills up while others look on. Where the block fails before `saved()`, what was there is there
    again: an earlier run that `overwrite` replaces, an empty folder, or nothing."""
    path = Path(path)
    old, there = _beside(path, "old"), path.exists()
    if there and any(path.iterdir()):  # an empty one is taken as it is: it may be a mount point
        if not overwrite:
            raise _taken(path)
        _move(path, old)
    try:
        make_folder(path)
        yield path
    except BaseException:
        if not saved():
            shutil.rmtree(path, ignore_errors=True)
            if old.exists():
                _move(old, path)
            elif there:
                path.mkdir(exist_ok=True)
        raise
    finally:
        if saved():
            for left in _replaced(path):
                shutil.rmtree(left, ignore_errors=True)


def _taken(path: Path) -> BadInput:
    return BadInput(f"wrong --out in {path}: the folder is not empty. Choose another name or add --overwrite")


def _replaced(path: Path) -> list[Path]:
    """What new results replaced under this name, where a killed process could not remove it."""
    return [p for p in path.parent.glob(".*.old") if re.fullmatch(rf"\.{re.escape(path.name)}\.\d+\.old", p.name)]


def recover(path: Path, saved: Callable[[], bool]) -> bool:
    """Put back what a run was to replace that was killed before it had `saved()`; only for who holds the lock.

    Returns whether there was something.
    """
    earlier = sorted(_replaced(Path(path)), key=os.path.getmtime)
    if not earlier or saved():
        return False
    if Path(path).exists():
        remove_folder(Path(path))
        earlier = [p for p in earlier if p.exists()]
    _move(earlier[0], path)
    return True


@contextmanager
def locked(path: Path):
    """The name `path` is this process's while the block runs. The kernel holds the lock: a killed process leaves none.

    Raises BadEnvironment with the pid of the process that has it. A file system without locks gets a note instead.
    """
    made = [p for p in Path(path).parents if not p.exists()]
    make_folder(Path(path).parent)
    name = Path(path).with_name(f".{Path(path).name}.lock")
    lock = FileLock(name, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
        name.write_text(str(os.getpid()))
    except Timeout:
        pid = "unknown"
        with suppress(OSError):  # it may have ended meanwhile
            pid = name.read_text(errors="replace")[:20] or pid
        raise BadEnvironment(
            f"busy --out in {path}: another run, process {pid}, writes it. Wait for it, or choose another name"
        ) from None
    except (OSError, NotImplementedError) as error:  # which some versions of filelock make of ENOSYS
        if isinstance(error, OSError) and error.errno not in (errno.ENOLCK, *UNSUPPORTED):
            raise
        say(f"note     {name.parent}: its file system has no locks; do not start a second run in {path}")
    try:
        yield
    finally:
        with suppress(OSError):
            name.unlink()  # before the release: who has opened it meanwhile sees that it is gone
        lock.release()
        for parent in made:  # a run that came to nothing leaves no empty folders
            with suppress(OSError):
                parent.rmdir()


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder, and what it replaced; only for who holds its lock."""
    ours = [path for path in folder.glob(".*") if re.fullmatch(r"\..+\.\d+\.(partial|old)", path.name)]
    for left in (*ours, *_replaced(folder)):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()


def remove_folder(path: Path) -> None:
    """Its name is gone at once; a kill while it is being emptied leaves a hidden remainder, for `sweep`."""
    old = _beside(path, "old")
    _move(path, old)
    shutil.rmtree(old, ignore_errors=True)


def _nearest(path: Path) -> Path:
    """The path itself or the first above it that is there."""
    return next(p for p in (Path(path), *Path(path).absolute().parents) if p.exists())


def check_place(path: Path) -> None:
    """Refuse a name under which no folder could be written. Raises BadInput, or OSError where it is not permitted."""
    path = Path(path)
    if path.name in ("", ".."):
        raise BadInput(f"wrong --out in {path}: it has no name of its own. Choose another name")
    for part in path.absolute().parts:
        if len(os.fsencode(part)) > 200:  # room for our `.partial` names below the usual limit of 255
            raise BadInput(f"wrong --out in {path}: a name of over 200 bytes. Choose a shorter one")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise BadInput(f"wrong --out in {path}: it is not a folder. Choose another name")
    nearest = _nearest(path)
    if not nearest.is_dir():
        raise BadInput(f"wrong --out in {path}: {nearest} is not a folder. Choose another name")
    for place in (nearest, path.absolute().parent if path.exists() else nearest):  # its lock lies beside it
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(13, "permission denied", str(place))
    if free_bytes(path) is None and not path.exists():  # nobody knows, so it is tried: /proc has no room either
        try:
            os.rmdir(tempfile.mkdtemp(dir=nearest))
        except OSError as error:
            why = f"no folder can be made there ({error.strerror})"
            raise BadEnvironment(f"no place in {nearest}: {why}. Choose another folder") from None
    check_room(path, 2**20, "any result")


def check_out(path: Path, overwrite: bool, ours: Iterable[str], others: Iterable[str] | None = None) -> None:
    """Refuse an output folder that is not empty, unless `overwrite` and it holds one of `ours`, files we write; and,
    where `others` are given, nothing but these and hidden files.

    So `--out ~ --overwrite` cannot delete a home. Raises BadInput, or OSError where the place is not writable.
    """
    path = Path(path)
    check_place(path)
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise _taken(path)
        found = [p.name for p in path.iterdir() if not p.match(".*.partial")]  # a run killed at its start has no more
        fix = "Choose another name, or empty it yourself"
        if found and not any((path / name).is_file() for name in ours):
            raise BadInput(f"wrong --out in {path}: --overwrite replaces only what this program wrote. {fix}")
        foreign = [] if others is None else sorted({*found} - {*ours, *others, ".DS_Store"})
        if foreign:
            what = f"{foreign[0]} in it is not of this program, and --overwrite would delete it"
            raise BadInput(f"wrong --out in {path}: {what}. Move it away, or choose another name")


def check_apart(path: Path, sources: Iterable[Path]) -> None:
    """Refuse an output folder that is or holds something which is read. Raises BadInput."""
    for source in sources:
        if path.resolve() in (source.resolve(), *source.resolve().parents):
            raise BadInput(f"wrong --out in {path}: it holds {source}, which is read. Choose another folder")


def free_bytes(path: Path) -> int | None:
    """On the disk of a folder that need not be there yet; None where the file system does not say (some of networks and
    of user programs), or says that it has no bytes at all."""
    try:
        usage = shutil.disk_usage(_nearest(path))
    except OSError:
        return None
    return usage.free if usage.free or usage.total else None


def check_room(path: Path, needed: int, what: str) -> None:
    """Raises BadEnvironment, with the bytes, where fewer than `needed` are known to be free on the disk of `path`."""
    free = free_bytes(path)
    if free is not None and free < needed:
        raise BadEnvironment(f"disk full in {path}: {what} needs {needed:,} bytes, {free:,} are free. Free some space")
