"""What an adapter adds to the weights of a base: the one it was trained on, or another one (`merge.py --onto`).

    dq(W) + ΔW      on the numbers that the packed base stood for: what was trained, rounded once
    W16 + ΔW        on the 16-bit original: what most tools write; off by W16 - dq(W), which ΔW was not fitted to

ΔW is formed on the base of the training. DoRA's m holds lengths of that one's rows: on others, even an adapter that
learned nothing would add something.
"""

from collections.abc import Callable, Mapping

import torch
from tqdm import tqdm

from lora import ops
from lora.adapter.layer import LoRALinear
from lora.adapter.merge import merged_weight
from lora.errors import BadInput, BadNumbers, say
from lora.network.config import ModelConfig
from lora.pretrained import ModelFiles, empty_model, find


def find_onto(name: str, base: ModelFiles) -> ModelFiles:
    """The model by this name. Raises BadInput where its tensors have other names or shapes than those of `base`."""
    onto = find(name)
    ours, theirs = ({n: tuple(t.shape) for n, t in empty_model(one).state_dict().items()} for one in (base, onto))
    if differing := [n for n in sorted(ours.keys() | theirs.keys()) if ours.get(n) != theirs.get(n)]:
        first = differing[0]
        why = f"{first} is {theirs.get(first, 'missing')}, in {base.name} it is {ours.get(first, 'missing')}"
        raise BadInput(f"wrong --onto in {onto.name}: {why}. Give the model that the base was made from")
    configs = (vars(ModelConfig.from_json(one.config, one.name)) for one in (base, onto))
    if fields := [key for (key, value), other in zip(*map(dict.items, configs), strict=True) if (key, value) != other]:
        say(f"warning: {onto.name} differs from {base.name} in {', '.join(fields)}, which the receipt does not see")
    return onto


def is_low_rank(layer: LoRALinear) -> bool:
    """Is its ΔW s B A, whatever W is?"""
    return type(layer).delta is LoRALinear.delta


def changer(
    layers: Mapping[str, LoRALinear], dtype: torch.dtype | None, bar: tqdm, trained_on: ModelFiles
) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """(name, tensor) -> what to write: W + ΔW for a target, rounded once to `dtype` or W's own; others as they are."""
    targets = {f"{path}.weight": layer for path, layer in layers.items()}

    @torch.no_grad()
    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        bar.update()
        if layer := targets.get(name):
            W = tensor if is_low_rank(layer) else trained_on.read(name, trained_on.widest)
            tensor = merged_weight(tensor, layer.delta(W), dtype)
        tensor = tensor.to(dtype or tensor.dtype)
        if not ops.is_finite(tensor):
            fix = "Use --dtype float32, or another adapter"
            raise BadNumbers(f"not finite in {name}: the merged weight does not fit {tensor.dtype}. {fix}")
        return tensor

    return change
