"""Model files on disk: what a folder and a GGUF file both offer, and the hub folder itself."""

import re
from pathlib import Path
from typing import Protocol

import torch

from lora import files
from lora.errors import BadInput, Refused
from lora.pretrained import fused, prequantised, wrapped
from lora.quant.packed import Packed

SIDECARS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json", "generation_config.json", "LICENSE",
)  # fmt: skip
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "config.json")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class ModelFiles(Protocol):
    """A model that is not loaded yet. `header` maps a tensor's name to its dtype name and shape, `config` is the raw
    config.json, `hub_id` what others call the model; `files()` are those beside the weights.

    `read` gives a tensor in the header's dtype, or in the one asked for. `widest` is one that loses nothing of the
    file, where the header's does: a GGUF file is a bf16 model to all that fingerprints and writes it.

    `block_type` says which blocks of `lora.quant` a file has for a weight, if any; `packed` gives them, and `nbytes`
    their size. `quant` is how Linears are packed on reading, and `original` the files without that.
    """

    name: str
    hub_id: str
    described: str
    config: dict
    header: dict[str, tuple[str, tuple[int, ...]]]
    widest: torch.dtype | None
    quant: str | None
    original: "ModelFiles"

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor: ...
    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor: ...
    def files(self) -> dict[str, bytes]: ...
    def block_type(self, name: str) -> str | None: ...
    def packed(self, name: str) -> Packed | None: ...
    def nbytes(self, name: str) -> int | None: ...


class ModelFolder:
    """A hub folder: config.json, safetensors (one file, or shards with an index), tokenizer files. Weights that are
    quantised there are offered as the 16-bit numbers they stand for, with the blocks at hand.

    Raises BadInput for what is missing or broken, Refused for pickles and for paths that lead out of the folder.
    """

    quant = None

    def __init__(self, path: Path, name: str | None = None, described: str | None = None):
        self.path, self.original = Path(path), self
        if not (self.path / "config.json").exists():
            raise BadInput(f"no model in {path}: there is no config.json. Give a model folder, hub id or .gguf file")
        raw = files.read_json(self.path / "config.json")
        self.config = wrapped.text_config(raw)
        source = self.path / "source.json"
        source = files.read_json(source) if source.exists() else {}
        source = {key: value for key, value in source.items() if isinstance(value, str)}  # another program's, perhaps
        self.name = name or source.get("model") or str(self.path.absolute())
        self.described = described or source.get("source") or f"folder {self.path}"
        self.hub_id = source.get("hub_id") or self.name
        self._file_of: dict[str, files.Safetensors] = {}
        self.left_out: set[str] = set()
        for shard in [files.Safetensors(self.path / name) for name in self._shard_names(raw)]:
            names = wrapped.own_names(raw, shard.header, shard.path)
            self.left_out.update(shard.header.keys() - names.values())
            shard.rename(names)
            for tensor in shard.header:
                if tensor in self._file_of:
                    raise BadInput(f"broken model in {shard.path}:{tensor}: it is in two files. Download it again")
                self._file_of[tensor] = shard
        header = {tensor: shard.header[tensor] for tensor, shard in self._file_of.items()}
        self.config = wrapped.tied(raw, self.config, header)
        self._quantised = prequantised.find(self.config, self._file_of, self.name)
        self.widest = torch.float32 if self._quantised else None
        if self._quantised:
            self.described += f" in {prequantised.kinds(self._quantised)}{prequantised.DEQUANTISED}"
        if self.left_out:
            self.described += f", without {wrapped.left_out(self.left_out)}"
        self.config, header = prequantised.plain(self.config), prequantised.offered(header, self._quantised)
        self.header, self._parts = fused.split(self.config, header, f"{self.name}/config.json")

    def _shard_names(self, raw: dict) -> list[str]:
        index = self.path / "model.safetensors.index.json"
        if (self.path / "model.safetensors").exists():
            return ["model.safetensors"]
        if not index.exists():
            if any(next(self.path.glob(pattern), None) for pattern in PICKLES):
                fix = "Convert them to safetensors"
                raise Refused(f"pickle in {self.path}: pickled weights are never opened. {fix}")
            raise BadInput(f"no weights in {self.path}: there is no model.safetensors. Download the model again")
        weight_map = files.read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise BadInput(f"broken index in {index}:weight_map: not a map of names to files. Download it again")
        if not weight_map:
            raise BadInput(f"broken index in {index}:weight_map: it is empty. Download it again")
        for name in sorted(set(weight_map.values())):
            if not re.fullmatch(r"[\w.-]+\.safetensors", name) or name.startswith("."):
                fix = "Download it from a source you trust"
                raise Refused(f"path in {index}:weight_map: {name!r} is not a file of this folder. {fix}")
        names = sorted(wrapped.files_of(raw, weight_map, index))  # others have towers alone
        self.left_out.update(name for name, file in weight_map.items() if file not in names)
        missing = [self.path / name for name in names if not (self.path / name).exists()]
        if missing:
            raise BadInput(*(f"missing weights in {path}: named in {index}. Download it" for path in missing))
        return names

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        if name in self._parts or name in self._quantised:
            return self.read_rows(name, 0, self.header[name][1][0], dtype)
        tensor = self._file_of[name].read(name)
        return tensor.to(dtype or tensor.dtype)

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Some rows of a tensor, without reading the others."""
        whole, first = self._parts.get(name, (name, 0))
        if whole in self._quantised:
            dtype = dtype or files.DTYPES[self.header[name][0]]
            return self._quantised[whole].rows(first + start, first + stop, dtype)
        tensor = self._file_of[whole].read_rows(whole, first + start, first + stop)
        return tensor.to(dtype or tensor.dtype)

    def _stored(self, name: str) -> tuple[prequantised.Stored | None, int, int]:
        """A weight that is quantised here, and which of its rows are those of this name."""
        whole, first = self._parts.get(name, (name, 0))
        return self._quantised.get(whole), first, first + self.header[name][1][0]

    def block_type(self, name: str) -> str | None:
        return self._stored(name)[0].kind if self.nbytes(name) else None

    def packed(self, name: str) -> Packed | None:
        stored, first, last = self._stored(name)
        return stored and stored.packed(first, last)

    def nbytes(self, name: str) -> int | None:
        stored, first, last = self._stored(name)
        return stored and stored.nbytes(first, last)

    def shard_of(self, name: str) -> str:
        """The file a tensor is in."""
        whole, _ = self._parts.get(name, (name, 0))
        return self._file_of[whole].path.name

    def files(self) -> dict[str, bytes]:
        return {name: files.read_bytes(self.path / name) for name in SIDECARS if files.is_regular(self.path / name)}


def shards(folder: Path) -> list[str]:
    """The names of the weights' files in a folder of ours, which may lack its index yet."""
    index = folder / "model.safetensors.index.json"
    named = files.read_json(index).get("weight_map") if index.is_file() else None
    named = set(map(str, named.values())) if isinstance(named, dict) else set()
    return sorted(named | {shard.name for shard in folder.glob("model-*-of-*.safetensors")})
