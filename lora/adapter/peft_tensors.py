"""The tensors in an adapter's file, whichever program wrote it: their names as ours, and what lies beside the adapter.

base_model.model.<path>.lora_A.weight    as PEFT saves them, and we do
<path>.lora_A.default.weight             as a state_dict calls them: with the adapter's name, and with the names that
                                         wrappers give (WRAPPERS) in front, or none
...qkv_proj.lora_B.weight                of what this model holds as several Linears: each has the same A and its own
                                         rows of B, which is the same ΔW
<path>.weight, .base_layer.weight        whole tensors of the model, which PEFT saves beside an adapter on them; where
                                         they repeat the base's, nothing is lost without them
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from lora import files
from lora.adapter.layer import LoRALinear
from lora.adapter.targets import linears, path_endswith
from lora.errors import BadInput, Refused

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's wrapper round the model
WRAPPERS = re.compile(r"(?<![^.])(base_model\.model|module|_orig_mod|_(fsdp|checkpoint)_wrapped_module)\.")
COPIES = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.(weight|bias)$)")
HEAD = f"{PREFIX}lm_head.base_layer.weight"  # the base's own, which PEFT saves beside an adapter on it
SMALLEST = 2.0**-24  # of float16: programs round what is below it in more than one way
MERGE = "Merge it into its base with PEFT, or train without"

Read = Callable[[str], torch.Tensor]


def find_weights(folder: Path) -> Path:
    """The file with an adapter's tensors. Raises BadInput where there is none, Refused where it is a pickle."""
    folder, path = Path(folder), Path(folder) / WEIGHTS
    if path.exists():
        return path
    pickles = sorted(p for p in folder.glob("adapter*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npz"))
    if pickles:
        fix = "Convert it to safetensors: load it with PEFT where you trust it, and save_pretrained"
        raise Refused(f"pickle in {pickles[0]}: pickled weights are never opened. {fix}")
    raise BadInput(f"missing adapter in {path}: there is no such file. The adapter is incomplete; train it again")


def read_tensors(
    folder: Path, known: Iterable[str] | None = None, model: nn.Module | None = None, read: Read | None = None
) -> dict[str, torch.Tensor]:
    """Tensor name as `<path>.lora_A.weight` -> tensor. Raises BadInput, Refused for pickles.

    `known` are the names that end one; without them, those of a plain LoRA. With the `model` that they are for, names
    may be as other programs write them, and copies of the base's own tensors are compared with it, by `read` or as they
    are in the model, and left out.
    """
    ends = sorted(known or LoRALinear.shapes(1, 1, 1))
    file, problems, called, copies, tensors = files.Safetensors(find_weights(folder)), [], {}, {}, {}
    paths, state = set(), {}
    if model is not None:
        paths, state = {*linears(model), *(whole for whole, _ in fused(model))}, model.state_dict()
    for name, (dtype, _) in file.header.items():
        ours, copied = own_name(name, ends, paths), copy_of(name, model, state)
        if copied:
            copies[name] = copied
        elif model is None and name == HEAD:
            continue
        elif ours is None or (model is None and name != PREFIX + ours):
            problems.append(f"extra tensor in {file.path}:{name}: {extra(name, model)}")
        elif ours in called:
            problems.append(f"extra tensor in {file.path}:{name}: {ours} is there twice. Keep one adapter in a file")
        elif dtype not in files.DTYPES:
            fix = "Save it as F32 or BF16"
            problems.append(f"wrong tensor in {file.path}:{name}: dtype {dtype} is not supported. {fix}")
        else:
            called[ours] = name
    for ours, name in called.items() if not problems else ():
        tensors[ours] = file.read(name)
        if not torch.isfinite(tensors[ours]).all():
            problems.append(f"wrong tensor in {file.path}:{name}: values that are not finite. Train the adapter again")
    for name, copied in copies.items() if not problems else ():
        problems += _unlike(file, name, copied, state[copied], read)
    if problems:
        raise BadInput(*problems)
    return tensors if model is None else split(tensors, model)


def own_name(name: str, ends: Sequence[str], paths: set[str]) -> str | None:
    """The name of an adapter's tensor in the form `<path>.lora_A.weight`; None for other tensors. A path that is none
    of `paths` is taken without the names of wrappers."""
    for end in ends:
        kind = re.escape(end.removesuffix(".weight"))
        if found := re.fullmatch(rf"(.+)\.{kind}(\.(?!bias$)[^.]+)??(\.weight)?", name):
            path = found[1].removeprefix(PREFIX)
            return f"{path if path in paths or not paths else WRAPPERS.sub('', path)}.{end}"
    return None


def copy_of(name: str, model: nn.Module | None, state: dict[str, torch.Tensor]) -> str | None:
    """The tensor of the model that a tensor in a file is a copy of, by its name."""
    inner = COPIES.sub("", WRAPPERS.sub("", name))
    if inner == "lm_head.weight" and inner not in state and is_tied(model):
        inner = "model.embed_tokens.weight"
    return inner if inner in state else None


def is_tied(model: nn.Module | None) -> bool:
    """Does the model say that its head is its embedding?"""
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def extra(name: str, model: nn.Module | None) -> str:
    """Why a tensor of a file has no place here, and what to do."""
    if ".lora_embedding_" in name:
        return f"it adapts an embedding, which is not implemented. {MERGE}"
    if "lm_head" in name and is_tied(model):
        return f"this model's head is its embedding, which gets no adapter here. {MERGE}"
    if name.endswith(".bias"):
        return f"biases are never trained here. {MERGE}"
    if name.split(".")[-2:-1] in (["lora_A"], ["lora_B"]) or name.endswith("lora_magnitude_vector"):
        return "no target of this base. Give the right base"
    if name.endswith(".weight") and "lora_" not in name:
        return f"it is a whole layer, which this base has not. {MERGE}"
    return "it is no part of a plain LoRA. Convert it to one with PEFT"


def _unlike(file: files.Safetensors, name: str, copied: str, ours: torch.Tensor, read: Read | None) -> list[str]:
    """What is wrong with a copy of the base's own tensor: it is another one. Of a model on `meta` without `read`, only
    the shape is known."""
    shape, expected = file.header[name][1], tuple(ours.shape)
    ours = read(copied) if read else ours.detach()
    if shape == expected and (ours.is_meta or same_numbers(file.read(name), ours.cpu(), read is not None)):
        return []
    if name == HEAD:
        return [f"another head in {file.path}:{name}: not this base's. Give the base it was trained on"]
    what = "a bias, and biases are never trained here" if name.endswith(".bias") else "a tensor other than the base's"
    if shape[1:] == expected[1:] and shape != expected and len(shape) == 2:
        what = f"a whole tensor of {shape[0]} rows, the base has {expected[0]}: tokens were added to it"
    return [f"extra tensor in {file.path}:{name}: it brings {what}. {MERGE}"]


def same_numbers(kept: torch.Tensor, ours: torch.Tensor, exact: bool = False) -> bool:
    """Is `kept` what `ours` became by being rounded to its dtype, perhaps by way of another? Where `ours` need not be
    `exact`, it may be the rounded one."""

    def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
        return torch.equal(a, b) or (a.dtype == torch.float16 and bool((a - b).abs().max() <= SMALLEST))

    ways = dict.fromkeys((kept.dtype, torch.float16, torch.bfloat16))
    found = any(equal(ours.to(way).to(kept.dtype), kept) for way in ways)
    return found or (not exact and equal(kept.to(ours.dtype), ours))


# ---- what this model holds as several Linears ------------------------------------------------------------------------


def fused(model: nn.Module) -> list[tuple[str, list[str]]]:
    """Paths that other programs know as one Linear, each with its parts in this model, by the model's own config."""
    found = []
    for stem, parts in getattr(getattr(model, "config", None), "fused", ()):
        block = stem.split(".")[0]
        for path in linears(model):
            if path_endswith(path, f"{block}.{parts[0]}"):
                front = path.removesuffix(f"{block}.{parts[0]}")
                found.append((front + stem, [f"{front}{block}.{part}" for part in parts]))
    return found


def split(tensors: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors with those of every fused Linear in its parts: A for each of them, and the rows of what has `out`."""
    for whole, parts in fused(model):
        sizes = [model.get_submodule(part).out_features for part in parts]
        for name in [name for name in tensors if name.startswith(f"{whole}.")]:
            tensor, end = tensors[name], name.removeprefix(f"{whole}.")
            rows = [tensor] * len(parts)
            if not end.startswith("lora_A"):
                if len(tensor) != sum(sizes):
                    continue  # it is reported as one that fits nowhere
                rows = tensor.split(sizes)
            del tensors[name]
            tensors |= {f"{part}.{end}": its for part, its in zip(parts, rows, strict=True)}
    return tensors
