"""A value head: a number for a position, from its hidden state. It lies beside the adapter, as LLaMA-Factory writes it.

    value_head.safetensors    v_head.summary.weight (1, D)    v_head.summary.bias (1,)

It is zero at the start, so that every score is 0 and the first loss of a reward model is ln 2 exactly.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from lora import files
from lora.errors import BadInput

FILE = "value_head.safetensors"
PICKLED = "value_head.bin"


class ValueHead(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.summary = nn.Linear(width, 1, dtype=torch.float32)
        nn.init.zeros_(self.summary.weight)
        nn.init.zeros_(self.summary.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (N, D) -> values (N,), in float32 or wider"""
        return self.summary(hidden.to(self.summary.weight.dtype))[:, 0]


def add(model: nn.Module, width: int) -> ValueHead:
    """Give a patched model a value head that trains, as `model.v_head`."""
    model.v_head = ValueHead(width).to(next(model.parameters()).device)
    return model.v_head


def save(model: nn.Module, folder: Path) -> None:
    """Write the model's value head into `folder`, if it has one."""
    if head := getattr(model, "v_head", None):
        tensors = {f"v_head.{name}": tensor.detach() for name, tensor in head.state_dict().items()}
        files.write_tensors(Path(folder) / FILE, tensors, metadata={"format": "pt"})


def load(model: nn.Module, folder: Path) -> bool:
    """Give the model the value head in `folder`, if there is one: True. Raises BadInput where it does not fit."""
    if not has(folder):
        return False
    found = read(folder)
    weight = found["summary.weight"]
    width = getattr(getattr(model, "config", None), "hidden_size", weight.shape[1])
    if weight.shape[1] != width:
        why = f"it reads {weight.shape[1]} numbers, this model's hidden states have {width}"
        raise BadInput(f"wrong value head in {Path(folder) / FILE}: {why}. Give the base it was trained on")
    head = getattr(model, "v_head", None) or add(model, width)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.copy_(found[name])
    return True


def has(folder: Path) -> bool:
    """Is there a value head in `folder`? Raises BadInput for one in pickled form."""
    if (Path(folder) / FILE).exists():
        return True
    if (Path(folder) / PICKLED).exists():
        why = "a pickle may run code, so none is opened here"
        raise BadInput(f"unsupported value head in {Path(folder) / PICKLED}: {why}. Save its tensors as {FILE}")
    return False


def read(folder: Path) -> dict[str, Tensor]:
    """summary.weight (1, D) and summary.bias (1,), in float32. Raises BadInput."""
    file, problems = files.Safetensors(Path(folder) / FILE), []
    wanted = {"v_head.summary.weight", "v_head.summary.bias"}
    fix = "Train the reward model again"
    for name in sorted(wanted | file.header.keys()):
        if name not in file.header or name not in wanted:
            what = "missing" if name in wanted else "extra"
            problems.append(f"{what} tensor in {file.path}:{name}: {' and '.join(sorted(wanted))} are expected. {fix}")
    if problems:
        raise BadInput(*problems)
    found = {name.removeprefix("v_head."): file.read(name).float() for name in wanted}
    if found["summary.weight"].dim() != 2 or len(found["summary.weight"]) != 1 or found["summary.bias"].shape != (1,):
        shapes = ", ".join(str(tuple(found[name].shape)) for name in sorted(found))
        problems.append(f"wrong tensor in {file.path}: shapes {shapes}, expected (1,) and (1, width). {fix}")
    if not all(torch.isfinite(tensor).all() for tensor in found.values()):
        problems.append(f"wrong tensor in {file.path}: values that are not finite. {fix}")
    if problems:
        raise BadInput(*problems)
    return found
