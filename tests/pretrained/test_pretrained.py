"""A model on disk: loaded strictly or refused by name, written tensor by tensor, and never half there."""

import errno
import json
import os
import pickle
import re
import shutil
import struct
import weakref
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors import safe_open

from lora import files, folders
from lora.data.encode import encode
from lora.data.formats import Conversation
from lora.errors import BadEnvironment, BadInput, Refused
from lora.inference.prompts import encode as encode_prompt
from lora.pretrained import ModelFolder, empty_model, find, load_chat, load_model, write_model
from tests.helpers import same, some_tokens, tiny_config, tiny_model
from tests.mutation import mutation
from tests.text.test_template import CHATML, CONTROL, SMOLLM2, byte_level, byte_level_json

CALM = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}  # other work may share the machine
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tensors_of(model, dtype=None) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype or tensor.dtype) for name, tensor in model.state_dict().items()}


def folder_of(path: Path, tensors: dict, shards: int = 1, **config) -> Path:
    """A hub folder of these tensors, in one file or in several with an index."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(tiny_config(**config)))
    if shards == 1:
        safetensors.torch.save_file(tensors, path / "model.safetensors")
        return path
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    where = {name: names[i % shards] for i, name in enumerate(tensors)}
    for shard in names:
        safetensors.torch.save_file({n: t for n, t in tensors.items() if where[n] == shard}, path / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def problems_of(path: Path, error=BadInput) -> str:
    with pytest.raises(error) as raised:
        load_model(ModelFolder(path))
    assert all("\n" not in problem for problem in raised.value.problems)
    return str(raised.value)


# ---- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_loaded_is_what_was_saved(tmp_path, dtype):
    model = tiny_model(dtype)
    loaded = load_model(ModelFolder(folder_of(tmp_path / "m", tensors_of(model))), dtype)
    assert same(tensors_of(model), tensors_of(loaded))
    assert torch.equal(loaded(some_tokens()), model(some_tokens()))
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())


@pytest.mark.parametrize("shards", [2, 5])
def test_a_sharded_folder_loads_as_one_file_does(tmp_path, shards):
    tensors = tensors_of(tiny_model(torch.float32))
    one = load_model(ModelFolder(folder_of(tmp_path / "one", tensors)))
    many = load_model(ModelFolder(folder_of(tmp_path / "many", tensors, shards)))
    assert same(tensors_of(one), tensors_of(many)) and same(tensors_of(one), tensors)


def test_bfloat16_weights_are_the_same_numbers_in_float32(tmp_path):
    tensors = tensors_of(tiny_model(torch.bfloat16))
    loaded = load_model(ModelFolder(folder_of(tmp_path / "m", tensors)), torch.float32)
    assert same({name: tensor.float() for name, tensor in tensors.items()}, tensors_of(loaded))


@mutation("lora/pretrained/load.py", "elif header[name][1] != expected[name]:", "elif False:")
def test_everything_missing_extra_or_of_another_shape_is_named_at_once(tmp_path):
    tensors = tensors_of(tiny_model(torch.float32))
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(24)
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(24, 12)  # transposed
    found = problems_of(folder_of(tmp_path / "m", tensors)).splitlines()
    assert len(found) == 5
    for kind, name in (
        ("missing", "model.norm.weight"), ("missing", "model.layers.1.mlp.up_proj.weight"),
        ("extra", "model.layers.2.mlp.up_proj.weight"), ("extra", "model.layers.0.self_attn.q_proj.bias"),
        ("wrong", "model.layers.0.self_attn.k_proj.weight"),
    ):  # fmt: skip
        assert sum(line.startswith(f"{kind} tensor in ") and f":{name}: " in line for line in found) == 1
    assert "(24, 12)" in str(found) and "(12, 24)" in str(found)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.int64])
def test_a_quantised_tensor_is_refused_by_name(tmp_path, dtype):
    tensors = tensors_of(tiny_model(torch.float32))
    name = "model.layers.1.self_attn.v_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    assert re.search(
        rf":{name}: dtype \w+\. Give an unquantised model", problems_of(folder_of(tmp_path / "m", tensors))
    )


def test_old_rotary_buffers_are_dropped(tmp_path):
    tensors = tensors_of(tiny_model(torch.float32))
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(2) for i in range(2)}
    loaded = load_model(ModelFolder(folder_of(tmp_path / "m", tensors | extra)))
    assert same(tensors_of(loaded), tensors)


@mutation(
    "lora/pretrained/load.py", "if not same or not torch.equal(base.read(head), base.read(embedding)):", "if not same:"
)
def test_a_head_that_repeats_the_tied_embedding_is_dropped_and_one_that_differs_refused(tmp_path):
    tensors = tensors_of(tiny_model(torch.float32, tie_word_embeddings=True))
    again = tensors | {HEAD: tensors[EMBEDDING].clone()}
    loaded = load_model(ModelFolder(folder_of(tmp_path / "same", again, tie_word_embeddings=True)))
    assert same(tensors_of(loaded), tensors)
    again[HEAD][-1, -1] += 1e-7
    assert not torch.equal(again[HEAD], again[EMBEDDING])
    found = problems_of(folder_of(tmp_path / "other", again, tie_word_embeddings=True))
    assert f":{HEAD}: " in found and "tie_word_embeddings" in found
    again[HEAD] = tensors[EMBEDDING].double()
    assert f":{HEAD}: " in problems_of(folder_of(tmp_path / "wider", again, tie_word_embeddings=True))


def test_an_untied_model_without_a_head_is_refused(tmp_path):
    tensors = tensors_of(tiny_model(torch.float32, tie_word_embeddings=True))
    assert f":{HEAD}: the config asks for it" in problems_of(folder_of(tmp_path / "m", tensors))


@mutation("lora/pretrained/load.py", "if not ops.is_finite(weights[name]):", "if False:")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    tensors = tensors_of(tiny_model(torch.bfloat16))
    for name in ("model.norm.weight", "model.layers.0.mlp.down_proj.weight"):
        tensors[name].view(-1)[5] = value
    found = problems_of(folder_of(tmp_path / "m", tensors)).splitlines()
    assert len(found) == 2 and all("not finite" in line for line in found)
    assert ":model.layers.0.mlp.down_proj.weight:" in found[0] and ":model.norm.weight:" in found[1]


def test_large_finite_weights_whose_sum_overflows_are_accepted(tmp_path):
    tensors = tensors_of(tiny_model(torch.float32))
    tensors["model.norm.weight"].fill_(3e38)
    assert load_model(ModelFolder(folder_of(tmp_path / "m", tensors))).model.norm.weight[0] > 2e38


# ---- files that are not weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
def test_a_folder_with_pickled_weights_only_is_refused_unopened(tmp_path, name):
    path = tmp_path / "m"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(tiny_config()))

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "opened"),)

    (path / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(Refused, match="pickled weights are never opened") as raised:
        ModelFolder(path)
    assert raised.value.code == 5 and not (tmp_path / "opened").exists()


@mutation("lora/files.py", "if start.startswith(pickles) and", "if False and")
@pytest.mark.parametrize("protocol", [2, 4, 5, "zip"])
def test_a_pickle_under_the_name_of_safetensors_is_refused(tmp_path, protocol):
    path = folder_of(tmp_path / "m", tensors_of(tiny_model(torch.float32)))
    if protocol == "zip":
        torch.save({"a": torch.zeros(3)}, path / "model.safetensors")
    else:
        (path / "model.safetensors").write_bytes(pickle.dumps({"a": [1] * 100}, protocol=protocol))
    with pytest.raises(Refused, match=r"model\.safetensors") as raised:
        ModelFolder(path)
    assert raised.value.code == 5


def header_bytes(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 269060552\n"
BROKEN = {
    "empty": b"",
    "short": b"\x10\0\0",
    "a huge header": struct.pack("<Q", 2**62) + b"{}",
    "no json": header_bytes(b"{nothing"),
    "a list": header_bytes(b"[]"),
    "offsets beyond the end": header_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234"),
    "offsets that overlap": header_bytes({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                                          "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "a shape of another size": header_bytes({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}, b"1234"),
    "an overflowing shape": header_bytes({"a": {"dtype": "F32", "shape": [2**63, 2], "data_offsets": [0, 0]}}),
    "an unknown dtype": header_bytes({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "text": b"<html><body>404: not found</body></html>" * 9,
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_safetensors_file_is_bad_input_that_names_it(tmp_path, kind):
    path = folder_of(tmp_path / "m", {"a": torch.zeros(2)})
    (path / "model.safetensors").write_bytes(BROKEN[kind])
    found = problems_of(path)
    assert "model.safetensors" in found and len(found) < 600


def test_a_truncated_file_is_bad_input_at_every_length(tmp_path):
    path = folder_of(tmp_path / "m", {"a": torch.arange(6.0)})
    whole = (path / "model.safetensors").read_bytes()
    for length in range(len(whole)):
        (path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(BadInput):
            ModelFolder(path)


def test_a_git_lfs_pointer_is_named_as_what_it_is(tmp_path):
    path = folder_of(tmp_path / "m", tensors_of(tiny_model(torch.float32)), shards=2)
    (path / "model-00002-of-00002.safetensors").write_bytes(LFS)
    found = problems_of(path)
    assert "git-lfs pointer" in found and "model-00002-of-00002.safetensors" in found


# ---- the index -------------------------------------------------------------------------------------------------------


@mutation(
    "lora/pretrained/folder.py",
    'if not re.fullmatch(r"[\\w.-]+\\.safetensors", name) or name.startswith("."):',
    "if False:",
)
@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "",
                                  "a\\b.safetensors", ".hidden.safetensors", "model.bin", "x.safetensors\n",
                                  "x\0.safetensors"])  # fmt: skip
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    tensors = tensors_of(tiny_model(torch.float32))
    path = folder_of(tmp_path / "m", tensors, shards=2)
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(Refused, match="not a file of this folder") as raised:
        ModelFolder(path)
    assert raised.value.code == 5 and str(index) in str(raised.value)


def test_missing_shards_are_named(tmp_path):
    path = folder_of(tmp_path / "m", tensors_of(tiny_model(torch.float32)), shards=4)
    for i in (2, 4):
        (path / f"model-{i:05}-of-00004.safetensors").unlink()
    found = problems_of(path).splitlines()
    assert len(found) == 2 and "model-00002-of-00004" in found[0] and "model-00004-of-00004" in found[1]


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 3}, "x"])
def test_an_index_without_a_map_of_names_to_files_is_bad_input(tmp_path, weight_map):
    path = folder_of(tmp_path / "m", tensors_of(tiny_model(torch.float32)), shards=2)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "model.safetensors.index.json:weight_map" in problems_of(path)


def test_a_tensor_in_two_files_is_bad_input(tmp_path):
    tensors = tensors_of(tiny_model(torch.float32))
    path = folder_of(tmp_path / "m", tensors, shards=2)
    safetensors.torch.save_file(tensors, path / "model-00002-of-00002.safetensors")
    assert "it is in two files" in problems_of(path)


def test_a_folder_without_config_or_weights_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match=r"there is no config\.json"):
        ModelFolder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    with pytest.raises(BadInput, match=r"there is no model\.safetensors"):
        ModelFolder(tmp_path)
    for text in ("", "[]", "{", '{"a": NaN', "\ud800".encode("utf-8", "surrogatepass").decode("latin1")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(BadInput, match=r"config\.json"):
            ModelFolder(tmp_path)


def test_find_takes_a_folder_and_names_what_it_does_not_find(tmp_path):
    path = folder_of(tmp_path / "m", tensors_of(tiny_model(torch.float32)))
    base = find(str(path))
    assert isinstance(base, ModelFolder) and base.name == str(path)
    for name in ("nosuch", "./no/such", "../nosuch/x", "/no/such/folder", "a/b/c", "x y/z"):
        with pytest.raises(BadInput, match="no model in"):
            find(name)


# ---- tokenizer and template ------------------------------------------------------------------------------------------


def chat_folder(path: Path, settings: dict | None = None, generation: dict | None = None, **config) -> Path:
    folder_of(path, {"a": torch.zeros(1)}, **({"vocab_size": byte_level().size, "eos_token_id": 0} | config))
    (path / "tokenizer.json").write_bytes(byte_level_json())
    settings = {"chat_template": CHATML} if settings is None else settings
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


@pytest.mark.parametrize(
    ("config", "generation", "settings", "stops"),
    [
        ({"eos_token_id": 0}, None, {}, {0, 2}),
        ({"eos_token_id": [0, 8]}, None, {}, {0, 8, 2}),
        ({"eos_token_id": None}, {"eos_token_id": 4}, {}, {4, 2}),
        ({"eos_token_id": 0}, {"eos_token_id": [4, 8]}, {}, {0, 4, 8, 2}),
        ({"eos_token_id": None}, None, {"eos_token": "</s>"}, {4, 2}),
        ({"eos_token_id": None}, None, {"eos_token": {"content": "</s>", "special": True}}, {4, 2}),
        ({"eos_token_id": 0}, {"eos_token_id": ["x", None, -3, 10**9, True]}, {"eos_token": "nosuch"}, {0, 2}),
        ({"eos_token_id": 10**6}, {}, {"eos_token": "<|im_end|>"}, {2}),
    ],
)
def test_generation_stops_at_every_end_token_the_files_name(tmp_path, config, generation, settings, stops):
    path = chat_folder(tmp_path / "m", {"chat_template": CHATML} | settings, generation, **config)
    assert CONTROL[2] == "<|im_end|>" and CONTROL[4] == "</s>" and CONTROL[8] == "<|eot_id|>"
    assert load_chat(ModelFolder(path)).stops == stops


@mutation("lora/pretrained/chat.py", "    for file in SPECIAL_FILES:", "    for file in SPECIAL_FILES[1:]:")
def test_special_tokens_come_from_their_map_and_the_tokenizer_config_is_believed_over_it(tmp_path):
    """As transformers reads them; Gemma's and Llama 2's folders have both files."""
    path = chat_folder(tmp_path / "m", {"chat_template": CHATML, "eos_token": "</s>"})
    given = {"bos_token": "<|im_start|>", "eos_token": "<|eot_id|>", "sep_token": {"content": "<|im_end|>"}, "n": 1}
    (path / "special_tokens_map.json").write_text(json.dumps(given))
    assert load_chat(ModelFolder(path)).template.tokens == {
        "bos_token": "<|im_start|>", "eos_token": "</s>", "sep_token": "<|im_end|>"
    }  # fmt: skip


def test_the_chat_template_comes_from_its_file_else_from_the_tokenizer_config(tmp_path):
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    assert load_chat(ModelFolder(chat_folder(tmp_path / "a"))).template.source == CHATML
    assert load_chat(ModelFolder(chat_folder(tmp_path / "b", {"chat_template": named}))).template.source == CHATML
    path = chat_folder(tmp_path / "c")
    (path / "chat_template.json").write_text(json.dumps({"chat_template": SMOLLM2}))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
    assert load_chat(ModelFolder(path)).template.source == SMOLLM2
    (path / "chat_template.jinja").write_text(CHATML)
    assert load_chat(ModelFolder(path)).template.source == CHATML


@pytest.mark.parametrize("template", [..., None, [{"name": "x", "template": "y"}], [3, "default"], {"default": "x"}])
def test_a_base_model_without_a_chat_template_is_bad_input(tmp_path, template):
    settings = {} if template is ... else {"chat_template": template}
    with pytest.raises(BadInput, match="no chat template"):
        load_chat(ModelFolder(chat_folder(tmp_path / "m", settings)))


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@mutation("lora/text/tokenizer.py", "if i >= self.rows), None)", "if i > self.rows), None)")
@mutation("lora/text/chat.py", """        self._check_rows(tokens)
        answers, masked""", "        answers, masked")  # fmt: skip
@mutation("lora/text/chat.py", """        self._check_rows(tokens)
        return""", "        return")  # fmt: skip
def test_a_token_that_the_model_has_no_embedding_for_is_refused_only_where_a_text_has_it(tmp_path):
    """Gemma 3 of 270M and 1B: 262,145 tokens, 262,144 embeddings."""
    rows = byte_level().size - 1
    assert byte_level().token(rows) == "<think>" and "<think>" not in byte_level().control
    chat = load_chat(ModelFolder(chat_folder(tmp_path / "m", vocab_size=rows)))
    whole = load_chat(ModelFolder(chat_folder(tmp_path / "n", vocab_size=rows + 1)))
    right = [turns("Hi", "Hello."), [{"role": "text", "content": "Once."}]]
    wrong = [turns("Hi", "<think>"), turns("a <think> b", "c"), [{"role": "text", "content": "<think>"}]]
    assert [chat.tokenize(row) for row in right] == [whole.tokenize(row) for row in right]
    what = f"the token '<think>' has id {rows}, the model has {rows} embeddings"
    with pytest.raises(BadInput) as caught:
        encode([Conversation(row, f"rows.jsonl:{n}", "x") for n, row in enumerate(right + wrong, 1)], chat, 999)
    assert [problem.split(". ")[0] for problem in caught.value.problems] == [
        f"wrong row in rows.jsonl:{n}: {what}" for n in (3, 4, 5)
    ]
    assert len(encode([Conversation(row, "x", "x") for row in right + wrong], whole, 999)) == 5
    assert encode_prompt(chat, 999, turns("Hi", "")[:1], "--prompt")
    with pytest.raises(BadInput, match=rf"^wrong prompt in --prompt: {what}\. Leave it out$"):
        encode_prompt(chat, 999, turns("a <think> b", "")[:1], "--prompt")
    with pytest.raises(BadInput, match=r"^wrong prompt in this conversation: "):
        chat.prompt(turns("<think>", "")[:1])


@mutation(
    "lora/text/chat.py",
    'raise BadInput(f"chat template in {template.where}: {error.what}. {fix}") from None',
    "raise",
)
def test_a_template_of_tokens_without_embedding_is_refused_by_its_name(tmp_path):
    template = CHATML.replace("<|im_start|>", "<think>")
    path = chat_folder(tmp_path / "m", {"chat_template": template}, vocab_size=byte_level().size - 1)
    with pytest.raises(BadInput, match=r"^chat template in .*tokenizer_config.json: the token '<think>' has id"):
        load_chat(ModelFolder(path))


def test_an_end_without_an_embedding_ends_nothing(tmp_path):
    """As a pad or eos id that was added to a tokenizer and never to its model."""
    rows, settings = byte_level().size - 1, {"chat_template": CHATML, "eos_token": "<think>", "pad_token": "<think>"}
    path = chat_folder(tmp_path / "m", settings, {"eos_token_id": [4, rows]}, vocab_size=rows, eos_token_id=[0, rows],
                       pad_token_id=rows)  # fmt: skip
    assert load_chat(ModelFolder(path)).stops == {0, 4, 2}


def test_a_tokenizer_that_is_missing_or_broken_is_bad_input(tmp_path):
    path = chat_folder(tmp_path / "m")
    (path / "tokenizer.json").write_bytes(byte_level_json()[:-50])
    with pytest.raises(BadInput, match="broken tokenizer"):
        load_chat(ModelFolder(path))
    (path / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match="no tokenizer"):
        load_chat(ModelFolder(path))


def test_a_model_that_names_no_end_token_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="eos_token_id"):
        load_chat(ModelFolder(chat_folder(tmp_path / "m", eos_token_id=None)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
    | st.sampled_from([CHATML, "default", "<|im_end|>", "model.safetensors", "../x"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["name", "template", "content", "model", "chat_template"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
KEYS = {
    "source.json": ("model", "source", "hub_id"),
    "tokenizer_config.json": ("chat_template", "bos_token", "eos_token", "pad_token", "unk_token"),
    "generation_config.json": ("eos_token_id",),
    "chat_template.json": ("chat_template",),
    "model.safetensors.index.json": ("weight_map", "metadata"),
}


@hypothesis_settings(max_examples=40, **CALM)
@given(st.sampled_from(sorted(KEYS)).flatmap(
    lambda name: st.tuples(st.just(name), JSON | st.dictionaries(st.sampled_from(KEYS[name]), JSON, max_size=4))
))  # fmt: skip
@example(("source.json", {"model": 3}))
@example(("generation_config.json", {"eos_token_id": {}}))
def test_any_json_in_any_small_file_gives_a_chat_or_one_of_our_errors(tmp_path_factory, case):
    name, value = case
    path = chat_folder(tmp_path_factory.mktemp("any") / "m")
    (path / name).write_text(json.dumps(value))
    if name == "model.safetensors.index.json":
        (path / "model.safetensors").unlink()
    try:
        chat = load_chat(ModelFolder(path))
    except (BadInput, Refused) as error:
        assert all(problem for problem in error.problems)
        return
    assert chat.prompt([{"role": "user", "content": "Hi"}])


# ---- writing a model -------------------------------------------------------------------------------------------------


def unchanged(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@mutation(
    "lora/pretrained/write.py",
    "headers.setdefault(shard_of(parts[0]), {})",
    'headers.setdefault("model.safetensors", {})',
)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_written_model_has_the_same_tensors_and_the_same_cut_into_files(tmp_path, shards, dtype):
    tensors = tensors_of(tiny_model(dtype))
    source = ModelFolder(folder_of(tmp_path / "m", tensors, shards, torch_dtype="bfloat16"))
    out = tmp_path / "out"
    out.mkdir()
    write_model(source, out, unchanged)
    again = ModelFolder(out)
    assert same({name: again.read(name) for name in again.header}, tensors)
    assert {name: again.shard_of(name) for name in tensors} == {name: source.shard_of(name) for name in tensors}
    assert (out / "model.safetensors.index.json").exists() == (shards > 1)
    if shards > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: source.shard_of(name) for name in tensors}
        assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in tensors.values())
    assert again.config == source.config
    twice = tmp_path / "twice"
    twice.mkdir()
    write_model(again, twice, unchanged)
    assert {p.name: p.read_bytes() for p in twice.iterdir()} == {p.name: p.read_bytes() for p in out.iterdir()}


def test_a_change_is_written_and_rounded_to_the_stored_dtype(tmp_path):
    tensors = tensors_of(tiny_model(torch.bfloat16))
    source = ModelFolder(folder_of(tmp_path / "m", tensors))
    target, delta = "model.layers.0.mlp.up_proj.weight", torch.randn(40, 24)
    out = tmp_path / "out"
    out.mkdir()
    write_model(source, out, lambda name, t: t.float() + delta if name == target else t)
    expected = tensors | {target: (tensors[target].float() + delta).bfloat16()}
    assert same(tensors_of(load_model(ModelFolder(out), torch.bfloat16)), expected)


@mutation(
    "lora/pretrained/write.py", 'config |= {key: name for key in ("torch_dtype", "dtype") if key in config}', "pass"
)
@pytest.mark.parametrize("key", ["torch_dtype", "dtype", None])
def test_another_dtype_converts_the_tensors_and_the_config_says_so(tmp_path, key):
    tensors = tensors_of(tiny_model(torch.float32))
    config = {key: "float32"} if key else {}
    source = ModelFolder(folder_of(tmp_path / "m", tensors, **config))
    out = tmp_path / "out"
    out.mkdir()
    write_model(source, out, unchanged, torch.float16)
    again = ModelFolder(out)
    assert same({n: again.read(n) for n in again.header}, {n: t.half() for n, t in tensors.items()})
    assert again.config == source.config | ({key: "float16"} if key else {})


def test_leftovers_are_not_written_and_the_small_files_go_along(tmp_path):
    tensors = tensors_of(tiny_model(torch.float32, tie_word_embeddings=True, vocab_size=byte_level().size))
    extra = {HEAD: tensors[EMBEDDING].clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    path = chat_folder(tmp_path / "m", generation={"eos_token_id": 2}, tie_word_embeddings=True)
    safetensors.torch.save_file(tensors | extra, path / "model.safetensors")
    (path / "README.md").write_text("not of this")
    out = tmp_path / "out"
    out.mkdir()
    write_model(ModelFolder(path), out, unchanged)
    assert {p.name for p in out.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json",
                                               "tokenizer_config.json", "generation_config.json"}  # fmt: skip
    assert set(ModelFolder(out).header) == set(tensors)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (path / name).read_bytes()


def test_writing_holds_one_tensor_at_a_time_and_reads_each_once(tmp_path):
    source = ModelFolder(folder_of(tmp_path / "m", tensors_of(tiny_model(torch.float32))))
    living, counts, read = [], [], source.read

    def counted(name, dtype=None):
        counts.append(sum(reference() is not None for reference in living))
        tensor = read(name)
        living.append(weakref.ref(tensor))
        return tensor

    source.read = counted
    out = tmp_path / "out"
    out.mkdir()
    write_model(source, out, unchanged)
    assert len(counts) == len(source.header) and max(counts) <= 1  # the one just written, at the most


def test_the_empty_model_has_no_memory(tmp_path):
    source = ModelFolder(folder_of(tmp_path / "m", tensors_of(tiny_model(torch.float32))))
    model = empty_model(source)
    assert all(p.is_meta for p in model.parameters())
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        n: s for n, (_, s) in source.header.items()
    }


# ---- safetensors -----------------------------------------------------------------------------------------------------

MIXED = {
    "b.weight": torch.randn(3, 5),
    "a.weight": torch.randn(4, dtype=torch.float64),
    "c": torch.randn(2, 3, 4).bfloat16(),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 7),
    "naïve \"name\" 日本": torch.randn(2, 2).bfloat16(),
    "transposed": torch.randn(6, 3).T,
}  # fmt: skip


def header_of(tensors: dict) -> dict:
    return {name: (files.NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}


def test_written_safetensors_are_those_of_the_package_to_the_byte(tmp_path):
    contiguous = {name: tensor.contiguous() for name, tensor in MIXED.items()}
    for metadata in (None, {"format": "pt"}):
        files.write_safetensors(tmp_path / "ours", header_of(MIXED), MIXED.__getitem__, metadata)
        assert same(safetensors.torch.load_file(tmp_path / "ours"), contiguous)
        with safe_open(tmp_path / "ours", "pt") as file:
            assert (file.metadata() or None) == metadata
        assert (tmp_path / "ours").read_bytes() == safetensors.torch.save(contiguous, metadata)


def test_the_order_in_which_tensors_are_given_changes_no_byte(tmp_path):
    backwards = dict(reversed(MIXED.items()))
    for name, tensors in (("a", MIXED), ("b", backwards)):
        files.write_safetensors(tmp_path / name, header_of(tensors), tensors.__getitem__, {"format": "pt"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_tensor_that_is_not_what_was_announced_leaves_no_file(tmp_path):
    for wrong in (torch.zeros(3, 4), torch.zeros(3, 5).bfloat16()):
        with pytest.raises(AssertionError, match=r"b\.weight"):
            files.write_safetensors(tmp_path / "x", {"b.weight": ("F32", (3, 5))}, lambda name: wrong)  # noqa: B023
    assert list(tmp_path.iterdir()) == []


def test_half_precision_of_both_kinds_is_read_by_the_package(tmp_path):
    both = {"x": torch.randn(3).half(), "a": torch.randn(5).bfloat16(), "z": torch.randn(1).bfloat16()}
    files.write_safetensors(tmp_path / "x", header_of(both), both.__getitem__)
    assert same(safetensors.torch.load_file(tmp_path / "x"), both)


# ---- folders that are there whole or not at all ----------------------------------------------------------------------


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@mutation(
    "lora/folders.py",
    """        shutil.rmtree(aside, ignore_errors=True)
        raise""",
    "        raise",
)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [None, {"old": b"1", "more": b"2"}])
def test_an_exception_while_a_folder_is_filled_leaves_everything_as_it_was(tmp_path, error, before):
    path = tmp_path / "deep" / "out"
    if before:
        path.mkdir(parents=True)
        for name, data in before.items():
            (path / name).write_bytes(data)
    with pytest.raises(error), folders.new_folder(path) as folder:
        files.write_bytes(folder / "new", b"3")
        assert not path.exists() or tree(path) == before
        raise error
    assert (tree(path) if path.exists() else None) == before
    assert [p.name for p in path.parent.iterdir()] == (["out"] if before else [])


@pytest.mark.parametrize("before", [False, True])
def test_a_folder_that_ends_well_replaces_the_old_one_whole(tmp_path, before):
    path = tmp_path / "out"
    if before:
        path.mkdir()
        (path / "old").write_bytes(b"1")
    with folders.new_folder(path) as folder:
        files.write_bytes(folder / "new", b"3")
        (folder / "sub").mkdir()
        files.write_bytes(folder / "sub" / "x", b"4")
    assert tree(path) == {"new": b"3", "sub/x": b"4"} and [p.name for p in tmp_path.iterdir()] == ["out"]


@mutation("lora/folders.py", "if old.exists() and _is_empty(path):", "if False:")
@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_restores_the_old_folder(tmp_path, monkeypatch, failing):
    path, rename, calls = tmp_path / "out", os.rename, []
    path.mkdir()
    (path / "old").write_bytes(b"1")

    def rename_or_fail(a, b):
        calls.append(1)
        if len(calls) == failing:
            raise OSError(5, "input/output error")
        rename(a, b)

    monkeypatch.setattr(os, "rename", rename_or_fail)
    with pytest.raises(OSError, match="input/output"), folders.new_folder(path) as folder:
        files.write_bytes(folder / "new", b"3")
    assert tree(path) == {"old": b"1"} and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_that_is_not_written_to_its_end_leaves_the_old_one(tmp_path):
    files.write_bytes(tmp_path / "a", b"old")
    with pytest.raises(ValueError, match="stop"), files.writing(tmp_path / "a") as file:
        file.write(b"half")
        raise ValueError("stop")
    assert tree(tmp_path) == {"a": b"old"}
    files.write_bytes(tmp_path / "a", b"new")
    assert tree(tmp_path) == {"a": b"new"}


@mutation("lora/files.py", "            flush(file.fileno())", "            pass")
def test_data_is_synced_before_its_name_appears(tmp_path, monkeypatch):
    events = []

    def recorded(kind, function):
        def wrapper(*args):
            names = [os.readlink(f"/proc/self/fd/{a}") if isinstance(a, int) else str(a) for a in args]
            events.append((kind, *(Path(name).name for name in names)))
            return function(*args)

        return wrapper

    for name in ("fsync", "replace", "rename"):
        monkeypatch.setattr(os, name, recorded(name, getattr(os, name)))
    with folders.new_folder(tmp_path / "out") as folder:
        files.write_bytes(folder / "a", b"1")
        files.append_row(folder / "log", {"step": 1})
        events.append(("filled",))
    partial = f".a.{os.getpid()}.partial"
    assert events.index(("fsync", partial)) < events.index(("replace", partial, "a"))
    shown = events.index(("rename", folder.name, "out"))
    synced = events[events.index(("filled",)) : shown]
    assert ("fsync", "log") in synced and synced[-1] == ("fsync", folder.name)
    assert events[-1] == ("fsync", tmp_path.name) and shown == len(events) - 2


@mutation(
    "lora/files.py", "            flush(file.fileno())", "            os.fsync(file.fileno())", case="file-ENOSYS-False"
)
@mutation(
    "lora/files.py",
    "if error.errno not in (*UNSUPPORTED, errno.EPERM, errno.EBADF):",
    "if False:",
    case="file-EIO-True",
)
@pytest.mark.parametrize(
    ("name", "fails"),
    [("EIO", True), ("ENOSPC", True), ("EINVAL", False), ("ENOTSUP", False), ("EOPNOTSUPP", False), ("ENOSYS", False)],
)
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_cannot_be_synced_fails_the_save_unless_the_system_knows_no_such_thing(
    tmp_path, monkeypatch, kind, name, fails
):
    fsync, number = os.fsync, getattr(errno, name)

    def failing(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}") == (kind == "folder"):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", failing)
    if fails:
        with pytest.raises(OSError, match=os.strerror(number)), folders.new_folder(tmp_path / "out") as folder:
            files.write_bytes(folder / "a", b"1")
        assert list(tmp_path.iterdir()) == []
    else:
        with folders.new_folder(tmp_path / "out") as folder:
            files.write_bytes(folder / "a", b"1")
        assert tree(tmp_path) == {"out/a": b"1"}


# ---- where output may go ---------------------------------------------------------------------------------------------


def test_an_output_folder_that_is_new_or_empty_is_accepted_and_nothing_is_made(tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "new", tmp_path / "a" / "b" / "c", tmp_path / "empty"):
        folders.check_out(path, False, ("settings.json",))
        folders.check_out(path, True, ("settings.json",))
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


@mutation("lora/folders.py", "if found and not any((path / name).is_file() for name in ours):", "if False:")
def test_only_a_folder_of_ours_may_be_overwritten(tmp_path):
    for name, content in (("ours", "settings.json"), ("home", "photo.jpg")):
        (tmp_path / name).mkdir()
        (tmp_path / name / content).write_text("x")
        with pytest.raises(BadInput, match="add --overwrite"):
            folders.check_out(tmp_path / name, False, ("settings.json",))
    folders.check_out(tmp_path / "ours", True, ("config.json", "settings.json"))
    with pytest.raises(BadInput, match="replaces only what this program wrote"):
        folders.check_out(tmp_path / "home", True, ("config.json", "settings.json"))
    (tmp_path / "home" / "settings.json").mkdir()
    with pytest.raises(BadInput, match="replaces only what this program wrote"):
        folders.check_out(tmp_path / "home", True, ("config.json", "settings.json"))
    assert (tmp_path / "home" / "photo.jpg").exists()


def test_a_file_a_link_or_a_path_through_a_file_is_no_output_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path in ("file", "link", "dangling", "file/below", "file/far/below"):
        with pytest.raises(BadInput, match=r"is not a folder|not a folder"):
            folders.check_out(tmp_path / path, True, ("settings.json",))


def test_names_too_long_folders_not_writable_and_full_disks_are_found_first(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="over 200 bytes"):
        folders.check_out(tmp_path / ("é" * 101), False, ())
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError):
        folders.check_out(tmp_path / "new", False, ())
    monkeypatch.undo()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**19))
    with pytest.raises(BadEnvironment, match="a model needs 524,289 bytes, 524,288 are free"):
        folders.check_room(tmp_path / "new", 2**19 + 1, "a model")
    folders.check_room(tmp_path / "new", 2**19, "a model")


@mutation("lora/pretrained/load.py", 'PACKED = (".qweight",', 'PACKED = (".nothing",', case=".qweight")
@pytest.mark.parametrize("end", [".qweight", ".weight_scale_inv", ".scales", ".weight_packed"])
def test_quantised_weights_whose_config_says_nothing_are_refused_in_one_line(tmp_path, end):
    tensors = tensors_of(tiny_model(torch.float32)) | {f"model.layers.0.mlp.up_proj{end}": torch.ones(3)}
    problem = problems_of(folder_of(tmp_path / "tiny-GPTQ", tensors))
    assert f"up_proj{end}: its weights are quantised, which is not implemented" in problem and "\n" not in problem
    assert problem.endswith("Give the model that it was made from, tiny")
