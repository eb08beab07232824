"""`config.json` of a supported model as data. What is not implemented is refused by field, never ignored."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from lora.errors import BadInput
from lora.network.families import ACTIVATIONS, FAMILIES, NEUTRAL, OTHERS, TRAPS, WRAPPERS, Family, quantised
from lora.network.layer_fields import DeltaSizes, Gemma4Sizes, LayerFields
from lora.network.rope_fields import RopeFields, RopeScaling


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
    activation: str  # silu or gelu_tanh
    norms: tuple[str | None, ...]  # before and after attention, before and after the MLP
    norm_offset: float  # what norms add to their weight
    qk_norm: str | None  # of what queries and keys are normed, `Attention.normed`
    embedding_scale: float
    embedding_scale_rounded: bool  # to the model's dtype
    residual_multiplier: float  # what is added to a block's input is multiplied by it
    logits_scaling: float  # and logits are divided by this
    query_pre_attn_scalar: float  # the number whose root attention divides by, head_dim in most
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    rotary_dim: int  # of the head_dim numbers of a head RoPE turns so many
    rope_interleaved: bool  # and it turns (2i, 2i + 1), not (i, i + d/2)
    rope_local_theta: float  # of "local" RoPE, which is never scaled
    rope_local_dim: int
    ropes: tuple[str | None, ...]  # "global", "local" or none, for every layer
    windows: tuple[int | None, ...]  # how many positions each layer looks back, its own included; None is all
    mixers: tuple[str, ...]  # what mixes positions in each layer: "attention", "delta", "conv"
    delta: DeltaSizes | None
    conv_size: int | None  # positions that LFM2's convolution sees
    gemma4: Gemma4Sizes | None
    output_gate: bool  # attention's output is multiplied by the sigmoid of what q_proj gives beside each query
    fused: tuple[tuple[str, tuple[str, ...]], ...]  # Linears whose rows a file has as one tensor, and its name
    names: Mapping[str, str]  # modules that the hub calls otherwise
    written_as: str | None  # the model_type of merged models, where it is another
    eos_token_ids: tuple[int, ...]

    @property
    def head_dims(self) -> dict[int, int]:
        """Of each layer that has keys and values."""
        own = (i for i, mixer in enumerate(self.mixers) if mixer == "attention")
        if self.gemma4 is None:
            return dict.fromkeys(own, self.head_dim)
        sizes = (self.head_dim, self.gemma4.global_head_dim)
        return {i: sizes[self.windows[i] is None] for i in own if self.gemma4.sources[i] == i}

    @staticmethod
    def from_json(raw: Mapping, where: str = "config.json") -> "ModelConfig":
        """Read a parsed `config.json`. Raises BadInput with every field that is wrong or not implemented."""
        return _Reader(raw, where).config()


class _Reader(LayerFields, RopeFields):
    """Reads fields one by one and collects what is wrong with them."""

    def __init__(self, raw: Mapping, where: str):
        self.raw, self.where, self.problems, self.family = raw, where, [], Family()

    def called(self, field: str) -> str:
        """What the family's files call a field."""
        return self.family.called.get(field, field)

    def wrong(self, field: str, why: str, fix: str = "Give another model") -> None:
        self.problems.append(f"unsupported model in {self.where}:{self.called(field)}: {why}. {fix}")

    def number(self, field, default=None, *, raw=None, kind=int, low=1, high=2**24):
        """A field between `low` and `high`; strings and booleans are no numbers."""
        value = self.raw.get(self.called(field)) if raw is None else raw.get(field)
        value = default if value is None else value
        kinds = (int,) if kind is int else (int, float)
        if value is None:
            self.wrong(field, "it is missing", "Download the file again")
        elif type(value) not in kinds or not low <= value <= high:  # false for NaN, too
            self.wrong(field, f"{value!r} is no {kind.__name__} from {low} to {high}", "Download the file again")
        else:
            return kind(value)
        return 1

    def flag(self, field: str, default: bool = False, raw: Mapping | None = None) -> bool:
        value = self.raw.get(self.called(field)) if raw is None else raw.get(field)
        if value is not None and type(value) is not bool:
            self.wrong(field, f"{value!r} is neither true nor false", "Download the file again")
        return default if value is None else bool(value)

    def optional(self, field: str, **limits) -> float | None:
        """A number of families that read the field; absent, it is what the family says, and null is none."""
        value = default = getattr(self.family, field)
        if field in self.family.reads:
            value = self.raw.get(field, default)
        return None if value is None else self.number(field, default, raw={field: value}, **limits)

    def config(self) -> ModelConfig:
        """The whole config, with all problems raised together. It is long because it is a table, a line a field."""
        kind = self.raw.get("model_type")
        if isinstance(kind, str) and kind in WRAPPERS:
            why = f"no config of the language model in {kind}, of the kind {' or '.join(WRAPPERS[kind])}"
            raise BadInput(f"unsupported model in {self.where}:text_config: {why}. Download the file again")
        if not isinstance(kind, str) or kind not in FAMILIES:
            why = OTHERS.get(kind) if isinstance(kind, str) else None
            why = why or f"Supported are: {', '.join(sorted(FAMILIES))}"
            raise BadInput(f"unsupported model in {self.where}:model_type: {kind!r}. {why}")
        self.family = family = FAMILIES[kind]
        for field, value, why, fix in TRAPS.get(kind, ()):
            if self.raw.get(field) == value:
                self.wrong(field, why, fix)
        if self.problems:  # nothing else of another architecture need be right
            raise BadInput(*self.problems)
        for field, (needed, absent) in family.required.items():
            value = self.raw.get(field, absent)
            if value != needed:
                self.wrong(field, f"{json.dumps(value)[:60]} is not implemented, {json.dumps(needed)} is")
        for field, neutral in NEUTRAL.items():
            known = field not in self.raw or field in (*family.reads, *family.unused)
            if not known and not any(self.raw[field] == n for n in neutral):
                why, fix = f"{json.dumps(self.raw[field])[:60]} is not implemented", "Give another model"
                if "quantization" in field or field == "compression_config":
                    why, fix = quantised(self.raw, self.where.removesuffix("/config.json"))
                self.wrong(field, why, fix)
        field, activation = family.activation
        activation = self.raw.get(field) or activation
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            self.wrong(field, f"{json.dumps(activation)[:60]} is not implemented; {', '.join(ACTIVATIONS)} are")
            activation = "silu"
        if family.mixer == "delta" and ACTIVATIONS[activation] != "silu":
            self.wrong(field, f"{activation} is not implemented here; silu is")

        hidden = self.number("hidden_size", high=2**17)
        heads = self.number("num_attention_heads", high=2**12)
        absent = family.num_key_value_heads if "num_key_value_heads" not in self.raw else None
        kv_heads = self.number("num_key_value_heads", default=absent or heads, high=2**12)
        if heads % kv_heads:
            self.wrong("num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}")
        if self.raw.get("head_dim") is None and hidden % heads and not family.head_dim:
            self.wrong("num_attention_heads", f"{heads} does not divide hidden_size {hidden}, and there is no head_dim")
        head_dim = self.number("head_dim", default=family.head_dim or max(1, hidden // heads), high=2**12)
        layers = self.number("num_hidden_layers", high=1024)
        mixers = self.mixers(layers)
        windows = self.windows(layers)
        wide = self.global_head_dim(windows) if "global_head_dim" in family.reads else head_dim
        rope = self.rope(head_dim, wide)
        positions = self.number("max_position_embeddings", family.max_position_embeddings, high=2**30)
        bias, reads = family.attention_bias, family.reads
        bias = self.flag("attention_bias", bias) if "attention_bias" in reads else bias
        tied = self.flag("tie_word_embeddings", family.tie_word_embeddings)
        tied = self.flag("tie_embedding", tied) if "tie_embedding" in reads else tied
        config = ModelConfig(
            model_type=kind,
            vocab_size=self.number("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.lfm2_width() if kind == "lfm2" else self.number("intermediate_size", high=2**20),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=min(positions, rope["rope_scaling"].longest),
            rms_norm_eps=self.number("rms_norm_eps", family.rms_norm_eps, kind=float, low=0, high=1),
            **rope,
            tie_word_embeddings=tied,
            qkv_bias=bias,
            o_bias=self.flag("o_bias") if "o_bias" in reads else bias and family.o_bias,
            mlp_bias=self.flag("mlp_bias") if "mlp_bias" in reads else False,
            activation=ACTIVATIONS[activation],
            norms=family.norms,
            norm_offset=family.norm_offset,
            qk_norm=family.qk_norm,
            embedding_scale=hidden**0.5
            if family.embedding_scaled
            else self.optional("embedding_multiplier", kind=float, low=1e-6, high=1e6),
            embedding_scale_rounded=family.embedding_scaled,
            residual_multiplier=self.optional("residual_multiplier", kind=float, low=1e-6, high=1e6),
            logits_scaling=self.optional("logits_scaling", kind=float, low=1e-6, high=1e6),
            query_pre_attn_scalar=self.query_scalar() or head_dim,
            attn_logit_softcapping=self.optional("attn_logit_softcapping", kind=float, low=1e-6),
            final_logit_softcapping=self.optional("final_logit_softcapping", kind=float, low=1e-6),
            rope_interleaved=family.rope_interleaved,
            ropes=tuple(
                rope if mixer == "attention" else None for rope, mixer in zip(self.ropes(windows), mixers, strict=True)
            ),
            windows=windows,
            mixers=mixers,
            delta=self.delta() if "delta" in mixers else None,
            conv_size=self.number("conv_L_cache", 3, low=2, high=64) if family.mixer == "conv" else None,
            gemma4=self.gemma4(windows, wide) if kind == "gemma4_text" else None,
            output_gate=family.output_gate,
            names=family.names,
            fused=family.fused,
            written_as=family.written_as,
            eos_token_ids=self.token_ids("eos_token_id"),
        )
        if self.problems:
            raise BadInput(*self.problems)
        return config

    def query_scalar(self) -> float | None:
        """Granite says what scores are multiplied by, Gemma whose root they are divided by."""
        multiplier = self.optional("attention_multiplier", kind=float, low=1e-6, high=1e6)
        if multiplier:
            return multiplier**-2
        return self.optional("query_pre_attn_scalar", kind=float, low=1e-6)

    def token_ids(self, field: str) -> tuple[int, ...]:
        value = self.raw.get(field)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            self.wrong(field, f"{value!r} is no token id or list of them", "Download the file again")
            return ()
        return tuple(ids)

    def mapping(self, raw: Mapping, field: str) -> Mapping:
        value = raw.get(field) or {}
        if isinstance(value, Mapping):
            return value
        self.wrong(field, f"{value!r} is not an object", "Download the file again")
        return {}
