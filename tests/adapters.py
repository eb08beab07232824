"""Adapters with random weights on the tiny model on disk, made without training."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from lora import pretrained
from lora.adapter import inject, passport, store
from lora.adapter.layer import LoRALinear
from lora.adapter.targets import find_targets
from tests import cli
from tests.helpers import randomise_adapter


def write_adapter(
    folder: Path,
    seed: int = 1,
    rank: int = 4,
    alpha: float = 6,
    kind: type[LoRALinear] = LoRALinear,
    targets=("all",),
    system: str | bool | None = None,
    template: str = cli.CHATML,
    model: Path | None = None,
    quant: str | None = None,
) -> Path:
    """A folder as a training run leaves one, ΔW being 10 % of W or more."""
    base = pretrained.find(str(model or cli.model_folder()), quant)
    net = pretrained.load_model(base)
    paths = find_targets(net, targets)
    inject.patch(net, {path: kind(net.get_submodule(path), rank, alpha) for path in paths})
    randomise_adapter(net, seed)
    chat = {"system": system, "date": "2025-01-01"}
    papers = passport.make(base, paths, chat)
    store.save(net, folder, base.hub_id, papers, "CAUSAL_LM")
    (folder / passport.TEMPLATE).write_text(template)
    return folder


def deltas(folder: Path, model: Path | None = None) -> dict:
    """path -> ΔW of an adapter on disk, float64, from its tensors and config alone."""
    net = pretrained.empty_model(pretrained.find(str(model or cli.model_folder())))
    store.load(net, folder)
    found = {}
    for path, layer in inject.lora_layers(net).items():
        scaling = layer.alpha / layer.rank ** (0.5 if "use_rslora" in layer.fields else 1)
        found[path] = scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    return found


def write_head(folder: Path, seed: int = 1, width: int = cli.SIZES["hidden_size"]) -> Path:
    """A value head with random weights beside an adapter or a model; scores differ by about 1."""
    random = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(1, width, generator=random) / width**0.5, torch.randn(1, generator=random)
    head = {"v_head.summary.weight": weight, "v_head.summary.bias": bias}
    save_file(head, folder / "value_head.safetensors", {"format": "pt"})
    return folder
