"""Every family: the decoder equals the numpy oracle, and adapters, packing, cache, folders and merging work for it."""

import json
import random

import gguf
import numpy as np
import pytest
import torch

from lora import ops
from lora.adapter import merge, store
from lora.adapter.inject import lora_layers
from lora.errors import BadInput
from lora.files import Safetensors, write_tensors
from lora.network.config import ModelConfig
from lora.network.decoder import Model
from lora.network.families import FAMILIES
from lora.ops import fast_log_probs, plain, windowed_attention
from lora.ops.fast_decoding import for_decoding
from lora.pretrained import ModelFolder, find, load_model, write_model
from lora.pretrained.gguf import GGUFFile
from lora.train.evaluate import divergence
from tests import oracle
from tests.helpers import as_written, close, far, patched, randomise, same, snapshot, some_tokens, tiny_config
from tests.mutation import mutation
from tests.pretrained.gguf_converter import permuted
from tests.pretrained.test_gguf import write

NEW = sorted(FAMILIES.keys() - {"llama", "qwen2"})
TOL = 1e-12
each = pytest.mark.parametrize("kind", NEW)
Q_K_V = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = {"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}
FUSED = {
    "baichuan": {"self_attn.W_pack": Q_K_V},
    "phi3": {"self_attn.qkv_proj": Q_K_V, **GATE_UP},
    "glm4": GATE_UP,
    "granitemoehybrid": {"shared_mlp.input_linear": ("shared_mlp.gate_proj", "shared_mlp.up_proj")},
}
FREE_HEAD_DIM = (
    "qwen3", "qwen3_5_text", "ministral3", "gemma2", "gemma3_text", "glm4", "ernie4_5", "seed_oss", "exaone4",
)  # fmt: skip


def family_config(kind: str, seed: int = 0) -> dict:
    """A raw config.json of random odd sizes, in which everything in which the family differs is at work: windows are
    shorter than the tests' documents."""
    draw = random.Random(f"{kind} {seed}")
    wide = seed > 5  # the first are small, as every test here takes them
    kv_heads, group = (draw.choice((1, 2, 3, 5) if wide else (1, 2, 3)) for _ in range(2))
    heads = kv_heads * group
    d = draw.choice((4, 8, 12, 20) if wide else (8, 12))  # half of it is even
    free_head_dim = kind in FREE_HEAD_DIM
    config = {
        "model_type": kind, "vocab_size": draw.randint(90, 140), "num_hidden_layers": draw.choice((2, 3)),
        "hidden_size": heads * (2 * draw.randint(2, 6) if free_head_dim else d),
        "intermediate_size": draw.randint(17, 60),
        "num_attention_heads": heads, "num_key_value_heads": None if kind == "baichuan" else kv_heads,
        "head_dim": d if free_head_dim else None, "max_position_embeddings": 16384, "pad_token_id": 0,
        "rms_norm_eps": draw.choice((1e-6, 1e-5, 1e-2)), "tie_word_embeddings": bool(seed % 2),
        "rope_theta": None if kind == "baichuan" else draw.choice((1000.0, 10000.0, 500000.0)),
    }  # fmt: skip
    window = draw.choice((5, 11, 20))
    config |= {
        "mistral": {"sliding_window": window if seed % 3 != 2 else None},
        "ministral3": {"rope_theta": None, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 12,
            "beta_fast": 4.0, "beta_slow": 1.0, "llama_4_scaling_beta": 0.2}},
        "qwen3_5_text": {"num_hidden_layers": 3, "full_attention_interval": 2 + seed % 2, "rope_theta": None,
                         "partial_rotary_factor": None, "rope_parameters": {
                             "rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5},
                         "linear_num_key_heads": draw.choice((1, 2)), "linear_num_value_heads": 2 * (1 + seed % 2),
                         "linear_key_head_dim": 6, "linear_value_head_dim": 10, "linear_conv_kernel_dim": 3 + seed % 2},
        "qwen3": {"attention_bias": bool(seed % 3), "max_window_layers": 1, "sliding_window": window,
                  "use_sliding_window": seed % 3 == 1},
        "smollm3": {"no_rope_layer_interval": 2, "attention_bias": seed % 3 == 1, "mlp_bias": seed % 3 == 2,
                    "no_rope_layers": [0, 1, 1, 0] if seed % 3 == 2 else None},
        "phi3": {"sliding_window": window if seed % 3 != 2 else None,
                 "partial_rotary_factor": (None, 0.5, 1.0)[seed % 3]},
        "gemma2": {"sliding_window": window, "query_pre_attn_scalar": d if seed % 2 else 7,
                   "attn_logit_softcapping": 5.0, "final_logit_softcapping": 9.0, "attention_bias": seed % 3 == 1},
        "gemma3_text": {"sliding_window": window, "query_pre_attn_scalar": d if seed % 2 else 7,
                        "num_hidden_layers": 3, "rope_local_base_freq": 100.0, "attention_bias": seed % 3 == 1,
                        "sliding_window_pattern": 2, "final_logit_softcapping": None,
                        "rope_scaling": {"rope_type": "linear", "factor": 2.5} if seed % 3 == 2 else None},
        "glm4": {"partial_rotary_factor": 0.5, "attention_bias": bool(seed % 3)},
        "granite": {"attention_bias": seed % 3 == 1, "mlp_bias": seed % 3 == 2, "embedding_multiplier": 3.0,
                    "residual_multiplier": 0.4, "attention_multiplier": 0.3, "logits_scaling": 0.7},
        "granitemoehybrid": {"attention_bias": seed % 3 == 1, "embedding_multiplier": 3.0, "residual_multiplier": 0.4,
                             "attention_multiplier": 0.3, "logits_scaling": 0.7, "num_local_experts": 0,
                             "position_embedding_type": "rope", "shared_intermediate_size": draw.randint(17, 60),
                             "layer_types": ["attention"] * 3, "num_hidden_layers": 3, "mamba_n_heads": 2},
        "lfm2": {"norm_eps": 1e-2, "conv_L_cache": 3 + seed % 2, "block_multiple_of": 7, "num_hidden_layers": 3,
                 "block_auto_adjust_ff_dim": seed % 3 != 1, "layer_types": ["conv", "full_attention", "conv"]},
        "olmo2": {"attention_bias": seed % 3 == 1},
        "olmo3": {"attention_bias": seed % 3 == 1, "sliding_window": window, "num_hidden_layers": 4, "rope_theta": None,
                  "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
                                      "full_attention": {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0,
                                                         "original_max_position_embeddings": 12}}},
        "exaone4": {"sliding_window": window if seed % 3 != 2 else None, "num_hidden_layers": 3,
                    "sliding_window_pattern": 2 if seed % 3 != 2 else None},
        "ernie4_5": {"use_bias": seed % 3 == 1},
        "hunyuan_v1_dense": {"attention_bias": seed % 3 == 1, "use_qk_norm": True, "head_dim": d, "rope_scaling": {
            "type": "dynamic", "alpha": 50.0, "factor": 1.0, "beta_fast": 32} if seed % 3 != 2 else None},
        "gemma4_text": {"num_hidden_layers": 5, "sliding_window": window, "global_head_dim": 2 * d, "head_dim": d,
                        "num_kv_shared_layers": 2 + seed % 2, "hidden_size_per_layer_input": 6 + 2 * (seed % 2),
                        "vocab_size_per_layer_input": 143, "use_double_wide_mlp": seed % 3 != 1,
                        "attention_bias": seed % 3 == 1, "final_logit_softcapping": 9.0 if seed % 3 else None,
                        "layer_types": (["sliding_attention", "full_attention"] * 3)[-5:], "rope_theta": None,
                        "rope_parameters": {
                            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25,
                                               "rope_theta": 1000.0}}},
        "seed_oss": {"attention_bias": seed % 3 != 1, "attention_out_bias": seed % 3 == 2, "mlp_bias": seed % 3 == 0,
                     "attention_dropout": 0.1, "residual_dropout": 0.1},
    }.get(kind, {})  # fmt: skip
    if kind.startswith("gemma"):
        config |= {"hidden_activation": "gelu_pytorch_tanh"}
    elif wide and free_head_dim:
        config |= {"hidden_size": draw.randint(12, 90)}
    return tiny_config(**config)


def model_of(raw: dict, seed: int = 0, dtype=torch.float64) -> Model:
    return randomise(Model(ModelConfig.from_json(raw)).to(dtype), seed).requires_grad_(False).eval()


def family_model(kind: str, seed: int = 0, dtype=torch.float64) -> Model:
    return model_of(family_config(kind, seed), seed, dtype)


def on_disk(model) -> dict[str, torch.Tensor]:
    """A model's tensors as its family's files have them."""
    tensors = dict(model.state_dict())
    for whole, parts in FUSED.get(model.config.model_type, {}).items():
        for i in range(model.config.num_hidden_layers):
            for kind in ("weight", "bias"):
                names = [f"model.layers.{i}.{part}.{kind}" for part in parts]
                if names[0] in tensors:
                    tensors[f"model.layers.{i}.{whole}.{kind}"] = torch.cat([tensors.pop(name) for name in names])
    return tensors


def folder_of(model, raw: dict, path):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    write_tensors(path / "model.safetensors", on_disk(model), {"format": "pt"})
    return path


# ---- logits ----------------------------------------------------------------------------------------------------------


@mutation(
    "lora/network/layers.py",
    "self.offset + self.weight.to(wide(self.weight.dtype)) if self.offset else self.weight",
    "self.weight",
    case="0-gemma2",
)
@mutation("lora/network/layer_fields.py", "(i + 1) % interval != 0", "i % interval != 0", case="0-smollm3")
@mutation(
    "lora/network/rope.py",
    "angles.repeat_interleave(2, -1) if config.rope_interleaved else",
    "angles.repeat_interleave(2, -1) if False else",
    case="0-glm4",
)
@mutation(
    "lora/network/rope.py",
    "theta = config.rope_local_theta if local",
    "theta = config.rope_theta if local",
    case="0-gemma3_text",
)
@each
@pytest.mark.parametrize("seed", range(3))
def test_logits_equal_the_numpy_oracle(kind, seed):
    raw = family_config(kind, seed)
    model, tokens = model_of(raw, seed), some_tokens(41, raw["vocab_size"], seed)
    arrays = {name: tensor.numpy() for name, tensor in on_disk(model).items()}
    expected = torch.from_numpy(oracle.logits(raw, arrays, tokens.tolist()))
    assert expected.std() > 0.5
    assert close(model(tokens), expected, TOL)


def test_configs_have_what_each_family_brings():
    configs = {(kind, seed): ModelConfig.from_json(family_config(kind, seed)) for kind in NEW for seed in range(3)}
    windowed = {kind for (kind, _), c in configs.items() if any(w and w < 21 for w in c.windows)}
    assert windowed == {"mistral", "qwen3", "phi3", "gemma2", "gemma3_text", "gemma4_text", "olmo3", "exaone4"}
    assert {kind for (kind, _), c in configs.items() if None in c.ropes} == {
        "smollm3", "qwen3_5_text", "exaone4", "lfm2"}  # fmt: skip
    assert {kind for (kind, _), c in configs.items() if "local" in c.ropes} == {
        "gemma3_text", "gemma4_text", "olmo3"}  # fmt: skip
    assert {kind for (kind, _), c in configs.items() if c.rotary_dim < c.head_dim} == {
        "phi3", "glm4", "qwen3_5_text"}  # fmt: skip
    assert {kind for (kind, _), c in configs.items() if {"delta", "conv"} & set(c.mixers)} == {"qwen3_5_text", "lfm2"}
    assert {kind for (kind, _), c in configs.items() if c.rope_scaling.q_beta} == {"ministral3"}
    assert {kind for (kind, _), c in configs.items() if c.query_pre_attn_scalar != c.head_dim} == {
        "gemma2", "gemma3_text", "granite", "granitemoehybrid"}  # fmt: skip
    assert {kind for (kind, _), c in configs.items() if c.qkv_bias} == {
        "qwen3", "smollm3", "glm4", "gemma2", "gemma3_text", "gemma4_text", "granite", "granitemoehybrid", "olmo2",
        "olmo3", "ernie4_5", "hunyuan_v1_dense", "seed_oss"}  # fmt: skip
    assert {kind for (kind, _), c in configs.items() if c.qk_norm == "projection"} == {"olmo2", "olmo3"}
    assert {kind for (kind, _), c in configs.items() if c.qk_norm == "turned"} == {"hunyuan_v1_dense"}
    for kind in NEW:
        assert {configs[kind, seed].tie_word_embeddings for seed in range(3)} == {True, False}
    assert {c.num_attention_heads // c.num_key_value_heads for c in configs.values()} == {1, 2, 3}


# ---- attention with a window or a cap --------------------------------------------------------------------------------


def textbook(q, k, v, window, cap):
    """One query and head at a time."""
    (T, H, d), (S, KV, _) = q.shape, k.shape
    out = []
    for t in range(T):
        end = S - T + t + 1
        seen = slice(max(0, end - window) if window else 0, end)
        for h in range(H):
            scores = k[seen, h * KV // H] @ q[t, h] / d**0.5
            scores = scores if cap is None else cap * (scores / cap).tanh()
            out.append(scores.softmax(0) @ v[seen, h * KV // H])
    return torch.stack(out).view(T, H, d)


@mutation("lora/ops/plain.py", "tril(S - T - window)", "tril(S - T - window - 1)")
@pytest.mark.parametrize("short", [512, 6])
@pytest.mark.parametrize(("window", "cap"), [(1, None), (4, None), (9, 1.5), (None, 1.5), (40, None)])
@pytest.mark.parametrize(("T", "S"), [(1, 1), (17, 17), (5, 23), (1, 23)])
def test_windows_and_caps_equal_the_textbook_with_gradients(T, S, window, cap, short, monkeypatch):
    monkeypatch.setattr(ops, "SHORT", short)
    monkeypatch.setattr(windowed_attention, "QUERIES", short)
    random = torch.Generator().manual_seed(T + S)
    tensors = [torch.randn(n, 6 if i == 0 else 3, 8, generator=random, dtype=torch.float64).requires_grad_()
               for i, n in enumerate((T, S, S))]  # fmt: skip
    g = torch.randn(T, 6, 8, generator=random, dtype=torch.float64)
    found = []
    for form in (textbook, ops.attend, windowed_attention.attend if window else ops.attend, plain.attend):
        out = form(*tensors, window, cap)
        found.append([out, *torch.autograd.grad(out, tensors, g)])
    for other in found[1:]:
        assert all(close(a, b, TOL) for a, b in zip(other, found[0], strict=True))


def test_documents_no_longer_than_the_window_go_the_fast_way():
    q = torch.randn(12, 4, 8, requires_grad=True)
    assert "Causal" in type(ops.attention(q, q, q, [7, 5], 7).grad_fn).__name__
    assert "Causal" not in type(ops.attention(q, q, q, [7, 5], 6).grad_fn).__name__


# ---- adapters, packing, cache ----------------------------------------------------------------------------------------

LENGTHS = [23, 1, 30, 7]


def gradients(model, tokens, lengths, g) -> list[torch.Tensor]:
    hidden = model.trunk(tokens, lengths)
    parameters = [p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]
    return [hidden, *torch.autograd.grad(model.head(hidden), parameters, g)]


@mutation(
    "lora/ops/__init__.py",
    "return torch.cat([attend(*document, window, cap) for document in documents])",
    "return attend(q, k, v, window, cap)",
)
@each
def test_documents_end_to_end_equal_one_by_one_and_fast_paths_equal_plain_ones(kind, monkeypatch):
    model = patched(family_model(kind))
    vocab = model.config.vocab_size
    tokens = some_tokens(sum(LENGTHS), vocab)
    g = torch.randn(len(tokens), vocab, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    together = gradients(model, tokens, LENGTHS, g)
    parts = zip(tokens.split(LENGTHS), LENGTHS, g.split(LENGTHS), strict=True)
    alone = [gradients(model, part, [n], g1) for part, n, g1 in parts]
    alone = [torch.cat([a[0] for a in alone]), *(sum(parts) for parts in zip(*(a[1:] for a in alone), strict=True))]
    model.checkpoint_activations = True
    again = gradients(model, tokens, LENGTHS, g)
    model.checkpoint_activations = False
    with as_written():
        expected = gradients(model, tokens, LENGTHS, g)
    in_layers = [{"attention": 14, "delta": 12, "conv": 10}[mixer] for mixer in model.config.mixers]  # A and B
    if kind == "gemma4_text":  # no k and v in layers that use those of others
        in_layers = [count - 4 * (source != i) for i, (count, source) in enumerate(
            zip(in_layers, model.config.gemma4.sources, strict=True))]  # fmt: skip
    assert len(expected) == 1 + sum(in_layers)
    for found in (together, alone, again):
        assert all(close(a, b, 1e-11) and b.abs().max() > 1e-3 for a, b in zip(found, expected, strict=True))


@mutation("lora/network/cache.py", "columns <= ends[:, None] - window", "columns < ends[:, None] - window")
@each
def test_decoding_with_a_cache_equals_the_full_forward_and_rows_of_unequal_length_each_alone(kind):
    model, lengths, more = family_model(kind), [17, 2, 26, 9], 5
    rows = [some_tokens(n + more, model.config.vocab_size, seed=n) for n in lengths]
    alone = [model(row) for row in rows]
    with for_decoding(model.groups()), torch.inference_mode():
        cache = model.new_cache(len(rows), max(lengths) + more)
        model(torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)]), lengths, cache=cache)
        for step in range(more):
            ends = [n + step for n in lengths]
            logits = model(torch.stack([row[e] for row, e in zip(rows, ends, strict=True)]), [1] * 4, cache=cache)
            assert close(logits, torch.stack([row[e] for row, e in zip(alone, ends, strict=True)]), TOL)
        cache = model.new_cache(1, 31)  # in steps of one and of several
        steps = [model(part, [len(part)], cache=cache) for part in rows[2].split([1] * 14 + [9] + [1] * 8)]
    assert close(torch.cat(steps), alone[2], TOL)


@mutation("lora/ops/fast_log_probs.py", "else e.mul_(1 - (z / cap).square())", "else e")
@pytest.mark.parametrize("rows", [3, 256])
def test_losses_and_forgetting_know_the_soft_cap_of_logits(rows):
    model = patched(family_model("gemma2"))
    c, tokens = model.config, some_tokens(30, model.config.vocab_size)
    hidden, targets = model.trunk(tokens[:-1]).detach().requires_grad_(), tokens[1:]
    expected = torch.nn.functional.cross_entropy(model.head(hidden), targets, reduction="sum")
    cap, found = c.final_logit_softcapping, []
    for loss in (expected, plain.cross_entropy(hidden, model.head_weight, targets, cap),
                 (-fast_log_probs.log_probs(hidden, model.head_weight, targets, cap, 1.0, rows)).sum()):  # fmt: skip
        found.append([loss, *torch.autograd.grad(loss, hidden)])
    assert all(close(a, b, TOL) for other in found[1:] for a, b in zip(other, found[0], strict=True))
    assert far(plain.cross_entropy(hidden, model.head_weight, targets), expected, TOL)
    with torch.no_grad():
        base = hidden + 0.1
        now, before = (model.head(states).log_softmax(-1) for states in (hidden, base))
        kl, _, loss = divergence(base, hidden, model.head_weight, targets, rows, cap=cap)
    assert close(
        torch.tensor([kl, loss], dtype=torch.float64),
        torch.stack([(before.exp() * (before - now)).sum(), expected]),
        1e-11,
    )


# ---- files -----------------------------------------------------------------------------------------------------------


@mutation("lora/pretrained/fused.py", "row += found[part][1]", "row = found[part][1]")
@each
def test_a_folder_is_read_and_a_merged_one_written_as_the_family_stores_it(kind, tmp_path):
    model, raw = family_model(kind, dtype=torch.float32), family_config(kind)
    base = folder_of(model, raw, tmp_path / "base")
    loaded = load_model(find(str(base)))
    assert same(snapshot(model), snapshot(loaded))
    patched(loaded)
    store.save(loaded, tmp_path / "adapter", base=str(base))
    again = load_model(str(base))
    store.load(again, tmp_path / "adapter")
    tokens = some_tokens(31, raw["vocab_size"])
    adapted, before = loaded(tokens), snapshot(again)
    assert torch.equal(again(tokens), adapted) and far(model(tokens), adapted, 1e-4)
    merge.merge(again)
    assert close(again(tokens), adapted, 1e-4)
    merge.unmerge(again)
    assert same(before, snapshot(again))

    (tmp_path / "merged").mkdir()
    deltas = {f"{path}.weight": layer.delta() for path, layer in lora_layers(loaded).items()}
    checkpoint = ModelFolder(base)
    write_model(checkpoint, tmp_path / "merged", lambda name, x: (x + deltas[name] if name in deltas else x).detach())
    merged = ModelFolder(tmp_path / "merged")
    assert close(load_model(merged)(tokens), adapted, 1e-4)
    written = {name: tensor.shape for name, tensor in on_disk(model).items()}
    as_llama = FAMILIES[kind].written_as
    assert merged.config["model_type"] == (as_llama or kind)
    stored = Safetensors(tmp_path / "merged" / "model.safetensors").header
    assert (
        (stored.keys() == model.state_dict().keys())
        if as_llama
        else ({name: shape for name, (_, shape) in stored.items()} == {name: tuple(s) for name, s in written.items()})
    )


@pytest.mark.parametrize("kind", ["baichuan", "phi3", "glm4"])
def test_rows_of_a_fused_tensor_are_those_of_its_parts(kind, tmp_path):
    model, raw = family_model(kind, dtype=torch.float32), family_config(kind)
    checkpoint = ModelFolder(folder_of(model, raw, tmp_path / "base"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.read(name), tensor) and checkpoint.shard_of(name) == "model.safetensors"
        assert torch.equal(checkpoint.read_rows(name, 2, 7), tensor[2:7])
    tensors = on_disk(model)
    [name] = [
        n for n in tensors if n.startswith("model.layers.0") and n.endswith(("W_pack.weight", "gate_up_proj.weight"))
    ][:1]
    for broken in (tensors[name][1:], torch.cat((tensors[name], tensors[name][:1]))):
        write_tensors(tmp_path / "base" / "model.safetensors", {**tensors, name: broken}, {"format": "pt"})
        with pytest.raises(BadInput) as refused:
            load_model(str(tmp_path / "base"))
        assert f":{name}:" in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("chatglm", {}, ("model_type", "'chatglm'", "GLM-4-9B-0414")),
        ("qwen", {}, ("model_type", "'qwen'", "Qwen1.5")),
        ("baichuan", {"max_position_embeddings": None}, ("max_position_embeddings", "ALiBi")),
        ("baichuan", {"vocab_size": 125696}, ("vocab_size", "Baichuan2")),
        ("phi3", {"original_max_position_embeddings": 64, "partial_rotary_factor": 1.0,
                  "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
         ("rope_scaling", "short_factor")),
        ("phi3", {"resid_pdrop": 0.1}, ("resid_pdrop",)),
        ("phi3", {"partial_rotary_factor": 0.1}, ("head_dim", "pairs")),
        ("phi3", {"partial_rotary_factor": 1.5}, ("partial_rotary_factor",)),
        ("mistral", {"sliding_window": 0}, ("sliding_window",)),
        ("mistral", {"layer_types": ["full_attention", "full_attention"]}, ("layer_types",)),
        ("gemma2", {"hidden_activation": "gelu"}, ("hidden_activation",)),
        ("gemma2", {"use_bidirectional_attention": True}, ("use_bidirectional_attention",)),
        ("gemma2", {"final_logit_softcapping": 0}, ("final_logit_softcapping",)),
        ("gemma3_text", {"layer_types": ["full_attention"]}, ("layer_types",)),
        ("smollm3", {"no_rope_layers": [1]}, ("no_rope_layers",)),
        ("smollm3", {"use_sliding_window": True}, ("use_sliding_window",)),
        ("qwen3", {"use_sliding_window": True, "sliding_window": "4"}, ("sliding_window",)),
        ("glm4", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ("original_max_position_embeddings",)),
        ("glm4", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, ("rope_parameters", "dynamic")),
        ("qwen3_5_text", {"layer_types": ["full_attention", "sliding_attention"]}, ("layer_types",)),
        ("qwen3_5_text", {"linear_num_value_heads": 3, "linear_num_key_heads": 2}, ("linear_num_key_heads",)),
        ("qwen3_5_text", {"attn_output_gate": False}, ("attn_output_gate",)),
    ],
)  # fmt: skip
def test_what_a_family_does_not_compute_is_refused_by_field_with_what_to_use(kind, fields, words):
    raw = {**(family_config(kind) if kind in FAMILIES else tiny_config(model_type=kind)), **fields}
    if fields.get("max_position_embeddings", 1) is None:
        del raw["max_position_embeddings"]
    raw["num_hidden_layers"] = 2
    with pytest.raises(BadInput) as refused:
        ModelConfig.from_json(raw)
    assert len(refused.value.problems) == 1 and all(word in str(refused.value) for word in words)


def test_new_files_say_the_same_of_rope_and_windows_as_old_ones():
    old = family_config("gemma3_text", 2)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    new = {key: value for key, value in old.items()
           if key not in ("rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern")}  # fmt: skip
    new |= {"layer_types": kinds, "rope_parameters": {
        "full_attention": {"rope_theta": old["rope_theta"], **old["rope_scaling"]},
        "sliding_attention": {"rope_theta": old["rope_local_base_freq"], "rope_type": "default"}}}  # fmt: skip
    assert ModelConfig.from_json(new) == ModelConfig.from_json(old)
    assert ModelConfig.from_json(old).windows == (old["sliding_window"], None, old["sliding_window"])
    old = family_config("glm4")
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "partial_rotary_factor")}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": old["rope_theta"], "partial_rotary_factor": 0.5}
    assert ModelConfig.from_json(new) == ModelConfig.from_json(old)


# ---- GGUF ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3", "smollm3", "glm4", "phi3", "gemma2", "gemma3_text"])
def test_a_gguf_file_gives_the_model_it_was_made_of(kind, tmp_path):
    """Names are those of the gguf package's own table, rows of q and k as llama.cpp's converter moves them."""
    raw = family_config(kind, 2 if kind == "qwen3" else 1) | ({"num_hidden_layers": 4} if kind == "smollm3" else {})
    for field in ("no_rope_layers", "no_rope_layer_interval"):
        raw.pop(field, None)  # which such a file does not have
    heads = {"q_proj": raw["num_attention_heads"], "k_proj": raw["num_key_value_heads"]}
    model = model_of(raw, dtype=torch.bfloat16).double()
    arch, called = next((a, n) for a, n in gguf.MODEL_ARCH_NAMES.items() if n == kind.removesuffix("_text"))
    names, tensors = gguf.get_tensor_name_map(arch, raw["num_hidden_layers"]), {}
    for name, tensor in on_disk(model).items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        moved = kind == "smollm3" and name.split(".")[-2] in heads
        data = tensor.float().numpy() + (kind.startswith("gemma") and name.endswith("norm.weight"))
        tensors[theirs] = permuted(data, heads[name.split(".")[-2]]) if moved else data
    c = model.config
    sizes = {
        "block_count": c.num_hidden_layers, "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size, "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads, "attention.head_count_kv": c.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps, "rope.freq_base": c.rope_theta,
        "attention.key_length": c.head_dim, "attention.value_length": c.head_dim,
        "rope.dimension_count": c.rotary_dim,
    }  # fmt: skip
    more = {"attention.sliding_window": "sliding_window", "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping", "rope.freq_base_swa": "rope_local_base_freq",
            "attention.sliding_window_pattern": "sliding_window_pattern"}  # fmt: skip
    if kind != "qwen3":
        sizes |= {key: raw[field] for key, field in more.items() if field in raw}
    checkpoint = GGUFFile(write(tmp_path / "model.gguf", called, sizes, tensors=tensors))
    read = load_model(checkpoint, torch.float64)
    assert same(snapshot(model), snapshot(read))
    tokens = some_tokens(31, c.vocab_size)
    assert torch.equal(read(tokens), model(tokens))
    unlike = {"eos_token_ids", "rms_norm_eps"}
    assert {k: v for k, v in vars(read.config).items() if k not in unlike} == {
        k: v for k, v in vars(c).items() if k not in unlike
    }


@pytest.mark.parametrize(("layers", "scalar"), [(2, 8.0), (46, 12.0)])
def test_gemma_27b_is_known_by_its_layers_and_keys_of_other_families_are_refused(layers, scalar, tmp_path):
    sizes = {"block_count": layers, "embedding_length": 48, "attention.head_count": 4, "attention.head_count_kv": 2,
             "attention.key_length": 8, "attention.value_length": 8, "attn_logit_softcapping": 50.0}  # fmt: skip
    tensors = {"token_embd.weight": np.zeros((64, 48), np.float32)}
    checkpoint = GGUFFile(write(tmp_path / "model.gguf", "gemma2", sizes, tensors=tensors))
    assert ModelConfig.from_json(checkpoint.config).query_pre_attn_scalar == scalar
    for arch in ("llama", "glm4", "baichuan"):
        with pytest.raises(BadInput) as refused:
            GGUFFile(write(tmp_path / "other.gguf", arch, sizes, tensors=tensors))
        assert ("attn_logit_softcapping" if arch != "baichuan" else "general.architecture") in str(refused.value)
