"""A plain model folder is written, tensor by tensor: the model's files again, with changed weights."""

from collections.abc import Callable
from pathlib import Path

import torch

from lora import files
from lora.pretrained import fused
from lora.pretrained.folder import ModelFiles
from lora.pretrained.load import empty_model
from lora.pretrained.spoken import Spoken


def write_model(
    base: ModelFiles,
    folder: Path,
    change: Callable[[str, torch.Tensor], torch.Tensor],
    dtype: torch.dtype | None = None,
    spoken: Spoken | None = None,
) -> None:
    """Write a model folder: `change(name, tensor)` gives the tensor to write, in `dtype` (by default the header's).

    Weights are cut into files as the base's are, and what its family fuses is fused again; config, tokenizer and
    template go along, with what was `spoken` in training where that is given.
    """
    model = empty_model(base)
    beside, config = spoken.written(base.files(), base.config) if spoken else (base.files(), base.config)
    layout, kinds = fused.stored(model.config, model.state_dict()), {}
    headers: dict[str, dict] = {}  # of each file: name -> dtype name and shape
    for whole, parts in layout.items():
        kind, shape = stored_as(base, parts)
        kinds[whole] = files.NAMES[dtype] if dtype else kind
        headers.setdefault(file_of(base, parts[0]), {})[whole] = (kinds[whole], shape)

    def read(whole: str) -> torch.Tensor:
        parts = [change(name, base.read(name, base.widest)) for name in layout[whole]]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        return tensor.to(files.DTYPES[kinds[whole]])

    write_folder(folder, headers, read, beside, written_config(config, model.config.written_as, dtype))


def file_of(base: ModelFiles, name: str) -> str:
    """The file that a tensor is written to: of the name of the one that it comes from."""
    return getattr(base, "shard_of", lambda name: "model.safetensors")(name)


def stored_as(base: ModelFiles, parts: list[str]) -> tuple[str, tuple[int, ...]]:
    """The dtype name of a tensor, and its shape with the rows of all its parts."""
    shapes = [base.header[name][1] for name in parts]
    return base.header[parts[0]][0], (sum(rows for rows, *_ in shapes), *shapes[0][1:])


def write_folder(folder: Path, headers: dict[str, dict], read: Callable, beside: dict, config: dict) -> None:
    """Weights by the header of each file, an index where there are several, what lies beside them, and the config."""
    for shard, header in headers.items():
        files.write_safetensors(folder / shard, header, read, metadata={"format": "pt"})
    if list(headers) != ["model.safetensors"]:
        files.write_json(folder / "model.safetensors.index.json", _index(headers))
    for name, data in beside.items():
        files.write_bytes(folder / name, data)
    files.write_json(folder / "config.json", config)


def _index(headers: dict[str, dict]) -> dict:
    tensors = [tensor for header in headers.values() for tensor in header.values()]
    total = sum(files.STORED[kind].itemsize * torch.Size(shape).numel() for kind, shape in tensors)
    weight_map = {name: shard for shard, header in headers.items() for name in header}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def written_config(base: dict, family: str | None, dtype: torch.dtype | None = None) -> dict:
    """The base's config.json, with the family and the dtype that the weights are written as."""
    config = dict(base)
    if family:
        config |= {"model_type": family, "architectures": [f"{family.capitalize()}ForCausalLM"]}
        config.pop("auto_map", None)  # to code that computes the family under its other name
    if dtype:
        name = str(dtype).removeprefix("torch.")
        config |= {key: name for key in ("torch_dtype", "dtype") if key in config}
    return config
