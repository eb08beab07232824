"""A GGUF file as a hub folder: config, tokenizer, chat template, and tensors under hub names, dequantised to bf16.

Nothing in the file is trusted: every count and length is checked against the bytes that remain before it is used.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf.quants import dequantize

from lora.errors import BadInput
from lora.network.families import FAMILIES, Family
from lora.pretrained import fused, sentencepiece
from lora.pretrained.gguf_header import AGAIN, Header, Stored, show
from lora.text.tokenizer import Tokenizer

CHUNK = 2**22  # values dequantised at a time; the gguf package works in float32 and on copies


# Keys under the architecture's name. Any other could change the maths and is refused.
KNOWN_KEYS = (
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "tensor_data_layout",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
)  # fmt: skip
READ_KEYS = {  # those of families that read the hub's field
    "attention.sliding_window": ("sliding_window", int), "rope.freq_base_swa": ("rope_local_base_freq", float),
    "attention.sliding_window_pattern": ("sliding_window_pattern", int),
    "attn_logit_softcapping": ("attn_logit_softcapping", float),
    "final_logit_softcapping": ("final_logit_softcapping", float),
}  # fmt: skip
GEMMA_27B = (46, 62)  # layers; llama.cpp knows these by them, the files do not say by what attention divides
ROPE_FREQS = "rope_freqs.weight"  # Llama 3's RoPE scaling: one divisor for each frequency
LLAMA3_FACTORS = (8.0, 32.0)  # of Llama 3.1 and 3.2
HUB_NAMES = {  # each with .weight or .bias; those after the first three are in model.layers.N (blk.N)
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "blk.attn_q": "self_attn.q_proj", "blk.attn_k": "self_attn.k_proj", "blk.attn_v": "self_attn.v_proj",
    "blk.attn_q_norm": "self_attn.q_norm", "blk.attn_k_norm": "self_attn.k_norm",
    "blk.attn_output": "self_attn.o_proj",
    "blk.ffn_gate": "mlp.gate_proj", "blk.ffn_up": "mlp.up_proj", "blk.ffn_down": "mlp.down_proj",
}  # fmt: skip
FUSED_NAMES = {"self_attn.qkv_proj": "blk.attn_qkv", "mlp.gate_up_proj": "blk.ffn_up"}
NORMS = ("blk.attn_norm", "blk.post_attention_norm", "blk.ffn_norm", "blk.post_ffw_norm")  # as `Family.norms`


class Architecture(NamedTuple):
    """How GGUF holds a family."""

    hub_class: str
    model_type: str  # what a file is read as
    written: tuple[str, ...]  # the hub's names of families that are written so; others are only read
    turns_neighbours: bool = False  # where the hub's code turns halves: rows of q and k are reordered
    rope_freqs: bool = False  # may hold Llama 3's scaling


ARCHITECTURES = {  # which RoPE they have: `llama_model_rope_type` in llama.cpp; GLM-4's turns neighbours in both
    "llama": Architecture("LlamaForCausalLM", "llama", ("llama", "mistral"), turns_neighbours=True, rope_freqs=True),
    "qwen2": Architecture("Qwen2ForCausalLM", "qwen2", ("qwen2",)),
    "qwen3": Architecture("Qwen3ForCausalLM", "qwen3", ("qwen3",)),
    "smollm3": Architecture("SmolLM3ForCausalLM", "smollm3", (), turns_neighbours=True),
    "glm4": Architecture("Glm4ForCausalLM", "glm4", ()),
    "phi3": Architecture("Phi3ForCausalLM", "phi3", ()),
    "gemma2": Architecture("Gemma2ForCausalLM", "gemma2", ()),
    "gemma3": Architecture("Gemma3ForCausalLM", "gemma3_text", ()),
}
ROTATED = re.compile(r"\.[qk]_proj\.")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types
TOKEN_TYPES = {"gpt2": {NORMAL, CONTROL, USER_DEFINED, UNUSED}, "llama": set(range(1, 7))}  # by tokenizer.ggml.model
SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # the hub's name -> GGUF's
ENDS = ("eos", "eot", "eom")  # all of them end an answer
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _split(number: str) -> list[dict]:
    regex = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{number}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return [split, BYTE_LEVEL | {"use_regex": False}]


# tokenizer.ggml.pre -> pre-tokenizers, normalizer, ignore_merges, and whether BOS is added if the file does not say.
# Sources: tokenizer.json of SmolLM2, GPT-2, Qwen2.5 and Llama 3; for GLM-4 and the last column llama.cpp's
# src/llama-vocab.cpp.
PRE_TOKENIZERS = {
    "smollm": ([{"type": "Digits", "individual_digits": True}, BYTE_LEVEL], None, False, False),
    "gpt-2": ([BYTE_LEVEL], None, False, False),
    "qwen2": (_split(r"\p{N}"), {"type": "NFC"}, False, False),
    "llama-bpe": (_split(r"\p{N}{1,3}"), None, True, True),
    "glm4": (_split(r"\p{N}{1,3}"), None, False, False),
}


def hub_names(family: Family) -> dict[str, str]:
    """The names of a family's tensors in a GGUF file, without layer and .weight or .bias -> those in its hub folder."""
    names = HUB_NAMES | {theirs: ours for theirs, ours in zip(NORMS, family.norms, strict=True) if ours}
    for stem, parts in family.fused:
        if stem in FUSED_NAMES:  # Baichuan's W_pack is three tensors here
            block, _ = stem.split(".")
            names = {theirs: ours for theirs, ours in names.items() if ours not in {f"{block}.{p}" for p in parts}}
            names[FUSED_NAMES[stem]] = stem
    return names


def hub_name(names: dict[str, str], name: str) -> str | None:
    """The hub's name of a tensor in GGUF, by `hub_names`; None where there is none."""
    parts = re.fullmatch(r"(?:blk\.(0|[1-9][0-9]{0,4})\.)?([a-z_]+)\.(weight|bias)", name)
    number, stem, kind = parts.groups() if parts else (None, "", "")
    hub = names.get(f"blk.{stem}" if number else stem)
    return hub and (f"model.layers.{number}." if number else "") + f"{hub}.{kind}"


def gguf_name(names: dict[str, str], name: str) -> str | None:
    """`hub_name` the other way."""
    number, stem, kind = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(\w+)", name).groups()
    theirs = {hub: name for name, hub in names.items() if name.startswith("blk.") == bool(number)}.get(stem)
    return theirs and f"{theirs.replace('blk.', f'blk.{number}.')}.{kind}"


def to_neighbours(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The hub's order of each head's rows, in which RoPE turns halves, as llama.cpp's, in which it turns neighbours."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def to_halves(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """`to_neighbours` the other way."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


class GGUFFile:
    """A `.gguf` file of a model of ARCHITECTURES; opening it reads the header only. Raises BadInput.

    `config` is a hub config.json; `header` maps a hub name to ("BF16", shape), a Linear's shape being (out, in).
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not self.path.is_file():
            raise BadInput(f"no model in {path}: there is no such file. Check the path")
        with open(self.path, "rb") as file:
            self.metadata, tensors = Header(file, self.path).read()
        self.name = self.hub_id = str(self.path.absolute())
        self.described = f"GGUF file {path}"
        self._arch = arch = self._get("general.architecture", str)
        known = ", ".join(ARCHITECTURES)
        self._check(arch in ARCHITECTURES, "general.architecture", f"{show(arch)}; implemented are {known}")
        self._family = FAMILIES[ARCHITECTURES[arch].model_type]
        self._reads = {key: field for key, field in READ_KEYS.items() if field[0] in self._family.reads}
        for key in self.metadata:
            known = not key.startswith(f"{arch}.") or key.removeprefix(f"{arch}.") in (*KNOWN_KEYS, *self._reads)
            self._check(known, show(key)[1:-1], "it could change the maths and is not implemented")
        self._rope_freqs = tensors.pop(ROPE_FREQS, None)
        names = hub_names(self._family)
        hub = {name: hub_name(names, name) for name in tensors}
        unknown = [show(name) for name in tensors if not hub[name]]
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        self._check(not unknown, "tensors", f"{', '.join(unknown[:5])}{more} are not implemented")
        self._tensors = {hub[name]: tensor for name, tensor in tensors.items()}
        self.header = {name: ("BF16", tensor.shape) for name, tensor in self._tensors.items()}
        self.config = self._config()
        self.header, self._rows = fused.split(self.config, self.header, str(path))

    def _check(self, right: bool, key: str, why: str, fix: str = "Give another file, or a folder") -> None:
        if not right:
            raise BadInput(f"unsupported model in {self.path}:{key}: {why}. {fix}")

    def _get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of exactly this type; numbers are positive and finite."""
        value = self.metadata.get(key, default)
        self._check(value is not None, key, "it is missing", AGAIN)
        right = type(value) is kind and (kind not in (int, float) or 0 < value < 3e38)
        self._check(right, key, f"{show(value)} is no {kind.__name__}, or not positive", AGAIN)
        return value

    def _config(self) -> dict:
        def get(key: str, kind: type = int, default: Any = None) -> Any:
            value = self._get(f"{self._arch}.{key}", kind, default)
            return float(str(np.float32(value))) if kind is float else value  # 1e-05, not 9.999999747378752e-06

        arch, tensors = self._arch, self.header
        hidden, heads = get("embedding_length"), get("attention.head_count")
        self._head_dim = size = get("attention.key_length", default=hidden // heads or 1)
        turned = get("rope.dimension_count", default=size)
        partial = "partial_rotary_factor" in self._family.reads
        for key, other in (("attention.value_length", get("attention.value_length", default=size)),
                           ("rope.dimension_count", size if partial and turned < size else turned)):  # fmt: skip
            self._check(other == size, f"{arch}.{key}", f"{other} is not implemented, only the {size} of a head")
        for name, (_, shape) in tensors.items():
            right = not ROTATED.search(name) or size % 2 == shape[0] % size == 0
            self._check(right, name, f"shape {shape} is not made of heads of {size} values in pairs", AGAIN)
        rows = tensors.get("model.embed_tokens.weight", ("", (0,)))[1][0]
        self._check(rows > 0, "token_embd.weight", "it is missing", AGAIN)
        self._tokens = self._get("tokenizer.ggml.tokens", list, [])
        count = len(self._tokens)
        self._check(count <= rows, "tokenizer.ggml.tokens", f"{count:,} tokens, but {rows:,} embeddings", AGAIN)
        self._ids = {}
        for name in (*SPECIAL.values(), *ENDS[1:]):
            self._ids[name] = i = self.metadata.get(key := f"tokenizer.ggml.{name}_token_id")
            right = i is None or (type(i) is int and 0 <= i < count)
            self._check(right, key, f"{show(i)} is none of the {count:,} tokens", AGAIN)
        ends = list(dict.fromkeys(self._ids[name] for name in ENDS if self._ids[name] is not None))
        biases = {name.split(".")[3] for name in tensors if name.endswith("_proj.bias")}
        theta = get("rope.freq_base", float, 10000.0)
        scalar = hidden / heads if get("block_count") in GEMMA_27B else float(size)
        given = {key: of for key, of in self._reads.items() if self.metadata.get(f"{arch}.{key}")}  # 0 is no window
        config = {field: get(key, kind) for key, (field, kind) in given.items()} | {
            "architectures": [ARCHITECTURES[arch].hub_class], "model_type": ARCHITECTURES[arch].model_type,
            self._family.activation[0]: self._family.activation[1], "torch_dtype": "bfloat16",
            "vocab_size": rows, "hidden_size": hidden, "intermediate_size": get("feed_forward_length"),
            "num_hidden_layers": get("block_count"), "num_attention_heads": heads,
            "num_key_value_heads": get("attention.head_count_kv", default=heads),
            "head_dim": size if f"{arch}.attention.key_length" in self.metadata or self._family.head_dim else None,
            "partial_rotary_factor": turned / size if partial else None,
            "query_pre_attn_scalar": scalar if self._family.query_pre_attn_scalar else None,
            "max_position_embeddings": get("context_length"),
            "rms_norm_eps": get("attention.layer_norm_rms_epsilon", float),
            "rope_theta": theta, "rope_scaling": self._rope_scaling(theta, get("rope.scaling.factor", float, 1.0)),
            "tie_word_embeddings": "lm_head.weight" not in tensors,
            "attention_bias": "self_attn" in biases if "attention_bias" in self._family.reads else None,
            "mlp_bias": "mlp" in biases if "mlp_bias" in self._family.reads else None,
            "bos_token_id": self._ids["bos"], "pad_token_id": self._ids["padding"],
            "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
        }  # fmt: skip
        return {key: value for key, value in config.items() if value is not None}

    def _rope_scaling(self, theta: float, factor: float) -> dict | None:
        key = f"{self._arch}.rope.scaling.type"
        kind = self._get(key, str, "linear")
        self._check(kind in ("none", "linear"), key, f"{show(kind)}; none and linear are implemented")
        linear = kind == "linear" and factor != 1
        if not self._rope_freqs:
            return {"rope_type": "linear", "factor": factor} if linear else None
        if ARCHITECTURES[self._arch].rope_freqs and self._rope_freqs.shape == (self._head_dim // 2,) and not linear:
            divisors = self._dequantised(self._rope_freqs, torch.float32).numpy()
            # the inverse of what the hub's code multiplies frequencies by: a blend over the turns in the old context
            turns = 8192 / (2 * math.pi) * theta ** -(np.arange(0, self._head_dim, 2) / self._head_dim)
            blend = np.clip((turns - 1) / (4 - 1), 0, 1)
            known = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
            for factor in LLAMA3_FACTORS:
                if np.allclose(divisors, 1 / ((1 - blend) / factor + blend), rtol=1e-4, atol=0):
                    return {"rope_type": "llama3", "factor": factor, **known}
        self._check(False, ROPE_FREQS, f"not Llama 3's scaling by {' or '.join(map(str, LLAMA3_FACTORS))}")

    def read(self, name: str) -> torch.Tensor:
        """The tensor of a hub name in bfloat16. Raises BadInput if the file has become shorter."""
        whole, first = self._rows.get(name, (name, 0))
        offset = self._family.norm_offset if name.endswith("norm.weight") else 0.0  # which the converter has added
        if offset:
            return (self._dequantised(self._tensors[name], torch.float32) - offset).bfloat16()
        tensor = self._dequantised(self._tensors[whole], torch.bfloat16)[first : first + self.header[name][1][0]]
        turned = ARCHITECTURES[self._arch].turns_neighbours and ROTATED.search(name)
        return to_halves(tensor, self._head_dim) if turned else tensor

    def _dequantised(self, tensor: Stored, dtype: torch.dtype) -> torch.Tensor:
        columns = tensor.shape[-1]
        values = torch.empty(math.prod(tensor.shape) // columns, columns, dtype=dtype)
        row_bytes = tensor.size // len(values)
        with open(self.path, "rb") as file, np.errstate(all="ignore"):  # not mapped: truncation would kill the process
            file.seek(tensor.offset)
            for rows in values.split(max(1, CHUNK // columns)):
                data = bytearray(len(rows) * row_bytes)
                if file.readinto(data) != len(data):
                    raise BadInput(f"broken GGUF file in {self.path}: it became shorter while it was read. {AGAIN}")
                data = np.frombuffer(data, np.uint8).reshape(len(rows), row_bytes)
                rows.copy_(torch.from_numpy(dequantize(data, tensor.type)))
        return values.view(tensor.shape)

    def files(self) -> dict[str, bytes]:
        """tokenizer.json, tokenizer_config.json with the chat template, generation_config.json. Raises BadInput."""
        model, pre = self._get("tokenizer.ggml.model", str), self._get("tokenizer.ggml.pre", str, "missing")
        why = f"{show(model)} with {show(pre)}; implemented is 'gpt2' with {', '.join(PRE_TOKENIZERS)}, and 'llama'"
        self._check(model == "llama" or (model == "gpt2" and pre in PRE_TOKENIZERS), "tokenizer.ggml.pre", why)
        named = {f"{name}_token": self._ids[theirs] for name, theirs in SPECIAL.items()}
        settings = {name: self._tokens[i] for name, i in named.items() if i is not None}
        add_bos = self._get("tokenizer.ggml.add_bos_token", bool, model == "llama" or PRE_TOKENIZERS[pre][-1])
        self._check(not add_bos or "bos_token" in settings, "tokenizer.ggml.bos_token_id", "it is missing", AGAIN)
        add_eos = self._get("tokenizer.ggml.add_eos_token", bool, False)
        self._check(not add_eos, "tokenizer.ggml.add_eos_token", "it is not implemented")
        if "tokenizer.chat_template" in self.metadata:
            settings["chat_template"] = self._get("tokenizer.chat_template", str)
        settings |= {"add_bos_token": add_bos, "clean_up_tokenization_spaces": False}
        settings["model_max_length"] = self.config["max_position_embeddings"]
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        files = {
            "tokenizer.json": self._tokenizer(model, pre, settings["bos_token"] if add_bos else None),
            "tokenizer_config.json": settings,
            "generation_config.json": {key: self.config[key] for key in self.config if key.endswith("_token_id")},
        }
        encoded = {name: json.dumps(value, indent=2, ensure_ascii=False).encode() for name, value in files.items()}
        Tokenizer(encoded["tokenizer.json"], f"{self.path}:tokenizer.ggml")  # raises if the merges are wrong
        return encoded

    def _tokenizer(self, model: str, pre: str, bos: str | None) -> dict:
        """The content of tokenizer.json; `bos` is the token before every text."""
        types, tokens = self._get("tokenizer.ggml.token_type", np.ndarray).tolist(), self._tokens
        right = len(types) == len(tokens) and set(types) <= TOKEN_TYPES[model]
        why = f"{len(types):,} types for {len(tokens):,} tokens, or unknown ones: {show(set(types))}"
        self._check(right, "tokenizer.ggml.token_type", why, AGAIN)
        vocabulary = {token: i for i, token in enumerate(tokens)}
        self._check(len(vocabulary) == len(tokens), "tokenizer.ggml.tokens", "a token is there twice", AGAIN)
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        added = [
            {"id": i, "content": token, **flags, "special": kind == CONTROL}
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (CONTROL, USER_DEFINED)
        ]
        start = {"SpecialToken": {"id": bos, "type_id": 0}}
        first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
        with_bos = {"type": "TemplateProcessing", "single": [start, first], "pair": [start, first, start, second]}
        with_bos["special_tokens"] = {bos: {"id": bos, "ids": [vocabulary.get(bos)], "tokens": [bos]}}
        parts = self._sentencepiece(vocabulary, types) if model == "llama" else self._byte_level(vocabulary, pre)
        frame = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
        return frame | {"post_processor": with_bos if bos else None} | parts

    def _byte_level(self, vocabulary: dict[str, int], pre: str) -> dict:
        pre_tokenizers, normalizer, ignore_merges, _ = PRE_TOKENIZERS[pre]
        merges = self._get("tokenizer.ggml.merges", list)
        return {
            "normalizer": normalizer,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers},
            "decoder": BYTE_LEVEL,
            "model": {"type": "BPE", "ignore_merges": ignore_merges, "vocab": vocabulary, "merges": merges},
        }

    def _sentencepiece(self, vocabulary: dict[str, int], types: list[int]) -> dict:
        values, key = self._get("tokenizer.ggml.scores", np.ndarray).tolist(), "tokenizer.ggml.scores"
        self._check(len(values) == len(types), key, f"{len(values):,} scores for {len(types):,} tokens", AGAIN)
        scores = {t: values[i] for t, i in vocabulary.items() if types[i] == NORMAL}
        joint = {"".join(pair) for pair in sentencepiece.merges_of(scores)}
        distinct = len({scores[token] for token in joint}) == len(joint) and all(map(math.isfinite, scores.values()))
        self._check(distinct, key, "two tokens have one score, so it does not say which comes first")
        letters = sentencepiece.missing_letters(scores)
        why = f"{show(letters[:1])[1:-1]} is in tokens and no token itself"
        self._check(not letters, "tokenizer.ggml.tokens", why)
        missing = [token for token in sentencepiece.BYTES if token not in vocabulary]
        self._check(not missing, "tokenizer.ggml.tokens", f"{len(missing)} tokens of single bytes are missing")
        unknown = self._tokens[self._ids["unknown"] or 0]
        prefix = self._get("tokenizer.ggml.add_space_prefix", bool, True)
        return sentencepiece.tokenizer_parts(vocabulary, scores, unknown, prefix)
