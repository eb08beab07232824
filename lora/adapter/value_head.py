"""A value head: a number for a position, from its hidden state. It lies beside the adapter, as LLaMA-Factory writes it.

    value_head.safetensors    v_head.summary.weight (1, D)    v_head.summary.bias (1,)

It is zero at the start, so that every score is 0 and the first loss of a reward model is ln 2 exactly. It is in float32
whatever the model is in, and goes wherever the adapter goes: `store` reads and writes it.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lora import files
from lora.errors import BadInput, Refused

FILE, PICKLED = "value_head.safetensors", "value_head.bin"
SHAPES = {"v_head.summary.bias": "(1,)", "v_head.summary.weight": "(1, width)"}


class Summary(nn.Linear):
    """A class of its own, so that no adapter takes it for a target."""


class ValueHead(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.summary = Summary(width, 1, dtype=torch.float32)
        nn.init.zeros_(self.summary.weight)
        nn.init.zeros_(self.summary.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (N, D) -> values (N,), in float32 or wider"""
        return self.summary(hidden.to(self.summary.weight.dtype))[:, 0]


def add(model: nn.Module, width: int) -> ValueHead:
    """Give a patched model a value head that trains, as `model.v_head`."""
    return place(model, ValueHead(width))


def of(model: nn.Module) -> ValueHead | None:
    return getattr(model, "v_head", None)


def place(model: nn.Module, head: ValueHead | None) -> ValueHead | None:
    """Let the model have this value head, or none."""
    if hasattr(model, "v_head"):
        del model.v_head
    if head is not None:
        device = next(model.parameters()).device
        model.v_head = head if device.type == "meta" else head.to(device)  # a base on meta: for merge.py
    return head


# ---- on disk ---------------------------------------------------------------------------------------------------------


def save(model: nn.Module, folder: Path) -> None:
    """Write the model's value head into `folder`, if it has one."""
    if head := of(model):
        tensors = {f"v_head.{name}": tensor.detach() for name, tensor in head.state_dict().items()}
        files.write_tensors(Path(folder) / FILE, tensors, metadata={"format": "pt"})


def has(folder: Path) -> bool:
    """Is there a value head in `folder`? Raises Refused for one in pickled form."""
    if (Path(folder) / FILE).exists():
        return True
    if (Path(folder) / PICKLED).exists():
        raise pickled(Path(folder) / PICKLED)
    return False


def pickled(where: object) -> Refused:
    fix = f"Where you trust it: safetensors.torch.save_file(torch.load('{PICKLED}'), '{FILE}')"
    return Refused(f"pickle in {where}: pickled weights are never opened. {fix}")


def read(folder: Path, model: nn.Module | None = None) -> ValueHead | None:
    """The value head in `folder`; None where there is none. Raises BadInput for one that is broken, or that does not
    fit the `model`."""
    if not has(folder):
        return None
    file = files.Safetensors(Path(folder) / FILE)
    return _checked(str(file.path), file.header, file.read, model)


def of_base(base, model: nn.Module) -> ValueHead | None:
    """The value head of a whole model: beside its weights or, as TRL wrote it, among them."""
    if base.header.keys() >= SHAPES.keys():
        header = {name: base.header[name] for name in SHAPES}
        return _checked(base.name, header, base.read, model)
    return read(base.path, model) if hasattr(base, "path") else None


def restore(model: nn.Module, folder: Path) -> None:
    """Write the value head in `folder` into the model's, if both are there. Raises BadInput."""
    head = of(model) and read(folder, model)
    if head:
        of(model).load_state_dict(head.state_dict())


def _checked(where: str, header: dict, read: Callable[[str], Tensor], model: nn.Module | None) -> ValueHead:
    """Raises BadInput with all that is wrong with the tensors, of which nothing is believed."""
    problems, width = [], getattr(getattr(model, "config", None), "hidden_size", None)
    for name in sorted(header.keys() | SHAPES.keys()):
        dtype, shape = header.get(name, (None, ()))
        right = len(shape) == 2 and shape[0] == 1 and shape[1] > 0 if name.endswith("weight") else shape == (1,)
        if dtype is None:
            problems.append(f"missing tensor in {where}:{name}: a value head has it. Train the reward model again")
        elif name not in SHAPES:
            names = " and ".join(SHAPES)
            problems.append(f"extra tensor in {where}:{name}: a value head has {names} alone. Leave it out")
        elif not right:
            why = f"shape {tuple(shape)}, expected {SHAPES[name]}"
            problems.append(f"wrong tensor in {where}:{name}: {why}. Give a value head that LLaMA-Factory would read")
        elif dtype not in files.DTYPES:
            problems.append(f"wrong tensor in {where}:{name}: dtype {dtype} is not supported. Save it as F32 or BF16")
        elif len(shape) == 2 and shape[1] != (width or shape[1]):
            why = f"it reads {shape[1]} numbers, this model's hidden states have {width}"
            problems.append(f"wrong tensor in {where}:{name}: {why}. Give the base it was trained on")
        elif not torch.isfinite(read(name).float()).all():
            problems.append(f"wrong tensor in {where}:{name}: values that are not finite. Train the reward model again")
    if problems:
        raise BadInput(*problems)
    tensors = {name.removeprefix("v_head."): read(name) for name in SHAPES}
    head = ValueHead(tensors["summary.weight"].shape[1])
    head.load_state_dict(tensors)  # in float32
    return head.requires_grad_(False)
