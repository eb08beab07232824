"""Base models on disk: hub folders, GGUF files, the default model; read strictly, written again."""

from lora.pretrained.folder import (
    SIDECARS,
    TEMPLATE_LIMIT,
    WEIGHTS,
    Checkpoint,
    ModelFolder,
    empty_model,
    find,
    load_chat,
    load_model,
    shards,
    write_model,
)

__all__ = [
    "SIDECARS", "TEMPLATE_LIMIT", "WEIGHTS", "Checkpoint", "ModelFolder", "empty_model", "find", "load_chat",
    "load_model", "shards", "write_model",
]  # fmt: skip
