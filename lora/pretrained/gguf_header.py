"""The bounded reader of a GGUF header: metadata, and where each tensor lies.

Nothing in the file is trusted: every count and length is checked against the bytes that remain before it is used. (The
gguf package's own reader loops over counts as they are given.)
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import os
import struct
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from lora.errors import BadInput

MOST_HEADER = 64 * 2**20  # bytes; a vocabulary of 256,000 tokens with its merges takes about 20 MiB
MOST_ALIGNMENT = 2**20
AGAIN = "Download the file again"

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct's codes
STRING, ARRAY = 8, 9  # the other two types of metadata
STRING_BYTES, KEY_BYTES, TENSOR_BYTES = 8, 13, 32  # the least that one of them takes in the header


class Stored(NamedTuple):
    """A tensor in the file. `shape` is the hub's, rows last; `offset` and `size` are bytes."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    size: int


@cache
def block_of(kind: int) -> tuple[GGMLQuantizationType, int, int] | None:
    """A tensor type, its values and its bytes per block; None if the package cannot dequantise it."""
    try:
        known = GGMLQuantizationType(kind)
        dequantize(np.zeros((1, GGML_QUANT_SIZES[known][1]), np.uint8), known)
        return known, *GGML_QUANT_SIZES[known]
    except (ValueError, KeyError, NotImplementedError):
        return None


def show(value: Any) -> str:
    """Something out of the file, short and on one line."""
    value = value[:80] if isinstance(value, (str, list, np.ndarray)) else value
    text = " ".join(repr(value)[:1000].split())
    return text if len(text) <= 80 else text[:77] + "..."


class Metadata:
    """The key-value pairs of a file, checked when they are asked for. Raises BadInput that names the key."""

    def __init__(self, path: Path, values: dict[str, Any]):
        self.path, self.values = path, values

    def check(self, right: bool, key: str, why: str, fix: str = "Give another file, or a folder") -> None:
        if not right:
            raise BadInput(f"unsupported model in {self.path}:{key}: {why}. {fix}")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of exactly this type; numbers are positive and finite."""
        value = self.values.get(key, default)
        self.check(value is not None, key, "it is missing", AGAIN)
        right = type(value) is kind and (kind not in (int, float) or 0 < value < 3e38)
        self.check(right, key, f"{show(value)} is no {kind.__name__}, or not positive", AGAIN)
        return value


class Keys:
    """The values under the architecture's name."""

    def __init__(self, metadata: Metadata, arch: str):
        self.metadata, self.arch = metadata, arch

    def get(self, key: str, kind: type = int, default: Any = None) -> Any:
        value = self.metadata.get(f"{self.arch}.{key}", kind, default)
        return float(str(np.float32(value))) if kind is float else value  # 1e-05, not 9.999999747378752e-06

    def has(self, key: str) -> bool:
        """Whether it is there, and neither 0 nor empty."""
        return bool(np.any(self.metadata.values.get(f"{self.arch}.{key}")))

    def check(self, right: bool, key: str, why: str, fix: str = "Give another file, or a folder") -> None:
        self.metadata.check(right, f"{self.arch}.{key}", why, fix)


class Header:
    """Takes values from the front of a file, never more than there are. Raises BadInput."""

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path, self.key = file, path, ""
        self.size = os.fstat(file.fileno()).st_size
        self.left = min(self.size, MOST_HEADER)

    def check(self, right: bool, why: str, fix: str = AGAIN) -> None:
        if not right:
            raise BadInput(f"broken GGUF header in {self.path}{self.key and ':' + self.key}: {why}. {fix}")

    def take(self, size: int) -> bytes:
        if size > self.left:  # formatting the message first would double the time of a header
            self.check(False, f"{size:,} bytes are announced, {self.left:,} remain")
        self.left -= size
        data = self.file.read(size)
        self.check(len(data) == size, "the file became shorter while it was read")
        return data

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def count(self, least: int) -> int:
        """A count of things that take `least` bytes each, or more."""
        count = self.number("Q")
        self.check(count * least <= self.left, f"{count:,} entries are announced, {self.left:,} bytes remain")
        return count

    def string(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            self.check(False, f"text that is not UTF-8 at its byte {error.start}")

    def value(self) -> Any:
        """A str, int, float or bool; an array is a list of str or a numpy array."""
        kind = self.number("I")
        array = kind == ARRAY
        kind = self.number("I") if array else kind
        if kind == STRING:
            return [self.string() for _ in range(self.count(STRING_BYTES))] if array else self.string()
        self.check(kind in SCALARS, "an array of arrays" if kind == ARRAY else f"value type {kind} is unknown")
        if not array:
            return self.number(SCALARS[kind])
        dtype = np.dtype("<" + SCALARS[kind])
        return np.frombuffer(self.take(self.count(dtype.itemsize) * dtype.itemsize), dtype)

    def tensor(self) -> Stored:
        """A tensor's description; its offset counts from the start of the data."""
        dims = self.number("I")
        self.check(1 <= dims <= 4, f"{dims:,} dimensions; 1 to 4 are possible")
        shape = tuple(self.number("Q") for _ in range(dims))[::-1]
        kind, offset = self.number("I"), self.number("Q")
        block = block_of(kind)
        self.check(block is not None, f"tensor type {kind} cannot be dequantised", "Convert the model to Q8_0 or BF16")
        whole = 0 not in shape and shape[-1] % block[1] == 0
        self.check(whole, f"rows of shape {shape} are not whole blocks of {block[1]} values ({block[0].name})")
        return Stored(block[0], shape, offset, math.prod(shape) // block[1] * block[2])

    def read(self) -> tuple[dict[str, Any], dict[str, Stored]]:
        """All metadata, and all tensors: within the file, aligned, without overlap."""
        magic = self.file.read(8)
        self.check(magic != b"version ", "it is a git-lfs pointer, not the file", "Run git lfs pull")
        self.check(magic[:4] == b"GGUF" and len(magic) == 8, f"it begins with {magic}", "Give a GGUF file")
        self.left -= 8
        version, swapped = (int.from_bytes(magic[4:], order) for order in ("little", "big"))
        why = "it is big-endian" if swapped in (1, 2, 3) else f"version {version} is not supported; 2 and 3 are"
        self.check(version in (2, 3), why, "Convert the model again")
        metadata, tensors = {}, {}
        tensor_count, key_count = self.count(TENSOR_BYTES), self.count(KEY_BYTES)
        for count, entries, parse in ((key_count, metadata, self.value), (tensor_count, tensors, self.tensor)):
            for _ in range(count):
                self.key = ""
                name = self.string()
                self.key = show(name)[1:-1]
                self.check(name not in entries, "it is there twice")
                entries[name] = parse()
        self.key, alignment = "general.alignment", metadata.get("general.alignment", 32)
        power = type(alignment) is int and 1 <= alignment <= MOST_ALIGNMENT and alignment & (alignment - 1) == 0
        self.check(power, f"{show(alignment)} is no power of two up to {MOST_ALIGNMENT}")
        start = end = -(-self.file.tell() // alignment) * alignment
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
            self.key, offset = show(name)[1:-1], start + tensor.offset
            self.check(tensor.offset % alignment == 0, f"its data is not aligned to {alignment}")
            self.check(offset >= end, "its data overlaps that of another tensor")
            end = offset + tensor.size
            self.check(end <= self.size, f"its data would end at byte {end:,}, the file has {self.size:,}")
            tensors[name] = tensor._replace(offset=offset)
        return metadata, tensors
