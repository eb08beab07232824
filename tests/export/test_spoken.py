"""The template and the end of turn that were trained stand in every file of a result that says them, and no other."""

import json
from types import SimpleNamespace

import pytest
from gguf import GGUFReader

from lora import pretrained
from lora.pretrained import Spoken
from lora.text.template import BUILT_IN, ChatTemplate
from tests import cli
from tests.mutation import mutation
from tests.scripts.test_commands import ok

TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"


def base_model(folder, template: str | None = None, **sizes):
    """A model that ends a text with <|endoftext|>, as base models do, and has this template."""
    cli.write_model(folder, **{"eos_token_id": 0} | sizes)
    settings = {"eos_token": "<|endoftext|>", "bos_token": "<|im_start|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return folder


def read(path) -> dict:
    return json.loads(path.read_text())


def ends(folder) -> tuple:
    """What the files of a folder say of the end: those of the model, and that of the tokenizer."""
    ids = [read(folder / name)["eos_token_id"] for name in ("config.json", "generation_config.json")]
    return *ids, read(folder / "tokenizer_config.json")["eos_token"]


def metadata(path) -> dict:
    fields = GGUFReader(path).fields
    return {key.removeprefix("tokenizer."): field.contents() for key, field in fields.items() if "tokenizer." in key}


# ---- by the commands -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A base without a template, an adapter and a full fine-tune of it with ChatML, the adapter merged both ways."""
    folder = tmp_path_factory.mktemp("spoken")
    base = base_model(folder / "base")
    ok(cli.train("adapter", "--template", "chatml", cwd=folder, model=base))
    ok(cli.call("merge", "--adapter", "adapter", "--out", "merged", cwd=folder))
    ok(cli.call("merge", "--adapter", "adapter", "--out", "merged.gguf", "--format", "gguf", cwd=folder))
    argv = ("--max-steps", 2, *cli.ON_CPU, "--full", "--template", "chatml", "--save-every", "1")
    ok(cli.call("train", "--model", base, "--data", cli.data_file(), "--out", "full", *argv, cwd=folder))
    return folder


@mutation("lora/pretrained/spoken.py", '{"eos_token_id": _with(old, self.end)}', '{"eos_token_id": old}')
@mutation("lora/pretrained/spoken.py", '_with(generation.get("eos_token_id", old), self.end)', "old")
@mutation("lora/pretrained/spoken.py", '                settings["eos_token"] = self.eos_token', "                pass")
@mutation("merge.py", "bar, base), dtype, spoken)", "bar, base), dtype)", case="merged")
@mutation("lora/run/trainable.py", "torch.float32, self.spoken)", "torch.float32)", case="full")
@pytest.mark.parametrize("name", ["merged", "full", "full/checkpoints/000002"])
def test_the_end_of_turn_of_another_template_is_added_where_config_generation_and_tokenizer_name_it(work, name):
    assert ends(work / name) == ([0, 2], [0, 2], "<|im_end|>")
    assert "im_end" in (work / name / "chat_template.jinja").read_text()


def test_a_gguf_file_ends_with_the_end_of_turn_and_keeps_the_old_end(work):
    found = metadata(work / "merged.gguf")
    assert (found["ggml.eos_token_id"], found["ggml.eot_token_id"]) == (2, 0)
    assert found["chat_template"].endswith(BUILT_IN["chatml"])


@mutation("lora/export/card.py", 'ends=f"eos_token_id={stops}, "', 'ends=f""')
def test_the_lines_of_an_adapters_card_stop_at_its_end_of_turn(work):
    text = (work / "adapter/README.md").read_text()
    assert "model.generate(**prompt, eos_token_id=[0, 2], max_new_tokens=100)" in text
    assert "eos_token_id" not in (work / "merged/README.md").read_text()  # its folder says it


@mutation("merge.py", "if end.end_of_turn not in known.stops:", "if False:")
def test_beside_an_adapter_alone_llama_server_is_told_the_end_of_turn(work):
    argv = ("--adapter", "adapter", "--out", "alone.gguf", "--format", "gguf", "--adapter-only")
    told = cli.call("merge", *argv, cwd=work).err
    assert "--jinja --chat-template-file adapter/chat_template.jinja" in told
    assert "--override-kv tokenizer.ggml.eot_token_id=int:2" in told


def test_a_model_whose_own_template_ends_otherwise_than_its_config_is_mended_too(tmp_path):
    base = base_model(tmp_path / "base", cli.CHATML)
    ok(cli.train("adapter", cwd=tmp_path, model=base))
    ok(cli.call("merge", "--adapter", "adapter", "--out", "merged", cwd=tmp_path))
    assert ends(tmp_path / "merged") == ([0, 2], [0, 2], "<|im_end|>")


@mutation("lora/pretrained/spoken.py", '.pop("chat_template", None)', '.get("chat_template", None)')
@pytest.mark.parametrize("template", ["alpaca", None])
def test_a_merged_folder_has_one_template_and_it_is_the_one_that_was_trained(tmp_path, template):
    base = base_model(tmp_path / "base", cli.CHATML, eos_token_id=2)
    (base / "chat_template.json").write_text(json.dumps({"chat_template": cli.CHATML}))
    ok(cli.train("adapter", *(("--template", template) if template else ()), cwd=tmp_path, model=base))
    for out, how in (("merged", ()), ("merged.gguf", ("--format", "gguf"))):
        ok(cli.call("merge", "--adapter", "adapter", "--out", out, *how, cwd=tmp_path))
    trained = (tmp_path / "adapter/chat_template.jinja").read_text()
    assert trained == cli.CHATML if template is None else trained.endswith(BUILT_IN[template])
    assert (tmp_path / "merged/chat_template.jinja").read_text() == trained
    assert "chat_template" not in read(tmp_path / "merged/tokenizer_config.json")
    assert not (tmp_path / "merged/chat_template.json").exists()
    assert metadata(tmp_path / "merged.gguf")["chat_template"] == trained


def test_an_adapter_without_a_template_on_a_base_without_one_changes_no_file_of_it(tmp_path):
    base = base_model(tmp_path / "base")
    ok(cli.train("adapter", "--template", "chatml", cwd=tmp_path, model=base))
    (tmp_path / "adapter/chat_template.jinja").unlink()
    ok(cli.call("merge", "--adapter", "adapter", "--out", "merged", cwd=tmp_path))
    assert read(tmp_path / "merged/config.json") == read(base / "config.json")
    for name in ("tokenizer_config.json", "tokenizer.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    assert not (tmp_path / "merged/chat_template.jinja").exists()


# ---- file by file ----------------------------------------------------------------------------------------------------


def written(config: dict, spoken=None, **beside: dict) -> tuple[dict, dict]:
    """The settings and the config that are written beside a model's weights."""
    names = {f"{name}.json": json.dumps(value).encode() for name, value in beside.items()}
    files, config = (spoken or Spoken("T", 7, "<end>")).written(names, config)
    return {name.removesuffix(".json"): json.loads(data) for name, data in files.items() if "jinja" not in name}, config


@mutation("lora/pretrained/spoken.py", "return ids if end in known else", "return", case="7-7")
@mutation("lora/pretrained/spoken.py", "[*known, end] if known else end", "[end]", case="None-7")
@pytest.mark.parametrize(
    "before, after",
    [(None, 7), (7, 7), ([7], [7]), (0, [0, 7]), ([0, 3], [0, 3, 7]), ([7, 3], [7, 3])],
    ids=lambda ids: str(ids).replace(" ", ""),
)
def test_ids_that_end_an_answer_are_kept_and_the_end_of_turn_is_added(before, after):
    files, config = written({"eos_token_id": before}, generation_config={"eos_token_id": before, "temperature": 0.5})
    assert config["eos_token_id"] == files["generation_config"]["eos_token_id"] == after
    assert files["generation_config"]["temperature"] == 0.5


def test_a_model_without_a_generation_config_is_given_one_that_says_what_its_config_says():
    files, _ = written({"eos_token_id": [0, 1], "bos_token_id": 4, "pad_token_id": None})
    assert files["generation_config"] == {"bos_token_id": 4, "eos_token_id": [0, 1, 7]}
    files, _ = written({"eos_token_id": 0}, generation_config={"do_sample": True})
    assert files["generation_config"] == {"do_sample": True, "eos_token_id": [0, 7]}


@pytest.mark.parametrize("old", ["<old>", {"content": "<old>", "lstrip": True, "__type": "AddedToken"}, None])
def test_the_tokenizers_end_is_named_in_both_files_that_may_name_it(old):
    files, _ = written({}, tokenizer_config={"eos_token": old, "pad_token": "<p>"}, special_tokens_map={})
    assert files["tokenizer_config"] == {"eos_token": "<end>", "pad_token": "<p>"}
    assert files["special_tokens_map"] == {"eos_token": "<end>"}
    same = {"eos_token": {"content": "<end>", "lstrip": True}}
    assert written({}, tokenizer_config=same)[0]["tokenizer_config"] == same


def test_what_says_the_same_stays_byte_for_byte():
    beside = {"tokenizer_config.json": b'{"eos_token":   "<end>"}', "generation_config.json": b'{"eos_token_id":[7]}'}
    files, config = Spoken("T", 7, "<end>").written(beside, {"eos_token_id": 7})
    assert files == beside | {"chat_template.jinja": b"T"} and config == {"eos_token_id": 7}


def test_templates_by_name_become_the_one_that_was_trained_and_that_is_said(capsys):
    named = [{"name": "default", "template": "T"}, {"name": "tool_use", "template": "U"}]
    files, _ = written({}, tokenizer_config={"chat_template": named})
    assert "chat_template" not in files["tokenizer_config"]
    assert "templates ['default', 'tool_use'] only the one that was trained" in capsys.readouterr().err


@mutation("lora/pretrained/spoken.py", 'eos_token = chat.template.tokens.get("eos_token")', "pass")
def test_a_template_that_writes_the_old_eos_token_inside_a_turn_keeps_it(tmp_path):
    """transformers puts `eos_token` of the tokenizer's settings into the template: it must stay what was trained."""
    base = base_model(tmp_path / "base", TURNS.replace("{{ eos_token }}", "{{ eos_token }}<|im_end|>"))
    chat = pretrained.load_chat(pretrained.find(str(base)))
    assert Spoken.of(chat)[1:] == (2, "<|endoftext|>")


@mutation("lora/pretrained/spoken.py", "if chat.end_is_written else None", "")
def test_an_end_of_turn_that_the_template_would_not_say_names_nothing():
    tokenizer = SimpleNamespace(token={2: "<|im_end|>"}.get)
    chat = SimpleNamespace(end_of_turn=2, end_is_written=False, tokenizer=tokenizer,
                           template=ChatTemplate("x"))  # fmt: skip
    assert Spoken.of(chat) == ("x", 2, None)
    chat.end_is_written = True
    assert Spoken.of(chat) == ("x", 2, "<|im_end|>")
