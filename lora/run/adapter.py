"""The adapter that a run makes: what its flags or --init-adapter say of it, checked against the base on `meta`."""

import copy
import re
from collections import defaultdict
from collections.abc import Iterator

import torch

from lora import pretrained
from lora.adapter import passport, peft_config, store, value_head
from lora.adapter.inject import inject, lora_layers
from lora.adapter.targets import NoMatch, find_targets, first_match, path_endswith
from lora.adapter.variants import PiSSALinear, kind_of
from lora.errors import BadInput, say
from lora.methods import has_value_head
from lora.network.decoder import Model
from lora.run.settings import TrainSettings, pattern
from lora.text.template import read_arguments, spell_arguments
from lora.train import memory

TRAINS_WHOLE = "Leave it out, or train every weight with --full"


def arguments(args: TrainSettings, given: bool = False) -> dict:
    """What `inject` is called with. Are the adapter's values `given`, by a checkpoint or another adapter?"""
    return {
        "rank": args.rank,
        "alpha": args.alpha,
        "dropout": args.dropout,
        "targets": args.target,
        "dtype": getattr(torch, args.adapter_dtype),
        "kind": PiSSALinear if args.init == "pissa" else kind_of({"use_rslora": args.rslora, "use_dora": args.dora}),
        "init": None if given else args.init,
        "layers": args.layers,
        "rank_pattern": pattern(args.rank_pattern, int),
        "alpha_pattern": pattern(args.alpha_pattern, float),
    }


def ranks(args: TrainSettings, empty: Model) -> dict[str, int]:
    """The paths of the Linears to patch, with their ranks. Raises BadInput naming all that does not fit the base."""
    how, problems = arguments(args), []
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
    found = {path: first_match(path, how["rank_pattern"], args.rank) for path in paths}
    if "lm_head" in found:  # the loss reads the head's weight and never calls it
        problems.append(f"wrong --target in the command line: lm_head: heads get no adapters here. {TRAINS_WHOLE}")
    sizes = {path: min(empty.get_submodule(path).weight.shape) for path in found}
    over = [path for path in found if args.init == "pissa" and found[path] > sizes[path]]
    if over:
        why = f"{over[0]} has {sizes[over[0]]} singular values, rank {found[over[0]]} is more"
        problems.append(f"wrong --rank in the command line: {why}. Lower it, or add --rank-pattern")
    if problems:
        raise BadInput(*problems)
    return found


def on_meta(args: TrainSettings, empty: Model) -> Model:
    """A copy of a model on `meta` as the run trains it: in its dtype, and patched. `lora.train.memory` counts by it."""
    model = copy.deepcopy(empty).to(getattr(torch, args.dtype)).train()
    if not args.full:
        inject(model, **arguments(args, given=True))
    return model


def table(args: TrainSettings, empty: Model, targets: dict[str, int]) -> Iterator[str]:
    """A line for each name of a target: how many there are, their shapes, ranks and alphas, and how much trains."""
    alphas, names = pattern(args.alpha_pattern, float), defaultdict(list)
    for path in targets:
        names[path.rsplit(".", 1)[-1]].append(path)
    width = max(10, *map(len, names))
    for name, paths in names.items():
        shapes = {f"{o} x {i}" for o, i in (empty.get_submodule(path).weight.shape for path in paths)}
        rank, alpha = _span({targets[p] for p in paths}), _span({first_match(p, alphas, args.alpha) for p in paths})
        size = memory.in_adapter(empty, {path: targets[path] for path in paths}, args.dora)
        yield (
            f"  {name:<{width}} {len(paths):>4} of {' and '.join(sorted(shapes)):<13} rank {rank:<5} alpha {alpha:<5} "
            f"{size:>11,} parameters"
        )


def _span(values: set) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


def take_over(args: TrainSettings, base: pretrained.ModelFiles) -> None:
    """Variant, ranks, alphas and targets of --init-adapter; where no flag says otherwise, its template with its
    arguments, its system turn and its date too.

    Raises BadInput for flags that contradict it, and for an adapter that does not fit the base.
    """
    trial = pretrained.empty_model(base)
    wanted = list(ranks(args, trial))
    config = store.load(trial, args.init_adapter, read=base.read)  # strict about every tensor
    layers = lora_layers(trial)
    if line := _fate_of_head(args, value_head.of(trial)):
        say(line)
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
    theirs = {name: (_words(getattr(args, name)), _words(value)) for name, value in its.items()}
    theirs["target"] = f"{_words(args.target)} ({len(wanted)} linears)", f"{len(layers)} linears"
    differs = {name for name, value in its.items() if getattr(args, name) != value}
    differs |= {"target"} if wanted != list(layers) else set()
    problems = [
        f"contradiction in the command line: --{name.replace('_', '-')} {given}, {args.init_adapter} has {here}. "
        "Leave it out"
        for name, (given, here) in theirs.items()
        if name in differs & args.given
    ]
    if problems:
        raise BadInput(*problems)
    if not args.no_verify:
        passport.verify(args.init_adapter, base, layers)
    names = peft_config.target_modules(trial)
    vars(args).update(its, target=names if isinstance(names, list) else [f"re:{names}"])
    if problems := args.contradictions():
        raise BadInput(*problems)
    trained = (passport.read(args.init_adapter) or {}).get("chat", {})
    if not args.given & {"system", "no_system"}:
        args.system, args.no_system = trained.get("system") or None, trained.get("system") is False
    if "date" not in args.given:
        args.date = trained.get("date") or args.date
    if not args.template:
        args.template_arg = spell_arguments(trained.get("template_args", {}) | read_arguments(args.template_arg))
    args.control_tokens = args.control_tokens or trained.get("control_tokens", False)
    args.template = args.template or passport.template_of(args.init_adapter)


def _fate_of_head(args: TrainSettings, head: value_head.ValueHead | None) -> str | None:
    if has_value_head(args.method):
        goes_on = "its value head goes on" if head else "it has no value head, so that begins at zero"
        return f"head     {args.init_adapter}: {goes_on}"
    left = f"its value head is left behind, as --method {args.method} trains none"
    return f"note     {args.init_adapter}: {left}" if head else None


def _only(path: str) -> str:
    """The target that is this path and no other."""
    return f"re:{re.escape(path)}"


def _words(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)
