"""`config.json` of a Llama or Qwen2 model as data. What is not implemented is refused by field, never ignored."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from lora.errors import BadInput

# A family's meaning of absent fields, and the biases it always has. Sources: the configuration classes of transformers.
FAMILIES = {
    "llama": {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "qkv_bias": False},
    "qwen2": {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "qkv_bias": True},
}

# Fields that would change the maths of these families, and the values with which they change nothing.
NEUTRAL = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0, None),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
    "use_mrope": (False, None),
    "use_qk_norm": (False, None),
    "qk_layernorm": (False, None),
    "clip_qkv": (None,),
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "num_local_experts": (None, 0, 1),
    "num_experts": (None, 0, 1),
    "is_causal": (True, None),
    "add_cross_attention": (False, None),
    "is_encoder_decoder": (False, None),
}


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE frequencies are stretched: `default`, `linear` (by `factor`) or `llama3` (by wavelength)."""

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """The numbers the decoder is built from; names are those of `config.json`."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]

    @staticmethod
    def from_json(raw: Mapping, where: str = "config.json") -> "ModelConfig":
        """Read a parsed `config.json`. Raises BadInput with every field that is wrong or not implemented."""
        return _Reader(raw, where).config()


class _Reader:
    """Reads fields one by one and collects what is wrong with them."""

    def __init__(self, raw: Mapping, where: str):
        self.raw, self.where, self.problems = raw, where, []

    def wrong(self, field: str, why: str, fix: str = "Give a model of the Llama or Qwen2 family") -> None:
        self.problems.append(f"unsupported model in {self.where}:{field}: {why}. {fix}")

    def number(self, field, default=None, *, raw=None, kind=int, low=1, high=2**24):
        """A field between `low` and `high`; strings and booleans are no numbers."""
        value = (self.raw if raw is None else raw).get(field)
        value = default if value is None else value
        kinds = (int,) if kind is int else (int, float)
        if value is None:
            self.wrong(field, "it is missing", "Download the file again")
        elif type(value) not in kinds or not low <= value <= high:  # false for NaN, too
            self.wrong(field, f"{value!r} is no {kind.__name__} from {low} to {high}", "Download the file again")
        else:
            return kind(value)
        return 1

    def flag(self, field: str, default: bool = False) -> bool:
        value = self.raw.get(field)
        if value is not None and type(value) is not bool:
            self.wrong(field, f"{value!r} is neither true nor false", "Download the file again")
        return default if value is None else bool(value)

    def config(self) -> ModelConfig:
        kind = self.raw.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise BadInput(
                f"unsupported model in {self.where}:model_type: {kind!r}. Supported are: {', '.join(sorted(FAMILIES))}"
            )
        family = FAMILIES[kind]
        for field, neutral in NEUTRAL.items():
            if field in self.raw and not any(self.raw[field] == n for n in neutral):
                self.wrong(field, f"{json.dumps(self.raw[field])[:60]} is not implemented")
        layers = self.raw.get("layer_types")
        if layers is not None and (not isinstance(layers, list) or set(map(str, layers)) - {"full_attention"}):
            self.wrong("layer_types", "only full_attention is implemented")
        if kind == "llama" and self.raw.get("sliding_window") is not None:
            self.wrong("sliding_window", "a sliding window is not implemented")

        hidden = self.number("hidden_size", high=2**17)
        heads = self.number("num_attention_heads", high=2**12)
        kv_heads = self.number("num_key_value_heads", default=heads, high=2**12)
        if heads % kv_heads:
            self.wrong("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
        if self.raw.get("head_dim") is None and hidden % heads:
            self.wrong("num_attention_heads", f"{heads} does not divide hidden_size {hidden}, and there is no head_dim")
        head_dim = self.number("head_dim", default=max(1, hidden // heads), high=2**12)
        if head_dim % 2:
            self.wrong("head_dim", f"{head_dim} is odd; RoPE turns pairs")
        theta, scaling = self.rope()
        llama_bias = self.flag("attention_bias") if kind == "llama" else False
        config = ModelConfig(
            model_type=kind,
            vocab_size=self.number("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.number("intermediate_size", high=2**20),
            num_hidden_layers=self.number("num_hidden_layers", high=1024),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=self.number(
                "max_position_embeddings", family["max_position_embeddings"], high=2**30
            ),
            rms_norm_eps=self.number("rms_norm_eps", family["rms_norm_eps"], kind=float, low=0, high=1),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=self.flag("tie_word_embeddings"),
            qkv_bias=family["qkv_bias"] or llama_bias,
            o_bias=llama_bias,
            mlp_bias=self.flag("mlp_bias") if kind == "llama" else False,
            eos_token_ids=self.token_ids("eos_token_id"),
        )
        if self.problems:
            raise BadInput(*self.problems)
        return config

    def token_ids(self, field: str) -> tuple[int, ...]:
        value = self.raw.get(field)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            self.wrong(field, f"{value!r} is no token id or list of them", "Download the file again")
            return ()
        return tuple(ids)

    def rope(self) -> tuple[float, RopeScaling]:
        """RoPE's base and scaling, from `rope_parameters` (new files) or `rope_theta` and `rope_scaling` (old ones)."""
        old, new = (self.raw.get(field) or {} for field in ("rope_scaling", "rope_parameters"))
        for field, part in (("rope_scaling", old), ("rope_parameters", new)):
            if not isinstance(part, Mapping):
                self.wrong(field, f"{part!r} is not an object", "Download the file again")
                return 10000.0, RopeScaling()
        field, part = ("rope_parameters", new) if new else ("rope_scaling", old)
        thetas = [p["rope_theta"] for p in (new, old, self.raw) if p.get("rope_theta") is not None]
        if any(theta != thetas[0] for theta in thetas):
            self.wrong("rope_theta", f"two different values, {thetas[0]!r} and {thetas[-1]!r}", "Keep the right one")
        theta = self.number("rope_theta", raw={"rope_theta": thetas[0] if thetas else 10000.0}, kind=float, high=1e12)

        kinds = {part[key] for key in ("rope_type", "type") if isinstance(part.get(key), str)} or {"default"}
        kind = kinds.pop()
        if kinds or kind not in ("default", "linear", "llama3"):
            self.wrong(field, f"rope type {kind!r} is not implemented; default, linear and llama3 are")
            return theta, RopeScaling()
        if kind == "default":
            for key in sorted(part.keys() - {"rope_type", "type", "rope_theta"}):
                if part[key] not in (None, 1, 1.0):
                    self.wrong(field, f"{key} {part[key]!r} without a rope type that uses it")
            return theta, RopeScaling()
        factor = self.number("factor", raw=part, kind=float, low=1, high=1e6)
        if kind == "linear":
            return theta, RopeScaling("linear", factor)
        low = self.number("low_freq_factor", raw=part, kind=float, low=1e-6, high=1e6)
        high = self.number("high_freq_factor", raw=part, kind=float, low=1e-6, high=1e6)
        if not low < high and not self.problems:
            self.wrong(
                field, f"low_freq_factor {low:g} is not below high_freq_factor {high:g}", "Download the file again"
            )
        original = self.number("original_max_position_embeddings", raw=part, high=2**30)
        return theta, RopeScaling("llama3", factor, low, high, original)
