"""The sizes of a model as keys of a GGUF file, and what llama.cpp computes otherwise than the hub, which is refused.

Conventions: llama.cpp's convert_hf_to_gguf.py, and `load_arch_hparams` in its src/models.
"""

from collections.abc import Iterator, Mapping

from lora.errors import BadInput
from lora.network.config import ModelConfig
from lora.network.families import ACTIVATIONS, FAMILIES
from lora.pretrained import gguf_names
from lora.pretrained.gguf_names import EXAONE_32B, GEMMA_27B, PATTERN, WINDOW, Architecture


def architecture(config: ModelConfig, where: str) -> tuple[str, Architecture]:
    """What GGUF calls a model's family, and how it holds it. Raises BadInput for what it cannot hold."""
    rows = gguf_names.ARCHITECTURES.items()
    arch, row = next(((arch, row) for arch, row in rows if config.model_type in row.written), (None, None))
    if row is None:
        known = ", ".join(kind for _, row in rows for kind in row.written)
        why = f"{config.model_type} as GGUF is not implemented, only {known}"
        fix = "Write a model folder and convert it with llama.cpp"
        raise BadInput(f"unsupported model in {where}: {why}. {fix}")
    for what in lacks(config, arch, row):
        refuse(where, arch, what)
    return arch, row


def lacks(config: ModelConfig, arch: str, row: Architecture) -> Iterator[str]:
    """What this model has and llama.cpp does not compute for the architecture."""
    family, layers, windows = FAMILIES[config.model_type], config.num_hidden_layers, any(config.windows)
    width, heads, size = config.hidden_size, config.num_attention_heads, config.head_dim
    if windows and not (row.windows and period(config)):
        yield "such sliding windows"
    if arch == "exaone4" and windows != (layers == EXAONE_32B):
        yield f"sliding windows, but has them in {EXAONE_32B} layers"
    if config.rope_local_theta != config.rope_theta and "rope_local_base_freq" not in family.reads:
        yield "RoPE of another base in sliding windows"
    if row.square and heads * size != width:
        yield f"{heads} heads of {size} beside {width} channels"
    if row.head is config.tie_word_embeddings:
        yield "head that is the embedding" if row.head else "head of its own"
    scalar = width / heads if family.query_pre_attn_scalar and layers in GEMMA_27B else size
    if config.query_pre_attn_scalar != scalar and not family.attention_multiplier:
        yield f"query_pre_attn_scalar {config.query_pre_attn_scalar:g}"
    for field in "attn_logit_softcapping", "final_logit_softcapping":
        if getattr(family, field) and not getattr(config, field):
            yield f"model without {field}"
    step, attending = family.no_rope_layer_interval, [i for i in range(layers) if config.mixers[i] == "attention"]
    turned = [i for i in attending if not step or (i + 1) % step]
    if windows and family.rope_in_windows_only:
        turned = [i for i in attending if config.windows[i]]
    if turned != [i for i in attending if config.ropes[i]]:
        yield "RoPE in such layers only"
    if config.activation != ACTIVATIONS[family.activation[1]]:
        yield f"activation {config.activation}"
    if config.delta and config.delta.key_dim != config.delta.value_dim:
        yield "keys and values of different sizes"


def refuse(where: str, arch: str, what: str) -> None:
    raise BadInput(f"unsupported model in {where}: {arch} in llama.cpp has no {what}. Write a model folder")


def sizes(config: ModelConfig, raw: Mapping, row: Architecture) -> dict[str, int | float | list]:
    """Keys under the architecture's name, but for how RoPE is scaled."""
    values = {
        "vocab_size": config.vocab_size, "block_count": config.num_hidden_layers,
        "context_length": raw.get("max_position_embeddings") or config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size, "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.rotary_dim, "rope.freq_base": config.rope_theta,
    }  # fmt: skip
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        values |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    family = FAMILIES[config.model_type]
    if any(config.windows) or (row.windows and family.query_pre_attn_scalar):
        window = max(filter(None, config.windows), default=1)  # where there are none, one layer in one has none
        values |= {WINDOW: window, PATTERN: period(config)}
    if config.rope_local_theta != config.rope_theta:
        values["rope.freq_base_swa"] = config.rope_local_theta
    for key in "attn_logit_softcapping", "final_logit_softcapping":
        values |= {key: getattr(config, key)} if getattr(config, key) else {}
    if family.attention_multiplier:
        values |= {"attention.scale": config.query_pre_attn_scalar**-0.5, "embedding_scale": config.embedding_scale,
                   "residual_scale": config.residual_multiplier, "logit_scale": config.logits_scaling}  # fmt: skip
    if config.conv_size:
        heads = [config.num_key_value_heads * (mixer == "attention") for mixer in config.mixers]
        values |= {"shortconv.l_cache": config.conv_size, "attention.head_count_kv": heads}
    return values | (delta_sizes(config, raw) if config.delta else {})


def period(config: ModelConfig) -> int:
    """One layer in so many looks back without limit; 0 where the layers do not follow each other so."""
    windows = [bool(window) for window in config.windows]
    usual = FAMILIES[config.model_type].sliding_window_pattern or 1
    for step in (usual, *range(1, len(windows) + 2)):
        if windows == [(i + 1) % step > 0 for i in range(len(windows))]:
            return step
    return 0


def delta_sizes(config: ModelConfig, raw: Mapping) -> dict[str, int | list]:
    """Of Gated DeltaNet. RoPE's pairs go round time, height and width, which text has the same position in; those that
    no section counts, llama.cpp would not turn."""
    d, layers, pairs = config.delta, [mixer == "delta" for mixer in config.mixers], config.rotary_dim // 2
    interval = raw.get("full_attention_interval") or 4
    return {
        "ssm.conv_kernel": d.kernel, "ssm.state_size": d.key_dim, "ssm.group_count": d.key_heads,
        "ssm.time_step_rank": d.value_heads, "ssm.inner_size": d.value_heads * d.value_dim,
        "full_attention_interval": interval,
        "rope.dimension_sections": [*(len(range(i, pairs, 3)) for i in range(3)), 0],
    } | ({} if layers == [bool((i + 1) % interval) for i in range(len(layers))] else
         {"attention.recurrent_layers": layers})  # fmt: skip
