"""What `config.json` says of RoPE: new files by `rope_parameters`, old ones by `rope_theta` and `rope_scaling`."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

FULL, SLIDING = "full_attention", "sliding_attention"  # in layer_types, and in Gemma 3's rope_parameters
ROPES = {  # kinds, and what each reads
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "attn_factor", "beta_fast", "beta_slow",
        "mscale", "mscale_all_dim", "truncate",
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
    "dynamic": ("factor", "alpha", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),  # Hunyuan's; α alone counts
    "proportional": ("factor", "partial_rotary_factor"),
}  # fmt: skip


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
    turned: int = 0  # of proportional: so many of a head's pairs, the fastest, and the others stand still
    q_beta: float = 0.0  # queries grow by 1 + β log(1 + ⌊position / original length⌋)

    @property
    def longest(self) -> int:
        """The positions for which this holds: longrope has other factors for longer documents."""
        return self.original_max_position_embeddings if self.kind == "longrope" else 2**30


class RopeFields:
    """The part of the reader of `config.json` that reads them."""

    def rope(self, head_dim: int, global_head_dim: int) -> dict:
        """What ModelConfig says of RoPE: by `rope_parameters` (new files), or `rope_theta` and `rope_scaling` (old)."""
        family, raw = self.family, self.raw
        old, new = (self.mapping(raw, field) for field in ("rope_scaling", "rope_parameters"))
        new = new or (not old and family.rope_parameters) or {}
        local = self.optional("rope_local_base_freq", kind=float, high=1e12)
        if family.rope_local and {FULL, SLIDING} & new.keys():
            new, other = self.mapping(new, FULL), self.mapping(new, SLIDING)
            local = self.number("rope_theta", local or family.rope_theta, raw=other, kind=float, high=1e12)
            if other.get("rope_type", "default") != "default":
                self.wrong("rope_parameters", f"rope type {other['rope_type']!r} of {SLIDING} is not implemented")
        factor = family.partial_rotary_factor
        if "partial_rotary_factor" in family.reads:
            parts = [p for p in (new, old, raw) if p.get("partial_rotary_factor") is not None]
            factor = self.number(
                "partial_rotary_factor", factor, raw=parts[0] if parts else {}, kind=float, low=1e-3, high=1
            )
        proportional = new.get("rope_type") == "proportional" and "global_head_dim" in family.reads
        turned = head_dim if proportional else int(head_dim * factor)
        if turned % 2 or not turned:
            self.wrong("head_dim", f"of {head_dim} numbers {turned} are turned; RoPE turns pairs")
        theta, scaling = self.scaled_rope(old, new, turned)
        sizes = {"rotary_dim": turned, "rope_local_dim": turned}
        if proportional:  # in a wider head; the pairs that are not turned are the slowest ones
            sizes["rotary_dim"] = global_head_dim
            scaling = RopeScaling("proportional", turned=int(factor * global_head_dim // 2))
        return {"rope_theta": theta, "rope_scaling": scaling, "rope_local_theta": local or theta, **sizes}

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
        if kinds or kind not in ROPES or (kind == "proportional" and "global_head_dim" not in self.family.reads):
            self.wrong(field, f"rope type {kind!r} is not implemented; {', '.join(ROPES)} are")
            return theta, RopeScaling()
        for key in sorted(part.keys() - {"rope_type", "type", "rope_theta", *ROPES[kind], *self.family.reads}):
            if part[key] not in (None, 1, 1.0):
                said = f"{json.dumps(key)[1:-1][:60]} {json.dumps(part[key])[:60]}"
                self.wrong(field, f"{said} is nothing that rope type {kind!r} reads")
        if kind == "default":
            return theta, RopeScaling()
        if kind == "proportional":
            if part.get("factor") not in (None, 1, 1.0):
                self.wrong(field, f"factor {part['factor']!r} of rope type 'proportional' is not implemented")
            return theta, RopeScaling()
        if kind == "dynamic":
            return self.stretched_base(theta, field, part, turned), RopeScaling()
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

    def stretched_base(self, theta: float, field: str, part: Mapping, turned: int) -> float:
        """NTK-aware RoPE with a fixed α is RoPE of another base; without α it would change with the text's length."""
        if "alpha" not in self.family.reads or part.get("alpha") is None:
            self.wrong(field, "rope type 'dynamic' changes with the text's length, which is not implemented")
            return theta
        alpha = self.number("alpha", raw=part, kind=float, low=1, high=1e9)
        return theta * alpha ** (turned / (turned - 2)) if turned > 2 else theta

    def yarn(self, part: Mapping) -> RopeScaling:
        """Its defaults, and what attention's scores are multiplied by, as transformers has them."""

        def named(field: str, default: float | None, **limits) -> float | None:
            value = part.get(field)
            return default if value is None else self.number(field, raw=part, **({"kind": float, "high": 1e6} | limits))

        original = self.original(part)
        factor = self.stretch(part, original)
        mscale, of_all = (named(field, 0, low=0) for field in ("mscale", "mscale_all_dim"))
        grown = [grows(factor, by) for by in ((mscale, of_all) if mscale and of_all else (1, 0))]
        fast, slow = named("beta_fast", 0, low=0) or 32.0, named("beta_slow", 0, low=0) or 1.0
        truncate = self.flag("truncate", True, raw=part)
        beta = named("llama_4_scaling_beta", 0.0, low=0) if "llama_4_scaling_beta" in self.family.reads else 0.0
        # vLLM and llama.cpp multiply by what DeepSeek's files call attn_factor, which transformers passes over: there
        # it is 1 / grows(factor), so that cos and sin stay as they are
        attention = named("attention_factor", grown[0] / grown[1] * named("attn_factor", 1.0, low=0), low=0)
        return RopeScaling(
            "yarn", factor, original_max_position_embeddings=original, beta_fast=fast, beta_slow=slow,
            truncate=truncate, attention_factor=attention, q_beta=beta,
        )  # fmt: skip

    def original(self, part: Mapping) -> int:
        """The length of the pretraining: a part of RoPE's, or a field beside it."""
        field = "original_max_position_embeddings"
        found = {raw[field] for raw in (part, self.raw) if isinstance(raw.get(field), int)}
        if len(found) > 1:
            self.wrong(field, "two different values", "Keep the right one")
        return self.number(field, raw=self.raw | part, high=2**30)

    def stretch(self, part: Mapping, original: int) -> float:
        """How many times longer than in the pretraining texts are: `factor`, or what the two lengths say."""
        if part.get("factor") is not None:
            return self.number("factor", raw=part, kind=float, low=1, high=1e6)
        longest = self.raw.get("max_position_embeddings")
        return longest / original if type(longest) is int and 0 < longest <= 2**30 else 1.0

    def longrope(self, part: Mapping, turned: int) -> RopeScaling:
        """With the factors of short documents: longer ones than the original length are refused."""
        original, factors = self.original(part), part.get("short_factor")
        right = isinstance(factors, list) and len(factors) == turned // 2
        if not right or not all(type(x) in (int, float) and 0 < x < 1e6 for x in factors):
            self.wrong("rope_scaling", f"short_factor is not {turned // 2} numbers above 0", "Download the file again")
            factors = ()
        factor = self.stretch(part, original)
        attention = part.get("attention_factor")
        if attention is None:
            attention = longrope_grows(factor, original)
        attention = self.number("attention_factor", raw={"attention_factor": attention}, kind=float, low=0, high=1e3)
        return RopeScaling(
            "longrope", original_max_position_embeddings=original, attention_factor=attention,
            short_factors=tuple(map(float, factors)),
        )  # fmt: skip


def grows(factor: float, by: float = 1.0) -> float:
    """YaRN's factor for cos and sin, Peng et al. 2023, https://arxiv.org/abs/2309.00071, eq. 22; DeepSeek's files have
    it grow `by` another share."""
    return 0.1 * by * math.log(factor) + 1 if factor > 1 else 1.0


def longrope_grows(factor: float, original: int) -> float:
    """LongRoPE's, Ding et al. 2024, https://arxiv.org/abs/2402.13753, as transformers has it."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 < original else 1.0
