"""Which Linears get an adapter: names, groups, patterns and layers that choose among their paths."""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from lora.quant.linear import QuantLinear

KINDS = (nn.Linear, QuantLinear)
# By the names that families give them: attention or what is in its place, and the MLP.
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "in_proj", "out_proj")
MLP = ("gate_proj", "up_proj", "down_proj", "output_linear", "w1", "w3", "w2")
GROUPS = {"all": ATTENTION + MLP, "attention": ATTENTION, "mlp": MLP}


def linears(model: nn.Module) -> dict[str, nn.Linear | QuantLinear]:
    """Path -> Linear, for every Linear that could be a target, quantised or not. Subclasses are left alone: their
    owners use them in other ways than calling them (`nn.MultiheadAttention` reads its output projection's weight)."""
    return {path: module for path, module in model.named_modules() if type(module) in KINDS}


def matches(path: str, target: str) -> bool:
    """Does a target name this path? `all`, `attention`, `mlp`; `re:PATTERN` for the whole path; else a suffix that
    begins on a dot: `o_proj` matches `layers.0.o_proj`, never `layers.0.foo_proj`."""
    if target.startswith("re:"):
        return re.fullmatch(target[3:], path) is not None
    return path_endswith(path, *GROUPS.get(target, (target,)))


def path_endswith(path: str, *suffixes: str) -> bool:
    """Does the path end in one of these, whole names only?"""
    return any(path == suffix or path.endswith("." + suffix) for suffix in suffixes)


class NoMatch(ValueError):
    """What was asked for matches nothing: `problems` has an argument's name, what it names, and what is wrong."""

    def __init__(self, problems: Sequence[tuple[str, str, str]]):
        self.problems = problems
        super().__init__("; ".join(text for *_, text in problems))


def find_targets(
    model: nn.Module,
    targets: Sequence[str] = ("all",),
    layers: str | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> list[str]:
    """The paths of all Linears that some target names, in the order of the model; with `layers`, as `0-7,20-`, those
    whose path has such a number. Arguments as for `inject`.

    Raises NoMatch for no target, and naming every target, span of layers and pattern that matches nothing.
    """
    everywhere, problems = list(linears(model)), [] if targets else [("target", "", "no target is given")]

    def named(name: str, targets: Iterable[str], paths: Iterable[str]) -> set[str]:
        """Those of `paths` that some target names."""
        there, found = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in paths})) or "none", set()
        for target in targets:
            what = f"{name.replace('_', ' ')} {target!r}"
            try:
                its = {path for path in paths if matches(path, target)}
            except (re.error, OverflowError, RecursionError) as error:
                problems.append((name, target, f"{what} is no regular expression: {error}"))
                continue
            if not its:
                problems.append((name, target, f"{what} matches no Linear; there are: {there}"))
            found |= its
        return found

    chosen = named("target", targets, everywhere)
    if layers is not None and chosen:
        numbers = {path: n for path in chosen if (n := layer_number(path)) is not None}
        there = ", ".join(str(n) for n in sorted(set(numbers.values()))) or "none"
        for span, text in zip(parse_layers(layers), layers.split(","), strict=True):
            if not any(n in span for n in numbers.values()):
                problems.append(("layers", text, f"layers {text!r} match no target; there are: {there}"))
        chosen = {path for path, n in numbers.items() if any(n in span for span in parse_layers(layers))}
    for name, pattern in (("rank_pattern", rank_pattern), ("alpha_pattern", alpha_pattern)):
        if chosen:
            named(name, pattern or (), chosen)
    if problems:
        raise NoMatch(problems)
    return [path for path in everywhere if path in chosen]


def layer_number(path: str) -> int | None:
    """That of the layer: the first in a path."""
    return next((int(part) for part in path.split(".") if part.isdecimal()), None)


def parse_layers(layers: str) -> list[range]:
    """`0-7,20-` -> 0 to 7, and 20 to the end."""
    pairs = (part.partition("-") for part in layers.split(","))
    return [range(int(low), int(high or (sys.maxsize if dash else low)) + 1) for low, dash, high in pairs]


def first_match(path: str, pattern: Mapping | None, default):
    """The value of the first key that names this path as a target would."""
    return next((value for target, value in (pattern or {}).items() if matches(path, target)), default)
