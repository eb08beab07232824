"""Full fine-tuning: every weight of the model trains, through the same loop as an adapter.

AdamW steps `masters`, all weights in float32; the model computes with the same weights rounded to --dtype. An update of
less than a 512th of a bf16 weight would be rounded away if it were added to that weight, and most updates are smaller
(Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740, section 3.1). With --dtype float32 a weight is its own
master, so there is one way for both. As soon as a backward pass has the whole gradient of a weight, its master takes
it: micro-batches add up in float32, and there is never a second set of gradients. What steps, clips and counts sees the
masters only; what evaluates and answers sees the model only.
"""

from pathlib import Path

import torch
from torch import nn

from lora import files, pretrained
from lora.adapter import passport
from lora.errors import BadInput
from lora.pretrained import ModelFiles, ModelFolder


class Masters:
    """The weights of a model in its own dtype, `by_name`, to be trained; the model itself is converted to `dtype`."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        weights = dict(model.requires_grad_().named_parameters())
        self.by_name, self.rounded = weights, []
        if any(weight.dtype != dtype for weight in weights.values()):
            self.by_name = {name: nn.Parameter(weight.detach()) for name, weight in weights.items()}
            model.to(dtype)  # which gives each weight other memory: its master keeps what there was
            self.rounded = [(weight, self.by_name[name]) for name, weight in weights.items()]
        for weight, master in self.rounded:
            weight.register_post_accumulate_grad_hook(_taken_by(master))

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on the model changes with every step of `optimizer`, which has the masters."""
        optimizer.register_step_post_hook(lambda *_: self.show())

    @torch.no_grad()
    def show(self) -> None:
        """Round the masters to the weights that the model computes with."""
        for weight, master in self.rounded:
            weight.copy_(master)

    @torch.no_grad()
    def restore(self, folder: Path) -> None:
        """Take the weights in the folder of a model of the same shape. Raises BadInput for another."""
        found = ModelFolder(folder)
        if {name: shape for name, (_, shape) in found.header.items()} != {n: p.shape for n, p in self.by_name.items()}:
            raise BadInput(f"wrong model in {folder}: its tensors are not those of this run. Give another one")
        for name, master in self.by_name.items():
            master.copy_(found.read(name))
        self.show()


def _taken_by(master: nn.Parameter):
    def take(weight: nn.Parameter) -> None:
        gradient = weight.grad.to(master.dtype)
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        weight.grad = None

    return take


def write(base: ModelFiles, folder: Path, masters: dict[str, torch.Tensor], template: str) -> None:
    """The masters as a plain model folder in float32, with the chat template that they were trained with."""
    pretrained.write_model(base, folder, lambda name, _: masters[name], torch.float32)
    files.write_bytes(folder / passport.TEMPLATE, template.encode())


def publish(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """The model that `write` left in `source`, rounded to `dtype`: what was evaluated. The config comes last, and goes
    first: what is half written has none, and is not taken for a model."""
    (folder / "config.json").unlink(missing_ok=True)
    files.sync(folder)
    pretrained.write_model(ModelFolder(source), folder, lambda _, tensor: tensor, dtype)
