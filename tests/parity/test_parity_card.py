"""The lines of Python on a model card run as they are printed, with PEFT and transformers, and give our answer."""

import json
import os
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora
from tests import cli
from tests.export.test_spoken import base_model
from tests.scripts.test_commands import ok

if os.environ.get("LORA_PARITY") == "1":
    import peft
    import transformers
else:
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_snippet_of_a_card_runs_and_answers_as_generate_does(tmp_path, monkeypatch, capsys, kind):
    base = cli.write_model(tmp_path / "model", torch_dtype="float32")  # which transformers then computes in
    ok(cli.train("adapter", cwd=tmp_path, model=base))
    ok(cli.call("merge", "--adapter", "adapter", "--out", "merged", "--dtype", "float32", cwd=tmp_path))
    text = (tmp_path / kind / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?)\n```\n", text, re.DOTALL)[1]
    snippet = snippet.replace("FOLDER OF THE BASE MODEL", str(base)).replace("max_new_tokens=100", "max_new_tokens=12")
    which = ("--adapter", "adapter") if kind == "adapter" else ("--model", "merged")
    answer = ok(cli.ask(*which, "--prompt", "Who are you?", cwd=tmp_path))
    monkeypatch.chdir(tmp_path / kind)
    capsys.readouterr()
    with torch.no_grad():
        exec(snippet, {})
    assert "Who are you?<|im_end|>\n<|im_start|>assistant\n" + answer.rstrip("\n") in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_the_snippet_of_a_reward_models_card_prints_our_score(tmp_path, monkeypatch, capsys, kind):
    base = cli.write_model(tmp_path / "model", torch_dtype="float32")
    pairs = [{"prompt": f"What is {a}?", "chosen": f"It is {a}.", "rejected": "Who knows."} for a in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    ok(cli.train("adapter", "--method", "reward", cwd=tmp_path, model=base, data="pairs.jsonl"))
    ok(cli.call("merge", "--adapter", "adapter", "--out", "merged", "--dtype", "float32", cwd=tmp_path))
    text = (tmp_path / kind / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?)\n```\n", text, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path / kind)
    capsys.readouterr()
    with torch.no_grad():
        exec(snippet.replace("FOLDER OF THE BASE MODEL", str(base)), found := {})
    theirs = float(re.search(r"tensor\(\[(.*?)\]", capsys.readouterr().out)[1])
    chat = lora.open(**{"adapter" if kind == "adapter" else "model": tmp_path / kind}, device="cpu", dtype="float32")
    assert abs(chat.score(found["messages"]) - theirs) < 1e-3 and abs(theirs) > 1e-2


@pytest.mark.parametrize("kind", ["adapter", "merged", "full"])
def test_generate_stops_at_the_end_of_turn_that_was_trained_where_the_base_ends_otherwise(
    tmp_path, monkeypatch, capsys, kind
):
    base = base_model(tmp_path / "model", torch_dtype="float32")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"][2] *= 6  # now <|im_end|> is the likeliest token soon, and <|endoftext|> is not
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    argv = ("--template", "chatml", "--lr", "1e-6")
    ok(cli.train("adapter", *argv, cwd=tmp_path, model=base))
    ok(cli.call("merge", "--adapter", "adapter", "--out", "merged", "--dtype", "float32", cwd=tmp_path))
    argv = (*argv, "--max-steps", 1, *cli.ON_CPU, "--full")
    ok(cli.call("train", "--model", base, "--data", cli.data_file(), "--out", "full", *argv, cwd=tmp_path))
    text = (tmp_path / kind / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?)\n```\n", text, re.DOTALL)[1].replace("FOLDER OF THE BASE MODEL", str(base))
    monkeypatch.chdir(tmp_path / kind)
    capsys.readouterr()
    with torch.no_grad():
        exec(snippet, {})
    answer = capsys.readouterr().out.rsplit("assistant\n", 1)[1]
    assert answer.count("<|im_end|>") == 1 and answer.endswith("<|im_end|>\n")
