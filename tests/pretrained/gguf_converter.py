"""A hub folder as the GGUF file that llama.cpp makes of it: the rules of its convert_hf_to_gguf.py (conversion/*.py) by
numpy and the gguf package alone, which also has the names of tensors.
"""

import json
import math
from functools import cache

import gguf
import numpy as np
import torch
from gguf import GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file

F32 = gguf.GGMLQuantizationType.F32
CALLED = {  # where the model_type is another
    "mistral": "llama", "baichuan": "llama", "ministral3": "mistral3", "qwen3_5_text": "qwen35",
    "gemma3_text": "gemma3",
    "granitemoehybrid": "granite", "olmo3": "olmo2", "hunyuan_v1_dense": "hunyuan-dense",
}  # fmt: skip
GATE_UP = {"gate_up_proj": ("gate_proj", "up_proj")}
FUSED = {"phi3": {"qkv_proj": ("q_proj", "k_proj", "v_proj"), **GATE_UP}, "glm4": GATE_UP}
PERMUTED = {"llama", "mistral3", "smollm3", "granite"}
PLAIN = {  # keys that hold a field as it is
    "attention.sliding_window": "sliding_window", "attention.sliding_window_pattern": "sliding_window_pattern",
    "rope.freq_base_swa": "rope_local_base_freq", "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping", "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling", "shortconv.l_cache": "conv_L_cache",
}  # fmt: skip
ONE_MORE = {"gemma2", "gemma3", "qwen35"}


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """`permute` of its LlamaModel."""
    split = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(weights.shape))


def tiled(values: np.ndarray, config: dict, size: int, axis: int = 0) -> np.ndarray:
    """`_reorder_v_heads`: value heads of one key head follow each other on the hub; here, those of one place do."""
    keys = config["linear_num_key_heads"]
    shape = values.shape
    split = (*shape[:axis], keys, config["linear_num_value_heads"] // keys, size, *shape[axis + 1 :])
    return np.ascontiguousarray(values.reshape(split).swapaxes(axis, axis + 1).reshape(shape))


def delta_net(name: str, values: np.ndarray, config: dict) -> tuple[str, np.ndarray]:
    """Of a layer with Gated DeltaNet."""
    before, size = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"], config["linear_value_head_dim"]
    if name.endswith("conv1d.weight"):
        values = values.squeeze()
    if ".in_proj_qkv." in name or ".conv1d." in name:
        values = np.concatenate([values[:before], tiled(values[before:], config, size)])
    elif ".in_proj_z." in name:
        values = tiled(values, config, size)
    elif ".out_proj." in name:
        values = tiled(values, config, size, axis=1)
    elif not name.endswith("norm.weight"):
        values = tiled(values, config, 1)
    if name.endswith(".A_log"):
        values = -torch.from_numpy(values).exp().numpy()
    return name.replace("dt_bias", "dt_proj.bias"), values


def as_on_the_hub(config: dict, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors with those that the family's files have as one put together."""
    for whole, parts in FUSED.get(config["model_type"], {}).items():
        for name in [name for name in state if f".{parts[0]}." in name]:
            names = [name.replace(parts[0], part) for part in parts]
            state = state | {name.replace(parts[0], whole): torch.cat([state[one] for one in names])}
            state = {one: tensor for one, tensor in state.items() if one not in names}
    return state


def arch_of(config: dict) -> str:
    return CALLED.get(config["model_type"], config["model_type"])


@cache
def names(arch: str, layers: int):
    """The package's own table."""
    return gguf.get_tensor_name_map(next(key for key, one in gguf.MODEL_ARCH_NAMES.items() if one == arch), layers)


def stored(name: str, tensor: torch.Tensor, config: dict) -> tuple[str, np.ndarray]:
    """The name of a tensor in the file, and its float32 values there."""
    arch, values = arch_of(config), tensor.float().numpy()
    part = name.split(".")[-2]
    if arch in PERMUTED and part in ("q_proj", "k_proj"):
        heads = "num_key_value_heads" if part == "k_proj" else "num_attention_heads"
        values = permuted(values, config[heads])
    if ".linear_attn." in name:
        name, values = delta_net(name, values, config)
    elif arch in ONE_MORE and name.endswith("norm.weight"):
        values = values + 1
    if name.endswith(".conv.conv.weight"):
        values = values.squeeze(1)
    name = name.replace("shared_mlp.output_linear", "mlp.down_proj").replace("shared_mlp.", "mlp.")
    return names(arch, config["num_hidden_layers"]).get_name(name, try_suffixes=(".weight", ".bias")), values


def llama3_divisors(factor, low=1.0, high=4.0, original=8192, theta=500000.0, dim=64):
    """`generate_extra_tensors` of its LlamaModel."""
    divisors = []
    for frequency in 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)):
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            divisors.append(1)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def rope(config: dict) -> tuple[dict, dict]:
    """Keys and tensors for RoPE."""
    given = (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    kind, keys, tensors = given.get("rope_type", "default"), {}, {}
    if kind in ("linear", "yarn"):
        keys = {"rope.scaling.type": kind, "rope.scaling.factor": float(given["factor"])}
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = given["original_max_position_embeddings"]
        for beta in "beta_fast", "beta_slow":
            keys |= {f"rope.scaling.yarn_{beta}": float(given[beta])} if beta in given else {}
    if config["model_type"] == "ministral3" and kind == "yarn":
        keys |= {"rope.scaling.yarn_log_multiplier": float(given["mscale_all_dim"]),
                 "attention.temperature_scale": float(given["llama_4_scaling_beta"])}  # fmt: skip
    if kind == "longrope":
        original = given["original_max_position_embeddings"]
        scale = config["max_position_embeddings"] / original
        attention = math.sqrt(1 + math.log(scale) / math.log(original))
        keys = {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": attention}
        for which in "long", "short":
            tensors[f"rope_factors_{which}.weight"] = np.array(given[f"{which}_factor"], np.float32)
    if kind == "llama3":
        low, high = given["low_freq_factor"], given["high_freq_factor"]
        dim, theta = (
            config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]),
            config["rope_theta"],
        )
        divisors = llama3_divisors(given["factor"], low, high, given["original_max_position_embeddings"], theta, dim)
        tensors = {"rope_freqs.weight": divisors}
    base, size = given.get("rope_theta", config.get("rope_theta")), config.get("head_dim", 8)
    keys["rope.freq_base"] = float(base * given.get("alpha", 1) ** (size / (size - 2)))
    return keys, tensors


def keys_of(config: dict) -> dict:
    size = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    partial = config.get("partial_rotary_factor", {"qwen3_5_text": 0.25, "glm4": 0.5}.get(config["model_type"], 1))
    keys = {
        "block_count": config["num_hidden_layers"], "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"], "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config.get("norm_eps", config["rms_norm_eps"]),
        "rope.dimension_count": int(size * partial),
    } | rope(config)[0]  # fmt: skip
    if "head_dim" in config:
        keys |= {"attention.key_length": size, "attention.value_length": size}
    for key, field in PLAIN.items():
        keys |= {key: config[field]} if config.get(field) else {}
    kinds, window = config.get("layer_types"), config.get("sliding_window")
    if config["model_type"] in ("olmo3", "exaone4") and window:
        kinds = kinds or ["sliding" if (i + 1) % 4 else "full" for i in range(config["num_hidden_layers"])]
        keys["attention.sliding_window_pattern"] = [kind.startswith("sliding") for kind in kinds]
    if "conv" in (kinds or ()):
        keys["attention.head_count_kv"] = [config["num_key_value_heads"] * (kind != "conv") for kind in kinds]
    if config["model_type"] == "granitemoehybrid":  # what it writes of layers that are not there
        keys |= {"expert_count": 0, "expert_used_count": 0, "ssm.conv_kernel": 4, "ssm.state_size": 8,
                 "attention.head_count_kv": [config["num_key_value_heads"]] * len(kinds)}  # fmt: skip
    if "linear_num_key_heads" in config:
        keys |= {
            "ssm.conv_kernel": config["linear_conv_kernel_dim"], "ssm.state_size": config["linear_key_head_dim"],
            "ssm.group_count": config["linear_num_key_heads"], "ssm.time_step_rank": config["linear_num_value_heads"],
            "ssm.inner_size": config["linear_value_head_dim"] * config["linear_num_value_heads"],
            "full_attention_interval": config["full_attention_interval"],
            "rope.dimension_sections": [11, 11, 10, 0],
        }  # fmt: skip
    return keys


def convert(folder, path, kind=F32, keys=(), tensors=()):
    """The file of a model folder, matrices of layers in `kind` where their rows are whole blocks; `keys` and `tensors`
    come on top."""
    config = json.loads((folder / "config.json").read_text())
    state = as_on_the_hub(config, load_file(folder / "model.safetensors"))
    found = dict(stored(name, tensor, config) for name, tensor in state.items()) | rope(config)[1] | dict(tensors)
    writer = GGUFWriter(path, arch_of(config))
    for key, value in (keys_of(config) | dict(keys)).items():
        key = f"{arch_of(config)}.{key}"
        adds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        adds[type(value)](key, value)
    for name, values in found.items():
        blocks = values.ndim == 2 and name.startswith("blk") and "conv" not in name
        its = kind if blocks and values.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else F32
        writer.add_tensor(name, quantize(np.ascontiguousarray(values), its), raw_dtype=its)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def values_of(path) -> dict[str, tuple]:
    """name -> (type, float32 values), by the package's reader."""
    return {
        tensor.name: (tensor.tensor_type, dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1]))
        for tensor in gguf.GGUFReader(path).tensors
    }
