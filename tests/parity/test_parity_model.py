"""transformers as referee: logits, folders in both directions, chat ids. Run with LORA_PARITY=1 it fails, not skips."""

import copy
import json
import os
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

if os.environ.get("LORA_PARITY") == "1":
    import transformers
else:
    transformers = pytest.importorskip("transformers")

from lora import files
from lora.errors import BadInput
from lora.network.config import ModelConfig
from lora.network.decoder import Model
from lora.network.families import FAMILIES
from lora.network.rope import rope_table
from lora.pretrained import ModelFolder, load_chat, load_model, write_model
from tests.helpers import as_true_as, close, example_of, far, randomise, some_tokens, tiny_config, tiny_model
from tests.network.test_families import NEW, family_config, on_disk
from tests.network.test_model import LLAMA3, random_config
from tests.text.test_template import (
    CALM,
    CONTROL,
    OPEN,
    QWEN3,
    SPELLED,
    TEMPLATES,
    TEXT,
    byte_level,
    byte_level_json,
    chat_of,
    conversations,
    turns,
)

transformers.logging.set_verbosity_error()
LLAMA3_TOKENS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}


def theirs(raw: dict):
    """transformers' model of a raw config.json, in float32, eager attention, eval mode."""
    raw = copy.deepcopy(raw)  # it writes into them
    config = transformers.AutoConfig.for_model(**raw)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()


def pair(raw: dict, seed: int):
    """Our model and theirs with the same random weights."""
    ours = randomise(Model(ModelConfig.from_json(raw)), seed).requires_grad_(False).eval()
    reference = theirs(raw)
    missing, extra = reference.load_state_dict(on_disk(ours), strict=False)
    assert not extra and set(missing) <= ({"lm_head.weight"} if ours.config.tie_word_embeddings else set())
    reference.tie_weights()
    return ours, reference


@torch.inference_mode()
def logits_of(reference, tokens: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    future = torch.full((len(tokens), len(tokens)), float("-inf"), dtype=reference.dtype).triu(1)  # (T, T)
    positions = None if positions is None else positions[None]  # without a mask, gaps would mean packed documents
    return reference(tokens[None], future[None, None], position_ids=positions, use_cache=False).logits[0]


@torch.inference_mode()
def seen_as_they_say(reference, tokens: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Logits under the masks that transformers makes, windows and all."""
    positions = torch.arange(start, start + len(tokens))[None]
    return reference(tokens[None], position_ids=positions, use_cache=False).logits[0]


def agree(ours: torch.Tensor, reference, look, *given) -> bool:
    """Our float32 logits are as true as `look(reference, *given)`. The truth is the reference itself in float64, which
    forms its angles in float32 all the same, as ours are: beyond position 5,000 that alone is 2e-3."""
    return as_true_as(ours, look(reference, *given), look(copy.deepcopy(reference).double(), *given))


# ---- logits ----------------------------------------------------------------------------------------------------------


STRANGE = {  # fields that some families compute with, and values that change what they compute
    "attn_logit_softcapping": 3.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 7, "sliding_window": 5,
    "use_sliding_window": True, "attention_bias": True, "mlp_bias": True, "qkv_bias": True, "max_window_layers": 1,
    "partial_rotary_factor": 0.5, "rope_local_base_freq": 77.0, "no_rope_layer_interval": 3, "use_qk_norm": True,
    "sliding_window_pattern": 3, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "silu", "logit_scale": 0.5,
    "embedding_multiplier": 3.0, "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "no_rope_layers": [0, 1, 0], "rope_interleaved": True, "embd_pdrop": 0.1, "original_max_position_embeddings": 8,
}  # fmt: skip


@pytest.mark.parametrize("field", STRANGE)
@pytest.mark.parametrize("kind", ["llama", "qwen2", *(kind for kind in NEW if kind != "baichuan")])
def test_a_field_changes_what_it_changes_in_the_reference_or_is_refused(kind, field):
    """Gemma 3 stores `attn_logit_softcapping`, and transformers never computes with it."""
    raw = family_config(kind) if kind in NEW else tiny_config(model_type=kind)
    value = STRANGE[field]
    raw[field] = (value * 9)[: raw["num_hidden_layers"]] if isinstance(value, list) else value
    try:
        ModelConfig.from_json(raw)
    except BadInput as error:
        assert f":{field}: " in str(error)
        return
    ours, reference = pair(raw, 0)
    tokens = some_tokens(31, ours.config.vocab_size)
    assert agree(ours(tokens), reference, seen_as_they_say, tokens)


@pytest.mark.parametrize("seed", range(25))
def test_logits_of_random_configs_are_those_of_transformers(seed):
    raw = random_config(seed)
    ours, reference = pair(raw, seed)
    tokens = some_tokens(67, raw["vocab_size"], seed)
    expected = logits_of(reference, tokens)
    assert expected.std() > 0.5
    assert agree(ours(tokens), reference, logits_of, tokens)
    positions = torch.arange(67) * 3 + 5000 + 97 * seed
    assert agree(ours(tokens, positions=positions), reference, logits_of, tokens, positions)
    assert far(ours(tokens), logits_of(reference, tokens, positions), 1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"baichuan"}))
def test_absent_fields_mean_what_transformers_means_by_them(family):
    raw = {"model_type": family, "vocab_size": 90, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 7,
           "num_attention_heads": 8, "pad_token_id": 0}  # fmt: skip
    raw |= {"num_key_value_heads": 2} if family in ("qwen2", "qwen3", "exaone4") else {}  # 32 there; never left out
    raw |= {"head_dim": 4} if family == "hunyuan_v1_dense" else {}  # without it, the reference ends in a traceback
    if family == "gemma4_text":  # absent, half a billion weights: compared as a number, and then made smaller
        their_config = transformers.AutoConfig.for_model(**raw)
        assert ModelConfig.from_json(raw).gemma4.inputs_vocab_size == their_config.vocab_size_per_layer_input
        raw |= {"vocab_size_per_layer_input": 90}
    if family == "granitemoehybrid":  # absent, these mean what is refused
        raw |= {"num_local_experts": 0, "position_embedding_type": "rope", "layer_types": ["attention"] * 7}
        raw |= {"mamba_n_heads": 2, "shared_intermediate_size": 40}
    ours, reference = pair(raw, 0)
    tokens, config = some_tokens(67, 90), reference.config
    assert agree(ours(tokens), reference, seen_as_they_say, tokens)
    for field in ("max_position_embeddings", "rms_norm_eps", "num_key_value_heads", "tie_word_embeddings"):
        theirs = "norm_eps" if family == "lfm2" and field == "rms_norm_eps" else field
        assert getattr(ours.config, field) == getattr(config, theirs), field
    windows = [getattr(getattr(layer, "self_attn", None), "sliding_window", None) for layer in reference.model.layers]
    windows = [config.sliding_window] * 7 if family in ("mistral", "phi3") else windows
    if family == "exaone4":  # each layer has the number, and three of four use it
        windows = [
            window if layer.self_attn.is_sliding else None
            for window, layer in zip(windows, reference.model.layers, strict=True)
        ]
    assert list(ours.config.windows) == windows


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_logits_of_qwen_with_windows_in_its_last_layers_are_those_of_transformers(family):
    raw = tiny_config(model_type=family, use_sliding_window=True, sliding_window=7, max_window_layers=1, head_dim=8,
                      num_hidden_layers=3)  # fmt: skip
    ours, reference = pair(raw, 0)
    tokens = some_tokens(67)
    assert agree(ours(tokens), reference, seen_as_they_say, tokens)
    without = pair({**raw, "use_sliding_window": False}, 0)[0]
    assert far(without(tokens), ours(tokens), 1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "glm4"])
def test_error_in_bfloat16_is_at_most_that_of_transformers(family):
    raw = tiny_config(model_type=family, hidden_size=48, head_dim=16, num_hidden_layers=4, pad_token_id=0)
    ours, reference = pair(raw, 3)
    ours, reference = ours.bfloat16(), reference.bfloat16()
    tokens = some_tokens(128)
    exact = tiny_model(torch.float64, **raw)
    exact.load_state_dict({name: tensor.double() for name, tensor in ours.state_dict().items()})
    truth = exact(tokens)
    mine, other = ours(tokens).double(), seen_as_they_say(reference, tokens).double()
    assert as_true_as(mine, other, truth, factor=1.5, floor=2**-8)
    assert (mine - truth).pow(2).mean().sqrt() <= 1.2 * (other - truth).pow(2).mean().sqrt()


# ---- folders in both directions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("size", ["1GB", "4KB"])
def test_a_folder_that_transformers_wrote_loads_here(tmp_path, seed, size):
    raw = random_config(seed)
    _, reference = pair(raw, seed)
    reference.save_pretrained(tmp_path, max_shard_size=size)
    loaded = load_model(ModelFolder(tmp_path))
    tokens = some_tokens(67, raw["vocab_size"])
    assert agree(loaded(tokens), reference, logits_of, tokens)
    assert (tmp_path / "model.safetensors.index.json").exists() == (size == "4KB")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_a_written_folder_loads_in_transformers_with_the_same_logits(tmp_path, seed, dtype):
    raw = random_config(seed) | {"torch_dtype": "float32"}
    _, reference = pair(raw, seed)
    (tmp_path / "base").mkdir()
    reference.save_pretrained(tmp_path / "base", max_shard_size="4KB")
    (tmp_path / "merged").mkdir()
    target = "model.layers.0.self_attn.q_proj.weight"
    change = torch.randn(ModelFolder(tmp_path / "base").header[target][1]) / 5
    write_model(ModelFolder(tmp_path / "base"), tmp_path / "merged",
                lambda name, tensor: tensor + change if name == target else tensor, dtype)  # fmt: skip
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype="auto", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert again.dtype == (dtype or torch.float32)
    tokens = some_tokens(67, raw["vocab_size"])
    expected = logits_of(again.float().eval(), tokens)
    assert close(load_model(ModelFolder(tmp_path / "merged"))(tokens), expected, 1e-4)
    assert far(logits_of(reference, tokens), expected, 1e-4)


# ---- tokenizer and chat ----------------------------------------------------------------------------------------------

CHATS = {
    "smollm2": {"eos_token": "<|im_end|>"},
    "marked": {"eos_token": "<|im_end|>"},
    "strict": {"eos_token": "<|im_end|>"},
    "llama3-lines": LLAMA3_TOKENS,
    "llama2": {"bos_token": "<s>", "eos_token": "</s>"},
    "dated-lines": LLAMA3_TOKENS,
    "qwen2.5": {"eos_token": "<|im_end|>"},
    "qwen3": {"eos_token": "<|im_end|>"},
    "mistral": {"bos_token": "<s>", "eos_token": "</s>"},
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>"},
    "deepseek": {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"},
}
CONVERSATIONS = [
    turns("Who are you?"),
    turns("Hi", "Hello.", "  Blanks before and after  "),
    turns("Hi", "Hello.", "More\n\nlines\n", "of 日本語 👩‍🚀.", "It's 2 + 2 = 4, isn't it?", system="Be brief.\n"),
    turns("{{ messages }} {% if %}", "{# not a comment #}", "naïve \u2028 café"),
]


def chat_folder(path, name: str):
    source = QWEN3 if name == "qwen3" else TEMPLATES[name][0]
    template = source.replace("strftime_now('%d %b %Y')", "'today'")  # there it is today
    data = byte_level_json(name.endswith("-lines"))
    raw = tiny_config(vocab_size=600, eos_token_id=0)
    model = randomise(Model(ModelConfig.from_json(raw)))
    path.mkdir()
    (path / "config.json").write_text(json.dumps(raw))
    header = {name: ("F32", tuple(t.shape)) for name, t in model.state_dict().items()}
    files.write_safetensors(path / "model.safetensors", header, model.state_dict().__getitem__, {"format": "pt"})
    (path / "tokenizer.json").write_bytes(data)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                "chat_template": template, **CHATS[name]}  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("name", CHATS)
def test_ids_are_those_of_the_tokenizer_and_template_of_transformers_also_after_merging(tmp_path, name):
    base = chat_folder(tmp_path / "base", name)
    (tmp_path / "merged").mkdir()
    write_model(ModelFolder(base), tmp_path / "merged", lambda name, tensor: tensor)
    for path in (base, tmp_path / "merged"):
        ours, reference = load_chat(ModelFolder(path)), transformers.AutoTokenizer.from_pretrained(path)
        for text in ("Hello  there\n\n", "naïve 日本語 👩‍🚀", "<|im_end|> inside", "", *CONTROL):
            assert ours.tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)
        for messages in CONVERSATIONS:
            if name in ("strict", "mistral", "gemma") and messages[0]["role"] == "system":
                messages = messages[1:]
            if messages[-1]["role"] == "user":
                assert ours.prompt(messages) == ids_of(reference, messages, True)
            if name == "qwen3":  # an example for each answer
                places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
                found = [part.tokens for part in ours.tokenize(messages)] if places else []
                assert found == [ids_of(reference, messages[: i + 1], False) for i in places]
            elif len(messages) > 1:
                whole = messages if messages[-1]["role"] == "assistant" else messages[:-1]
                assert example_of(ours, whole).tokens == ids_of(reference, whole, False)
        assert ours.cuts == ours.guarded == 0


@cache
def both_chats(name: str):
    path = chat_folder(Path(tempfile.mkdtemp()) / "base", name)
    return load_chat(ModelFolder(path)), transformers.AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("name", CHATS)
@hypothesis_settings(max_examples=100, **CALM)
@given(messages=conversations(st.one_of(TEXT, TEXT, TEXT, SPELLED)))
def test_ids_of_any_conversation_are_those_of_transformers_but_for_the_two_counted_exceptions(name, messages):
    if name in ("strict", "mistral", "gemma"):
        messages = [m for m in messages if m["role"] != "system"]
    ours, reference = both_chats(name)
    places = [i for i, m in enumerate(messages) if m["role"] == "assistant"] if name == "qwen3" else [len(messages) - 1]
    for place, part in zip(places, ours.tokenize(messages), strict=True):
        whole, before = messages[: place + 1], (ours.cuts, ours.guarded)
        [alone] = ours.tokenize(whole, "last")
        cut, guarded = ours.cuts > before[0], ours.guarded > before[1]
        assert alone.tokens == part.tokens and ours.tokenizer.decode(part.tokens) is not None
        spelled = any(control in m["content"] for m in whole for control in CONTROL)
        assert guarded == spelled
        theirs = ids_of(reference, whole, False)
        prompt, theirs_prompt = ours.prompt(messages[:place]), ids_of(reference, messages[:place], True)
        if not guarded and not cut:
            assert part.tokens == theirs and prompt == theirs_prompt
        elif not guarded:  # the same text, cut where generation begins
            assert ours.tokenizer.spell(part.tokens) == reference.decode(theirs)
            assert part.tokens[: len(prompt)] == prompt
            if len(places) == 1 and sum(m["role"] == "assistant" for m in whole) == 1:
                assert prompt == theirs_prompt != theirs[: len(prompt)]
        else:  # the same text, in which only the template has written control tokens
            harmless = [{**m, "content": "x"} for m in whole]
            controls = set(ours.tokenizer.control.values())
            assert ours.tokenizer.spell(part.tokens) == reference.decode(theirs)
            assert [i for i in part.tokens if i in controls] == [
                i for i in ids_of(reference, harmless, False) if i in controls
            ]


def ids_of(reference, messages: list[dict], generate: bool) -> list[int]:
    return reference.apply_chat_template(messages, add_generation_prompt=generate, tokenize=True, return_dict=False)


def test_a_template_without_control_tokens_differs_by_the_end_of_turn_only():
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level()._fast, chat_template=OPEN)
    messages = turns("Hi", "Hello.")
    expected = ids_of(reference, messages, False)
    assert example_of(chat_of("open"), messages).tokens == [*expected, byte_level().id("<|endoftext|>")]


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 2.5}, LLAMA3])
def test_rope_frequencies_are_those_of_transformers(scaling):
    raw = tiny_config(head_dim=64, hidden_size=96, rope_theta=500000.0, rope_scaling=scaling,
                      max_position_embeddings=131072)  # fmt: skip
    positions = torch.tensor([0, 1, 77, 5001, 70001, 131071])
    rotary = theirs(raw).model.rotary_emb
    expected = rotary(torch.zeros(1, 1, 64), positions[None])
    for a, b in zip(rope_table(ModelConfig.from_json(raw), positions, torch.float32)[:2], expected, strict=True):
        assert torch.equal(a, b[0])
