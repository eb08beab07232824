"""Writing files, and the bounded reading of safetensors and JSON. Only this module and `folders` write.

A name that exists is complete: everything is written aside, synced, renamed, and then the folder is synced.
"""

import errno
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from lora.errors import BadInput, Refused

JSON_LIMIT = 256 * 2**20  # bytes; the largest tokenizer.json files have about 35 MB
TEMPLATE_LIMIT = 2**20

# safetensors dtype name -> torch dtype; a model may hold others, but we do not compute with them
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORED = DTYPES | {"F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "U8": torch.uint8}  # weights are, packed ones too
NAMES = {dtype: name for name, dtype in STORED.items()}
# errors of a call that a file system does not know; EINVAL is what Linux says of fsync and flock
UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY)
NO_RENAME = (errno.EXDEV, errno.EBUSY, *UNSUPPORTED)  # at mount points, layers of a container, some of networks


# ---- writing ---------------------------------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power loss, where the system can do that."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows does not open folders
        return
    try:
        flush(handle)
    finally:
        os.close(handle)


def flush(handle: int) -> None:
    """`os.fsync`, where the file system can do that: some of networks and of user programs cannot."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (*UNSUPPORTED, errno.EPERM, errno.EBADF):
            raise


def _replace(aside: Path, path: Path) -> None:
    """`os.replace`; a copy where a file system cannot do it: a file that is a mount point, some of networks."""
    try:
        os.replace(aside, path)
    except OSError as error:
        if error.errno not in NO_RENAME:
            raise
        shutil.copyfile(aside, path)
        sync(path)
        os.unlink(aside)


def behind_link(path: Path) -> Path:
    """What a link to a file, to a folder or to nothing yet leads to: results go there, and the link stays."""
    path = Path(path)
    follow = path.is_symlink() and (path.is_file() or path.is_dir() or not path.exists())  # not /dev/stdout, a pipe
    real = Path(os.path.realpath(path))
    return real if follow and not real.is_symlink() else path  # a link to itself leads nowhere


@contextmanager
def writing(path: Path, check: Callable[[Path], None] = lambda whole: None):
    """A binary file that appears under `path` only when the block, and `check` of the whole file, have ended well."""
    path = behind_link(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            flush(file.fileno())
        check(aside)
        _replace(aside, path)
        sync(path.parent)
    except BaseException as error:
        if isinstance(error, OSError) and not error.filename:  # a failed write does not say which file
            error.filename = str(path)
        with suppress(OSError):
            os.unlink(aside)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    with writing(path) as file:
        file.write(data)


def write_json(path: Path, value) -> None:
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """A JSON object a line."""
    with writing(path) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def unwritable(flag: str, path: Path, *inputs: Path) -> list[str]:
    """Why `flag` cannot name this file for a result: no folder, no regular file, or one of the files that are read."""
    path = behind_link(path)
    if path.name in ("", ".."):
        return [f"wrong {flag} in {path}: it is not a regular file. Give a file name"]
    if not path.parent.is_dir():
        return [f"wrong {flag} in {path}: there is no folder {path.parent}. Make it first: mkdir -p {path.parent}"]
    if path.exists() and not path.is_file():
        return [f"wrong {flag} in {path}: it is not a regular file. Choose another name"]
    if any(os.path.realpath(path) == os.path.realpath(other) for other in inputs):
        return [f"wrong {flag} in {path}: it is a file that is read. Choose another name"]
    return []


def append_row(path: Path, row: dict) -> tuple[int, bytes]:
    """One JSON line in one write, so that a killed process leaves whole lines only; a full disk leaves none of it.

    Where it begins in the file, and the line, for `blank_row`.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        line, size = (json.dumps(row, ensure_ascii=False) + "\n").encode(), os.fstat(handle).st_size
        if os.write(handle, line) < len(line):
            os.ftruncate(handle, size)
            raise OSError(errno.ENOSPC, "no space left")
        return os.lseek(handle, 0, os.SEEK_CUR) - len(line), line
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        os.close(handle)


def blank_row(path: Path, start: int, line: bytes) -> bool:
    """Put spaces over a row that `append_row` wrote, if it still is there: nothing else moves, whoever appends."""
    with open(path, "r+b", buffering=0) as file:
        file.seek(start)
        if file.read(len(line)) != line:
            return False
        file.seek(start)
        return file.write(b" " * (len(line) - 1)) == len(line) - 1


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_safetensors(path: Path, header: dict[str, tuple[str, tuple[int, ...]]], read, metadata=None) -> None:
    """Write tensors one at a time: `header` gives each name's dtype and shape, `read(name)` the tensor.

    The same content gives the same bytes: names are sorted, as safetensors sorts them (by dtype width, then by name).
    Format: https://github.com/huggingface/safetensors#format
    """
    table, offset = {"__metadata__": metadata} if metadata else {}, 0
    names = sorted(header, key=lambda name: (-STORED[header[name][0]].itemsize, name))
    for name in names:
        dtype, shape = header[name]
        end = offset + STORED[dtype].itemsize * int(np.prod(shape, dtype=np.int64))
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with writing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            tensor = read(name).detach().to("cpu").contiguous()
            if (NAMES[tensor.dtype], tuple(tensor.shape)) != header[name]:
                raise AssertionError(f"{name}: announced {header[name]}, got {tensor.dtype} {tuple(tensor.shape)}")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata=None) -> None:
    """`write_safetensors` of tensors that are in memory."""
    header = {name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_safetensors(path, header, tensors.get, metadata)


# ---- reading ---------------------------------------------------------------------------------------------------------


def is_regular(path: Path) -> bool:
    return Path(path).is_file()  # follows links; false for FIFOs and devices, which could hang


def open_regular(path: Path, limit: int = JSON_LIMIT):
    """A file of at most `limit` bytes, open for reading. Raises BadInput for anything else."""
    path = Path(path)
    if not path.exists():
        raise BadInput(f"missing file in {path}: there is no such file. Check the path")
    if not is_regular(path):
        raise BadInput(f"wrong file in {path}: not a regular file. Give a file")
    if path.stat().st_size > limit:
        raise BadInput(f"wrong file in {path}: larger than {limit >> 20} MiB. It can't be what it claims to be")
    return open(path, "rb")


def read_bytes(path: Path, limit: int = JSON_LIMIT) -> bytes:
    with open_regular(path, limit) as file:
        return file.read()


def read_json(path: Path, data: bytes | None = None) -> dict:
    """A JSON object. Raises BadInput with line and column."""
    try:
        value = json.loads((read_bytes(path) if data is None else data).decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise BadInput(f"broken JSON in {path}:{error.lineno}: {error.msg}, column {error.colno}. Repair it") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"wrong encoding in {path}: not UTF-8 at byte {error.start}. Convert it to UTF-8") from None
    except (RecursionError, ValueError) as error:
        raise BadInput(f"broken JSON in {path}: {error}. Repair it") from None
    if not isinstance(value, dict):
        raise BadInput(f"wrong JSON in {path}: expected an object, found {type(value).__name__}. Repair it")
    return value


def read_template(path: Path, data: bytes | None = None) -> str | None:
    """The chat template in a file: all of it; or of a JSON file what `chat_template` says, a text or the one called
    "default" in a list of several, None where it says neither. Raises BadInput for what is no text."""
    data = read_bytes(path, TEMPLATE_LIMIT if Path(path).suffix != ".json" else JSON_LIMIT) if data is None else data
    if Path(path).suffix != ".json":
        return data.decode("utf-8-sig", "replace")
    source = read_json(path, data).get("chat_template")
    if isinstance(source, list):  # "tool_use" and the like are the others
        named = (one for one in source if isinstance(one, dict) and one.get("name") == "default")
        source = next((one.get("template") for one in named), None)
    return source if isinstance(source, str) else None


class Safetensors:
    """One safetensors file: `header` maps a name to dtype name and shape, `read(name)` gives the tensor.

    Read with pread into memory of our own: a file truncated while it is mapped would kill the process (SIGBUS).
    Raises BadInput for a file that is not valid, Refused for a pickle under this name.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        if not is_regular(self.path):
            raise BadInput(f"missing weights in {path}: there is no such file. Download it again")
        with open(self.path, "rb") as file:
            start = file.read(16)
        pickles = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
        if start.startswith(pickles) and start[8:9] != b"{":  # or a header of 0x..80 bytes
            raise Refused(f"pickle in {path}: pickled weights are never opened. Convert them to safetensors")
        if start.startswith(b"version https://"[:16]):
            raise BadInput(f"missing weights in {path}: a git-lfs pointer, not the file. Run git lfs pull")
        try:
            self._file = safe_open(self.path, "pt", backend="pread")
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118 (not a dict)
            self.header = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
            self.metadata, self._names = self._file.metadata() or {}, {}
        except (SafetensorError, OSError, ValueError, OverflowError, TypeError) as error:
            fix = "It is damaged or incomplete; download or write it again"
            raise BadInput(f"broken safetensors in {path}: {str(error).rstrip('.')}. {fix}") from None

    def rename(self, names: dict[str, str]) -> None:
        """From now on only these tensors are there, under new names: new -> old."""
        self._names, self.header = names, {new: self.header[old] for new, old in names.items()}

    def read(self, name: str) -> torch.Tensor:
        try:
            return self._file.get_tensor(self._names.get(name, name))
        except (SafetensorError, OSError) as error:
            raise BadInput(f"broken safetensors in {self.path}:{name}: {error}. Download it again") from None

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a tensor, and no others are read: the library's slices read all of it first."""
        dtype, shape = self.header[name]
        rows = torch.empty((stop - start, *shape[1:]), dtype=STORED[dtype])
        buffer = rows.reshape(-1).view(torch.uint8).numpy()
        with open(self.path, "rb") as file:
            file.seek(self._starts[self._names.get(name, name)] + start * rows[:1].nbytes)
            if file.readinto(buffer) < buffer.nbytes:
                raise BadInput(f"broken safetensors in {self.path}:{name}: it has been cut. Download it again")
        return rows

    @cached_property
    def _starts(self) -> dict[str, int]:
        """Where in the file each tensor begins; the header has been checked when it was opened."""
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        return {name: 8 + length + found["data_offsets"][0] for name, found in header.items() if "dtype" in found}
