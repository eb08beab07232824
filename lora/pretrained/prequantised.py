"""Weights that lie quantised in their hub folder, read as the numbers they stand for.

bitsandbytes, 4 bits  X.weight            codes, two a byte, whatever dtype the bytes are stored as
                      X.weight.quant_map  the values of the codes, (16,)
                      X.weight.absmax     a scale a block: float32, or codes with X.weight.nested_absmax, a scale of
                                          256 each, and X.weight.nested_quant_map, their values
                      X.weight.quant_state.bitsandbytes__nf4, or fp4: JSON as bytes: shape, dtype, block size, mean
bitsandbytes, 8 bits  X.weight            int8, (out, in)
                      X.SCB               127 times the scale of each row, (out,)
FP8                   X.weight            float8_e4m3fn, (out, in)
                      X.weight_scale_inv  a factor for each block of 128 x 128, or one for all; what the config says is
                                          not converted has none, and lies there in 16 bits

Sources: QuantState in bitsandbytes/functional.py; FineGrainedFP8Config of transformers, and DeepSeek-V3's own code.
What other methods write is refused: by `network.families.quantised` after the config, or by tensors left over.
"""

import re
from collections.abc import Mapping
from math import ceil, prod

import torch
from torch import Tensor

from lora import files
from lora.errors import BadInput
from lora.quant.int8 import LARGEST, Int8
from lora.quant.nf4 import BLOCKS_A_SCALE, NF4
from lora.quant.packed import Packed

METHODS = ("bitsandbytes", "fp8")  # quant_method of the configs that are read
DEQUANTISED = ", dequantised"  # how the description of such files ends
BLOCKS = tuple(2**i for i in range(5, 13))  # sizes that bitsandbytes knows
FLOAT8_BLOCK = [128, 128]
STATE_LIMIT = 2**16  # bytes of a quant_state, which has about 200
STATE = ".quant_state.bitsandbytes__"
COMPANION = re.compile(
    rf"(.*\.weight)\.(absmax|quant_map|nested_absmax|nested_quant_map|nested_offset|{STATE[1:]}(nf4|fp4))"
)
AGAIN = "Download it again"
Tensors = Mapping[str, files.Safetensors]  # in which file each tensor is


class Stored:
    """A weight (out, in) as some tensors of a folder, itself called `name`; `used` are the others. `kind` is that of
    its blocks, None where they are not kept. Raises BadInput for tensors that do not fit each other."""

    def __init__(self, name: str, tensors: Tensors, config: Mapping, where: str):
        self.name, self.tensors, self.where = name, tensors, where
        said = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
        self.dtype = getattr(torch, said) if said in ("float32", "float16") else torch.bfloat16
        self.shape = tensors[name].header[name][1]
        self.used: set[str] = set()
        self.prepare(config)

    def need(self, right: bool, name: str, why: str) -> None:
        if not right:
            raise BadInput(f"wrong tensor in {self.where}:{name}: {why}. {AGAIN}")

    def get(self, end: str, *kinds: str, count: int | None = None, stem: str | None = None) -> str:
        """The name of a companion, which is there in one of these dtypes, with this many values."""
        name = (self.name if stem is None else stem) + end
        if name not in self.tensors:
            raise BadInput(f"missing tensor in {self.where}:{name}: {self.name} is quantised. {AGAIN}")
        kind, shape = self.tensors[name].header[name]
        self.need(kind in kinds, name, f"dtype {kind}, where {' or '.join(kinds)} is expected")
        why = f"{prod(shape)} values, where the weight's shape {tuple(self.shape)} asks for {count}"
        self.need(count is None or prod(shape) == count, name, why)
        self.used.add(name)
        return name

    def need_matrix(self, dtype: str) -> None:
        kind, shape = self.tensors[self.name].header[self.name]
        self.need(
            kind == dtype and len(shape) == 2, self.name, f"{kind} {shape}, where a matrix of {dtype} is expected"
        )

    def values(self, name: str) -> Tensor:
        return self.tensors[name].read(name).reshape(-1)

    def packed(self, start: int, stop: int) -> Packed | None:
        """Some rows as they are; None where a block has values of other rows, too."""
        return None

    def nbytes(self, start: int, stop: int) -> int | None:
        """The bytes of `packed`, without reading it."""
        return None

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Some rows: decoded in float32, and rounded once to `dtype`."""
        return self.packed(start, stop).dequantise(dtype)


class FourBit(Stored):
    def prepare(self, config: Mapping) -> None:
        kind = "fp4" if f"{self.name}{STATE}fp4" in self.tensors else "nf4"
        self.kind, name = kind.upper(), self.get(STATE + kind, "U8")
        self.need(prod(self.tensors[name].header[name][1]) <= STATE_LIMIT, name, f"over {STATE_LIMIT:,} bytes")
        state = files.read_json(f"{self.where}:{name}", self.values(name).numpy().tobytes())
        shape, dtype, self.block = (state.get(key) for key in ("shape", "dtype", "blocksize"))
        right = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 2**31 for n in shape)
        self.need(right, name, f"shape {str(shape)[:60]} is not that of a matrix")
        self.need(self.block in BLOCKS, name, f"blocksize {str(self.block)[:60]} is none of {BLOCKS}")
        self.shape, self.dtype = tuple(shape), getattr(torch, str(dtype), None)
        self.need(self.dtype in files.DTYPES.values(), name, f"dtype {str(dtype)[:60]} is none of a weight")
        count, blocks = prod(shape), ceil(prod(shape) / self.block)
        kind, stored = self.tensors[self.name].header[self.name]
        self.need(kind in files.STORED, self.name, f"dtype {kind}")
        found, asked = prod(stored) * files.STORED[kind].itemsize, ceil(count / 2)
        self.need(found == asked, self.name, f"{found} bytes, where the shape {self.shape} asks for {asked}")
        self.table = self.get(".quant_map", "F32", count=16)
        self.nested = f"{self.name}.nested_absmax" in self.tensors
        self.absmax = self.get(".absmax", *(("U8",) if self.nested else ("F32", "F16", "BF16")), count=blocks)
        if self.nested:
            of_256 = state.get("nested_blocksize") == BLOCKS_A_SCALE
            self.need(of_256, name, f"nested_blocksize is not {BLOCKS_A_SCALE}")
            self.nested_absmax = self.get(".nested_absmax", "F32", count=ceil(blocks / BLOCKS_A_SCALE))
            self.map = self.get(".nested_quant_map", "F32", count=256)
            self.mean = state.get("nested_offset")
            if f"{self.name}.nested_offset" in self.tensors:  # as older versions wrote it
                self.mean = self.values(self.get(".nested_offset", "F32", count=1)).item()
            right = type(self.mean) in (int, float) and abs(self.mean) < 3e38  # false for NaN, too
            self.need(right, name, f"nested_offset {str(self.mean)[:60]} is no finite number")

    def whole(self) -> NF4:
        codes, absmax = self.values(self.name).view(torch.uint8), self.values(self.absmax)
        nested = {}
        if self.nested:
            nested = {"nested_absmax": self.values(self.nested_absmax), "map": self.values(self.map)}
            nested["mean"] = torch.tensor(self.mean, dtype=torch.float32)
        absmax = absmax if self.nested else absmax.float()
        return NF4(self.shape, codes, absmax, table=self.values(self.table), block=self.block, **nested)

    def _blocks(self, start: int, stop: int) -> tuple[int, int] | None:
        """The first and the last block of some rows, if they are of no others."""
        columns = self.shape[1]
        aligned = start * columns % self.block == 0 and (stop * columns % self.block == 0 or stop == self.shape[0])
        return (start * columns // self.block, ceil(stop * columns / self.block)) if aligned else None

    def packed(self, start: int, stop: int) -> NF4 | None:
        whole, blocks = self.whole(), self._blocks(start, stop)
        if not blocks or (start, stop) == (0, self.shape[0]):
            return whole if blocks else None
        (first, last), columns = blocks, self.shape[1]
        codes = whole.codes[start * columns // 2 : ceil(stop * columns / 2)].clone()
        table = self.values(self.table)
        # a part's blocks need not begin where a scale's do, so its scales are decoded: the same numbers
        return NF4((stop - start, columns), codes, whole.scale(first, last).clone(), table=table, block=self.block)

    def nbytes(self, start: int, stop: int) -> int | None:
        if not (blocks := self._blocks(start, stop)):
            return None
        count, whole = blocks[1] - blocks[0], (start, stop) == (0, self.shape[0])
        scales = count + 4 * ceil(count / BLOCKS_A_SCALE) if self.nested and whole else 4 * count
        return ceil((stop - start) * self.shape[1] / 2) + scales

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        return self.whole().dequantise(dtype)[start:stop]


class EightBit(Stored):
    kind = "INT8"

    def prepare(self, config: Mapping) -> None:
        stem = self.name.removesuffix("weight")
        self.need_matrix("I8")
        self.scale = self.get("SCB", "F32", count=self.shape[0], stem=stem)
        if f"{stem}weight_format" in self.tensors:
            layout = self.values(self.get("weight_format", "U8", count=1, stem=stem)).item()
            self.need(layout == 0, f"{stem}weight_format", f"layout {layout}, where only rows, 0, is implemented")

    def packed(self, start: int, stop: int) -> Int8:
        codes = self.tensors[self.name].read_rows(self.name, start, stop)
        return Int8((stop - start, self.shape[1]), codes, self.values(self.scale)[start:stop] / LARGEST)

    def nbytes(self, start: int, stop: int) -> int:
        return (stop - start) * (self.shape[1] + 4)


class Float8(Stored):
    kind = None

    def prepare(self, config: Mapping) -> None:
        self.need_matrix("F8_E4M3")
        block = (config.get("quantization_config") or {}).get("weight_block_size") or FLOAT8_BLOCK
        right = isinstance(block, list) and len(block) == 2 and all(type(n) is int and 0 < n < 2**31 for n in block)
        self.need(right, self.name, f"weight_block_size {str(block)[:60]} in the config is not two sizes")
        self.factor = self.get("_scale_inv", *files.DTYPES)
        shape = self.tensors[self.factor].header[self.factor][1]
        self.block = block if prod(shape) > 1 else self.shape
        grid = tuple(ceil(size / by) for size, by in zip(self.shape, self.block, strict=True))
        why = f"shape {shape}, where the weight's {self.shape} asks for {grid}, a factor for {block[0]} x {block[1]}"
        self.need(shape == grid or prod(shape) == prod(grid) == 1, self.factor, why)
        stem = self.name.removesuffix("weight")
        self.used.update(stem + end for end in ("activation_scale", "input_scale") if stem + end in self.tensors)

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        (high, wide), columns = self.block, self.shape[1]
        factors = self.values(self.factor).float().view(-1, ceil(columns / wide))
        values = torch.empty(stop - start, columns, dtype=dtype)
        for i in range(start // high, ceil(stop / high)):  # a row of blocks
            first, last = max(start, i * high), min(stop, (i + 1) * high)
            part = self.tensors[self.name].read_rows(self.name, first, last).float()
            values[first - start : last - start] = part * factors[i].repeat_interleave(wide)[:columns]
        return values


def find(config: Mapping, tensors: Tensors, where: str) -> dict[str, Stored]:
    """The quantised weights of a folder, by name. Raises BadInput with all that are broken."""
    said = config.get("quantization_config") or {}
    if not isinstance(said, Mapping) or said.get("quant_method", METHODS[0]) not in METHODS:
        return {}  # to be refused by that field
    kinds: dict[str, type[Stored]] = {}
    for name in tensors:
        if found := COMPANION.fullmatch(name):
            kinds[found[1]] = FourBit
        elif name.endswith(".SCB"):
            kinds[name.removesuffix("SCB") + "weight"] = EightBit
        elif said.get("quant_method") == "fp8" and tensors[name].header[name][0] == "F8_E4M3":
            kinds[name] = Float8
    weights, problems = {}, []
    for name, kind in kinds.items():
        try:
            if name not in tensors:
                raise BadInput(f"missing tensor in {where}:{name}: only its scales are there. {AGAIN}")
            weights[name] = kind(name, tensors, config, where)
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(*problems)
    return weights


def offered(header: Mapping, weights: Mapping[str, Stored]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The header of the model that the weights stand for."""
    used = set().union(*(weight.used for weight in weights.values()))
    plain = {name: (files.NAMES[weight.dtype], weight.shape) for name, weight in weights.items()}
    return {name: plain.get(name, found) for name, found in header.items() if name not in used}


def plain(config: dict) -> dict:
    """The config of the model that the weights stand for."""
    said = config.get("quantization_config")
    read = isinstance(said, Mapping) and said.get("quant_method") in METHODS
    return {key: value for key, value in config.items() if key != "quantization_config"} if read else config


def kinds(weights: Mapping[str, Stored]) -> str:
    return " and ".join(sorted({weight.kind or "FP8" for weight in weights.values()}))
