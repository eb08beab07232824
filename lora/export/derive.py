"""New adapters: the weighted sum of others (`merge.py --combine`), and what a full fine-tune changed (`--extract`)."""

from collections.abc import Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm

from lora import files, folders, pretrained
from lora.adapter import algebra, passport, store, value_head
from lora.adapter.inject import lora_layers
from lora.adapter.merge import NotFinite, check_finite
from lora.adapter.targets import linears
from lora.data.sources import numbered
from lora.errors import BadInput, BadNumbers, say
from lora.export import card
from lora.inference.several import dry_load, find_base

FILES = (*passport.ADAPTER, card.FILE)
COMMON = ("out", "overwrite", "rank", "energy")
FLAGS = {  # that a mode takes
    "combine": ("combine", "model", "no_verify", *COMMON),
    "extract": ("extract", *COMMON),
}
MOST_NAMES = 5  # of tensors that one line lists
MOST_WEIGHT = 1e6
VOCABULARY = ("lm_head.weight", "model.embed_tokens.weight")  # they get rows where tokens are added


def find_mode(args) -> str:
    """`adapter`, `combine` or `extract`. Raises BadInput for flags that contradict it or each other."""
    modes = [name for name in ("adapter", *FLAGS) if name in args.given]
    if len(modes) > 1:
        both = " and ".join(f"--{name}" for name in modes)
        raise BadInput(f"contradiction in the command line: {both}. Give one of them")
    [mode] = modes or ["adapter"]
    if mode == "adapter":
        foreign, fix = args.given & {"rank", "energy"}, "Add --combine or --extract, or leave it out"
    else:
        foreign, fix = args.given - {*FLAGS[mode]}, "Leave it out"
    problems = []
    for name in sorted(foreign):
        flag = "--" + name.replace("_", "-")
        problems.append(f"contradiction in the command line: {flag} is not for --{mode}. {fix}")
    if args.rank is not None and args.energy is not None:
        problems.append("contradiction in the command line: --rank and --energy. Give one of them")
    if mode != "adapter" and args.out is None:
        problems.append("missing --out in the command line: it says where to write. Add it")
    if args.extract and len(args.extract) != 2:
        problems.append(f"wrong --extract in the command line: {len(args.extract)} models. Give BASE TUNED")
    if args.extract and args.rank is None and args.energy is None:
        problems.append("missing --rank in the command line: the difference has full rank. Add --rank R or --energy E")
    if problems:
        raise BadInput(*problems)
    return mode


# ---- --combine -------------------------------------------------------------------------------------------------------


def read_terms(names: Sequence[str]) -> list[tuple[str, float]]:
    """Folder and weight of each `FOLDER:WEIGHT` or `FOLDER`. Raises BadInput with everything that is wrong."""
    terms, problems = [], []
    for name in names:
        folder, weight = (name, None) if Path(name).is_dir() else numbered(name)
        terms.append((folder, 1.0 if weight is None else weight))
        if weight is not None and not 0 < abs(weight) <= MOST_WEIGHT:
            fix = f"Give FOLDER:WEIGHT, not 0, between {-MOST_WEIGHT:g} and {MOST_WEIGHT:g}"
            problems.append(f"wrong --combine in the command line: {name!r} has a weight out of range. {fix}")
        try:
            kind = store.read_config(folder).kind
        except BadInput as error:
            problems += error.problems
            continue
        if not algebra.is_low_rank(kind):
            why = f"{' and '.join(kind.fields)}: such adapters do not add up"
            problems.append(f"wrong --combine in {Path(folder) / store.CONFIG}: {why}. Merge it, then use --extract")
    if problems:
        raise BadInput(*problems)
    return terms


def combine(args) -> int:
    """Write Σ weight · adapter as one adapter, exactly or cut to a lower rank."""
    out = files.behind_link(args.out)
    terms = read_terms(args.combine)
    adapters = [folder for folder, _ in terms]
    with output_place(out, args, [Path(folder) for folder in adapters]):
        base = find_base(args.model, None, adapters, args.no_verify)
        say(f"model    {base.described}")

        # ---- on `meta` the base has no memory; only the adapters' tensors are real
        model, parts = pretrained.empty_model(base), []
        for folder, weight in terms:
            layers = dry_load(model, folder, base, not args.no_verify, torch.float64)
            parts.append((weight, {path: algebra.folded(layer) for path, layer in layers.items()}))
            ranks = described({path: layer.rank for path, layer in layers.items()})
            say(f"adapter  {weight:g} × {folder}, {ranks}")
            if passport.read(folder) is None:
                say(f"warning: {folder} has no passport; it is taken for an adapter of {base.name}")
        maps = algebra.combine(parts)
        if args.rank is not None or args.energy is not None:
            bar = tqdm(maps.items(), desc="cutting", unit="linear", leave=False, disable=None)
            maps = tell_cut({p: algebra.cut(algebra.svd_of_product(A, B), args.rank, args.energy) for p, (A, B) in bar})
        value_head.place(model, shared_head(adapters, model))
        chat, template = shared_chat(adapters)
        return write(model, maps, out, args.overwrite, base, chat, template)


def shared_head(adapters: Sequence[str], model) -> value_head.ValueHead | None:
    """The one value head that the adapters bring. Raises BadInput where they bring several."""
    heads = {adapter: head for adapter in adapters if (head := value_head.read(adapter, model))}
    if not heads:
        return None
    first, *others = heads.values()
    if any(not torch.equal(a, b) for one in others for a, b in zip(one.parameters(), first.parameters(), strict=True)):
        fix = "Combine one of them with adapters that have none"
        raise BadInput(f"different value heads in {' and '.join(heads)}: they do not add up. {fix}")
    say(f"head     the value head of {next(iter(heads))} goes along")
    return first


def shared_chat(adapters: Sequence[str]) -> tuple[dict, bytes | None]:
    """Chat (system turn, date) and template that all adapters were trained with; a warning where they differ."""
    chats = [(passport.read(adapter) or {}).get("chat") or {} for adapter in adapters]
    found = [passport.template_of(adapter) for adapter in adapters]
    templates = [path and files.read_template(path).encode() for path in found]
    for values, what, flag in ((chats, "system turns or dates", "--system"), (templates, "templates", "--template")):
        if any(value != values[0] for value in values):
            say(f"warning: the adapters were trained with different {what}; none is kept, give {flag} where it is used")
    same = [values[0] if all(value == values[0] for value in values) else None for values in (chats, templates)]
    return same[0] or {}, same[1]


# ---- --extract -------------------------------------------------------------------------------------------------------


def extract(args) -> int:
    """Write the difference of two models as an adapter, Linear by Linear: never two models in memory."""
    out = files.behind_link(args.out)
    base, tuned = map(pretrained.find, args.extract)
    with output_place(out, args, [source.path for source in (base, tuned) if hasattr(source, "path")]):
        say(f"base     {base.described}\ntuned    {tuned.described}")
        model = pretrained.empty_model(base)
        names, others = shared_names(model, pretrained.empty_model(tuned), base, tuned)
        paths, cuts, resized = {f"{path}.weight": path for path in linears(model)}, {}, bool(others)
        for name in tqdm(names, desc="extracting", unit="tensor", leave=False, disable=None):
            W, W_tuned = base.read(name, base.widest), tuned.read(name, tuned.widest)
            wide = torch.promote_types(W.dtype, W_tuned.dtype)
            if torch.equal(W.to(wide), W_tuned.to(wide)):
                continue
            if name not in paths:
                others.append(name)
                continue
            delta = W_tuned.double() - W.double()  # (out, in)
            if not torch.isfinite(delta).all():
                raise BadInput(f"wrong tensor in {tuned.name}:{name}: values that are not finite. Download it again")
            cuts[paths[name]] = algebra.cut(algebra.svd_of_matrix(delta), args.rank, args.energy)
        if not cuts:
            why = "their Linears are the same" + (f", only {listed(others)} differ" if others else "")
            raise BadInput(f"nothing to extract in {tuned.name}: {why}. Give the base and a model tuned from it")
        if others:
            say(f"warning: an adapter cannot hold what changed outside the Linears' weights: {listed(others)}")
            if resized:
                say("warning: tokens that only the tuned model knows mean nothing to the base with this adapter")
        template = None
        with suppress(BadInput):  # a base model has none
            template = pretrained.load_chat(tuned).template.source.encode()
        value_head.place(model, value_head.of_base(tuned, model))
        return write(model, tell_cut(cuts), out, args.overwrite, base, {}, template)


def shared_names(model, other, base, tuned) -> tuple[list[str], list[str]]:
    """The tensor names of two models, and with their sizes those of the vocabulary that have other rows, or that only
    one has. Raises BadInput where other names or shapes differ; warns of another config."""
    ours, theirs = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (model, other))
    differing = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    other_rows = {
        name: f"{name} ({theirs.get(name, [0])[0]} rows, the base has {ours.get(name, [0])[0]})"
        for name in differing
        if name in VOCABULARY and model.config.hidden_size == other.config.hidden_size
    }
    problems = [
        f"different models in {base.name} and {tuned.name}: {name} is {ours.get(name, 'missing')} and "
        f"{theirs.get(name, 'missing')}. Give a base and a model tuned from it"
        for name in differing
        if name not in other_rows
    ]
    if problems:
        raise BadInput(*problems)
    fields = [key for key, value in vars(model.config).items() if value != getattr(other.config, key)]
    if fields:
        say(f"warning: the models' configs differ in {', '.join(fields)}, which an adapter does not change")
    return [name for name in ours if name not in other_rows], list(other_rows.values())


# ---- both ------------------------------------------------------------------------------------------------------------


@contextmanager
def output_place(out: Path, args, sources: Sequence[Path]):
    """Inside the block `out` is this process's alone, free or replaceable, and apart from what is read."""
    folders.check_place(out)
    with folders.locked(out):
        folders.check_out(out, args.overwrite, FILES, ())
        folders.check_apart(out, sources)
        yield


def tell_cut(cuts: dict[str, algebra.Cut]) -> dict[str, algebra.Factors]:
    """Say what cutting lost; returns the maps that are left."""
    total, worst, most = algebra.share_lost(cuts)
    say(f"cut      {100 * total:.3g} % of ΔW is lost, as ‖ΔW - ΔW'‖ / ‖ΔW‖; most in {worst}, {100 * most:.3g} %")
    return {path: (c.A, c.B) for path, c in cuts.items()}


def described(ranks: dict[str, int]) -> str:
    least, most = min(ranks.values()), max(ranks.values())
    return f"{f'rank {least}' if least == most else f'ranks {least} to {most}'}, {len(ranks)} linears"


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def write(
    model, maps: dict[str, algebra.Factors], out: Path, overwrite: bool, base, chat: dict, template: bytes | None
) -> int:
    """Write the adapter's folder, as a training run would leave one."""
    algebra.patch(model, maps)
    layers = lora_layers(model)
    try:
        check_finite(layers)
    except NotFinite as error:
        why = f"{error.place} has values too large for float32. Use smaller weights"
        raise BadNumbers(f"not finite in {out}: {why}") from None
    papers = passport.make(base, layers, chat)
    with folders.new_folder(out, overwrite) as folder:
        if template is not None:
            files.write_bytes(folder / passport.TEMPLATE, template)
        store.save(model, folder, base.hub_id, papers, "CAUSAL_LM")
        card.write_adapter(folder, out.name, base, None)
    say(f"saved    {out}, {described({path: layer.rank for path, layer in layers.items()})}")
    return 0
