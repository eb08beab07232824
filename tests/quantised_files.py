"""Tiny models whose Linears are packed: a 16-bit folder, a GGUF file of it in Q4_1, and adapters of each packing."""

from contextlib import contextmanager
from pathlib import Path

from gguf import GGMLQuantizationType, LlamaFileType

from lora import pretrained
from lora.adapter.layer import LoRALinear
from lora.pretrained import gguf_write
from lora.pretrained.quantised import Quantised
from tests import cli
from tests.adapters import write_adapter

PACKINGS = ("nf4", "int8", "keep")


@contextmanager
def also_q4_1():
    """Inside the block our writer of GGUF files knows Q4_1 as well, and moves rows as ever."""
    gguf_write.TYPES["q4_1"] = GGMLQuantizationType.Q4_1, LlamaFileType.MOSTLY_Q4_1
    try:
        yield
    finally:
        del gguf_write.TYPES["q4_1"]


def write_models(folder: Path) -> None:
    """`model`, and `q4.gguf` of it; all rows are whole blocks."""
    model = cli.write_model(folder / "model", intermediate_size=64)
    with also_q4_1():
        gguf_write.write_model(pretrained.find(str(model)), folder / "q4.gguf", lambda _, t: t.float(), "q4_1")


def base_path(folder: Path, quant: str) -> Path:
    return folder / ("q4.gguf" if quant == "keep" else "model")


def write_packed_adapter(folder: Path, name: str, quant: str, seed: int = 1, kind=LoRALinear) -> Path:
    """An adapter of the models in `folder`, in `folder / name`."""
    return write_adapter(folder / name, seed, model=base_path(folder, quant), quant=quant, kind=kind)


def trained_on(folder: Path, quant: str) -> Quantised:
    return pretrained.find(str(base_path(folder, quant)), quant)
