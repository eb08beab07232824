"""The family: one class per variant of LoRA, each with what its paper changes, and no more."""

from lora.adapter.layer import LoRALinear


class RsLoRALinear(LoRALinear):
    """s = alpha / √rank in place of alpha / rank, so that large ranks learn as fast as small ones.

    Kalajdzievski 2023, https://arxiv.org/abs/2312.03732
    """

    fields = ("use_rslora",)

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank**0.5


KINDS = (LoRALinear, RsLoRALinear)


def kind_of(config: dict) -> type[LoRALinear]:
    """The class that an `adapter_config.json` means by its fields."""
    meant = {name for kind in KINDS for name in kind.fields if config.get(name)}
    return next(kind for kind in KINDS if set(kind.fields) == meant)
