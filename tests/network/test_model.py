"""The decoder equals a numpy oracle, and every way to lay out or cache its input equals every other."""

import random

import pytest
import torch
from torch.nn import functional as F

from lora import ops
from lora.adapter.inject import inject, lora_layers
from lora.data.batch import collate
from lora.network import decoder, layers
from lora.network.config import ModelConfig
from lora.ops import cross_entropy, flash_attention, plain
from lora.text.chat import Example
from tests import oracle
from tests.helpers import as_written, close, far, patched, some_tokens, tiny_config, tiny_model
from tests.mutation import mutation

LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip
SCALINGS = (None, {"rope_type": "linear", "factor": 2.5}, LLAMA3)


def random_config(seed: int) -> dict:
    """A raw config.json of random sizes, most of them no multiples of 8, cycling through families, RoPE and tying."""
    draw = random.Random(seed)
    kv_heads, group = draw.choice((1, 2, 3)), 1 + seed % 3
    heads = kv_heads * group
    head_dim = draw.choice((None, 6, 10, 12))
    family = ("llama", "qwen2")[seed % 2]
    return tiny_config(
        model_type=family,
        vocab_size=draw.randint(60, 140),
        hidden_size=heads * 2 * draw.randint(2, 5),  # transformers wants a multiple of the heads, whatever head_dim is
        intermediate_size=draw.randint(17, 60),
        num_hidden_layers=draw.choice((1, 2, 3)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=16384,
        rms_norm_eps=draw.choice((1e-6, 1e-5, 1e-2)),
        rope_theta=draw.choice((1000.0, 10000.0, 500000.0)),
        rope_scaling=SCALINGS[seed % 5 % 3],
        tie_word_embeddings=seed % 4 < 2,
        attention_bias=bool(seed % 4) if family == "llama" else None,
        mlp_bias=bool(seed % 8 < 4) if family == "llama" else None,
    )


def arrays(model) -> dict:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def splits(total: int, parts: list[int]) -> list[int]:
    return [*parts, total - sum(parts)]


def relative(positions: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """q and k of one head, the same at every position, turned: the products of all pairs of positions."""
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 1, 1, config.head_dim, generator=generator, dtype=torch.float64)
    cos, sin, _ = decoder.rope_table(config, positions, torch.float64)
    count = len(positions)
    q, k = (ops.rotate(x.expand(count, 1, -1), cos, sin)[:, 0] for x in (q, k))
    return q @ k.T


# ---- the oracle ------------------------------------------------------------------------------------------------------


@mutation("lora/ops/plain.py", "first, second = x.chunk(2, dim=-1)", "first, second = x[..., ::2], x[..., 1::2]")
@mutation("lora/network/rope.py", "frequencies = 1.0 / theta **", "frequencies = 1.0 / 10000.0 **")
@mutation(
    "lora/ops/fast_rms_norm.py",
    "y.square().mean(-1, keepdim=True) + eps)",
    "y.square().mean(-1, keepdim=True) + 10 * eps)",
)
@mutation("lora/network/layers.py", "        x = self.norm(x)\n", "")
@mutation(
    "lora/ops/plain.py",
    "return tuple(module(x) for module in modules)",
    "return tuple(x @ module.weight.T for module in modules)",
)
@mutation("lora/ops/plain.py", "return ACTIVATIONS[activation](gate) * up", "return ACTIVATIONS[activation](up) * gate")
@mutation("lora/ops/plain.py", "return ACTIVATIONS[activation](gate) * up", "return F.gelu(gate) * up")
@mutation("lora/ops/fast_attention.py", "queries.shape[-1] ** -0.5)", "queries.shape[-1] ** -1)")
@mutation("lora/network/rope.py", "        return frequencies / scaling.factor\n", "        return frequencies\n")
@mutation("lora/network/rope.py", 'if scaling.kind == "llama3":', 'if scaling.kind == "never":')
@mutation("lora/network/rope.py", "blend = blend.clamp(0, 1)", "blend = blend.clamp(min=0)")
@pytest.mark.parametrize("seed", range(10))
def test_logits_equal_the_numpy_oracle(seed):
    config = random_config(seed)
    model = tiny_model(seed=seed, **config)
    tokens = some_tokens(67, config["vocab_size"], seed)
    expected = torch.from_numpy(oracle.logits(config, arrays(model), tokens.tolist()))
    assert expected.std() > 0.5
    assert close(model(tokens), expected, 1e-12)
    with as_written():
        assert close(model(tokens), expected, 1e-12)


@pytest.mark.parametrize("seed", range(4, 10))
def test_logits_at_positions_above_five_thousand_equal_the_numpy_oracle(seed):
    config = random_config(seed)
    model = tiny_model(seed=seed, **config)
    tokens = some_tokens(11, config["vocab_size"], seed)
    positions = sorted(random.Random(seed).sample(range(5000, 9000), len(tokens)))
    expected = torch.from_numpy(oracle.logits(config, arrays(model), tokens.tolist(), positions))
    assert close(model(tokens, positions=torch.tensor(positions)), expected, 1e-11)
    assert far(model(tokens), expected, 1e-11)


def test_random_configs_cover_what_they_should():
    configs = [random_config(seed) for seed in range(10)]
    assert {c["num_attention_heads"] // c["num_key_value_heads"] for c in configs} == {1, 2, 3}
    assert {(c["model_type"], c["tie_word_embeddings"]) for c in configs} == {
        (family, tied) for family in ("llama", "qwen2") for tied in (True, False)
    }
    kinds = {(c.get("rope_scaling") or {}).get("rope_type", "default") for c in configs}
    assert kinds == {"default", "linear", "llama3"}
    assert any(c.get("attention_bias") for c in configs) and any(c.get("mlp_bias") for c in configs)
    wide = [c for c in configs if c.get("head_dim", 0) * c["num_attention_heads"] not in (0, c["hidden_size"])]
    assert wide and all(c["vocab_size"] != c["hidden_size"] for c in configs)


@mutation("lora/network/decoder.py", "        if not config.tie_word_embeddings:", "        if config:")
def test_a_tied_model_has_no_lm_head_and_projects_with_its_embedding():
    model = tiny_model(tie_word_embeddings=True)
    assert not any("lm_head" in name for name in model.state_dict())
    embedding = model.model.embed_tokens.weight
    assert model.head_weight is embedding
    hidden = torch.randn(5, embedding.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert close(model.head(hidden), hidden @ embedding.T, 1e-12)
    assert not any("lm_head" in path or "embed" in path for path in inject(model))
    untied = tiny_model(tie_word_embeddings=False)
    assert untied.head_weight is untied.lm_head.weight


@mutation("lora/network/layers.py", "bias=config.o_bias", "bias=False")
@pytest.mark.parametrize("seed", range(10))
def test_tensors_have_the_names_and_shapes_of_the_hub(seed):
    config = random_config(seed)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    d = config.get("head_dim") or D // heads
    qkv = config["model_type"] == "qwen2" or config["attention_bias"]
    o, mlp = config.get("attention_bias", False), config.get("mlp_bias", False)
    expected = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config["tie_word_embeddings"]:
        expected["lm_head.weight"] = (V, D)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        expected |= {f"{layer}.{norm}_layernorm.weight": (D,) for norm in ("input", "post_attention")}
        for path, out, into, bias in (
            ("self_attn.q_proj", heads * d, D, qkv), ("self_attn.k_proj", kv_heads * d, D, qkv),
            ("self_attn.v_proj", kv_heads * d, D, qkv), ("self_attn.o_proj", D, heads * d, o),
            ("mlp.gate_proj", F, D, mlp), ("mlp.up_proj", F, D, mlp), ("mlp.down_proj", D, F, mlp),
        ):  # fmt: skip
            expected[f"{layer}.{path}.weight"] = (out, into)
            if bias:
                expected[f"{layer}.{path}.bias"] = (out,)
    assert {name: tuple(t.shape) for name, t in tiny_model(**config).state_dict().items()} == expected


# ---- positions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", SCALINGS, ids=("default", "linear", "llama3"))
def test_rope_depends_on_distance_only(scaling):
    config = ModelConfig.from_json(tiny_config(head_dim=12, rope_scaling=scaling))
    positions = torch.tensor([0, 1, 2, 5, 17, 100])
    products = relative(positions, config)
    assert close(relative(positions + 1234, config), products, 1e-11)
    assert far(relative(positions * 2, config), products, 1e-11)


@pytest.mark.parametrize("scaling", SCALINGS, ids=("default", "linear", "llama3"))
def test_a_shift_of_all_positions_changes_no_logits(scaling):
    model, tokens = tiny_model(rope_scaling=scaling), some_tokens(20)
    positions, plain = torch.arange(20), model(tokens)
    assert close(model(tokens, positions=positions + 3000), plain, 1e-11)
    assert far(model(tokens, positions=positions * 3), plain, 1e-11)


@mutation("lora/network/rope.py", "positions.to(wide)[:, None]", "positions.to(dtype)[:, None]")
def test_angles_are_formed_in_float32_for_a_bfloat16_model():
    config = ModelConfig.from_json(tiny_config(head_dim=64, max_position_embeddings=131072))
    positions = torch.tensor([0, 1, 257, 5001, 70001, 131071])
    in_bf16, in_fp32 = (decoder.rope_table(config, positions, dtype) for dtype in (torch.bfloat16, torch.float32))
    for narrow, wide in zip(in_bf16[:2], in_fp32[:2], strict=True):
        assert narrow.dtype == torch.bfloat16 and torch.equal(narrow, wide.to(torch.bfloat16))
    exact = decoder.rope_table(config, positions, torch.float64)
    assert close(in_fp32[0], exact[0], 0.02)  # 131,071 · 2⁻²⁴ is 0.008 rad


@mutation("lora/ops/fast_rms_norm.py", "scale = torch.rsqrt(y.square()", "y = x; scale = torch.rsqrt(y.square()")
def test_norms_of_a_bfloat16_model_are_formed_in_float32():
    norm = layers.RMSNorm(300, 1e-5).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(40, 300, generator=generator).bfloat16()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=generator)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    differing = norm(x) != norm.weight * exact.bfloat16()
    assert differing.float().mean() < 0.01  # where float32 and float64 round to different sides; in bfloat16 a third


@mutation(
    "lora/network/decoder.py",
    "starts = cache.lengths if cache else [0] * len(lengths)",
    "starts = cache.lengths if cache else [sum(lengths[:i]) for i in range(len(lengths))]",
)
def test_positions_begin_anew_in_every_document():
    model = tiny_model(torch.float32, hidden_size=48, head_dim=16)
    lengths = [40] * 400  # 16,000 positions: in float32 their angles would be off by 1e-3
    tokens = some_tokens(sum(lengths))
    with torch.inference_mode():
        together, alone = model(tokens, lengths)[-40:], model(tokens[-40:])
    assert close(together, alone, 1e-5)


# ---- who sees whom ---------------------------------------------------------------------------------------------------


@mutation(
    "lora/ops/fast_attention.py",
    "dtype=dtype).triu(1)",
    "dtype=dtype).triu(2)",
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_future_tokens_cannot_change_past_logits(dtype):
    model, tokens = tiny_model(dtype), some_tokens(64)
    before = model(tokens)
    for cut in (1, 2, 31, 63):
        other = tokens.clone()
        other[cut:] = (other[cut:] + 1) % 131
        after = model(other)
        assert torch.equal(after[:cut], before[:cut])
        assert not torch.isclose(after[cut:], before[cut:]).all(-1).any()


def documents(lengths: list[int], seed: int = 0) -> list[Example]:
    """Examples of random tokens with answers at random places, the last token always trained."""
    draw = random.Random(seed)
    rows = [(draw.choices(range(131), k=n), draw.choices((True, False), k=n - 1)) for n in lengths]
    return [Example(tokens, [*trained, True]) for tokens, trained in rows]


def loss_and_gradients(model, loss: torch.Tensor) -> list[torch.Tensor]:
    """The loss, and what it gives every lora_A and lora_B."""
    parameters = [p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


def of_batch(model, examples: list[Example]) -> torch.Tensor:
    """The summed loss of examples laid end to end, as train.py forms it."""
    batch = collate(examples)
    hidden = model.trunk(batch.tokens, batch.lengths)[batch.trained]
    return cross_entropy(hidden, model.head_weight, batch.targets)


def padded_loss(model, examples: list[Example], pad: int) -> torch.Tensor:
    """The textbook: a right-padded (B, T) batch with an attention mask, W + s B A as one matrix, labels of -100."""
    c, T = model.config, max(len(e.tokens) for e in examples)
    H, KV, d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    ids = torch.tensor([e.tokens + [pad] * (T - len(e.tokens)) for e in examples])  # (B, T)
    labels = [[t if on else -100 for t, on in zip(*e, strict=True)] + [-100] * (T - len(e.tokens)) for e in examples]
    real = torch.tensor([[i < len(e.tokens) for i in range(T)] for e in examples])
    tensors, layers = dict(model.named_parameters()), lora_layers(model)

    def linear(x, path):
        base = layers[path].base
        return F.linear(x, base.weight + layers[path].alpha / layers[path].rank
                        * layers[path].lora_B @ layers[path].lora_A, base.bias)  # fmt: skip

    def norm(x, path):
        return F.rms_norm(x, x.shape[-1:], tensors[path + ".weight"], c.rms_norm_eps)

    frequencies = c.rope_theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    turns = torch.polar(torch.ones(T, d // 2, dtype=torch.float64), torch.arange(T)[:, None] * frequencies)

    def rope(x):  # (B, heads, T, d), the pairs (i, i + d/2) as complex numbers
        turned = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * turns
        return torch.cat((turned.real, turned.imag), -1)

    mask = torch.ones(T, T, dtype=torch.bool).tril() & real[:, None, None]  # (B, 1, T, T)
    x = F.embedding(ids, tensors["model.embed_tokens.weight"])
    for i in range(c.num_hidden_layers):
        layer, h = f"model.layers.{i}", norm(x, f"model.layers.{i}.input_layernorm")
        q, k, v = (linear(h, f"{layer}.self_attn.{p}_proj").unflatten(-1, (-1, d)).transpose(1, 2) for p in "qkv")
        q, k, v = rope(q), rope(k).repeat_interleave(H // KV, 1), v.repeat_interleave(H // KV, 1)
        weights = (q @ k.mT / d**0.5).masked_fill(~mask, -1e30).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), f"{layer}.self_attn.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        h = F.silu(linear(h, f"{layer}.mlp.gate_proj")) * linear(h, f"{layer}.mlp.up_proj")
        x = x + linear(h, f"{layer}.mlp.down_proj")
    logits = norm(x, "model.norm") @ model.head_weight.T
    shifted = torch.tensor(labels)[:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), shifted, ignore_index=-100, reduction="sum")


@mutation("lora/data/batch.py", "if example.trained[t + 1]]", "if example.trained[t]]")
@pytest.mark.parametrize("config", [{}, {"model_type": "qwen2", "tie_word_embeddings": True, "head_dim": 10}])
def test_documents_end_to_end_equal_one_at_a_time_equal_a_padded_batch(config, monkeypatch):
    monkeypatch.setattr(ops, "SHORT", 12)
    model = patched(tiny_model(**config))
    examples = documents([9, 2, 31, 13, 14, 40, 12])
    end_to_end = loss_and_gradients(model, of_batch(model, examples))
    singles = [loss_and_gradients(model, of_batch(model, [example])) for example in examples]
    one_at_a_time = [sum(parts) for parts in zip(*singles, strict=True)]
    padded = loss_and_gradients(model, padded_loss(model, examples, pad=2))
    assert len(padded) == 1 + 2 * 14
    for a, b, c in zip(end_to_end, one_at_a_time, padded, strict=True):
        assert close(a, c, 1e-12) and close(b, c, 1e-12)
        assert c.abs().max() > 1e-3


# ---- attention -------------------------------------------------------------------------------------------------------


@mutation("lora/ops/flash_attention.py", ".tril(S - T)", ".tril(S - T - 1)")
@mutation("lora/ops/flash_attention.py", "is_causal=mask is None", "is_causal=False")
@pytest.mark.parametrize(("T", "S"), [(1, 1), (9, 9), (37, 37), (1, 20), (5, 23), (36, 37)])
@pytest.mark.parametrize(("H", "KV"), [(3, 3), (4, 2), (6, 2), (3, 1)])
def test_explicit_attention_equals_blocked_attention(H, KV, T, S):
    generator = torch.Generator().manual_seed(T * S + H)
    sizes = ((T, H, 10), (S, KV, 10), (S, KV, 10))
    inputs = [2 * torch.randn(size, dtype=torch.float64, generator=generator) for size in sizes]
    inputs = [x.requires_grad_() for x in inputs]
    upstream = torch.randn((T, H, 10), dtype=torch.float64, generator=generator)
    results = []
    for form in (plain.attend, flash_attention.attend):
        out = form(*inputs)
        results.append([out, *torch.autograd.grad(out, inputs, upstream)])
    for a, b in zip(*results, strict=True):
        assert close(a, b, 1e-12)


@mutation(
    "lora/ops/plain.py",
    "q.view(T, KV, H // KV, d).permute(1, 2, 0, 3)",
    "q.view(T, H // KV, KV, d).permute(2, 1, 0, 3)",
)
@mutation("lora/ops/plain.py", ".triu(S - T + 1)", ".triu(S - T + 2)")
@pytest.mark.parametrize("form", [plain.attend, flash_attention.attend])
@pytest.mark.parametrize(("H", "KV"), [(3, 3), (4, 2), (6, 2), (3, 1)])
def test_query_head_h_reads_key_value_head_h_over_group_up_to_its_own_position(H, KV, form):
    generator = torch.Generator().manual_seed(H)
    T, S, d = 5, 8, 6
    q, k, v = (torch.randn(*size, d, dtype=torch.float64, generator=generator) for size in ((T, H), (S, KV), (S, KV)))
    found = form(q, k, v)
    for t in range(T):
        for h in range(H):
            seen, g = S - T + t + 1, h // (H // KV)
            weights = (k[:seen, g] @ q[t, h] / d**0.5).softmax(0)
            assert close(found[t, h], weights @ v[:seen, g], 1e-12)


# ---- the cache -------------------------------------------------------------------------------------------------------


@mutation(
    "lora/network/decoder.py",
    "starts = cache.lengths if cache else",
    "starts = [max(0, n - 1) for n in cache.lengths] if cache else",
)
@pytest.mark.parametrize("config", [{}, {"model_type": "qwen2", "tie_word_embeddings": True}, {"rope_scaling": LLAMA3}])
def test_decoding_with_a_cache_equals_the_full_forward_at_every_position(config):
    model, tokens = tiny_model(**config), some_tokens(31)
    cache = model.new_cache(1, 31)
    stepwise = torch.cat([model(token[None], cache=cache) for token in tokens])
    assert cache.lengths == [31]
    assert close(stepwise, model(tokens), 1e-12)


@mutation("lora/network/cache.py", "x[row, :, : self.lengths[row] + self.new[row]]", "x[row, :, self.lengths[row] :]")
@pytest.mark.parametrize("short", [512, 8])
@pytest.mark.parametrize("chunks", [[31], [1, 30], [7, 1, 12, 11], [16, 15]])
def test_prefill_in_chunks_equals_one_shot(chunks, short, monkeypatch):
    monkeypatch.setattr(ops, "SHORT", short)
    model, tokens = tiny_model(), some_tokens(31)
    cache = model.new_cache(1, 40)
    logits = torch.cat([model(part, [len(part)], cache=cache) for part in tokens.split(chunks)])
    assert close(logits, model(tokens), 1e-12)


@mutation("lora/network/cache.py", "attn_mask=mask", "attn_mask=None")
@mutation("lora/network/cache.py", "unseen = columns > ends[:, None]", "unseen = columns >= ends[:, None]")
def test_rows_of_unequal_length_in_one_batch_equal_each_alone():
    model, lengths, more = tiny_model(), [9, 2, 17, 1], 6
    rows = [some_tokens(n + more, seed=n) for n in lengths]
    alone = [model(row) for row in rows]
    cache = model.new_cache(len(rows), max(lengths) + more)
    prefill = model(torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)]), lengths, cache=cache)
    for part, expected, n in zip(prefill.split(lengths), alone, lengths, strict=True):
        assert close(part, expected[:n], 1e-12)
    for step in range(more):
        ends = [n + step for n in lengths]
        logits = model(torch.stack([row[end] for row, end in zip(rows, ends, strict=True)]), [1] * 4, cache=cache)
        expected = torch.stack([row[end] for row, end in zip(alone, ends, strict=True)])
        assert close(logits, expected, 1e-12)


@mutation(
    "lora/network/cache.py",
    "self.lengths = [self.lengths[row] for row in rows]",
    "self.lengths = self.lengths[: len(rows)]",
)
def test_rows_that_are_kept_go_on_as_if_they_had_been_alone():
    model, lengths = tiny_model(), [9, 2, 17, 5]
    rows = [some_tokens(n + 4, seed=n) for n in lengths]
    cache = model.new_cache(4, 21)
    model(torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)]), lengths, cache=cache)
    cache.keep([1, 3])
    assert cache.lengths == [2, 5] and cache.keys[0].shape[0] == 2
    chunk = model(torch.cat([rows[1][2:4], rows[3][5:8]]), [2, 3], cache=cache)
    assert close(chunk, torch.cat([model(rows[1])[2:4], model(rows[3])[5:8]]), 1e-12)
    cache.keep([1])
    assert close(model(rows[3][8:9], [1], cache=cache), model(rows[3])[8:9], 1e-12)
