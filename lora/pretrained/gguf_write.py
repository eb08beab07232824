"""A model, or an adapter alone, as one GGUF file that llama.cpp and Ollama load; tensors are written one at a time.

    blk.0.attn_q.weight                     (out, in), its rows as llama.cpp's RoPE wants them
    blk.0.attn_q.weight.lora_a, .lora_b     (r, in) and (out, r) of an adapter, counted alpha / r times

Conventions: llama.cpp's convert_hf_to_gguf.py, convert_lora_to_gguf.py and src/llama-adapter.cpp.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType, WriterState
from gguf.quants import dequantize, quantize

from lora import files, folders
from lora.errors import BadInput, BadNumbers, say
from lora.network.config import ModelConfig
from lora.network.families import FAMILIES
from lora.pretrained import fused, gguf_keys, gguf_names, gguf_rope
from lora.pretrained.folder import ModelFiles
from lora.pretrained.gguf import CHUNK
from lora.pretrained.gguf_layout import Layout
from lora.pretrained.gguf_vocab import tokenizer_metadata
from lora.pretrained.load import empty_model
from lora.pretrained.write import stored_as

F32, F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
FLOATS = {F32: torch.float32, F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}
TYPES = {  # --gguf-type: how matrices are stored, and what llama.cpp calls such a file
    "f32": (F32, LlamaFileType.ALL_F32),
    "f16": (F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


class Planned(NamedTuple):
    """A tensor of the file before there is one."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


def check_out(path: Path, overwrite: bool) -> None:
    """Refuse a name under which no GGUF file could be written, or one that would be lost. Raises BadInput, OSError."""
    problems = files.unwritable("--out", path)
    if not problems and path.suffix != ".gguf":
        problems = [f"wrong --out in {path}: a GGUF file has a name that ends in .gguf. Call it {path.name}.gguf"]
    if not problems and path.exists():
        with open(path, "rb") as file:
            ours = file.read(4) == b"GGUF"
        if not overwrite:
            problems = [f"wrong --out in {path}: the file is there already. Choose another name or add --overwrite"]
        elif not ours:
            why = "it is no GGUF file, and --overwrite replaces no other. Choose another name"
            problems = [f"wrong --out in {path}: {why}"]
    if problems:
        raise BadInput(*problems)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(13, "permission denied", str(path.parent))


def _type(shape: tuple[int, ...], kind: str) -> GGMLQuantizationType:
    """What is no matrix stays float32, which llama.cpp computes with; rows that are not whole blocks become float16."""
    wanted, _ = TYPES[kind]
    if len(shape) != 2:
        return F32
    return F16 if shape[-1] % GGML_QUANT_SIZES[wanted][0] else wanted


@torch.no_grad()
def write_model(
    base: ModelFiles,
    path: Path,
    change: Callable[[str, torch.Tensor], torch.Tensor],
    kind: str = "f16",
    template: str | None = None,
    check: Callable[[Path], None] = lambda whole: None,
) -> None:
    """Write a whole model: `change(name, tensor)` gives the float32 tensor that is rounded once to `kind`, a key of
    TYPES; `template` is a file that replaces the chat template; where `check` of the whole file raises, there is none.
    Raises BadInput for what GGUF, or we, cannot say."""
    config, names = ModelConfig.from_json(base.config, base.name), empty_model(base).state_dict()
    arch, row = gguf_keys.architecture(config, base.name)
    layout = Layout(row, config.head_dim, config.delta)
    scaling, tensors = gguf_rope.written(config, base.config, row, partial(gguf_keys.refuse, base.name, arch))

    def read(parts: list[str]) -> torch.Tensor:
        tensors = [layout.stored(name, change(name, base.read(name, base.widest))) for name in parts]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    planned = {}
    for whole, parts in fused.stored(gguf_names.held(config), names).items():
        shape = stored_as(base, parts)[1]
        own = (shape[0], *shape[2:]) if len(shape) == 3 else shape  # a convolution's
        planned[_named(row, config, whole, base.name)] = Planned(_type(shape, kind), own, partial(read, parts))
    for name, tensor in tensors.items():
        planned[name] = Planned(F32, tuple(tensor.shape), lambda tensor=tensor: tensor)
    sizes = {f"{arch}.{key}": value for key, value in (gguf_keys.sizes(config, base.config, row) | scaling).items()}
    _write(path, arch, "model", sizes | tokenizer_metadata(base, template), planned, kind, check)


@torch.no_grad()
def write_adapter(
    raw_config: dict, path: Path, maps: dict[str, tuple[float, torch.Tensor, torch.Tensor]], kind: str = "f32"
) -> None:
    """Write an adapter alone: a Linear's path -> s, A (r, in), B (out, r). Raises BadInput as `write_model`.

    llama.cpp counts a map alpha / r times with one alpha for all, so where s r differs it goes into B.
    """
    config = ModelConfig.from_json(raw_config)
    arch, row = gguf_keys.architecture(config, "config.json")
    layout = Layout(row, config.head_dim, config.delta)
    alpha = next(s * len(A) for s, A, _ in maps.values())
    tensors = {}
    for target, parts in fused.stored(gguf_names.held(config), [f"{name}.weight" for name in maps]).items():
        s, A, B = _one_map(config, target, {name: maps[name.removesuffix(".weight")] for name in parts})
        A, B = layout.maps(target, A, B.float() * (s * len(A) / alpha))
        for end, tensor in (("lora_a", A), ("lora_b", B)):
            shape = tuple(tensor.shape)
            tensors[f"{_named(row, config, target, target)}.{end}"] = Planned(
                _type(shape, kind), shape, lambda t=tensor: t
            )
    _write(path, arch, "adapter", {"adapter.type": "lora", "adapter.lora.alpha": float(alpha)}, tensors, kind)


def _one_map(config: ModelConfig, whole: str, maps: dict[str, tuple]) -> tuple[float, torch.Tensor, torch.Tensor]:
    """s, A and B of a tensor, of which the maps given are for some rows each: their ranks add up."""
    if whole in maps:
        return maps[whole]
    places, rows = fused.places(config, whole)
    A = torch.cat([A.float() for _, A, _ in maps.values()])
    B, rank = torch.zeros(rows, len(A)), 0
    for name, (s, one, other) in maps.items():
        first, count = places[name]
        B[first : first + count, rank : rank + len(one)] = s * other.float()
        rank += len(one)
    return 1.0, A, B


def _named(row: gguf_names.Architecture, config: ModelConfig, name: str, where: str) -> str:
    found = gguf_names.gguf_name(gguf_names.hub_names(row, FAMILIES[config.model_type]), name)
    stem, kind = name.rsplit(".", 1)
    if not found or (kind == "bias" and stem.rsplit(".", 1)[-1] not in row.biases):
        raise BadInput(f"unsupported model in {where}:{name}: GGUF has no place for it. Write a model folder")
    return found


def _write(
    path: Path,
    arch: str,
    what: str,
    metadata: dict[str, Any],
    tensors: dict[str, Planned],
    kind: str,
    check: Callable[[Path], None] = lambda whole: None,
) -> None:
    wanted, file_type = TYPES[kind]
    general = {"type": what, "name": Path(path).stem, "file_type": int(file_type)}
    general["quantization_version"] = GGML_QUANT_VERSION
    writer = GGUFWriter(None, arch)
    for key, value in ({f"general.{key}": value for key, value in general.items()} | metadata).items():
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds.get(type(value), writer.add_array)(key, value)
    total = 0
    for name, (kind, shape, _) in tensors.items():
        values, size = GGML_QUANT_SIZES[kind]
        total += (nbytes := int(np.prod(shape)) // values * size)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
    other = [name for name, (kind, shape, _) in tensors.items() if kind == F16 != wanted]
    if other:
        say(f"note     f16 in place of {wanted.name.lower()} where rows are not whole blocks of "
            f"{GGML_QUANT_SIZES[wanted][0]} values: {len(other)} tensors, {other[0]} the first")  # fmt: skip
    folders.check_room(path, total, "the GGUF file")
    with files.writing(path, check) as file:
        writer.fout, writer.state = [file], WriterState.EMPTY  # given a path, it opens a file of its own
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, (kind, shape, read) in tensors.items():
            writer.write_padding(file, file.tell())
            tensor = read().detach().to("cpu")
            if tuple(tensor.shape) != shape:
                raise AssertionError(f"{name}: announced {shape}, got {tuple(tensor.shape)}")
            for rows in tensor.split(max(1, CHUNK // shape[-1])) if len(shape) > 1 else [tensor]:
                file.write(_packed(rows, kind, name))
        writer.write_padding(file, file.tell())


def rounded(values: torch.Tensor, kind: str) -> torch.Tensor:
    """A float32 matrix as it is read back from a file of `kind`, a key of TYPES."""
    kind = _type(values.shape, kind)
    if kind in FLOATS:
        return values.to(FLOATS[kind]).float()
    return torch.from_numpy(dequantize(quantize(values.contiguous().numpy(), kind), kind))


def _packed(values: torch.Tensor, kind: GGMLQuantizationType, name: str) -> memoryview:
    """The bytes of float32 values in a type of GGUF, rounded once. Raises BadNumbers where it is too small for them."""
    if kind in FLOATS:
        packed = values.to(FLOATS[kind])
        finite, data = torch.isfinite(packed).all(), packed.contiguous().reshape(-1).view(torch.uint8).numpy()
    else:
        with np.errstate(all="ignore"):
            data = quantize(values.float().contiguous().numpy(), kind)
        finite = (values.abs() <= 127 * 65504).all()  # a block's scale, its largest value / 127, is a float16
    if not finite:
        fix = "Use --gguf-type bf16, or another adapter"
        raise BadNumbers(f"not finite in {name}: the merged weight does not fit {kind.name.lower()}. {fix}")
    return data.data
