"""What `config.json` says of each layer: what mixes positions there, how far it looks back, which RoPE it has."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lora.network.rope_fields import FULL, SLIDING

# In layer_types: what is there in attention's place.
LINEAR, CONV = "linear_attention", "conv"
MIXER_WORDS = {"delta": {LINEAR: "delta"}, "conv": {CONV: "conv"}, "mamba": {"attention": "attention"}}


@dataclass(frozen=True)
class DeltaSizes:
    """Of Gated DeltaNet."""

    key_heads: int
    value_heads: int
    key_dim: int  # of a head
    value_dim: int
    kernel: int  # positions that its convolution sees


@dataclass(frozen=True)
class Gemma4Sizes:
    """Of Gemma 4 E2B and E4B."""

    global_head_dim: int  # of layers without a window
    inputs: int  # numbers that each token brings to each layer
    inputs_vocab_size: int
    sources: tuple[int, ...]  # whose keys and values each layer uses, mostly its own
    double_wide: bool  # layers that use another's have an MLP of twice the width


class LayerFields:
    """The part of the reader of `config.json` that reads it."""

    def mixers(self, count: int) -> tuple[str, ...]:
        """What mixes positions in each layer: by the family's interval, or by `layer_types` in its place."""
        if self.family.mixer == "attention":
            return ("attention",) * count
        interval, given = self.optional("full_attention_interval"), self.raw.get("layer_types")
        attending = self.raw.get("full_attn_idxs") if self.family.mixer == "conv" else None
        if attending is not None:
            if not isinstance(attending, list) or not all(type(i) is int and 0 <= i < count for i in attending):
                self.wrong("full_attn_idxs", f"{json.dumps(attending)[:60]} is no list of layers from 0 to {count - 1}")
                attending = []
            kinds = [FULL if i in attending else CONV for i in range(count)]
        else:
            kinds = [LINEAR if interval and (i + 1) % interval else FULL for i in range(count)]
        kinds = kinds if given is None else given
        words = {FULL: "attention"} | MIXER_WORDS[self.family.mixer]
        if not isinstance(kinds, list) or len(kinds) != count or any(kind not in [*words] for kind in kinds):
            self.wrong("layer_types", f"{json.dumps(kinds)[:60]} is not {count} times {' or '.join(words)}")
            return ("attention",) * count
        return tuple(words[kind] for kind in kinds)

    def delta(self) -> DeltaSizes:
        keys, values = (self.number(f"linear_num_{of}_heads", n, high=2**12) for of, n in (("key", 16), ("value", 32)))
        if values % keys:
            self.wrong("linear_num_key_heads", f"{keys} does not divide linear_num_value_heads {values}")
        sizes = (self.number(f"linear_{of}_head_dim", 128, high=2**12) for of in ("key", "value"))
        return DeltaSizes(keys, values, *sizes, self.number("linear_conv_kernel_dim", 4, low=2, high=64))

    def gemma4(self, windows: tuple[int | None, ...], global_head_dim: int) -> Gemma4Sizes:
        """The last `num_kv_shared_layers` use the keys and values of the last layer before them with their window."""
        if self.raw.get("use_bidirectional_attention") not in (None, False, "vision"):
            self.wrong("use_bidirectional_attention", "tokens that see what follows them are not implemented")
        if windows[-1] is not None:
            self.wrong("layer_types", f"the last layer is not {FULL}")
        own = len(windows) - self.number("num_kv_shared_layers", 0, low=0, high=1024)
        sources = list(range(len(windows)))
        for i in range(max(own, 0), len(windows)):
            same = [j for j in range(max(own, 0)) if windows[j] == windows[i]]
            if not same:
                self.wrong(
                    "num_kv_shared_layers", f"no layer before {i} has keys and values for it", "Download it again"
                )
                break
            sources[i] = same[-1]
        vocabulary = self.number("vocab_size_per_layer_input", 262144)
        if vocabulary < self.number("vocab_size"):
            self.wrong("vocab_size_per_layer_input", f"{vocabulary} is below vocab_size")
        inputs = self.number("hidden_size_per_layer_input", 256, high=2**16)
        wide = self.flag("use_double_wide_mlp")
        return Gemma4Sizes(global_head_dim, inputs, vocabulary, tuple(sources), wide)

    def global_head_dim(self, windows: tuple[int | None, ...]) -> int:
        """Of layers without a window; files that transformers wrote say it layer by layer."""
        given = self.raw.get("per_layer_config")
        if given is None:
            return self.number("global_head_dim", 512, high=2**12)
        layers = [str(i) for i, window in enumerate(windows) if window is None]
        sizes = list(given.values()) if isinstance(given, Mapping) and [*given] == layers else []
        if (
            not sizes
            or sizes != sizes[:1] * len(sizes)
            or not isinstance(sizes[0], Mapping)
            or [*sizes[0]] != ["head_dim"]
        ):
            self.wrong("per_layer_config", "it is not one head_dim for each layer without a window, and nothing else")
            return 512
        return self.number("head_dim", raw=sizes[0], high=2**12)

    def lfm2_width(self) -> int:
        """LFM2's files say the MLP's width before it is cut to two thirds and rounded up, or say that it is not."""
        width = self.number("block_ff_dim", self.raw.get("intermediate_size"), high=2**20)
        if not self.flag("block_auto_adjust_ff_dim", True):
            return width
        width = int(int(2 * width / 3) * self.number("block_ffn_dim_multiplier", 1.0, kind=float, low=1e-3, high=1e3))
        multiple = self.number("block_multiple_of", 256)
        return multiple * -(-width // multiple)

    def windows(self, count: int) -> tuple[int | None, ...]:
        """How many positions each layer looks back: by the family's pattern, or by `layer_types` in its place."""
        family, window = self.family, self.optional("sliding_window", high=2**30)
        if "use_sliding_window" in family.reads and not self.flag("use_sliding_window"):
            window = None
        first, pattern = self.optional("max_window_layers", low=0), self.window_pattern()
        kinds = [
            FULL if not window or i < first or (pattern and (i + 1) % pattern == 0) else SLIDING for i in range(count)
        ]
        if family.last_is_full and kinds:
            kinds[-1] = FULL
        given = self.raw.get("layer_types") if family.mixer == "attention" else None
        if given is None or given == kinds:
            return tuple(window if kind == SLIDING else None for kind in kinds)
        possible = (FULL, SLIDING) if window and "layer_types" in family.reads else (kinds[0],)
        if not isinstance(given, list) or len(given) != count or any(kind not in possible for kind in given):
            self.wrong("layer_types", f"{json.dumps(given)[:60]} is not {count} times {' or '.join(possible)}")
            return (None,) * count
        return tuple(window if kind == SLIDING else None for kind in given)

    def window_pattern(self) -> int | None:
        """One layer in so many looks back without limit; Exaone's files write it as LLLG, too."""
        given = self.raw.get("sliding_window_pattern")
        if "sliding_window_pattern" in self.family.reads and isinstance(given, str) and re.fullmatch("L+G", given):
            return len(given)
        return self.optional("sliding_window_pattern")

    def ropes(self, windows: tuple[int | None, ...]) -> tuple[str | None, ...]:
        """Which RoPE each layer has."""
        interval = self.optional("no_rope_layer_interval")
        turned = [not interval or (i + 1) % interval != 0 for i in range(len(windows))]
        if self.family.rope_in_windows_only and self.optional("sliding_window", high=2**30):
            turned = [bool(window) for window in windows]
        given = self.raw.get("no_rope_layers") if interval else None  # 1 where a layer has RoPE, whatever the name says
        if given is not None:
            if not isinstance(given, list) or len(given) < len(windows) or any(i not in (0, 1) for i in given):
                self.wrong("no_rope_layers", f"{json.dumps(given)[:60]} does not say 0 or 1 for each layer")
                return (None,) * len(windows)
            turned = given
        local = self.family.rope_local
        kinds = ("local" if local and window else "global" for window in windows)
        return tuple(kind if rope else None for kind, rope in zip(kinds, turned, strict=False))
