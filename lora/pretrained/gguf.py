"""A GGUF file as a hub folder: config, tokenizer, chat template, and tensors under hub names, dequantised.

Its values are float32 until they are rounded, once, to the dtype that a run computes in; what names no dtype (hashes,
a folder written from it) takes it for a bf16 model.

Nothing in the file is trusted: every count and length is checked against the bytes that remain before it is used.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from gguf.quants import dequantize

from lora.errors import BadInput
from lora.network.families import FAMILIES
from lora.network.layer_fields import CONV, LINEAR, DeltaSizes
from lora.network.rope_fields import FULL, SLIDING
from lora.pretrained import fused, gguf_rope
from lora.pretrained import gguf_names as names
from lora.pretrained.gguf_header import AGAIN, Header, Keys, Metadata, Stored, show
from lora.pretrained.gguf_layout import Layout
from lora.pretrained.gguf_tokenizer import ENDS, special_ids, tokenizer_files
from lora.quant.gguf import TYPES, Blocks

MOST_LAYERS = 1024
BIASES = {  # config.json's field -> Linears that have one then
    "attention_bias": ("q_proj", "k_proj", "v_proj"), "o_bias": ("o_proj",), "mlp_bias": ("gate_proj", "up_proj"),
}  # fmt: skip
CHUNK = 2**22  # values dequantised at a time; the gguf package works in float32 and on copies


class GGUFFile:
    """A `.gguf` file of a model of ARCHITECTURES; opening it reads the header only. Raises BadInput.

    `config` is a hub config.json; `header` maps a hub name to ("BF16", shape), a Linear's shape being (out, in).
    """

    widest = torch.float32
    quant = None

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not self.path.is_file():
            raise BadInput(f"no model in {path}: there is no such file. Check the path")
        with open(self.path, "rb") as file:
            values, tensors = Header(file, self.path).read()
        self.name, self.original = str(self.path.absolute()), self
        self.hub_id = self.name
        self.described = f"GGUF file {path}"
        self._metadata = Metadata(self.path, values)
        self._check = self._metadata.check
        self._arch = arch = self._metadata.get("general.architecture", str)
        known = ", ".join(names.ARCHITECTURES)
        self._check(arch in names.ARCHITECTURES, "general.architecture", f"{show(arch)}; implemented are {known}")
        self._keys = Keys(self._metadata, arch)
        row = names.ARCHITECTURES[arch]
        if row.other and self._keys.has(row.other[0]):
            row = row._replace(hub_class=row.other[1], model_type=row.other[2])
        self._architecture, self._family = row, FAMILIES[row.model_type]
        self._heads = self._keys.get("attention.head_count")
        self._reads = {key: field for key, field in names.READ_KEYS.items() if field[0] in self._family.reads}
        self._reads |= {key: field for key, field in row.keys.items() if field}
        known = {*names.KNOWN_KEYS, *self._reads, *row.keys, *((names.PATTERN,) if row.windows else ())}
        for key in values:
            right = not key.startswith(f"{arch}.") or key.removeprefix(f"{arch}.") in known
            self._check(right, show(key)[1:-1], "it could change the maths and is not implemented")
        self._keys.check(not self._keys.has("expert_count"), "expert_count", "experts are not implemented")
        turned = arch != "granite" or values.get(f"{arch}.rope.scaling.finetuned") is not False
        self._keys.check(turned, "rope.scaling.finetuned", "Granite without RoPE is not implemented")
        self._layers = self._count_layers(tensors)
        self._rope_tensors = {name: tensors.pop(name) for name in gguf_rope.TENSORS if name in tensors}
        hub = names.hub_names(self._architecture, self._family)
        hub = {name: names.hub_name(hub, name) for name in tensors}
        unknown = [show(name) for name in tensors if not hub[name]]
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        self._check(not unknown, "tensors", f"{', '.join(unknown[:5])}{more} are not implemented")
        self._tensors = {hub[name]: tensor for name, tensor in tensors.items()}
        self._delta = self._delta_sizes() if self._family.mixer == "delta" else None
        self._head_dim, self._rotary_dim = self._head_sizes()
        self._layout = Layout(self._architecture, self._head_dim, self._delta)
        self.header = {name: ("BF16", self._layout.shape(name, t.shape)) for name, t in self._tensors.items()}
        for name, (_, shape) in self.header.items():
            order = self._layout.order(name)
            why = f"shape {shape} is not made of heads of {self._head_dim} values in pairs"
            self._check(not order or order.fits(shape), name, why, AGAIN)
        rows = self.header.get("model.embed_tokens.weight", ("", (0,)))[1][0]
        self._check(rows > 0, "token_embd.weight", "it is missing", AGAIN)
        self.config = self._config(rows, special_ids(self._metadata))
        self.header, self._parts = fused.split(self.config, self.header, str(path))

    def _count_layers(self, tensors: dict[str, Stored]) -> int:
        """How many layers the model has; those behind them, which guess further tokens, are taken out of `tensors`."""
        count, ahead = self._keys.get("block_count"), "nextn_predict_layers"
        ahead = self._keys.get(ahead) if self._keys.has(ahead) else 0
        self._keys.check(count <= MOST_LAYERS, "block_count", f"{count:,} is more than {MOST_LAYERS:,}", AGAIN)
        self._keys.check(ahead < count, "nextn_predict_layers", f"{ahead} of {count} layers", AGAIN)
        behind = tuple(f"blk.{i}." for i in range(count - ahead, count))
        left_out = [name for name in tensors if ahead and name.startswith(behind)]
        for name in left_out:
            tensors.pop(name)
        if left_out:
            self.described += f", without the layers that guess further tokens ({len(left_out)} tensors)"
        return count - ahead

    def _delta_sizes(self) -> DeltaSizes:
        """Of Gated DeltaNet; llama.cpp knows only values of a head that are as many as its keys."""
        get, inner = self._keys.get, "ssm.inner_size"
        sizes = DeltaSizes(*(get(f"ssm.{key}") for key in ("group_count", "time_step_rank", "state_size", "state_size",
                                                           "conv_kernel")))  # fmt: skip
        right = get(inner) == sizes.value_heads * sizes.value_dim
        self._keys.check(right, inner, f"{get(inner)} is not {sizes.value_heads} heads of {sizes.value_dim}")
        right = sizes.value_heads % sizes.key_heads == 0
        self._keys.check(right, "ssm.group_count", f"{sizes.key_heads} does not divide {sizes.value_heads}", AGAIN)
        return sizes

    def _head_sizes(self) -> tuple[int, int]:
        """How many values a head has, and how many of them RoPE turns."""
        get = self._keys.get
        size = get("attention.key_length", default=get("embedding_length") // self._heads or 1)
        rotary = get("rope.dimension_count", default=size)
        partial = "partial_rotary_factor" in self._family.reads and rotary < size
        values = get("attention.value_length", default=size)
        for key, other in ("attention.value_length", values), ("rope.dimension_count", size if partial else rotary):
            self._keys.check(other == size, key, f"{other} is not implemented, only the {size} of a head")
        return size, rotary

    def _config(self, vocab_size: int, ids: dict[str, int | None]) -> dict:
        """config.json, without what this family or this file has not."""
        get, has, family, reads = self._keys.get, self._keys.has, self._family, self._family.reads
        size, layers, kv_heads = self._head_dim, self._layers, self._kv_heads()
        scalar = get("embedding_length") // self._heads if layers in names.GEMMA_27B else size
        biases = {name.split(".")[-2] for name in self.header if name.endswith("_proj.bias")}
        ends = list(dict.fromkeys(ids[name] for name in ENDS if ids[name] is not None))
        given = {key: of for key, of in self._reads.items() if has(key)}
        factors = {name: self._dequantised(t, torch.float32) for name, t in self._rope_tensors.items()}
        config = {field: get(key, kind) for key, (field, kind) in given.items()} | {  # given: 0 is no window
            "architectures": [self._architecture.hub_class], "model_type": self._architecture.model_type,
            family.activation[0]: family.activation[1], "torch_dtype": "bfloat16",
            "vocab_size": vocab_size, "hidden_size": get("embedding_length"),
            "intermediate_size": get("feed_forward_length"),
            "num_hidden_layers": layers, "num_attention_heads": self._heads,
            "num_key_value_heads": max(kv_heads),
            "head_dim": size if family.head_dim or has("attention.key_length") else None,
            "partial_rotary_factor": self._rotary_dim / size if "partial_rotary_factor" in reads else None,
            "query_pre_attn_scalar": scalar if family.query_pre_attn_scalar else None,
            "linear_value_head_dim": self._delta.value_dim if self._delta else None,
            **self._layer_types(kv_heads),
            "max_position_embeddings": get("context_length"),
            family.called.get("rms_norm_eps", "rms_norm_eps"): get("attention.layer_norm_rms_epsilon", float),
            "block_auto_adjust_ff_dim": False if family.mixer == "conv" else None,
            "rope_theta": get("rope.freq_base", float, 10000.0),
            "rope_scaling": gguf_rope.scaling(self._keys, self._architecture, factors, self._rotary_dim),
            "tie_word_embeddings": "lm_head.weight" not in self.header,
            **{family.called.get(field, field): any(part in biases for part in parts)
               for field, parts in BIASES.items() if field in reads},
            "bos_token_id": ids["bos"], "pad_token_id": ids["padding"],
            "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        }  # fmt: skip
        config = {key: value for key, value in config.items() if value is not None}
        rope = config.get("rope_scaling", {})
        if rope.get("rope_type") == "longrope":  # Phi's files have it outside as well
            config["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
        if family.rope_in_windows_only and "sliding_window" not in config:  # absent, it would be the family's
            config |= {"sliding_window": None, "layer_types": [FULL] * layers}
        if family.rope_local and "rope_local_base_freq" not in reads:
            theta = {"rope_theta": config.pop("rope_theta")}
            config["rope_parameters"] = {FULL: {"rope_type": "default"} | config.pop("rope_scaling", {}) | theta,
                                         SLIDING: {"rope_type": "default"} | theta}  # fmt: skip
        return config

    def _kv_heads(self) -> list[int]:
        """Of every layer; those that do not attend may be told to have none."""
        key, value = "attention.head_count_kv", self._metadata.values.get(f"{self._arch}.attention.head_count_kv")
        if not isinstance(value, np.ndarray):
            return [self._keys.get(key, default=self._heads)] * self._layers
        told = value.tolist()[: self._layers]
        right = value.dtype.kind in "iu" and len(told) == self._layers and set(told) <= {0, max(told)} and max(told) > 0
        self._keys.check(right and (0 not in told or self._family.mixer == "conv"), key, "layers differ in it")
        return told

    def _layer_types(self, kv_heads: list[int]) -> dict:
        """What the file says of its layers one by one, or of one in so many, if it is not what the family has."""
        recurrent, pattern, family = "attention.recurrent_layers", names.PATTERN, self._family
        if family.mixer == "conv":
            return {"layer_types": [FULL if count else CONV for count in kv_heads]}
        for key, kinds in (recurrent, (FULL, LINEAR)), (pattern, (FULL, SLIDING)):
            value = self._metadata.values.get(f"{self._arch}.{key}")
            if isinstance(value, np.ndarray):
                right = value.ndim == 1 and len(value) >= self._layers and set(value.tolist()) <= {0, 1}
                self._keys.check(right, key, f"it does not say 0 or 1 of {self._layers} layers", AGAIN)
                return {"layer_types": [kinds[int(one)] for one in value[: self._layers]]}
        step = self._keys.get(pattern) if self._keys.has(pattern) else family.sliding_window_pattern
        if step == family.sliding_window_pattern or "sliding_window_pattern" in family.reads:
            return {"sliding_window_pattern": step} if self._keys.has(pattern) else {}
        return {"layer_types": [SLIDING if (i + 1) % step else FULL for i in range(self._layers)]}

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor of a hub name in `dtype`, by default bfloat16. Raises BadInput if the file has become shorter."""
        return self.read_rows(name, 0, self.header[name][1][0], dtype)

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Some rows of a tensor, `read` without the others where they lie together in the file."""
        (whole, first), dtype = self._parts.get(name, (name, 0)), dtype or torch.bfloat16
        if self._layout.differs(name):
            exact = torch.float32 if self._layout.other_values(name) else dtype
            return self._layout.hub(name, self._dequantised(self._tensors[name], exact)).to(dtype)[start:stop]
        return self._dequantised(self._tensors[whole], dtype, first + start, first + stop)

    def _dequantised(self, tensor: Stored, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Its values, or some of its rows; of a matrix no others are read."""
        columns, matrix = tensor.shape[-1], len(tensor.shape) == 2
        count = math.prod(tensor.shape) // columns
        first, last = (start, count if stop is None else stop) if matrix else (0, count)
        values, step = torch.empty(last - first, columns, dtype=dtype), max(1, CHUNK // columns)
        with np.errstate(all="ignore"):
            for rows, data in zip(values.split(step), self._bytes(tensor, first, last, step), strict=False):  # no rows
                rows.copy_(torch.from_numpy(dequantize(data, tensor.type)))
        return values if matrix else values.view(tensor.shape)[start:stop]

    def _bytes(self, tensor: Stored, first: int, last: int, step: int) -> Iterator[np.ndarray]:
        """Rows as they are in the file, `step` at a time, (rows, bytes) uint8."""
        row_bytes = tensor.size // (math.prod(tensor.shape) // tensor.shape[-1])
        with open(self.path, "rb") as file:  # not mapped: truncation would kill the process
            file.seek(tensor.offset + first * row_bytes)
            for start in range(first, last, step):
                data = bytearray(min(step, last - start) * row_bytes)
                if file.readinto(data) != len(data):
                    raise BadInput(f"broken GGUF file in {self.path}: it became shorter while it was read. {AGAIN}")
                yield np.frombuffer(data, np.uint8).reshape(-1, row_bytes)

    # ---- blocks as they are

    def block_type(self, name: str) -> str | None:
        """What GGUF calls the blocks of a matrix, if they can be kept."""
        kind, shape = self._tensors[self._parts.get(name, (name, 0))[0]].type.name, self.header[name][1]
        whole = kind in TYPES and len(shape) == 2 and self._layout.keeps_blocks(name, shape, kind)
        return kind if whole else None

    def nbytes(self, name: str) -> int:
        """The bytes of a matrix in the file."""
        kind = TYPES[self.block_type(name)]
        return math.prod(self.header[name][1]) // kind.block * kind.bytes

    def packed(self, name: str) -> Blocks:
        """The blocks of a matrix that has a `block_type`. Raises BadInput if the file has become shorter."""
        (whole, first), shape = self._parts.get(name, (name, 0)), self.header[name][1]
        [data] = self._bytes(self._tensors[whole], first, first + shape[0], shape[0])
        data = torch.from_numpy(data)  # (out, bytes of a row)
        if order := self._layout.order(name):
            data = order.moved(data, back=True)
        return Blocks(shape, data, self.block_type(name))

    def files(self) -> dict[str, bytes]:
        """tokenizer.json, tokenizer_config.json with the chat template, generation_config.json. Raises BadInput."""
        return tokenizer_files(self._metadata, self.config)
