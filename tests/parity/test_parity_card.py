"""The lines of Python on a model card run as they are printed, with PEFT and transformers, and give our answer."""

import os
import re

import pytest
import torch

from tests import cli
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
