"""Reference forward pass of the supported decoders in numpy float64, written to be read, not to be fast.

It shares no code with what it checks, and takes tensors as the hub stores them, fused ones as they are. Row vectors
throughout: a linear layer is y = W x + b with W of shape (out, in). One decoder layer (pre-norm residual blocks) maps
the hidden states x, shape (T, hidden_size), to

    h = x + Attention(RMSNorm(x))        y = h + SwiGLU(RMSNorm(h))

and where a family differs, that is said where it does. Sources: the papers named, and the model files of transformers.
"""

import math

import numpy as np

GEMMA = ("gemma2", "gemma3_text", "gemma4_text")
NORMS = {  # before and after attention, before and after the MLP; in all others as Llama's
    **dict.fromkeys(GEMMA, ("input", "post_attention", "pre_feedforward", "post_feedforward")),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), (None, "post_attention", None, "post_feedforward")),
    "glm4": ("input", "post_self_attn", "post_attention", "post_mlp"),
}
AS_LLAMA = ("input", None, "post_attention", None)
KNOWN = (
    *NORMS, "llama", "mistral", "ministral3", "baichuan", "qwen2", "qwen3", "qwen3_5_text", "smollm3", "phi3",
    "granite", "granitemoehybrid", "lfm2", "ernie4_5", "hunyuan_v1_dense", "seed_oss",
)  # fmt: skip
INTERLEAVED = ("glm4", "ernie4_5")


def logits(
    config: dict, weights: dict[str, np.ndarray], tokens: list[int], positions: list[int] | None = None
) -> np.ndarray:
    """Next-token logits, shape (T, V). `positions` only set the RoPE angles; the causal mask follows list order."""
    kind = config["model_type"]
    if kind not in KNOWN:
        raise ValueError(f"no oracle for model_type {kind!r}")
    if kind not in GEMMA and config.get("hidden_act", "silu") != "silu":
        raise ValueError("no oracle for activations other than silu")
    positions = list(range(len(tokens))) if positions is None else positions
    if len(positions) != len(tokens):
        raise ValueError("one position per token")

    embedding = _f64(weights["model.embed_tokens.weight"])
    x = np.stack([embedding[token] for token in tokens])
    if kind in GEMMA:
        x = x * math.sqrt(config["hidden_size"])
    x = x * config.get("embedding_multiplier", 1)
    kept = {}
    inputs = token_inputs(config, weights, tokens, x) if kind == "gemma4_text" else None
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        mix = attention
        if kind == "qwen3_5_text" and (i + 1) % config["full_attention_interval"]:
            mix = delta_net
        if kind == "lfm2" and config["layer_types"][i] == "conv":
            mix = short_convolution
        before, after, before_mlp, after_mlp = (
            f"{layer}.{name}_layernorm" if name else None for name in NORMS.get(kind, AS_LLAMA)
        )
        if kind == "lfm2":
            before, before_mlp = f"{layer}.operator_norm", f"{layer}.ffn_norm"
        y = norm(config, weights, after, mix(config, weights, i, norm(config, weights, before, x), positions, kept))
        x = x + y * config.get("residual_multiplier", 1)
        y = norm(config, weights, after_mlp, gated_mlp(config, weights, layer, norm(config, weights, before_mlp, x)))
        x = x + y * config.get("residual_multiplier", 1)
        if kind == "gemma4_text":
            y = gelu(linear(weights, f"{layer}.per_layer_input_gate", x)) * inputs[:, i]
            y = linear(weights, f"{layer}.per_layer_projection", y)
            x = (x + norm(config, weights, f"{layer}.post_per_layer_input_norm", y)) * _f64(
                weights[f"{layer}.layer_scalar"]
            )
    x = norm(config, weights, "model.embedding_norm" if kind == "lfm2" else "model.norm", x)
    x = x / config.get("logits_scaling", 1)
    head = embedding if config.get("tie_word_embeddings", kind in GEMMA) else _f64(weights["lm_head.weight"])
    return softcap(np.einsum("th,vh->tv", x, head), config.get("final_logit_softcapping"))


def token_inputs(config: dict, weights: dict, tokens: list[int], x: np.ndarray) -> np.ndarray:
    """Gemma 4: what tokens of embeddings x (T, D) bring to each layer, (T, L, P), from an embedding of their own and
    from x: (sqrt(P) E'[token] + RMSNorm(W x / sqrt(D))) / sqrt(2)."""
    P = config["hidden_size_per_layer_input"]
    own = np.stack([_f64(weights["model.embed_tokens_per_layer.weight"])[token] for token in tokens]) * math.sqrt(P)
    seen = linear(weights, "model.per_layer_model_projection", x) / math.sqrt(x.shape[1])
    own, seen = own.reshape(len(x), -1, P), seen.reshape(len(x), -1, P)
    seen = np.stack([norm(config, weights, "model.per_layer_projection_norm", row) for row in seen])
    return (own + seen) / math.sqrt(2)


def norm(config: dict, weights: dict, name: str | None, x: np.ndarray) -> np.ndarray:
    """RMSNorm by the stored weight, if there is one; Gemma and Qwen3.5 store the gain less one."""
    if name is None:
        return x
    less_one = ("gemma2", "gemma3_text", "qwen3_5_text")
    gain = _f64(weights[f"{name}.weight"]) + (1 if config["model_type"] in less_one else 0)
    return rms_norm(x, gain, config.get("norm_eps" if config["model_type"] == "lfm2" else "rms_norm_eps", 1e-6))


def softcap(scores: np.ndarray, cap: float | None) -> np.ndarray:
    """Gemma 2: s -> cap tanh(s / cap)."""
    return scores if cap is None else cap * np.tanh(scores / cap)


def rms_norm(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    """RMSNorm (Zhang & Sennrich 2019): y_j = g_j x_j / sqrt(mean_k x_k^2 + eps)."""
    return np.stack([_f64(gain) * row / math.sqrt(np.dot(row, row) / row.size + eps) for row in x])


def attention(config: dict, weights: dict, i: int, x: np.ndarray, positions: list[int], kept: dict) -> np.ndarray:
    """Causal grouped-query attention (Ainslie et al. 2023), over consecutive groups of heads/kv_heads query heads.

    Query head h reads key/value head floor(h / group):  o_t = sum_{s<=t} softmax_s(q_t . k_s / sqrt(d)) v_s.
    In layers with a sliding window w the sum is over the last w positions, t - w < s <= t.
    """
    kind, prefix = config["model_type"], f"model.layers.{i}.self_attn"
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    d = config.get("head_dim") or config["hidden_size"] // heads
    steps = len(x)
    if kind == "gemma4_text":
        d = d if sliding_window(config, i) else config["global_head_dim"]
    full = sliding_window(config, i) is None
    if kind in ("baichuan", "phi3"):
        packed = linear(weights, f"{prefix}.{'W_pack' if kind == 'baichuan' else 'qkv_proj'}", x)
        q, k, v = np.split(packed, [heads * d, (heads + kv_heads) * d], axis=1)
    else:
        q = linear(weights, f"{prefix}.q_proj", x)
        k, v = (linear(weights, f"{prefix}.{n}_proj", x) for n in "kv") if owns_keys(config, i) else kept[full]
    gates = np.ones((steps, heads, d))
    if kind == "qwen3_5_text":  # each head of q_proj is a query and a gate
        q, gates = np.split(q.reshape(steps, heads, 2 * d), 2, axis=2)
        gates = 1 / (1 + np.exp(-gates))
    if kind in ("olmo2", "olmo3"):  # over all heads
        q, k = norm(config, weights, f"{prefix}.q_norm", q), norm(config, weights, f"{prefix}.k_norm", k)
    q, k, v = q.reshape(steps, heads, d), k.reshape(steps, kv_heads, d), v.reshape(steps, kv_heads, d)
    suffix = "layernorm" if kind == "lfm2" else "norm"
    if kind in ("qwen3", "qwen3_5_text", "gemma3_text", "gemma4_text", "lfm2", "exaone4"):
        q = np.stack([norm(config, weights, f"{prefix}.q_{suffix}", row) for row in q])
        if owns_keys(config, i):
            k = np.stack([norm(config, weights, f"{prefix}.k_{suffix}", row) for row in k])
    if kind == "gemma4_text":  # values are normed, too, and the last layers use those of the last that has its own
        if owns_keys(config, i):
            v = np.stack([rms_norm(row, np.ones(d), config["rms_norm_eps"]) for row in v])
        kept[full] = k, v

    window, frequencies = sliding_window(config, i), rope_frequencies(config, d, i)
    scale = math.sqrt(config.get("query_pre_attn_scalar") or d)
    if kind.startswith("granite"):
        scale = 1 / config["attention_multiplier"]
    if kind == "gemma4_text":
        scale = 1
    mixed = np.zeros((steps, heads, d))
    for h in range(heads):
        g = h // (heads // kv_heads)
        keys = np.stack([rotate(k[s, g], positions[s], frequencies, kind in INTERLEAVED) for s in range(steps)])
        if kind == "hunyuan_v1_dense":  # normed after they were turned
            keys = norm(config, weights, f"{prefix}.key_layernorm", keys)
        for t in range(steps):
            query = rotate(q[t, h], positions[t], frequencies, kind in INTERLEAVED)
            if kind == "hunyuan_v1_dense":
                query = norm(config, weights, f"{prefix}.query_layernorm", query[None])[0]
            seen = slice(max(0, t + 1 - window) if window else 0, t + 1)
            scores = softcap(keys[seen] @ query / scale, config.get("attn_logit_softcapping"))
            scores = scores * rope_growth(config, positions[t], i)
            mixed[t, h] = softmax(scores) @ v[seen, g]
    return linear(
        weights, f"{prefix}.{'out' if kind == 'lfm2' else 'o'}_proj", (gates * mixed).reshape(steps, heads * d)
    )


def owns_keys(config: dict, i: int) -> bool:
    """Has the layer keys and values of its own?"""
    return i < config["num_hidden_layers"] - config.get("num_kv_shared_layers", 0)


def rope_growth(config: dict, position: int, i: int) -> float:
    """What scores are multiplied by: YaRN's temperature (Peng et al. 2023, eq. 22: cos and sin of both sides by
    0.1 ln s + 1), LongRoPE's likewise, and in Ministral 3 queries by 1 + beta ln(1 + floor(position / L))."""
    rope = (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    if config["model_type"] == "olmo3":
        rope = rope["sliding_attention" if sliding_window(config, i) else "full_attention"]
    kind, L = rope.get("rope_type", rope.get("type", "default")), rope.get("original_max_position_embeddings")
    if kind == "yarn":
        beta = rope.get("llama_4_scaling_beta", 0)
        return (0.1 * math.log(rope["factor"]) + 1) ** 2 * (1 + beta * math.log(1 + position // L))
    if kind == "longrope":
        L = config["original_max_position_embeddings"]
        return 1 + math.log(config["max_position_embeddings"] / L) / math.log(L)
    return 1.0


def delta_net(config: dict, weights: dict, i: int, x: np.ndarray, positions, kept) -> np.ndarray:
    """Gated DeltaNet (Yang et al. 2024), head by head and token by token, S mapping keys to values:

        S <- a S;   S <- S + b (v - S k) k^T;   y = S q / sqrt(d)

    with b = sigmoid(W_b x), a = exp(-exp(A_log) softplus(W_a x + dt_bias)), and q, k, v of length 1, 1 and any, from a
    causal convolution of W_qkv x over K positions, then silu. The output is RMSNorm(y) silu(W_z x), then W_out.
    """
    prefix = f"model.layers.{i}.linear_attn"
    heads, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    d, dv = config["linear_key_head_dim"], config["linear_value_head_dim"]
    wide, kernel = linear(weights, f"{prefix}.in_proj_qkv", x), _f64(weights[f"{prefix}.conv1d.weight"])[:, 0]
    K = kernel.shape[1]
    mixed = np.zeros_like(wide)
    for t in range(len(x)):
        for j in range(K):
            if t - j >= 0:
                mixed[t] += kernel[:, K - 1 - j] * wide[t - j]
    mixed = mixed / (1 + np.exp(-mixed))
    q, k, v = np.split(mixed, [heads * d, 2 * heads * d], axis=1)
    b = 1 / (1 + np.exp(-linear(weights, f"{prefix}.in_proj_b", x)))
    rate = np.log1p(np.exp(linear(weights, f"{prefix}.in_proj_a", x) + _f64(weights[f"{prefix}.dt_bias"])))
    a = np.exp(-np.exp(_f64(weights[f"{prefix}.A_log"])) * rate)
    z = linear(weights, f"{prefix}.in_proj_z", x)
    out = np.zeros((len(x), values * dv))
    for h in range(values):
        g, S = h // (values // heads), np.zeros((dv, d))
        for t in range(len(x)):
            query, key = (y[t, g * d : (g + 1) * d] for y in (q, k))
            query, key = (y / math.sqrt(y @ y + 1e-6) for y in (query, key))
            S = a[t, h] * S
            S = S + b[t, h] * np.outer(v[t, h * dv : (h + 1) * dv] - S @ key, key)
            y = rms_norm((S @ query / math.sqrt(d))[None], weights[f"{prefix}.norm.weight"], config["rms_norm_eps"])[0]
            gate = z[t, h * dv : (h + 1) * dv]
            out[t, h * dv : (h + 1) * dv] = y * gate / (1 + np.exp(-gate))
    return linear(weights, f"{prefix}.out_proj", out)


def short_convolution(config: dict, weights: dict, i: int, x: np.ndarray, positions, kept) -> np.ndarray:
    """LFM2's, token by token: y_t = W_out (C_t * sum_j w_j (B x)_{t - K + 1 + j}), with B, C, x from W_in."""
    prefix = f"model.layers.{i}.conv"
    b, c, u = np.split(linear(weights, f"{prefix}.in_proj", x), 3, axis=1)
    kernel, seen = _f64(weights[f"{prefix}.conv.weight"])[:, 0], b * u
    K, mixed = kernel.shape[1], np.zeros_like(x)
    for t in range(len(x)):
        for j in range(K):
            if t - j >= 0:
                mixed[t] += kernel[:, K - 1 - j] * seen[t - j]
    return linear(weights, f"{prefix}.out_proj", c * mixed)


def sliding_window(config: dict, i: int) -> int | None:
    """How many positions layer i looks back, its own included. `layer_types` says it where it is given."""
    kind, window = config["model_type"], config.get("sliding_window")
    windowed = ("mistral", "ministral3", "phi3", "qwen2", "qwen3", "olmo3", "exaone4", *GEMMA)
    if kind not in windowed:
        return None
    if kind in ("mistral", "ministral3", "phi3"):
        return window
    if "layer_types" in config:
        return window if config["layer_types"][i] == "sliding_attention" else None
    if kind in ("qwen2", "qwen3"):
        return window if config.get("use_sliding_window") and i >= config["max_window_layers"] else None
    pattern = {"gemma2": 2, "olmo3": 4}.get(kind) or config.get("sliding_window_pattern") or 1
    return None if (i + 1) % (pattern if isinstance(pattern, int) else len(pattern)) == 0 else window


def rotate(vector: np.ndarray, position: int, frequencies: list[float], rope_interleaved: bool = False) -> np.ndarray:
    """RoPE (Su et al. 2021): turn the i-th plane of a head vector by the angle position * frequency_i.

    Hub checkpoints use the half-split ("rotate_half") layout: plane i is coordinates (i, i + n/2), n being twice the
    number of frequencies; GLM-4's is (2i, 2i + 1). What is beyond n stays.
    """
    turned = vector.copy()
    for i, frequency in enumerate(frequencies):
        a, b = (2 * i, 2 * i + 1) if rope_interleaved else (i, i + len(frequencies))
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        turned[a] = cos * vector[a] - sin * vector[b]
        turned[b] = sin * vector[a] + cos * vector[b]
    return turned


def rope_frequencies(config: dict, d: int, i: int = 0) -> list[float]:
    """The n/2 angular frequencies f_j = theta^(-2j/n) of layer i, after the configured scaling; n is d or a part of it.

    linear: positions / factor, which is the same as f / factor.
    llama3 (`apply_scaling` in Meta's llama-models), with wavelength w = 2 pi / f and original context length L:
    f if w < L / high;  f / factor if w > L / low;  between, (1 - a) f / factor + a f, a = (L / w - low) / (high - low).
    Some layers of SmolLM3 have none (NoPE, https://arxiv.org/abs/2305.19466); Gemma 3 has another theta, and no
    scaling, where there is a window.
    """
    if config["model_type"] == "smollm3":
        interval = config.get("no_rope_layer_interval", 4)
        if not (config.get("no_rope_layers") or [(j + 1) % interval for j in range(i + 1)])[i]:
            return []
    rope = (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if config["model_type"] == "gemma3_text" and sliding_window(config, i):
        rope, theta = {}, config.get("rope_local_base_freq", 10000.0)
    if config["model_type"] == "olmo3":  # that of layers with a window is never stretched
        rope = rope["sliding_attention" if sliding_window(config, i) else "full_attention"]
        theta = rope["rope_theta"]
    if config["model_type"] == "gemma4_text":
        full = sliding_window(config, i) is None
        rope = rope["full_attention" if full else "sliding_attention"]
        turned = int(d * rope["partial_rotary_factor"]) // 2 if full else d // 2
        return [1.0 / rope["rope_theta"] ** (2 * j / d) if j < turned else 0.0 for j in range(d // 2)]
    if config["model_type"] == "exaone4" and config.get("sliding_window") and not sliding_window(config, i):
        return []
    kind = rope.get("rope_type", rope.get("type", "default"))
    n = int(d * rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1)))
    frequencies = [1.0 / theta ** (2 * j / n) for j in range(n // 2)]
    if kind == "default":
        return frequencies
    if kind == "dynamic":  # with an alpha: of another base
        return [1.0 / (theta * rope["alpha"] ** (n / (n - 2))) ** (2 * j / n) for j in range(n // 2)]
    if kind == "linear":
        return [f / rope["factor"] for f in frequencies]
    if kind == "llama3":
        return [_llama3_frequency(f, rope) for f in frequencies]
    if kind == "yarn":
        return [_yarn_frequency(f, j, n, theta, rope) for j, f in enumerate(frequencies)]
    if kind == "longrope":
        return [f / by for f, by in zip(frequencies, rope["short_factor"], strict=True)]
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


def _yarn_frequency(f: float, j: int, n: int, theta: float, rope: dict) -> float:
    """f where its plane turns more than beta_fast times in the original length, f / factor below beta_slow times, in
    between linear in the plane's number, whose ends are rounded outwards."""
    L, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = (
        n / 2 * math.log(L / (2 * math.pi * turns)) / math.log(theta)
        for turns in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
    )
    low, high = max(math.floor(low), 0), min(math.ceil(high), n - 1)
    high += 0.001 * (low == high)
    stretched = min(max((j - low) / (high - low), 0), 1)
    return stretched * f / factor + (1 - stretched) * f


def gated_mlp(config: dict, weights: dict, layer: str, x: np.ndarray) -> np.ndarray:
    """SwiGLU (Shazeer 2020): W_down (silu(W_gate x) * W_up x), silu(z) = z sigmoid(z) = z (1 + tanh(z / 2)) / 2;
    Gemma's has gelu in the place of silu, in its tanh form (Hendrycks & Gimpel 2016)."""
    kind = config["model_type"]
    names = {"lfm2": ("feed_forward", "w1", "w3", "w2"),
             "granitemoehybrid": ("shared_mlp", "input_linear", None, "output_linear"),
             **dict.fromkeys(("phi3", "glm4"), ("mlp", "gate_up_proj", None, "down_proj"))}  # fmt: skip
    block, first, second, down = names.get(kind, ("mlp", "gate_proj", "up_proj", "down_proj"))
    prefix = f"{layer}.{block}"
    gate = linear(weights, f"{prefix}.{first}", x)
    gate, up = (gate, linear(weights, f"{prefix}.{second}", x)) if second else np.split(gate, 2, axis=1)
    return linear(
        weights, f"{prefix}.{down}", (gelu(gate) if kind in GEMMA else gate * (1 + np.tanh(gate / 2)) / 2) * up
    )


def gelu(x: np.ndarray) -> np.ndarray:
    """In its tanh form: x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2."""
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


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
