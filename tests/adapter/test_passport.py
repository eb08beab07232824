"""What an adapter's passport says of its training, and that every command compares it before it uses the adapter."""

import hashlib
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora.adapter import passport
from lora.adapter.inject import lora_layers
from lora.inference.session import warn_if_unchanged
from lora.text.tokenizer import Tokenizer
from tests import cli
from tests.helpers import patched, tiny_model
from tests.mutation import mutation
from tests.scripts.test_commands import ok

HEX = re.compile(r"[0-9a-f]{64}")
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
FIELDS = {"format", "base", "chat", "tokenizer", "template", "data", "settings", "step"}


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def papers(folder) -> dict:
    return json.loads((folder / "passport.json").read_text())


@pytest.fixture
def work(tmp_path):
    """A model and an adapter of it, to be changed."""
    shutil.copytree(cli.model_folder(), tmp_path / "model")
    shutil.copytree(cli.adapter_folder(), tmp_path / "adapter", ignore=shutil.ignore_patterns("checkpoints"))
    return tmp_path


def use(script: str, work, *argv, adapter="adapter"):
    """The adapter on the model, by each of the commands that load one."""
    base, data = ("--model", "model", *argv), ("--data", cli.data_file())
    if script == "generate":
        return cli.ask("--adapter", adapter, "--prompt", "Hello.", *base, cwd=work)
    if script == "evaluate":
        flags = ("--no-generate", "--no-retention", *cli.ON_CPU)
        return cli.call("evaluate", "--adapter", adapter, *data, *flags, *base, cwd=work)
    if script == "merge":
        argv = ("--adapter", adapter, "--out", "merged", "--device", "cpu", "--overwrite")
        return cli.call("merge", *argv, *base, cwd=work)
    flags = ("--init-adapter", adapter, "--preview", 0, *cli.ON_CPU)  # which makes the plan, and ends there
    return cli.call("train", *data, *flags, *base, cwd=work)


ALL = pytest.mark.parametrize("script", ["generate", "evaluate", "merge", "train"])

# ---- what it says ----------------------------------------------------------------------------------------------------


def test_a_run_writes_the_fingerprints_of_its_tokenizer_template_data_and_settings():
    adapter = cli.adapter_folder()
    found = papers(adapter)
    assert set(found) == FIELDS
    assert found["tokenizer"]["file"] == sha256(cli.model_folder() / "tokenizer.json")
    assert found["template"] == sha256(adapter / "chat_template.jinja")
    assert all(HEX.fullmatch(found[key]) for key in ("data", "settings"))
    state = json.loads((adapter / "checkpoints/000002/state.json").read_text())
    assert found["data"] == state["data"] and found["step"] == 2
    assert papers(adapter / "checkpoints/000002") == found


@mutation(
    "lora/run/trainable.py",
    'learned = {**args.decisive(), "steps": plan.total}',
    "learned = args.decisive()",
)
def test_what_decides_what_is_learned_changes_the_fingerprints_and_nothing_else_does(tmp_path):
    first = papers(cli.adapter_folder())
    (tmp_path / "few.jsonl").write_text("".join(cli.data_file().read_text().splitlines(keepends=True)[:-1]))
    ok(cli.train("same", "--save-every", "1h", "--keep", 1, cwd=tmp_path))
    assert papers(tmp_path / "same") == first
    ok(cli.train("seed", "--seed", 1, cwd=tmp_path))
    ok(cli.train("data", cwd=tmp_path, data="few.jsonl"))
    ok(cli.train("steps", "--max-steps", 1, cwd=tmp_path))
    for name, changed in (("seed", {"settings"}), ("data", {"data"}), ("steps", {"settings", "step"})):
        other = papers(tmp_path / name)
        assert {key for key in first if other[key] != first[key]} == changed


def test_the_vocabulary_is_what_ids_stand_for_and_not_the_room_that_a_converter_left():
    data = (cli.model_folder() / "tokenizer.json").read_bytes()
    tokenizer = Tokenizer(data)
    padded = SimpleNamespace(
        size=tokenizer.size + 2, token=lambda i: tokenizer.token(i) if i < tokenizer.size else f"[PAD{i}]"
    )
    swapped = SimpleNamespace(size=tokenizer.size, token=lambda i: tokenizer.token({7: 8, 8: 7}.get(i, i)))
    assert passport.vocabulary(padded) == passport.vocabulary(tokenizer) != passport.vocabulary(swapped)
    again = Tokenizer(json.dumps(json.loads(data)).encode())
    assert again.fingerprint != tokenizer.fingerprint and passport.vocabulary(again) == passport.vocabulary(tokenizer)


# ---- what is compared ------------------------------------------------------------------------------------------------


def other_base(work):
    cli.write_model(work / "model", seed=1)


def change_tensors(work, change):
    path = work / "adapter/adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def change_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def swap_tokens(work):
    def swap(value):
        vocabulary = value["model"]["vocab"]
        one, two = (next(t for t, i in vocabulary.items() if i == number) for number in (20, 21))
        vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]

    change_json(work / "model/tokenizer.json", swap)


FAULTS = {
    "another base": (other_base, r"wrong base in adapter/passport\.json: .* --no-verify to insist"),
    "a missing tensor": (lambda work: change_tensors(work, lambda t: t.pop(A)), rf"missing tensor in .*{A}"),
    "an extra tensor": (
        lambda work: change_tensors(work, lambda t: t.update({A.replace("q_proj", "z_proj"): torch.zeros(4, 32)})),
        r"extra tensor in .*z_proj",
    ),
    "other tokens": (swap_tokens, r"wrong tokenizer in adapter/passport\.json: .* --no-verify to insist"),
}


@mutation("lora/adapter/passport.py", "if not same_ids and not insist:", "if False:", case="other tokens-merge")
@ALL
@pytest.mark.parametrize("fault", FAULTS)
def test_every_command_refuses(work, script, fault):
    change, pattern = FAULTS[fault]
    change(work)
    done = use(script, work)
    assert done.code == 2 and len(done.errors) == 1 and re.search(pattern, done.errors[0]), done.err
    assert not (work / "merged").exists()


@ALL
def test_who_insists_may_use_another_base_with_other_tokens(work, script):
    other_base(work), swap_tokens(work)
    done = use(script, work, "--no-verify")
    assert done.code == 0 and done.err.count("has other tokens than the one the adapter in adapter was trained") == 1


def cut_text_elsewhere(work):
    change_json(
        work / "model/tokenizer.json", lambda value: value["model"].update(merges=value["model"]["merges"][:-1])
    )


def edit_template(work):
    path = work / "adapter/chat_template.jinja"
    path.write_text(path.read_text() + "{# edited #}")


def base_changed(work):
    """And the adapter brings no template of its own."""
    (work / "adapter/chat_template.jinja").unlink()
    change_json(
        work / "model/tokenizer_config.json", lambda v: v.update(chat_template=v["chat_template"] + "{# new #}")
    )


OTHER = {
    "a tokenizer that cuts text elsewhere": (
        cut_text_elsewhere,
        r"may cut text in another way than the one the adapter",
    ),
    "an edited template": (edit_template, r"was trained with another chat template"),
    "a base with another template": (base_changed, r"was trained with another chat template"),
}


@mutation(
    "lora/adapter/passport.py",
    'if passport.get("template") not in (None, of_text(template)):',
    "if False:",
    case="an edited template-evaluate",
)
@ALL
@pytest.mark.parametrize("other", OTHER)
def test_every_command_warns_once_of(work, script, other):
    change, pattern = OTHER[other]
    change(work)
    done = use(script, work)
    found = [line for line in done.err.splitlines() if line.startswith("warning: ")]
    assert done.code == 0 and len(found) == 1 and re.search(pattern, found[0]), done.err


def test_another_template_by_flag_warns_and_the_trained_one_does_not(work):
    for template, count in (("qa", 1), ("adapter/chat_template.jinja", 0)):
        done = use("generate", work, "--template", template)
        assert done.code == 0 and done.err.count("warning: ") == count, done.err


@ALL
def test_a_passport_from_before_fingerprints_is_still_read(work, script):
    change_json(work / "adapter/passport.json", lambda v: [v.pop(key) for key in FIELDS - {"format", "base", "chat"}])
    swap_tokens(work), edit_template(work)
    done = use(script, work)
    assert done.code == 0 and "warning" not in done.err, done.err


@pytest.mark.parametrize(
    "value", [{"tokenizer": []}, {"tokenizer": {"file": "x"}}, {"template": 3}, {"tokenizer": None}]
)
def test_a_passport_with_something_else_for_a_fingerprint_is_bad_input(work, value):
    change_json(work / "adapter/passport.json", lambda v: v.update(value))
    done = use("generate", work)
    assert done.code == 2 and "broken passport in adapter/passport.json:tokenizer" in done.errors[0]


# ---- that logits change ----------------------------------------------------------------------------------------------


def zero_B(work):
    change_tensors(work, lambda t: t.update({name: torch.zeros_like(v) for name, v in t.items() if "lora_B" in name}))


@mutation(
    "lora/inference/session.py",
    """        warn_if_unchanged(net, adapter)
        say(""",
    "        say(",
    case="generate",
)
@pytest.mark.parametrize("script", ["generate", "evaluate", "merge"])
def test_an_adapter_that_changes_nothing_is_told(work, script):
    done = use(script, work)
    assert done.code == 0 and "warning" not in done.err, done.err
    zero_B(work)
    done = use(script, work)
    assert done.code == 0 and done.err.count("warning: the adapter in adapter changes nothing") == 1, done.err


@pytest.mark.parametrize("targets", [["q_proj"], ["k_proj"], ["v_proj"], ["down_proj"]], ids=str)
def test_a_change_of_any_one_kind_of_layer_is_seen(capsys, targets):
    model = patched(tiny_model(torch.float32, vocab_size=300), targets=targets)
    warn_if_unchanged(model, "somewhere")
    assert capsys.readouterr().err == ""
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.zero_()
    warn_if_unchanged(model, "somewhere")
    assert "the adapter in somewhere changes nothing" in capsys.readouterr().err
    assert all(layer.enabled for layer in lora_layers(model).values())


# ---- a template that another program left ----------------------------------------------------------------------------

LOUD = cli.CHATML.replace("m.role", "m.role | upper").replace("assistant\n", "ASSISTANT\n")


@mutation("lora/adapter/passport.py", "for name in (TEMPLATE, *TOKENIZERS_TEMPLATE))", "for name in (TEMPLATE,))")
@mutation("lora/adapter/passport.py", '("chat_template.json", "tokenizer_config.json")', '("chat_template.json",)')
@mutation("lora/files.py", 'if isinstance(one, dict) and one.get("name") == "default")', "if isinstance(one, dict))")
@mutation("merge.py", "load_chat(base, args.adapter, template", "load_chat(base, None, template")
@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.json"])
@pytest.mark.parametrize("form", ["text", "list"])
def test_a_template_in_the_tokenizers_files_of_an_adapter_is_the_one_it_was_trained_with(work, place, form):
    """As TRL, LLaMA-Factory and Unsloth save an adapter with its tokenizer."""
    plain = ok(use("generate", work))
    (work / "adapter/chat_template.jinja").write_text(LOUD)
    expected = ok(use("generate", work))
    (work / "adapter/chat_template.jinja").unlink()
    assert ok(use("generate", work)) == plain != expected
    value = LOUD if form == "text" else [{"name": "tool_use", "template": "x"}, {"name": "default", "template": LOUD}]
    (work / "adapter" / place).write_text(json.dumps({"chat_template": value, "eos_token": "<|im_end|>"}))
    assert passport.template_of(work / "adapter") == str(work / "adapter" / place)
    for script in ("generate", "evaluate", "merge", "train"):
        done = use(script, work)
        assert done.code == 0 and "another chat template" in done.err, script
        assert script != "generate" or done.out == expected
    assert (work / "merged/chat_template.jinja").read_text() == LOUD


@mutation("lora/adapter/passport.py", "(TEMPLATE, *TOKENIZERS_TEMPLATE))", "(*TOKENIZERS_TEMPLATE, TEMPLATE))")
def test_templates_of_an_adapter_count_in_the_order_of_a_models(work):
    def template():
        path = passport.template_of(work / "adapter")
        return path and path.rsplit("/", 1)[-1]

    (work / "adapter/chat_template.jinja").unlink()
    (work / "adapter/tokenizer_config.json").write_text(json.dumps({"eos_token": "x", "chat_template": None}))
    assert template() is None
    for name in ("tokenizer_config.json", "chat_template.json"):
        (work / "adapter" / name).write_text(json.dumps({"chat_template": LOUD}))
        assert template() == name
    (work / "adapter/chat_template.jinja").write_text(LOUD)
    assert template() == "chat_template.jinja"


@mutation("lora/pretrained/chat.py", 'if any("\\ud800" <= c <= "\\udfff" for c in text):', "if False:")
@ALL
@pytest.mark.parametrize("text", ["{", '{"chat_template": "\\ud800"}', '{"chat_template": "{% for"}'], ids=range(3))
def test_a_broken_template_in_the_tokenizers_files_of_an_adapter_is_bad_input(work, script, text):
    (work / "adapter/chat_template.jinja").unlink()
    (work / "adapter/tokenizer_config.json").write_text(text)
    done = use(script, work)
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code == 2 and len(lines) == 1 and "adapter/tokenizer_config.json" in lines[0]
    assert ("half a surrogate pair" in lines[0]) == ("ud800" in text)
