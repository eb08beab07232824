"""The adapter that a run makes: what its flags or --init-adapter say of it, checked against the base on `meta`."""

import re
from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace

import torch

from lora import flags, pretrained
from lora.adapter import passport, store
from lora.adapter.inject import NoMatch, find_targets, first_match, lora_layers, path_endswith
from lora.adapter.variants import PiSSALinear, kind_of
from lora.errors import BadInput
from lora.network.decoder import Model
from lora.train import memory

TRAINS_WHOLE = "Leave it out, or train every weight with --full"


def arguments(s: SimpleNamespace, given: bool = False) -> dict:
    """Those of `inject` that the settings mean; are its values `given`, by a checkpoint or another adapter?"""
    return {
        "rank": s.rank,
        "alpha": s.alpha,
        "dropout": s.dropout,
        "targets": s.target,
        "dtype": getattr(torch, s.adapter_dtype),
        "kind": PiSSALinear if s.init == "pissa" else kind_of({"use_rslora": s.rslora, "use_dora": s.dora}),
        "init": None if given else s.init,
        "layers": s.layers,
        "rank_pattern": flags.pattern(s.rank_pattern, int),
        "alpha_pattern": flags.pattern(s.alpha_pattern, float),
    }


def contradictions(s: SimpleNamespace) -> list[str]:
    """What cannot be together, without a look at the base."""
    line, problems = "contradiction in the command line:", []
    if s.init == "pissa":
        both = [f"--{name.replace('_', '-')}" for name in ("dora", "rslora", "init_adapter") if getattr(s, name)]
        problems = [f"{line} --init pissa and {flag}. Leave out one of them" for flag in both]
    if s.fsdp and (s.dora or s.init == "pissa"):
        flag = "--dora" if s.dora else "--init pissa"
        problems.append(f"{line} --fsdp and {flag}, which reads whole weights. Leave out one of them")
    for flag, values in (("--rank-pattern", s.rank_pattern), ("--alpha-pattern", s.alpha_pattern)):
        if len(flags.pattern(values, str)) < len(values or ()):
            problems.append(f"{line} {flag} names a target twice. Leave out one of them")
    return problems


def ranks(s: SimpleNamespace, empty: Model) -> dict[str, int]:
    """The paths of the Linears to patch, with their ranks. Raises BadInput naming all that does not fit the base."""
    how, problems = arguments(s), []
    try:
        paths = find_targets(empty, *(how[name] for name in ("targets", "layers", "rank_pattern", "alpha_pattern")))
    except NoMatch as error:
        for name, value, text in error.problems:
            if path_endswith(value, "embed_tokens"):
                text = f"{value}: embeddings get no adapters here. {TRAINS_WHOLE}"
            elif path_endswith(value, "lm_head") and empty.config.tie_word_embeddings:
                text = f"{value}: this model's head is its embedding, which gets no adapter here. {TRAINS_WHOLE}"
            else:
                text += ". Give one of these" + ", or all" * (name == "target")
            problems.append(f"wrong --{name.replace('_', '-')} in the command line: {text}")
        raise BadInput(*problems) from None
    found = {path: first_match(path, how["rank_pattern"], s.rank) for path in paths}
    if "lm_head" in found:  # the loss reads the head's weight and never calls it
        problems.append(f"wrong --target in the command line: lm_head: heads get no adapters here. {TRAINS_WHOLE}")
    sizes = {path: min(empty.get_submodule(path).weight.shape) for path in found}
    over = [path for path in found if s.init == "pissa" and found[path] > sizes[path]]
    if over:
        why = f"{over[0]} has {sizes[over[0]]} singular values, rank {found[over[0]]} is more"
        problems.append(f"wrong --rank in the command line: {why}. Lower it, or add --rank-pattern")
    if problems:
        raise BadInput(*problems)
    return found


def table(s: SimpleNamespace, empty: Model, targets: dict[str, int]) -> Iterator[str]:
    """A line for each name of a target: how many there are, their shapes, ranks and alphas, and how much trains."""
    alphas, names = flags.pattern(s.alpha_pattern, float), defaultdict(list)
    for path in targets:
        names[path.rsplit(".", 1)[-1]].append(path)
    for name, paths in names.items():
        shapes = {f"{o} x {i}" for o, i in (empty.get_submodule(path).weight.shape for path in paths)}
        rank, alpha = _span({targets[p] for p in paths}), _span({first_match(p, alphas, s.alpha) for p in paths})
        size = memory.in_adapter(empty, {path: targets[path] for path in paths}, s.dora)
        yield (
            f"  {name:<10} {len(paths):>4} of {' and '.join(sorted(shapes)):<13} rank {rank:<5} alpha {alpha:<5} "
            f"{size:>11,} parameters"
        )


def _span(values: set) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


def take_over(s: SimpleNamespace, base: pretrained.Checkpoint) -> None:
    """Variant, ranks, alphas and targets of --init-adapter; where no flag says otherwise, its template, system turn and
    date too.

    Raises BadInput for flags that contradict it, and for an adapter that does not fit the base.
    """
    trial = pretrained.empty_model(base)
    wanted = list(ranks(s, trial))
    config = store.load(trial, s.init_adapter)  # strict about every tensor, before any weights are loaded
    layers = lora_layers(trial)
    its = {
        "rank": config.rank,
        "alpha": float(config.alpha),
        "rank_pattern": [f"{_only(p)}={x.rank}" for p, x in layers.items() if x.rank != config.rank] or None,
        "alpha_pattern": [f"{_only(p)}={x.alpha}" for p, x in layers.items() if x.alpha != config.alpha] or None,
        "layers": None,
        "init": "kaiming",
        "rslora": "use_rslora" in config.kind.fields,
        "dora": "use_dora" in config.kind.fields,
    }
    theirs = {name: (_words(getattr(s, name)), _words(value)) for name, value in its.items()}
    theirs["target"] = f"{_words(s.target)} ({len(wanted)} linears)", f"{len(layers)} linears"
    differs = {name for name, value in its.items() if getattr(s, name) != value}
    differs |= {"target"} if wanted != list(layers) else set()
    problems = [
        f"contradiction in the command line: --{name.replace('_', '-')} {given}, {s.init_adapter} has {here}. "
        "Leave it out"
        for name, (given, here) in theirs.items()
        if name in differs & s.given
    ]
    if problems:
        raise BadInput(*problems)
    if not s.no_verify:
        passport.verify(s.init_adapter, base.name, base.header, base.read, layers)
    names = store.target_modules(trial)
    vars(s).update(its, target=names if isinstance(names, list) else [f"re:{names}"])
    if problems := contradictions(s):
        raise BadInput(*problems)
    trained = (passport.read(s.init_adapter) or {}).get("chat", {})
    if not s.given & {"system", "no_system"}:
        s.system, s.no_system = trained.get("system") or None, trained.get("system") is False
    if "date" not in s.given:
        s.date = trained.get("date") or s.date
    s.template = s.template or passport.template_of(s.init_adapter)


def _only(path: str) -> str:
    """The target that is this path and no other."""
    return f"re:{re.escape(path)}"


def _words(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
