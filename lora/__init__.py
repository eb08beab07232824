"""LoRA fine-tuning of open language models, written from scratch in PyTorch.

The public names below are imported when they are first used, so that `lora.errors` is there before torch is.
"""

from importlib import import_module

PUBLIC = {
    "LoRALinear": "lora.adapter.layer",
    "RsLoRALinear": "lora.adapter.variants",
    "DoRALinear": "lora.adapter.variants",
    "PiSSALinear": "lora.adapter.variants",
    "inject": "lora.adapter.inject",
    "disabled": "lora.adapter.inject",
    "lora_layers": "lora.adapter.inject",
    "merge": "lora.adapter.merge",
    "unmerge": "lora.adapter.merge",
    "unload": "lora.adapter.merge",
    "save_adapter": "lora.adapter.store:save",
    "load_adapter": "lora.adapter.store:load",
    "load_model": "lora.pretrained:load_model",
    "generate": "lora.inference.generate",
    "open": "lora.inference.session:open_session",
    "LoraError": "lora.errors",
}
__all__ = sorted(PUBLIC)


def __getattr__(name: str):
    if name not in PUBLIC:
        raise AttributeError(f"module 'lora' has no attribute {name!r}")
    module, _, attribute = PUBLIC[name].partition(":")
    return getattr(import_module(module), attribute or name)


def __dir__() -> list[str]:
    return __all__
