"""The receipt of a merge: what writing W + ΔW changed, beside what the adapter changed.

The base with its adapter unmerged, packed as in the training, is compared with the model that was written, read back
from disk. Both compute in float32, so only the weights differ: by their rounding, and with --onto by W16 - dq(W).
KL(adapter || merged) is measured against KL(adapter || base), in nats per position, where position t predicts token
t + 1.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from tqdm import tqdm

from lora import files
from lora.adapter import passport, store, value_head
from lora.adapter.inject import disabled, lora_layers
from lora.adapter.merge import plain_linear, unload
from lora.adapter.targets import linears
from lora.data import formats
from lora.data.encode import encode
from lora.data.retention import SHIPPED
from lora.errors import BadEnvironment, BadNumbers, is_out_of_memory, out_of_memory
from lora.network.decoder import Model
from lora.pretrained import ModelFiles, load_model
from lora.pretrained.quantised import KEEP
from lora.quant.linear import QuantLinear
from lora.text.chat import Chat

FILE, FORMAT = "receipt.json", 1
POSITIONS = 512  # are compared, at most; the logits of all of them are kept
ROWS = 1024  # of a weight are compared at a time
TOLERANCE = 0.01  # of what the adapter changed may be lost by rounding
OF_ANOTHER_BASE = 1.0  # beyond it is no nearer to the adapted model than the base without its adapter is


class Difference(NamedTuple):
    """How far the predictions of two models are apart, over all positions; KL in nats, from the adapted model."""

    max_logit: float
    mean_kl: float
    max_kl: float
    same_top1: float  # share of positions where the likeliest token is the same


class Lost(NamedTuple):
    """What rounding lost of a layer's ΔW: ||W' - (W + ΔW)|| / ||ΔW|| for the written W', and the share of the non-zero
    elements of ΔW that left the rounded weight what it had been; ||ΔW||; and ||W16 - dq(W)|| where W16 is at hand."""

    rounding: float
    unchanged: float
    size: float
    packing: float | None

    def figures(self) -> dict[str, float]:
        found = {"rounding": self.rounding, "unchanged": self.unchanged}
        return found if self.packing is None else found | {"packing": _ratio(self.packing, self.size)}


class Receipt(NamedTuple):
    prompts: int
    positions: int
    merged: Difference
    base: Difference
    layers: dict[str, Lost]

    @property
    def share(self) -> float:
        """What merging changed, as a share of what the adapter changed."""
        return _ratio(self.merged.mean_kl, self.base.mean_kl)

    @property
    def packing(self) -> float | None:
        """||W16 - dq(W)|| / ||ΔW|| over all layers."""
        whole = [(lost.packing, lost.size) for lost in self.layers.values() if lost.packing is not None]
        return _ratio(*(sum(x**2 for x in its) ** 0.5 for its in zip(*whole, strict=True))) if whole else None


def _ratio(part: float, whole: float) -> float:
    """`part / whole`, where 0 of nothing is 0 and all else of it 1."""
    return part / whole if whole > 0 else float(part > 0)


def needed(model: Model) -> int:
    """The bytes that `measure` needs: one model in float32, the kept logits, and those of a long prompt twice."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    return 4 * (weights + 3 * POSITIONS * model.config.vocab_size)


def check_room(model: Model, free: int | None) -> None:
    """Raises BadEnvironment where `free` bytes are not enough."""
    if free is not None and free < needed(model):
        size, there = needed(model) / 1e9, free / 1e9
        why = f"the receipt needs about {size:.1f} GB, {there:.1f} GB are free"
        raise BadEnvironment(f"out of memory in this merge: {why}. Add --no-receipt, or use a larger machine")


def retention_prompts(chat: Chat, limit: int) -> list[list[int]]:
    """Ids of the ordinary conversations that ship with the project, cut where the model's positions end."""
    return [example.tokens[:limit] for example in encode(formats.read([SHIPPED]), chat, 2**24, "all")]


def first(prompts: Iterable[list[int]], most: int) -> Iterator[list[int]]:
    """Yield prompts up to `most` tokens in all, the last one cut."""
    for ids in prompts:
        if most > 0:
            yield ids[:most]
        most -= len(ids)


def make(
    base: ModelFiles,
    adapter: Path,
    written: ModelFiles,
    prompts: Iterable[list[int]],
    device,
    onto: ModelFiles | None = None,
    kept: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Receipt:
    """The receipt for `written`, merged from an adapter's folder and its `base`, or `onto` another one. Raises
    BadEnvironment without memory."""
    before = onto or (None if base.quant in (None, KEEP) else base.original)
    try:
        model = load_model(base, torch.float32, device)
        store.load(model, adapter, read=base.read)
        return measure(model, written, prompts, onto, before, kept)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, "Add --device cpu or --no-receipt") from error


@torch.no_grad()
def measure(
    model: Model,
    written: ModelFiles,
    prompts: Iterable[list[int]],
    onto: ModelFiles | None = None,
    before: ModelFiles | None = None,
    kept: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Receipt:
    """Compare `model`, a float32 base with its adapter unmerged, with the model `written` of the same structure.

    ΔW was added to the model's own W, or to those of `onto`; `before` has W16, what W was before it was packed.
    `kept(W)` is a float32 W as `written` holds it, by default in the dtype that it is read in.
    There is never a second model: at the end `model` is unloaded and holds the weights of `written`.
    """
    prompts, layers = list(first(prompts, POSITIONS)), lora_layers(model)
    with tqdm(total=3 * len(prompts) + len(layers), desc="receipt", leave=False, disable=None) as bar:

        def logits(ids: list[int]) -> torch.Tensor:
            bar.update()
            return model(torch.tensor(ids, device=model.device))  # (T, V)

        adapted = [logits(ids) for ids in prompts]
        with disabled(model):
            base = difference((kept, logits(ids)) for kept, ids in zip(adapted, prompts, strict=True))
        lost = {}
        for path, layer in layers.items():
            W, name = layer.base.weight, f"{path}.weight"
            W16 = before and before.read(name, torch.float32)
            start = onto.read(name, torch.float32) if onto else W
            lost[path] = compare(W, layer.delta(W), written.read(name, written.widest), start, W16, kept)
            bar.update()
        unload(model)
        value_head.place(model, None)
        for path, packed in linears(model).items():
            if isinstance(packed, QuantLinear):
                empty = torch.empty(packed.out_features, packed.in_features, device=model.device)
                model.set_submodule(path, plain_linear(packed, empty))
        for name, tensor in model.state_dict().items():
            tensor.copy_(written.read(name, written.widest))
        merged = difference((kept, logits(ids)) for kept, ids in zip(adapted, prompts, strict=True))
    return Receipt(len(prompts), sum(map(len, prompts)), merged, base, lost)


def difference(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Difference:
    """The difference of logits (T, V) and (T, V), over all pairs; in float64, as KL is a small difference of large
    numbers."""
    logit, kl, same = [], [], []
    for pair in pairs:
        one, other = (logits.cpu().double() for logits in pair)  # MPS has no float64
        logit.append((one - other).abs().max())
        log_p, log_q = one.log_softmax(-1), other.log_softmax(-1)
        kl.append(F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))  # (T,)
        same.append(one.argmax(-1) == other.argmax(-1))
    kl, same = torch.cat(kl), torch.cat(same)
    worst = torch.stack(logit).max().item()
    return Difference(worst, kl.mean().item(), kl.max().item(), same.double().mean().item())


def compare(W, delta, written, start, W16=None, kept=None) -> Lost:
    """What the written weight lost of a layer's ΔW, which was added to `start`, in float64. All are (out, in)."""
    error = size = packing = 0.0
    unchanged = moved = 0
    every = (W, delta, written, start, W if W16 is None else W16)
    for dq, D, after, W, full in zip(*(t.cpu().split(ROWS) for t in every), strict=True):
        error += (after.double() - (W.double() + D.double())).square().sum().item()
        size += D.double().square().sum().item()
        packing += (full.double() - dq.double()).square().sum().item()
        moved += D.count_nonzero().item()
        unchanged += ((D != 0) & (after == (kept(W) if kept else W.to(after.dtype)))).sum().item()
    lost = (error / size) ** 0.5 if size else 0.0
    return Lost(lost, unchanged / max(1, moved), size**0.5, None if W16 is None else packing**0.5)


def rows(found: Receipt) -> list[tuple[str, str]]:
    """The receipt as (what, value)."""
    by_loss = sorted(found.layers.items(), key=lambda item: item[1].rounding)
    (_, middle), (path, worst) = by_loss[len(by_loss) // 2], by_loss[-1]
    packing = []
    if found.packing is not None:
        by_layer = sorted(lost.figures()["packing"] for lost in found.layers.values())
        packing.append(("‖W16 - dq(W)‖ / ‖ΔW‖, all layers", f"{found.packing:.3g}"))
        packing.append(("‖W16 - dq(W)‖ / ‖ΔW‖, median layer", f"{by_layer[len(by_layer) // 2]:.3g}"))
    return [
        ("compared", f"{found.prompts} prompts, {found.positions:,} positions"),
        ("largest difference of a logit", f"{found.merged.max_logit:.4f}"),
        ("mean KL from adapter to merged model", f"{found.merged.mean_kl:.2e} nats"),
        ("largest KL", f"{found.merged.max_kl:.2e} nats"),
        ("mean KL from adapter to base", f"{found.base.mean_kl:.2e} nats"),
        ("lost of what the adapter changed", f"{100 * found.share:.2g}%"),
        ("same likeliest token", f"{found.merged.same_top1:.2%}"),
        ("ΔW lost to rounding, median layer", f"{middle.rounding:.2%}"),
        ("ΔW lost to rounding, worst layer", f"{worst.rounding:.2%} in {path}"),
        ("elements of ΔW without effect, most in a layer", f"{max(lost.unchanged for _, lost in by_loss):.2%}"),
        *packing,
    ]


def table(rows: list[tuple[str, str]]) -> str:
    """The lines of `rows` for a terminal."""
    width = max(len(what) for what, _ in rows)
    return "\n".join(f"{what:{width}}  {value}" for what, value in rows)


def called(base: ModelFiles) -> str:
    """A model's name on the hub, or the last name of its path."""
    return Path(base.hub_id).name if Path(base.hub_id).is_absolute() else base.hub_id


def write(folder: Path, found: Receipt, tolerance: float, base: ModelFiles, onto: ModelFiles | None = None) -> None:
    """Write `receipt.json` into the folder of the merged model."""
    layers = {path: lost.figures() for path, lost in found.layers.items()}
    sides = {"merged": found.merged._asdict(), "base": found.base._asdict()}
    counts = {"format": FORMAT, "prompts": found.prompts, "positions": found.positions}
    shares = {"share": found.share, "tolerance": tolerance}
    if found.packing is not None:
        shares["packing"] = found.packing
    places = {"trained_on": called(base), "quant": base.quant, "onto": onto and called(onto)}
    files.write_json(Path(folder) / FILE, counts | places | sides | shares | {"layers": layers})


def check(
    found: Receipt,
    tolerance: float,
    out: Path,
    adapter: Path,
    kind: str | None = None,
    onto: ModelFiles | None = None,
) -> None:
    """Raises BadNumbers where merging changed more than the share `tolerance` of what the adapter changed; warns where
    the adapter changed nothing."""
    if found.base.max_logit == 0:
        passport.warn_unchanged(adapter)
    if not found.share <= tolerance:  # nor is NaN within it
        why = f"{found.share:.1%} of what the adapter changed is lost, over --tolerance {tolerance:g}; nothing is kept"
        fix = "Leave out --onto" if onto else "Give --gguf-type f32" if kind else "Merge with --dtype float32"
        raise BadNumbers(f"merged model too far from the adapter in {out}: {why}. {fix}, or raise --tolerance")
