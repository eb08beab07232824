"""Base models on disk: hub folders, GGUF files, the default model; read strictly, written again."""

from lora.pretrained.chat import load_chat
from lora.pretrained.folder import SIDECARS, WEIGHTS, ModelFiles, ModelFolder, shards
from lora.pretrained.load import empty_model, find, load_model, smallest
from lora.pretrained.spoken import Spoken
from lora.pretrained.write import write_model
from lora.pretrained.write_packed import write_packed

__all__ = [
    "SIDECARS", "WEIGHTS", "ModelFiles", "ModelFolder", "Spoken", "empty_model", "find", "load_chat",
    "load_model", "shards", "smallest", "write_model", "write_packed",
]  # fmt: skip
