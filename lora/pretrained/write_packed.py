"""A base that is packed in NF4, written as the folder that bitsandbytes would write; `prequantised` has the keys.

    pretrained.write_packed(pretrained.find("owner/model", "nf4"), "folder")

transformers loads it where bitsandbytes is installed, and `--quant keep` here.
"""

import json
from functools import lru_cache
from math import ceil, prod
from pathlib import Path

import torch
from torch import Tensor

from lora import files
from lora.errors import BadInput
from lora.pretrained import fused
from lora.pretrained.load import empty_model
from lora.pretrained.prequantised import STATE
from lora.pretrained.quantised import Quantised
from lora.pretrained.write import file_of, stored_as, write_folder, written_config
from lora.quant.nf4 import BLOCK, BLOCKS_A_SCALE, NF4, TABLE

STATE_BYTES = 256  # spaces follow the JSON: how long a number is in decimals is not known before it is
NF4_STATE = f"{STATE}nf4"


def write_packed(base: Quantised, folder: Path | str) -> None:
    """Write what `find(model, "nf4")` gives, packing one weight at a time; the folder is made.

    A weight that its family stores with others has scales in float32, since those of its parts have means of their
    own. Raises BadInput for another mode, and for parts that share a block.
    """
    if base.quant != "nf4":
        raise BadInput(f"wrong packing in {base.name}: only nf4 is written, not {base.quant}. Give --quant nf4")
    model, folder = empty_model(base), Path(folder)
    layout, headers, packed_names = fused.stored(model.config, model.state_dict()), {}, {}
    for whole, parts in layout.items():
        kind, shape = stored_as(base, parts)
        header = headers.setdefault(file_of(base, parts[0]), {})
        if not base.nbytes(parts[0]):
            header[whole] = kind, shape
            continue
        if any(prod(base.header[part][1]) % BLOCK for part in parts[:-1]):
            why = f"a block of {BLOCK} would have values of two of its parts"
            raise BadInput(f"unsupported model in {base.name}:{whole}: {why}. Keep it in 16 bits")
        for end, entry in _header(shape, nested=len(parts) == 1).items():
            header[whole + end], packed_names[whole + end] = entry, (whole, end)

    @lru_cache(1)  # its companions of one dtype follow each other in the file
    def packed(whole: str) -> NF4:
        parts = [base.packed(part) for part in layout[whole]]
        scales = [part.scale(0, len(part.absmax)) for part in parts]
        together = NF4(stored_as(base, layout[whole])[1], torch.cat([part.codes for part in parts]), torch.cat(scales))
        return parts[0] if len(parts) == 1 else together

    def read(name: str) -> Tensor:
        if name not in packed_names:
            parts = [base.read(part) for part in layout[name]]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        whole, end = packed_names[name]
        return _tensor(packed(whole), end, files.DTYPES[base.header[layout[whole][0]][0]])

    folder.mkdir(parents=True, exist_ok=True)
    config = written_config(base.config, model.config.written_as) | {"quantization_config": _said(base)}
    write_folder(folder, headers, read, base.files(), config)


def _header(shape: tuple[int, int], nested: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a weight becomes: the end of each name, its dtype and shape."""
    blocks = ceil(prod(shape) / BLOCK)
    scales = {".nested_absmax": ("F32", (ceil(blocks / BLOCKS_A_SCALE),)), ".nested_quant_map": ("F32", (256,))}
    return {
        "": ("U8", (ceil(prod(shape) / 2), 1)),
        ".absmax": ("U8" if nested else "F32", (blocks,)),
        ".quant_map": ("F32", (16,)),
        NF4_STATE: ("U8", (STATE_BYTES,)),
    } | (scales if nested else {})


def _tensor(packed: NF4, end: str, dtype: torch.dtype) -> Tensor:
    """The tensor of a weight whose name ends so."""
    if end == NF4_STATE:
        name = str(dtype).removeprefix("torch.")
        state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": name, "shape": packed.shape}
        if packed.mean is not None:
            state |= {
                "nested_blocksize": BLOCKS_A_SCALE,
                "nested_dtype": "float32",
                "nested_offset": packed.mean.item(),
            }
        return torch.tensor(list(json.dumps(state).encode().ljust(STATE_BYTES)), dtype=torch.uint8)
    tensors = {"": packed.codes[:, None], ".absmax": packed.absmax, ".quant_map": TABLE}
    return (tensors | {".nested_absmax": packed.nested_absmax, ".nested_quant_map": packed.map})[end]


def _said(base: Quantised) -> dict:
    """quantization_config, as transformers reads it."""
    dtype = files.DTYPES[base.header["model.embed_tokens.weight"][0]]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "llm_int8_skip_modules": ["lm_head"],
    }
