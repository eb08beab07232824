"""What a run trains, in two forms: an adapter, or every weight of the model."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from lora import files, pretrained
from lora.adapter import passport, store, value_head
from lora.adapter.inject import inject, lora_layers
from lora.errors import BadInput
from lora.export import card
from lora.methods import has_value_head
from lora.network.decoder import Model
from lora.pretrained import ModelFiles, ModelFolder, Spoken
from lora.run import adapter
from lora.run.plan import Plan
from lora.run.settings import TrainSettings


class Trainable(Protocol):
    """All that the loop, the checkpoints and the report know of what is trained."""

    kind: str  # "adapter" or "model", which is also the flag that opens the result
    described: str
    parameters: dict[str, nn.Parameter]  # what the optimizer steps, by name
    write_card: Callable[[Path, str, ModelFiles, card.Made], None]

    def sync_model(self) -> None:
        """What follows a step: the model computes with the new parameters."""

    def restore(self, folder: Path) -> None:
        """Take back what `write` left in a folder. Raises BadInput where it does not fit."""

    def write(self, folder: Path, step: int) -> None:
        """What was learned, as other programs read it."""

    def publish(self, source: Path, out: Path) -> None:
        """What `write` left in a checkpoint, into the run's own folder."""


def base_dtype(args: TrainSettings) -> torch.dtype:
    """The dtype in which the base is loaded: a weight that trains is kept in float32."""
    return torch.float32 if args.full else getattr(torch, args.dtype)


def make_trainable(model: Model, plan: Plan, args: TrainSettings, given: bool, writes: bool) -> Trainable:
    """Patch the model with an adapter, or let all of it train. Are the adapter's values `given`, by a checkpoint or
    another adapter? Does this process write?"""
    if not has_value_head(args.method):
        value_head.place(model, None)  # of a base that scores: it would not train
    if args.full:
        return AllWeights(model, getattr(torch, args.dtype), plan.base, Spoken.of(plan.chat))
    inject(model, **adapter.arguments(args, given))
    if has_value_head(args.method):
        head = value_head.of(model) or value_head.add(model, model.config.hidden_size)
        head.requires_grad_()
    papers = _papers(model, plan, args) if writes else {}
    return Adapter(model, plan.base, plan.chat.template.source, papers, f"rank {args.rank}")


def _papers(model: Model, plan: Plan, args: TrainSettings) -> dict:
    """The passport of the adapter, but for its step."""
    base, spoken = plan.base, {"system": False if args.no_system else args.system, "date": args.date}
    if args.template_arg:
        spoken["template_args"] = plan.chat.template.arguments
    if args.control_tokens:
        spoken["control_tokens"] = True
    learned = {**args.decisive(), "steps": plan.total}
    marks = passport.fingerprints(plan.chat.tokenizer, plan.chat.template.source, plan.data_fingerprint, learned)
    marks |= {"method": args.method} if args.method == "ppo" else {}
    return passport.make(base, lora_layers(model), spoken, **marks)


@dataclass
class Adapter:
    """The adapter of a patched model, which computes with the parameters themselves."""

    model: nn.Module
    base: ModelFiles
    template: str
    papers: dict = field(default_factory=dict)
    described: str = ""
    kind = "adapter"
    write_card = staticmethod(card.write_adapter)

    def __post_init__(self):
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def sync_model(self) -> None:
        pass

    def restore(self, folder: Path) -> None:
        store.restore(self.model, folder)

    def write(self, folder: Path, step: int) -> None:
        files.write_bytes(folder / passport.TEMPLATE, self.template.encode())
        store.save(self.model, folder, self.base.hub_id, self.papers | {"step": step}, "CAUSAL_LM")

    def publish(self, source: Path, out: Path) -> None:
        for name in filter(lambda name: (source / name).exists(), passport.ADAPTER):
            files.write_bytes(out / name, files.read_bytes(source / name, limit=2**40))


class AllWeights:
    """Every weight of a model, `parameters` in the model's own dtype; the model itself is converted to `dtype`.

    AdamW steps the weights in float32 (the masters); the model computes with the same weights rounded to --dtype. An
    update of less than a 512th of a bf16 weight would be rounded away if it were added to that weight, and most updates
    are smaller (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740, section 3.1). With --dtype float32 a weight
    is its own master, so there is one way for both. As soon as a backward pass has the whole gradient of a weight, its
    master takes it: micro-batches add up in float32, and there is never a second set of gradients.
    """

    kind, described = "model", "every weight"
    write_card = staticmethod(card.write_full)

    def __init__(self, model: nn.Module, dtype: torch.dtype, base: ModelFiles | None = None, spoken=None):
        self.base, self.spoken, self.dtype = base, spoken, dtype
        weights = dict(model.requires_grad_().named_parameters())
        self.parameters, self.rounded = weights, []
        if any(weight.dtype != dtype for weight in weights.values()):
            self.parameters = {name: nn.Parameter(weight.detach()) for name, weight in weights.items()}
            model.to(dtype)  # which gives each weight other memory: its master keeps what there was
            self.rounded = [(weight, self.parameters[name]) for name, weight in weights.items()]
        for weight, master in self.rounded:
            weight.register_post_accumulate_grad_hook(_taken_by(master))

    @torch.no_grad()
    def sync_model(self) -> None:
        """Round the masters to the weights that the model computes with."""
        for weight, master in self.rounded:
            weight.copy_(master)

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        found, shapes = ModelFolder(folder), {name: p.shape for name, p in self.parameters.items()}
        if {name: shape for name, (_, shape) in found.header.items()} != shapes:
            raise BadInput(f"wrong model in {folder}: its tensors are not those of this run. Give another one")
        for name, master in self.parameters.items():
            master.copy_(found.read(name))
        self.sync_model()

    def write(self, folder: Path, step: int) -> None:
        """A plain model folder in float32, with the chat template and the end of turn that were trained."""
        pretrained.write_model(self.base, folder, lambda name, _: self.parameters[name], torch.float32, self.spoken)

    def publish(self, source: Path, out: Path) -> None:
        """The weights rounded to --dtype: what was evaluated. The config comes last, and goes first: what is half
        written has none, and is not taken for a model."""
        (out / "config.json").unlink(missing_ok=True)
        files.sync(out)
        pretrained.write_model(ModelFolder(source), out, lambda _, tensor: tensor, self.dtype)


def _taken_by(master: nn.Parameter):
    def take(weight: nn.Parameter) -> None:
        gradient = weight.grad.to(master.dtype)
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        weight.grad = None

    return take


def make_optimizer(parameters: dict[str, nn.Parameter], args, device: torch.device) -> torch.optim.Optimizer:
    """AdamW. With --lr-ratio-b every lora_B is in a group that learns so many times as fast: LoRA+, Hayou et al. 2024,
    https://arxiv.org/abs/2402.12354."""
    groups = [{"params": list(parameters.values())}]
    if args.lr_ratio_b not in (None, 1):
        Bs = {name for name in parameters if name.endswith(".lora_B")}
        groups = [
            {"params": [p for name, p in parameters.items() if name not in Bs]},
            {"params": [parameters[name] for name in parameters if name in Bs], "lr_ratio": args.lr_ratio_b},
        ]
    fused = device.type != "mps"
    return torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay, fused=fused)
