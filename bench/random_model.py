"""Models of well-known shapes with random weights that exist nowhere: a tensor's rows are made when they are read."""

import zlib

import torch

from lora.network.config import ModelConfig
from lora.network.decoder import Model

POOL = 2**22 + 1  # random numbers, of which every tensor takes some after others


def shape(model_type: str, layers: int, hidden: int, inner: int, heads: int, kv: int, vocab: int, **more) -> dict:
    """A raw config.json."""
    return {
        "model_type": model_type, "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768, "tie_word_embeddings": False, "hidden_act": "silu", **more,
    }  # fmt: skip


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
SHAPES = {
    "Qwen2.5-1.5B": shape("qwen2", 28, 1536, 8960, 12, 2, 151_936, rope_theta=1e6, tie_word_embeddings=True),
    "Qwen2.5-7B": shape("qwen2", 28, 3584, 18_944, 28, 4, 152_064, rope_theta=1e6),
    "Llama-3.1-8B": shape("llama", 32, 4096, 14_336, 32, 8, 128_256, rope_theta=5e5, rope_scaling=LLAMA3),
    "tiny": shape("qwen2", 2, 64, 192, 4, 2, 512, rope_theta=1e6),
}


class RandomFiles:
    """The `ModelFiles` of a config, weights N(0, 0.02²) in bfloat16, the same whenever the same rows are read."""

    widest = quant = None
    name = hub_id = described = "random"

    def __init__(self, config: dict):
        self.config, self.original = config, self
        with torch.device("meta"):
            empty = Model(ModelConfig.from_json(config)).state_dict()
        self.header = {name: ("BF16", tuple(tensor.shape)) for name, tensor in empty.items()}
        self.pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.read_rows(name, 0, self.header[name][1][0], dtype)

    def read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        shape = (stop - start, *self.header[name][1][1:])
        if "norm" in name:
            return torch.ones(shape, dtype=dtype or torch.bfloat16)
        rows = torch.empty(shape, dtype=torch.bfloat16)
        numbers = self.pool.roll(zlib.crc32(f"{name}:{start}".encode()) % POOL)
        for part in rows.view(-1).split(POOL):
            part.copy_(numbers[: len(part)])
        return rows.to(dtype or rows.dtype)

    def files(self) -> dict[str, bytes]:
        return {}

    def block_type(self, name: str) -> None:
        return None

    packed = nbytes = block_type
