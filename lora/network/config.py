"""`config.json` of a supported model as data. What is not implemented is refused by field, never ignored."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from lora.errors import BadInput
from lora.network.families import ACTIVATIONS, FAMILIES, NEUTRAL, OTHERS, TRAPS, quantised

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"  # in layer_types


@dataclass(frozen=True)
class DeltaSizes:
    """Of Gated DeltaNet."""

    key_heads: int
    value_heads: int
    key_dim: int  # of a head
    value_dim: int
    kernel: int  # positions that its convolution sees


ROPES = ("default", "linear", "llama3", "yarn", "longrope")
YARN = (
    "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim", "truncate",
)  # fmt: skip


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE frequencies are stretched: `default`, `linear` (by `factor`), `llama3` and `yarn` (by wavelength) or
    `longrope` (each by a number of its own)."""

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0  # of yarn: pairs that turn more often in the original length stay
    beta_slow: float = 1.0  # and those that turn less often are stretched by the whole factor
    truncate: bool = True
    attention_factor: float = 1.0  # cos and sin are multiplied by it
    short_factors: tuple[float, ...] = ()  # of longrope, while a document fits the original length
    q_beta: float = 0.0  # queries grow by 1 + β log(1 + ⌊position / original length⌋)


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
    qk_norm: bool
    embedding_scale: float
    query_pre_attn_scalar: float  # the number whose root attention divides by, head_dim in most
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    rotary_dim: int  # of the head_dim numbers of a head RoPE turns so many
    rope_interleaved: bool  # and it turns (2i, 2i + 1), not (i, i + d/2)
    rope_local_theta: float  # of "local" RoPE, which is never scaled
    ropes: tuple[str | None, ...]  # "global", "local" or none, for every layer
    windows: tuple[int | None, ...]  # how many positions each layer looks back, its own included; None is all
    mixers: tuple[str, ...]  # what mixes positions in each layer: "attention", "delta"
    delta: DeltaSizes | None
    output_gate: bool  # attention's output is multiplied by the sigmoid of what q_proj gives beside each query
    fused: tuple[tuple[str, tuple[str, ...]], ...]  # Linears whose rows a file has as one tensor, and its name
    written_as: str | None  # the model_type of merged models, where it is another
    eos_token_ids: tuple[int, ...]

    @staticmethod
    def from_json(raw: Mapping, where: str = "config.json") -> "ModelConfig":
        """Read a parsed `config.json`. Raises BadInput with every field that is wrong or not implemented."""
        return _Reader(raw, where).config()


class _Reader:
    """Reads fields one by one and collects what is wrong with them."""

    def __init__(self, raw: Mapping, where: str):
        self.raw, self.where, self.problems = raw, where, []

    def wrong(self, field: str, why: str, fix: str = "Give another model") -> None:
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

    def flag(self, field: str, default: bool = False, raw: Mapping | None = None) -> bool:
        value = (self.raw if raw is None else raw).get(field)
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
        if not isinstance(kind, str) or kind not in FAMILIES:
            why = OTHERS.get(kind) if isinstance(kind, str) else None
            why = why or f"Supported are: {', '.join(sorted(FAMILIES))}"
            raise BadInput(f"unsupported model in {self.where}:model_type: {kind!r}. {why}")
        self.family = family = FAMILIES[kind]
        for field, value, why, fix in TRAPS.get(kind, ()):
            if self.raw.get(field) == value:
                self.wrong(field, why, fix)
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
        bias, reads = family.attention_bias, family.reads
        bias = self.flag("attention_bias", bias) if "attention_bias" in reads else bias
        config = ModelConfig(
            model_type=kind,
            vocab_size=self.number("vocab_size"),
            hidden_size=hidden,
            intermediate_size=self.number("intermediate_size", high=2**20),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=self.number("max_position_embeddings", family.max_position_embeddings, high=2**30),
            rms_norm_eps=self.number("rms_norm_eps", family.rms_norm_eps, kind=float, low=0, high=1),
            **self.rope(head_dim),
            tie_word_embeddings=self.flag("tie_word_embeddings", family.tie_word_embeddings),
            qkv_bias=bias,
            o_bias=bias and family.o_bias,
            mlp_bias=self.flag("mlp_bias") if "mlp_bias" in reads else False,
            activation=ACTIVATIONS[activation],
            norms=family.norms,
            norm_offset=family.norm_offset,
            qk_norm=family.qk_norm,
            embedding_scale=hidden**0.5 if family.embedding_scaled else 1.0,
            query_pre_attn_scalar=self.optional("query_pre_attn_scalar", kind=float, low=1e-6) or head_dim,
            attn_logit_softcapping=self.optional("attn_logit_softcapping", kind=float, low=1e-6),
            final_logit_softcapping=self.optional("final_logit_softcapping", kind=float, low=1e-6),
            rope_interleaved=family.rope_interleaved,
            ropes=tuple(
                rope if mixer == "attention" else None for rope, mixer in zip(self.ropes(windows), mixers, strict=True)
            ),
            windows=windows,
            mixers=mixers,
            delta=self.delta() if "delta" in mixers else None,
            output_gate=family.output_gate,
            fused=family.fused,
            written_as=family.written_as,
            eos_token_ids=self.token_ids("eos_token_id"),
        )
        if self.problems:
            raise BadInput(*self.problems)
        return config

    def mixers(self, count: int) -> tuple[str, ...]:
        """What mixes positions in each layer: by the family's interval, or by `layer_types` in its place."""
        if self.family.mixer == "attention":
            return ("attention",) * count
        interval, given = self.optional("full_attention_interval"), self.raw.get("layer_types")
        kinds = [LINEAR if (i + 1) % interval else FULL for i in range(count)] if given is None else given
        if not isinstance(kinds, list) or len(kinds) != count or any(kind not in (FULL, LINEAR) for kind in kinds):
            self.wrong("layer_types", f"{json.dumps(given)[:60]} is not {count} times {FULL} or {LINEAR}")
            return ("attention",) * count
        return tuple("attention" if kind == FULL else self.family.mixer for kind in kinds)

    def delta(self) -> DeltaSizes:
        keys, values = (self.number(f"linear_num_{of}_heads", n, high=2**12) for of, n in (("key", 16), ("value", 32)))
        if values % keys:
            self.wrong("linear_num_key_heads", f"{keys} does not divide linear_num_value_heads {values}")
        sizes = (self.number(f"linear_{of}_head_dim", 128, high=2**12) for of in ("key", "value"))
        return DeltaSizes(keys, values, *sizes, self.number("linear_conv_kernel_dim", 4, low=2, high=64))

    def windows(self, count: int) -> tuple[int | None, ...]:
        """How many positions each layer looks back: by the family's pattern, or by `layer_types` in its place."""
        family, window = self.family, self.optional("sliding_window", high=2**30)
        if "use_sliding_window" in family.reads and not self.flag("use_sliding_window"):
            window = None
        first, pattern = self.optional("max_window_layers", low=0), self.optional("sliding_window_pattern")
        kinds = [
            FULL if not window or i < first or (pattern and (i + 1) % pattern == 0) else SLIDING for i in range(count)
        ]
        given = self.raw.get("layer_types") if family.mixer == "attention" else None
        if given is None or given == kinds:
            return tuple(window if kind == SLIDING else None for kind in kinds)
        possible = (FULL, SLIDING) if window and "layer_types" in family.reads else (kinds[0],)
        if not isinstance(given, list) or len(given) != count or any(kind not in possible for kind in given):
            self.wrong("layer_types", f"{json.dumps(given)[:60]} is not {count} times {' or '.join(possible)}")
            return (None,) * count
        return tuple(window if kind == SLIDING else None for kind in given)

    def ropes(self, windows: tuple[int | None, ...]) -> tuple[str | None, ...]:
        """Which RoPE each layer has."""
        interval = self.optional("no_rope_layer_interval")
        turned = [not interval or (i + 1) % interval != 0 for i in range(len(windows))]
        given = self.raw.get("no_rope_layers") if interval else None  # 1 where a layer has RoPE, whatever the name says
        if given is not None:
            if not isinstance(given, list) or len(given) < len(windows) or any(i not in (0, 1) for i in given):
                self.wrong("no_rope_layers", f"{json.dumps(given)[:60]} does not say 0 or 1 for each layer")
                return (None,) * len(windows)
            turned = given
        local = self.family.rope_local_base_freq
        kinds = ("local" if local and window else "global" for window in windows)
        return tuple(kind if rope else None for kind, rope in zip(kinds, turned, strict=False))

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

    def rope(self, head_dim: int) -> dict:
        """What ModelConfig says of RoPE: by `rope_parameters` (new files), or `rope_theta` and `rope_scaling` (old)."""
        family, raw = self.family, self.raw
        old, new = (self.mapping(raw, field) for field in ("rope_scaling", "rope_parameters"))
        local = self.optional("rope_local_base_freq", kind=float, high=1e12)
        if local and {FULL, SLIDING} & new.keys():
            new, other = self.mapping(new, FULL), self.mapping(new, SLIDING)
            local = self.number("rope_theta", local, raw=other, kind=float, high=1e12)
            if other.get("rope_type", "default") != "default":
                self.wrong("rope_parameters", f"rope type {other['rope_type']!r} of {SLIDING} is not implemented")
        factor = family.partial_rotary_factor
        if "partial_rotary_factor" in family.reads:
            parts = [p for p in (new, old, raw) if p.get("partial_rotary_factor") is not None]
            factor = self.number(
                "partial_rotary_factor", factor, raw=parts[0] if parts else {}, kind=float, low=1e-3, high=1
            )
        turned = int(head_dim * factor)
        if turned % 2 or not turned:
            self.wrong("head_dim", f"of {head_dim} numbers {turned} are turned; RoPE turns pairs")
        theta, scaling = self.scaled_rope(old, new, turned)
        return {"rope_theta": theta, "rope_scaling": scaling, "rope_local_theta": local or theta, "rotary_dim": turned}

    def scaled_rope(self, old: Mapping, new: Mapping, turned: int) -> tuple[float, RopeScaling]:
        """RoPE's base and scaling."""
        field, part = ("rope_parameters", new) if new else ("rope_scaling", old)
        thetas = [p["rope_theta"] for p in (new, old, self.raw) if p.get("rope_theta") is not None]
        if any(theta != thetas[0] for theta in thetas):
            self.wrong("rope_theta", f"two different values, {thetas[0]!r} and {thetas[-1]!r}", "Keep the right one")
        theta = {"rope_theta": thetas[0] if thetas else self.family.rope_theta}
        theta = self.number("rope_theta", raw=theta, kind=float, high=1e12)

        kinds = {part[key] for key in ("rope_type", "type") if isinstance(part.get(key), str)} or {"default"}
        kind = kinds.pop()
        if kinds or kind not in ROPES:
            self.wrong(field, f"rope type {kind!r} is not implemented; {', '.join(ROPES)} are")
            return theta, RopeScaling()
        if kind == "default":
            for key in sorted(part.keys() - {"rope_type", "type", "rope_theta", *self.family.reads}):
                if part[key] not in (None, 1, 1.0):
                    self.wrong(field, f"{key} {part[key]!r} without a rope type that uses it")
            return theta, RopeScaling()
        if kind in ("yarn", "longrope"):
            return theta, self.yarn(part) if kind == "yarn" else self.longrope(part, turned)
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

    def yarn(self, part: Mapping) -> RopeScaling:
        """Its defaults, and what attention's scores are multiplied by, as transformers has them."""

        def named(field: str, default: float | None, **limits) -> float | None:
            value = part.get(field)
            return default if value is None else self.number(field, raw=part, **({"kind": float, "high": 1e6} | limits))

        original = self.number("original_max_position_embeddings", raw=part, high=2**30)
        factor = named("factor", None, low=1) or self.raw.get("max_position_embeddings", original) / original
        mscale, of_all = (named(field, 0, low=0) for field in ("mscale", "mscale_all_dim"))
        grown = (
            [0.1 * by * math.log(factor) + 1 for by in (mscale, of_all)] if mscale and of_all else [grows(factor), 1]
        )
        fast, slow = named("beta_fast", 0, low=0) or 32.0, named("beta_slow", 0, low=0) or 1.0
        truncate = self.flag("truncate", True, raw=part)
        beta = named("llama_4_scaling_beta", 0.0, low=0) if "llama_4_scaling_beta" in self.family.reads else 0.0
        attention = named("attention_factor", grown[0] / grown[1], low=0)
        known = {"rope_type", "type", "rope_theta", *YARN, *self.family.reads}
        for key in sorted(part.keys() - known):
            self.wrong("rope_parameters", f"{key} {part[key]!r} without a rope type that uses it")
        return RopeScaling(
            "yarn", factor, original_max_position_embeddings=original, beta_fast=fast, beta_slow=slow,
            truncate=truncate, attention_factor=attention, q_beta=beta,
        )  # fmt: skip

    def longrope(self, part: Mapping, turned: int) -> RopeScaling:
        """With the factors of short documents: longer ones than the original length are refused."""
        raw = self.raw | part
        original = self.number("original_max_position_embeddings", raw=raw, high=2**30)
        factors, factor = part.get("short_factor"), part.get("factor")
        right = isinstance(factors, list) and len(factors) == turned // 2
        if not right or not all(type(x) in (int, float) and 0 < x < 1e6 for x in factors):
            self.wrong("rope_scaling", f"short_factor is not {turned // 2} numbers above 0", "Download the file again")
            factors = ()
        factor = factor or raw.get("max_position_embeddings", original) / original
        attention = part.get("attention_factor")
        if attention is None:
            attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 < original else 1.0
        attention = self.number("attention_factor", raw={"attention_factor": attention}, kind=float, low=0, high=1e3)
        return RopeScaling(
            "longrope", original_max_position_embeddings=original, attention_factor=attention,
            short_factors=tuple(map(float, factors)),
        )  # fmt: skip


def grows(factor: float) -> float:
    """YaRN's factor for cos and sin, Peng et al. 2023, https://arxiv.org/abs/2309.00071, eq. 22."""
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
