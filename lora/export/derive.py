"""Adapters made of others, and of a full fine-tune: `merge.py --combine` and `--extract`."""

from collections.abc import Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm

from lora import files, folders, pretrained
from lora.adapter import algebra, passport, store
from lora.adapter.inject import linears, lora_layers
from lora.adapter.merge import NotFinite, check_finite
from lora.data.sources import numbered
from lora.errors import BadInput, BadNumbers, say
from lora.export import card
from lora.inference.several import common_base, dry_load

FILES = (*passport.ADAPTER, card.FILE)
COMMON = ("out", "overwrite", "rank", "energy")
BELONGS = {"combine": ("combine", "model", "no_verify", *COMMON), "extract": ("extract", *COMMON)}
MOST_NAMES = 5  # of tensors in one line
MOST_WEIGHT = 1e6


def way(s) -> str:
    """`adapter`, `combine` or `extract`. Raises BadInput for flags that contradict it or each other."""
    ways = [name for name in ("adapter", *BELONGS) if name in s.given]
    if len(ways) > 1:
        both = " and ".join(f"--{name}" for name in ways)
        raise BadInput(f"contradiction in the command line: {both}. Give one of them")
    [chosen] = ways or ["adapter"]
    foreign = s.given - {*BELONGS[chosen]} if chosen in BELONGS else s.given & {"rank", "energy"}
    problems = []
    for name in sorted(foreign):
        fix = "Leave it out" if chosen in BELONGS else "Add --combine or --extract, or leave it out"
        flag = "--" + name.replace("_", "-")
        problems.append(f"contradiction in the command line: {flag} is not for --{chosen}. {fix}")
    if s.rank is not None and s.energy is not None:
        problems.append("contradiction in the command line: --rank and --energy. Give one of them")
    if chosen in BELONGS and s.out is None:
        problems.append("missing --out in the command line: it says where to write. Add it")
    if s.extract and len(s.extract) != 2:
        problems.append(f"wrong --extract in the command line: {len(s.extract)} models. Give BASE TUNED")
    if s.extract and s.rank is None and s.energy is None:
        problems.append("missing --rank in the command line: the difference has full rank. Add --rank R or --energy E")
    if problems:
        raise BadInput(*problems)
    return chosen


# ---- --combine -------------------------------------------------------------------------------------------------------


def weighted(names: Sequence[str]) -> list[tuple[str, float]]:
    """`FOLDER:WEIGHT` or `FOLDER` as folder and weight. Raises BadInput for all that is wrong with them."""
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


def combine(s) -> int:
    """Σ weight · adapter as one adapter, exactly or cut to a lower rank."""
    out = Path(s.out)
    terms = weighted(s.combine)
    adapters = [folder for folder, _ in terms]
    with place(out, s, [Path(folder) for folder in adapters]):
        checkpoint = pretrained.find(s.model or common_base(adapters, s.no_verify))
        say(f"model    {checkpoint.described}")

        # ---- on `meta` the base has no memory; only the adapters' tensors are real
        model, parts = pretrained.empty_model(checkpoint), []
        for folder, weight in terms:
            layers = dry_load(model, folder, checkpoint, not s.no_verify, torch.float64)
            parts.append((weight, {path: algebra.folded(layer) for path, layer in layers.items()}))
            ranks = described({path: layer.rank for path, layer in layers.items()})
            say(f"adapter  {weight:g} × {folder}, {ranks}")
            if passport.read(folder) is None:
                say(f"warning: {folder} has no passport; it is taken for an adapter of {checkpoint.name}")
        maps = algebra.combine(parts)
        if s.rank is not None or s.energy is not None:
            bar = tqdm(maps.items(), desc="cutting", unit="linear", leave=False, disable=None)
            maps = told({p: algebra.cut(algebra.svd_of_product(A, B), s.rank, s.energy) for p, (A, B) in bar})
        chat, template = agreed(adapters)
        return write(model, maps, s, checkpoint, chat, template)


def agreed(adapters: Sequence[str]) -> tuple[dict, bytes | None]:
    """System turn, date and chat template that the adapters were trained with; what they do not share is left out."""
    chats = [(passport.read(adapter) or {}).get("chat") or {} for adapter in adapters]
    found = [passport.template_of(adapter) for adapter in adapters]
    templates = [path and files.read_bytes(path, pretrained.TEMPLATE_LIMIT) for path in found]
    for values, what, flag in ((chats, "system turns or dates", "--system"), (templates, "templates", "--template")):
        if any(value != values[0] for value in values):
            say(f"warning: the adapters were trained with different {what}; none is kept, give {flag} where it is used")
    same = [values[0] if all(value == values[0] for value in values) else None for values in (chats, templates)]
    return same[0] or {}, same[1]


# ---- --extract -------------------------------------------------------------------------------------------------------


def extract(s) -> int:
    """The difference of two models as an adapter, Linear by Linear: never two models in memory."""
    out = Path(s.out)
    base, tuned = map(pretrained.find, s.extract)
    with place(out, s, [source.path for source in (base, tuned) if hasattr(source, "path")]):
        say(f"base     {base.described}\ntuned    {tuned.described}")
        model = pretrained.empty_model(base)
        names = alike(model, pretrained.empty_model(tuned), base, tuned)
        paths, cuts, others = {f"{path}.weight": path for path in linears(model)}, {}, []
        for name in tqdm(names, desc="extracting", unit="tensor", leave=False, disable=None):
            W, W_tuned = base.read(name), tuned.read(name)
            wide = torch.promote_types(W.dtype, W_tuned.dtype)
            if torch.equal(W.to(wide), W_tuned.to(wide)):
                continue
            if name not in paths:
                others.append(name)
                continue
            delta = W_tuned.double() - W.double()  # (out, in)
            if not torch.isfinite(delta).all():
                raise BadInput(f"wrong tensor in {tuned.name}:{name}: values that are not finite. Download it again")
            cuts[paths[name]] = algebra.cut(algebra.svd_of_matrix(delta), s.rank, s.energy)
        if not cuts:
            why = "their Linears are the same" + (f", only {listed(others)} differ" if others else "")
            raise BadInput(f"nothing to extract in {tuned.name}: {why}. Give the base and a model tuned from it")
        if others:
            say(f"warning: an adapter cannot hold what changed outside the Linears' weights: {listed(others)}")
        template = None
        with suppress(BadInput):  # a base model has none
            template = pretrained.load_chat(tuned).template.source.encode()
        return write(model, told(cuts), s, base, {}, template)


def alike(model, other, base, tuned) -> list[str]:
    """The names of the tensors of two models. Raises BadInput where names or shapes differ; another config warns."""
    ours, theirs = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (model, other))
    problems = [
        f"different models in {base.name} and {tuned.name}: {name} is {ours.get(name, 'missing')} and "
        f"{theirs.get(name, 'missing')}. Give a base and a model tuned from it"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]
    if problems:
        raise BadInput(*problems)
    fields = [key for key, value in vars(model.config).items() if value != getattr(other.config, key)]
    if fields:
        say(f"warning: the models' configs differ in {', '.join(fields)}, which an adapter does not change")
    return list(ours)


# ---- both ------------------------------------------------------------------------------------------------------------


@contextmanager
def place(out: Path, s, sources: Sequence[Path]):
    """The name `out` is this process's, free or replaceable, and holds nothing that is read."""
    folders.check_place(out)
    with folders.locked(out):
        folders.check_out(out, s.overwrite, FILES, ())
        folders.check_apart(out, sources)
        yield


def told(cuts: dict[str, algebra.Cut]) -> dict[str, algebra.Factors]:
    """The maps that are left; a line says what is lost."""
    total, worst, most = algebra.share_lost(cuts)
    say(f"cut      {100 * total:.3g} % of ΔW is lost, as ‖ΔW - ΔW'‖ / ‖ΔW‖; most in {worst}, {100 * most:.3g} %")
    return {path: (c.A, c.B) for path, c in cuts.items()}


def described(ranks: dict[str, int]) -> str:
    least, most = min(ranks.values()), max(ranks.values())
    return f"{f'rank {least}' if least == most else f'ranks {least} to {most}'}, {len(ranks)} linears"


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def write(model, maps: dict[str, algebra.Factors], s, checkpoint, chat: dict, template: bytes | None) -> int:
    """The adapter's folder, as a training run would leave one."""
    algebra.patch(model, maps)
    layers = lora_layers(model)
    try:
        check_finite(layers)
    except NotFinite as error:
        why = f"{error.place} has values too large for float32. Use smaller weights"
        raise BadNumbers(f"not finite in {s.out}: {why}") from None
    papers = passport.make(checkpoint.name, checkpoint.header, checkpoint.read, layers, chat)
    with folders.new_folder(Path(s.out), s.overwrite) as folder:
        if template is not None:
            files.write_bytes(folder / passport.TEMPLATE, template)
        card.write_adapter(folder, Path(s.out).name, checkpoint, None)
        store.save(model, folder, checkpoint.hub_id, papers, "CAUSAL_LM")
    say(f"saved    {s.out}, {described({path: layer.rank for path, layer in layers.items()})}")
    return 0
