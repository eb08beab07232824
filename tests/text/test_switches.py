"""--template-arg: switches of a chat template, checked against it, remembered by the adapter, used where it is used."""

import json

import pytest

import lora
from lora.errors import BadInput
from lora.text import sandbox
from lora.text.template import ChatTemplate, is_argument, read_arguments, spell_arguments
from tests import cli
from tests.mutation import mutation
from tests.scripts.test_commands import ok

MOOD = "{% if mood is defined %}[{{ mood }}]{% endif %}"
SWITCHED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}" + MOOD + "{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    + MOOD
    + "{% endif %}"
)


@mutation("lora/text/template.py", "PYTHON[text] if text in PYTHON else _json_or_text(text)", "_json_or_text(text)")
@mutation("lora/text/template.py", "parse_constant=lambda word: word", "parse_constant=None")
def test_values_are_json_or_python_words_or_text():
    texts = [
        "a=false",
        "b=3",
        'c="x"',
        "d=high",
        "e=False",
        "f=None",
        "g=[1, 2]",
        "h=a=b",
        "i=",
        "j=NaN",
        "k=1e999",
        "l={",
    ]
    found = read_arguments(texts)
    assert found.pop("k") == float("inf")
    assert found == {"a": False, "b": 3, "c": "x", "d": "high", "e": False, "f": None, "g": [1, 2], "h": "a=b", "i": "",
                     "j": "NaN", "l": "{"}  # fmt: skip
    assert (
        read_arguments(spell_arguments(found)) == found and spell_arguments({}) is None and read_arguments(None) == {}
    )
    with pytest.raises(BadInput, match="--template-arg sets a twice"):
        read_arguments(["a=1", "b=2", "a=1"])


@mutation("lora/text/template.py", 'and not name.endswith("_token")', "")
def test_what_every_rendering_is_given_is_no_switch():
    names = ("messages", "add_generation_prompt", "tools", "documents", "bos_token", "eos_token", "raise_exception")
    assert not any(is_argument(f"{name}=1") for name in (*names, "", "a b", "1a", "a-b")) and not is_argument(
        "thinking"
    )
    assert is_argument("enable_thinking=1") and is_argument("reasoning_effort=low")


@mutation("lora/text/template.py", "return self._compile(find)", "return find(self.source)")
def test_switches_are_looked_for_within_the_limits_and_only_where_some_are_set(monkeypatch):
    """Jinja computes a template's constants when it looks for names, too."""
    entered, limits = [], sandbox.limits
    monkeypatch.setattr(sandbox, "limits", lambda: entered.append(1) or limits())
    ChatTemplate("{{ mood }}")
    assert len(entered) == 1
    ChatTemplate("{{ mood }}", arguments={"mood": 1})
    assert len(entered) == 3


@mutation("lora/text/template.py", "undeclared - its_own - self", "undeclared - self")
@mutation("lora/text/template.py", 'ASKS = ("defined", "undefined", "default", "d")', 'ASKS = ("defined", "default")')
@mutation("lora/text/template.py", 'ASKS = ("defined", "undefined", "default", "d")', 'ASKS = ("undefined", "d")')
@mutation("lora/text/template.py", 'if n.name in ASKS} - names["param"]', "if n.name in ASKS}")
def test_a_template_knows_its_switches_and_refuses_others_by_name():
    source = (
        "{% set mode = mode | default('x') %}{% if not think is defined %}{% set think = true %}{% endif %}"
        "{% for m in messages %}{% if m.content %}{% set text = m.content %}{% endif %}{{ text ~ effort }}{% endfor %}"
        "{{ bos_token }}{{ strftime_now('%Y') }}{{ range(2) | list | length }}"
        "{% if keep is undefined %}{% set keep = true %}{% endif %}{% set budget = budget | d(-1) %}"
        "{% macro show(part) %}{{ '' if part is undefined else part }}{% endmacro %}"
        "{% for m in messages %}{% if m.role %}{% set part = m.content %}{% endif %}{{ show(part) }}{% endfor %}"
    )
    assert ChatTemplate(source).switches == {"mode", "think", "effort", "keep", "budget"}
    said = (
        r"unknown --template-arg in here: no enable_thinking; it has budget, effort, keep, mode, think\. Leave it out"
    )
    with pytest.raises(BadInput, match=said):
        ChatTemplate(source, where="here", arguments={"enable_thinking": False, "think": False})
    with pytest.raises(BadInput, match=r"no think; it has none\. Leave it out"):
        ChatTemplate(cli.CHATML, arguments={"think": False})


def switched_model(folder):
    base = cli.write_model(folder)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": SWITCHED}))
    return base


@mutation("lora/text/template.py", "given = self.tokens | self.arguments", "given = self.tokens")
@mutation("lora/run/trainable.py", 'spoken["template_args"] = plan.chat.template.arguments', "pass")
@mutation(
    "lora/inference/session.py", 'remembered = {} if template else trained.get("template_args", {})', "remembered = {}"
)
@mutation("merge.py", 'if arguments := spell_arguments(chat.get("template_args", {})):', "if arguments := None:")
def test_a_switch_is_trained_remembered_and_used_again_unless_another_value_is_given(tmp_path):
    base = switched_model(tmp_path / "model")
    done = cli.train("out", "--max-steps", 4, "--template-arg", 'mood="glad"', cwd=tmp_path, model=base)
    ok(done)
    assert json.loads((tmp_path / "out/settings.json").read_text())["template_arg"] == ['mood="glad"']
    assert json.loads((tmp_path / "out/passport.json").read_text())["chat"]["template_args"] == {"mood": "glad"}
    preview = ("--data", cli.data_file(), "--preview", 1, "--template-arg", "mood=glad", *cli.ON_CPU)
    shown = ok(cli.call("train", "--model", base, *preview, cwd=tmp_path))
    assert "[glad]" in shown.replace("│", "")
    ask = ("--adapter", "out", "--prompt", "What is 1 and 1?")
    told = cli.ask(*ask, cwd=tmp_path)
    assert 'template as in training: mood="glad"\n' in told.err
    same, other = (cli.ask(*ask, "--template-arg", f"mood={mood}", cwd=tmp_path) for mood in ("glad", "sad"))
    assert ok(told) == ok(same) != ok(other)
    session = lora.open(adapter=tmp_path / "out", dtype="float32")
    assert "[glad]" in session.chat.tokenizer.decode(session.encode("Hi"))
    session = lora.open(adapter=tmp_path / "out", dtype="float32", template_args={"mood": "sad"})
    assert "[sad]" in session.chat.tokenizer.decode(session.encode("Hi"))
    done = cli.call("merge", "--adapter", "out", "--out", "merged", cwd=tmp_path)
    ok(done)
    assert 'note     it was trained with --template-arg mood="glad", which a merged model does not remember' in done.err
    rows = ("--adapter", "out", "--data", cli.data_file(), "--no-generate", "--no-retention", *cli.ON_CPU)
    losses = [ok(cli.call("evaluate", *rows, *more, cwd=tmp_path)).splitlines()[1].split()[-1]
              for more in ((), ("--template-arg", "mood=glad"), ("--template-arg", "mood=sad"))]  # fmt: skip
    assert losses[0] == losses[1] != losses[2]


@mutation("lora/run/adapter.py", 'trained.get("template_args", {}) | ', "")
def test_a_run_from_an_adapter_and_a_resumed_run_have_its_switches(tmp_path):
    base = switched_model(tmp_path / "model")
    ok(cli.train("out", "--max-steps", 1, "--template-arg", "mood=glad", cwd=tmp_path, model=base))
    ok(cli.train("next", "--init-adapter", "out", "--max-steps", 1, cwd=tmp_path, model=base))
    assert json.loads((tmp_path / "next/passport.json").read_text())["chat"]["template_args"] == {"mood": "glad"}
    ok(
        cli.train(
            "sad", "--init-adapter", "out", "--template-arg", "mood=sad", "--max-steps", 1, cwd=tmp_path, model=base
        )
    )
    assert json.loads((tmp_path / "sad/passport.json").read_text())["chat"]["template_args"] == {"mood": "sad"}
    ok(cli.train("out", "--resume", "--max-steps", 1, cwd=tmp_path, model=base))
    changed = cli.train("out", "--resume", "--max-steps", 1, "--template-arg", "mood=sad", cwd=tmp_path, model=base)
    assert changed.code == 2 and "changed --template-arg in the command line" in changed.err


@pytest.mark.parametrize("script", ["train", "generate", "evaluate"])
def test_wrong_switches_are_refused_by_every_command(tmp_path, script):
    inputs = {"train": ("--data", cli.data_file(), "--out", "out"), "generate": ("--prompt", "Hi"),
              "evaluate": ("--data", cli.data_file())}[script]  # fmt: skip
    for wrong, said in (
        ("messages=3", "wrong --template-arg in the command line: 'messages=3' is out of range. Give NAME=VALUE; not"),
        ("thinking", "wrong --template-arg in the command line: 'thinking' is out of range. Give NAME=VALUE"),
        ("thinking=true", "no thinking; it has none. Leave it out"),
    ):
        done = cli.call(
            script, "--model", cli.model_folder(), *inputs, "--template-arg", wrong, *cli.ON_CPU, cwd=tmp_path
        )
        assert done.code == 2 and said in done.errors[0] and len(done.errors) == 1, done.err


@mutation(
    "lora/adapter/passport.py",
    "if not isinstance(template_args, dict) or not isinstance(control_tokens, bool):",
    "if False:",
)
@pytest.mark.parametrize("chat", [{"template_args": [1]}, {"control_tokens": "yes"}], ids=str)
def test_a_passport_with_something_else_for_them_is_bad_input(tmp_path, chat):
    ok(cli.train("out", "--max-steps", 1, cwd=tmp_path))
    path = tmp_path / "out/passport.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat": chat}))
    done = cli.ask("--adapter", "out", "--prompt", "Hi", cwd=tmp_path)
    assert done.code == 2 and "broken passport in out/passport.json:chat: template_args" in done.errors[0]
