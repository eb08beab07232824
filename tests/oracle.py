"""Reference forward pass of Llama and Qwen2 decoders in numpy float64, written to be read, not to be fast.

It shares no code with what it checks. Row vectors throughout: a linear layer is y = W x + b with W of shape (out, in).
One decoder layer (pre-norm residual blocks) maps the hidden states x, shape (T, hidden_size), to

    h = x + Attention(RMSNorm(x))        y = h + SwiGLU(RMSNorm(h))
"""

import math

import numpy as np


def logits(
    config: dict, weights: dict[str, np.ndarray], tokens: list[int], positions: list[int] | None = None
) -> np.ndarray:
    """Next-token logits, shape (T, V). `positions` only set the RoPE angles; the causal mask follows list order."""
    if config["model_type"] not in ("llama", "qwen2"):
        raise ValueError(f"no oracle for model_type {config['model_type']!r}")
    if config.get("hidden_act", "silu") != "silu" or config.get("use_sliding_window"):
        raise ValueError("no oracle for activations other than silu, nor for sliding-window attention")
    positions = list(range(len(tokens))) if positions is None else positions
    if len(positions) != len(tokens):
        raise ValueError("one position per token")

    eps = config.get("rms_norm_eps", 1e-6)
    embedding = _f64(weights["model.embed_tokens.weight"])
    x = np.stack([embedding[token] for token in tokens])
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        normed = rms_norm(x, weights[f"{layer}.input_layernorm.weight"], eps)
        x = x + attention(config, weights, f"{layer}.self_attn", normed, positions)
        normed = rms_norm(x, weights[f"{layer}.post_attention_layernorm.weight"], eps)
        x = x + swiglu(weights, f"{layer}.mlp", normed)
    x = rms_norm(x, weights["model.norm.weight"], eps)
    head = embedding if config.get("tie_word_embeddings", False) else _f64(weights["lm_head.weight"])
    return np.einsum("th,vh->tv", x, head)


def rms_norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    """RMSNorm (Zhang & Sennrich 2019): y_j = g_j x_j / sqrt(mean_k x_k^2 + eps)."""
    return np.stack([_f64(gain) * row / math.sqrt(np.dot(row, row) / row.size + eps) for row in x])


def attention(config: dict, weights: dict, prefix: str, x: np.ndarray, positions: list[int]) -> np.ndarray:
    """Causal grouped-query attention (Ainslie et al. 2023), over consecutive groups of heads/kv_heads query heads.

    Query head h reads key/value head floor(h / group):  o_t = sum_{s<=t} softmax_s(q_t . k_s / sqrt(d)) v_s.
    """
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    d = config.get("head_dim") or config["hidden_size"] // heads
    steps = len(x)
    q = linear(weights, f"{prefix}.q_proj", x).reshape(steps, heads, d)
    k = linear(weights, f"{prefix}.k_proj", x).reshape(steps, kv_heads, d)
    v = linear(weights, f"{prefix}.v_proj", x).reshape(steps, kv_heads, d)

    frequencies = rope_frequencies(config, d)
    mixed = np.zeros((steps, heads, d))
    for h in range(heads):
        g = h // (heads // kv_heads)
        keys = np.stack([rotate(k[s, g], positions[s], frequencies) for s in range(steps)])
        for t in range(steps):
            query = rotate(q[t, h], positions[t], frequencies)
            mixed[t, h] = softmax(keys[: t + 1] @ query / math.sqrt(d)) @ v[: t + 1, g]
    return linear(weights, f"{prefix}.o_proj", mixed.reshape(steps, heads * d))


def rotate(vector: np.ndarray, position: int, frequencies: list[float]) -> np.ndarray:
    """RoPE (Su et al. 2021): turn the i-th plane of a head vector by the angle position * frequency_i.

    Hub checkpoints use the half-split ("rotate_half") layout: plane i is coordinates (i, i + d/2), not (2i, 2i + 1).
    """
    half = len(vector) // 2
    turned = np.empty_like(vector)
    for i, frequency in enumerate(frequencies):
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        turned[i] = cos * vector[i] - sin * vector[i + half]
        turned[i + half] = sin * vector[i] + cos * vector[i + half]
    return turned


def rope_frequencies(config: dict, d: int) -> list[float]:
    """The d/2 angular frequencies f_i = theta^(-2i/d), after the configured scaling.

    linear: positions / factor, which is the same as f / factor.
    llama3 (`apply_scaling` in Meta's llama-models), with wavelength w = 2 pi / f and original context length L:
    f if w < L / high;  f / factor if w > L / low;  between, (1 - a) f / factor + a f, a = (L / w - low) / (high - low).
    """
    rope = (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    frequencies = [1.0 / theta ** (2 * i / d) for i in range(d // 2)]
    if kind == "default":
        return frequencies
    if kind == "linear":
        return [f / rope["factor"] for f in frequencies]
    if kind == "llama3":
        return [_llama3_frequency(f, rope) for f in frequencies]
    raise ValueError(f"no oracle for rope type {kind!r}")


def _llama3_frequency(f: float, rope: dict) -> float:
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    context = rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / f
    if wavelength < context / high:
        return f
    if wavelength > context / low:
        return f / factor
    a = (context / wavelength - low) / (high - low)
    return (1 - a) * f / factor + a * f


def swiglu(weights: dict, prefix: str, x: np.ndarray) -> np.ndarray:
    """SwiGLU (Shazeer 2020): W_down (silu(W_gate x) * W_up x), silu(z) = z sigmoid(z) = z (1 + tanh(z / 2)) / 2."""
    gate, up = linear(weights, f"{prefix}.gate_proj", x), linear(weights, f"{prefix}.up_proj", x)
    return linear(weights, f"{prefix}.down_proj", gate * (1 + np.tanh(gate / 2)) / 2 * up)


def linear(weights: dict, name: str, x: np.ndarray) -> np.ndarray:
    """W x (+ b where the checkpoint has one) for every row x."""
    y = np.einsum("ti,oi->to", x, _f64(weights[f"{name}.weight"]))
    return y + _f64(weights[f"{name}.bias"]) if f"{name}.bias" in weights else y


def softmax(scores: np.ndarray) -> np.ndarray:
    """exp(s_j - m) / sum_k exp(s_k - m), m = max s."""
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def lora_delta(lora_A: np.ndarray, lora_B: np.ndarray, alpha: float) -> np.ndarray:
    """LoRA (Hu et al. 2021): Delta W = (alpha / r) B A, for A of shape (r, in) and B of shape (out, r)."""
    return alpha / lora_A.shape[0] * np.einsum("or,ri->oi", _f64(lora_B), _f64(lora_A))


def nll(logits: np.ndarray, targets: list[int], trained: list[bool]) -> tuple[float, int]:
    """Summed -log p(targets[t]) in nats over the trained positions t, -log p = log sum_v exp(z_v) - z_target; count."""
    total, count = 0.0, 0
    for row, target, counts in zip(_f64(logits), targets, trained, strict=True):
        if counts:
            top = row.max()
            total += float(top + np.log(np.exp(row - top).sum()) - row[target])
            count += 1
    return total, count


def greedy(config: dict, weights: dict[str, np.ndarray], tokens: list[int], count: int) -> list[int]:
    """The `count` tokens that follow `tokens` by argmax, the whole sequence recomputed each time (no cache)."""
    generated: list[int] = []
    for _ in range(count):
        generated.append(int(np.argmax(logits(config, weights, tokens + generated)[-1])))
    return generated


def _f64(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, dtype=np.float64)
