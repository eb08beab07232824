"""What a process does to the files of a folder, operation by operation; one of them can be struck: killed or failed.

`Disk(folder)` only watches. `Disk(folder, Blow(7, "half"))` kills the process (SIGKILL) in the middle of operation 7;
with a number of errno, `Blow(7, "half", errno.ENOSPC)`, the operation fails there. `replay` says what a power loss may
leave of a list of operations.
"""

import builtins
import io
import itertools
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from unittest import mock


class Op(NamedTuple):
    """`to` is the new name of what is renamed, `data` what is written."""

    kind: str  # open (for writing), write, truncate, fsync, rename, mkdir, unlink, rmdir
    path: Path
    to: Path | None = None
    data: bytes = b""


class Blow(NamedTuple):
    """At operation `at`, counted from 0: before it, after half of its bytes are written, or after it."""

    at: int
    part: str = "before"
    number: int | None = None  # of the error; None kills


class Disk:
    """A context manager: within it, `ops` grows by every operation below `folder`."""

    def __init__(self, folder: Path, blow: Blow | None = None):
        self.folder, self.blow, self.ops = Path(os.path.abspath(folder)), blow, []
        self.names: dict[int, Path] = {}  # of open files, by number

    def __enter__(self):
        self.patches = ExitStack()
        for name in ("rename", "replace", "mkdir", "unlink", "rmdir", "ftruncate", "fsync", "write", "open"):
            self.patches.enter_context(mock.patch.object(os, name, getattr(self, f"_{name}")(getattr(os, name))))
        self.patches.enter_context(mock.patch.object(builtins, "open", self._open_file(builtins.open)))
        return self

    def __exit__(self, *error):
        self.patches.close()

    # ---- the operations ----------------------------------------------------------------------------------------------

    def do(self, op: Op, whole, half=lambda: None):
        if self.folder not in (op.path, *op.path.parents):
            return whole()
        struck = self.blow is not None and self.blow.at == len(self.ops)
        self.ops.append(op)
        if struck and self.blow.part != "after":
            if self.blow.part == "half":
                half()
            self._strike(op)
        result = whole()
        if struck:
            self._strike(op)
        return result

    def _strike(self, op: Op):
        if self.blow.number is None:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(self.blow.number, os.strerror(self.blow.number), None if op.kind == "write" else str(op.path))

    def _named(self, path, dir_fd: int | None = None) -> Path:
        return Path(os.path.abspath((self.names[dir_fd] if dir_fd in self.names else Path()) / os.fspath(path)))

    def _rename(self, real):
        return lambda a, b: self.do(Op("rename", self._named(a), self._named(b)), lambda: real(a, b))

    _replace = _rename

    def _mkdir(self, real):
        def mkdir(path, *mode):
            work = lambda: real(path, *mode)  # noqa: E731
            return work() if os.path.exists(path) else self.do(Op("mkdir", self._named(path)), work)

        return mkdir

    def _unlink(self, real):
        return lambda path, *, dir_fd=None: self.do(
            Op("unlink", self._named(path, dir_fd)), lambda: real(path, dir_fd=dir_fd)
        )

    def _rmdir(self, real):
        return lambda path, *, dir_fd=None: self.do(
            Op("rmdir", self._named(path, dir_fd)), lambda: real(path, dir_fd=dir_fd)
        )

    def _ftruncate(self, real):
        return lambda fd, size: self.do(Op("truncate", self.names.get(fd, Path())), lambda: real(fd, size))

    def _fsync(self, real):
        return lambda fd: self.do(Op("fsync", self.names.get(fd, Path())), lambda: real(fd))

    def _write(self, real):
        def write(fd, data):
            op = Op("write", self.names.get(fd, Path()), data=bytes(data))
            return self.do(op, lambda: real(fd, data), lambda: real(fd, op.data[: len(op.data) // 2]))

        return write

    def _open(self, real):
        def open_number(path, flags, mode=0o777, *, dir_fd=None):
            name, work = self._named(path, dir_fd), lambda: real(path, flags, mode, dir_fd=dir_fd)
            fd = self.do(Op("open", name), work) if flags & (os.O_WRONLY | os.O_RDWR) else work()
            self.names[fd] = name
            return fd

        return open_number

    def _open_file(self, real):
        def open_file(file, mode="r", *args, **kwargs):
            if mode != "wb" or isinstance(file, int):
                return real(file, mode, *args, **kwargs)
            raw = self.do(Op("open", self._named(file)), lambda: _Raw(file, "w"))
            raw.disk, self.names[raw.fileno()] = self, self._named(file)
            return io.BufferedWriter(raw)

        return open_file


class _Raw(io.FileIO):
    """Beneath the buffer of a file: a call here is a write of the system."""

    disk: Disk

    def write(self, data):
        data = bytes(data)
        op = Op("write", self.disk.names[self.fileno()], data=data)
        real = super().write
        return self.disk.do(op, lambda: real(data), lambda: real(data[: len(data) // 2]))


# ---- power loss ------------------------------------------------------------------------------------------------------


Tree = dict[Path, bytes | None]  # None: a folder


class _Node:
    """A file or folder, as programs see it and as it is known to be on the disk. Of a folder, `waiting` are the changes
    of names since it was synced, each {name: node or None}."""

    def __init__(self, content):
        self.content, self.synced, self.waiting = content, None if isinstance(content, bytes) else {}, []

    def change(self, names: dict):
        for name, node in names.items():
            self.content.pop(name, None) if node is None else self.content.__setitem__(name, node)
        self.waiting.append(names)

    def sync(self):
        self.synced = self.content if isinstance(self.content, bytes) else dict(self.content)
        self.waiting = []


def replay(
    root: Path, before: dict[Path, bytes | None], ops: list[Op]
) -> Iterator[tuple[int, dict[Path, bytes | None]]]:
    """(operations done, what the disk may hold after a power loss then), for every number of operations. A disk is
    {path: bytes, or None for a folder}.

    `before` is safely on the disk. As in ALICE (Pillai et al., OSDI 2014) a file's bytes are safe after its fsync and a
    name after that of its folder; until then, changes of names may be there or not in any order (a rename is one
    change), and bytes may be missing or zero. Of the many subsets: all changes, none, all but one, one alone.
    """
    root, tree = Path(os.path.abspath(root)), _Node({})

    def find(path: Path) -> _Node:
        node = tree
        for part in path.relative_to(root).parts:
            node = node.content[part]
        return node

    for path, data in sorted(before.items()):
        find(path.parent).change({path.name: _Node({} if data is None else data)})
    for node in _nodes(tree):
        node.sync()

    for done in range(len(ops) + 1):
        if done:
            _apply(ops[done - 1], find)
        changes = [(node, i) for node in _nodes(tree) for i in range(len(node.waiting))]
        fates = [set(), set(changes), *({c} for c in changes), *(set(changes) - {c} for c in changes)]
        for kept, lost in itertools.product(fates, (lambda data: b"", lambda data: bytes(len(data)))):
            yield done, dict(_left(tree, root, kept, lost))


def _nodes(node: _Node) -> Iterator[_Node]:
    yield node
    if isinstance(node.content, dict):
        versions = (node.content, node.synced, *node.waiting)
        there = {id(child): child for names in versions for child in names.values() if child}
        for child in there.values():
            yield from _nodes(child)


def _apply(op: Op, find) -> None:
    names = lambda path: find(path.parent)  # noqa: E731
    if op.kind in ("mkdir", "open"):
        if op.path.name not in names(op.path).content:
            names(op.path).change({op.path.name: _Node({} if op.kind == "mkdir" else b"")})
    elif op.kind == "write":
        find(op.path).content += op.data
    elif op.kind == "fsync":
        find(op.path).sync()
    elif op.kind == "rename":
        assert op.path.parent == op.to.parent
        names(op.path).change({op.path.name: None, op.to.name: find(op.path)})
    elif op.kind in ("unlink", "rmdir"):
        names(op.path).change({op.path.name: None})
    else:
        raise AssertionError(op)


def _left(node: _Node, path: Path, kept: set, lost) -> Iterator[tuple[Path, bytes | None]]:
    if isinstance(node.content, bytes):
        safe = node.synced or b""
        yield path, safe + lost(node.content[len(safe) :])
        return
    yield path, None
    names = dict(node.synced)
    for i, change in enumerate(node.waiting):
        if (node, i) in kept:
            for name, child in change.items():
                names.pop(name, None) if child is None else names.__setitem__(name, child)
    for name, child in names.items():
        yield from _left(child, path / name, kept, lost)
