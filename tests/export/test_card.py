"""The card of a saved folder: front matter that a hub reads, nothing private in it, and figures that were measured; and
its way to the hub, imitated by a server on this machine."""

import base64
import hashlib
import http.server
import json
import re
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from lora.export import card
from tests import cli
from tests.mutation import mutation
from tests.scripts.test_commands import ok

ROWS = [
    {"step": 0, "eval_loss": 3.5, "retention_kl": 0.0, "retention_loss_before": 2.5, "retention_loss": 2.5},
    *({"step": step, "loss": 4.0 - step / 4} for step in range(1, 5)),
    {"step": 4, "eval_loss": 2.25, "retention_kl": 0.125, "retention_loss_before": 2.5, "retention_loss": 2.75},
    {"step": 5, "loss": 99.0},
]
MADE = card.Made({"rank": 4, "data": ["/home/me/secret/chats.jsonl:2"], "system": None, "no_system": False}, ROWS, 4)


def base_of(folder=None, hub_id="owner/base", **more):
    return SimpleNamespace(hub_id=hub_id, **({"path": folder} if folder else {}), **more)


def read(folder) -> tuple[dict, str]:
    """Front matter as the hub's own client reads it, and the text below."""
    found = ModelCard.load(folder / "README.md")
    return found.data.to_dict(), found.text


def adapter_card(tmp_path, name="heron", made=MADE, **base):
    folder = tmp_path / name
    folder.mkdir()
    card.write_adapter(folder, name, base_of(**base), made)
    return read(folder)


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_the_front_matter_is_what_the_hub_asks_of_an_adapter(tmp_path):
    front, text = adapter_card(tmp_path)
    assert front == {
        "base_model": "owner/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora"],
    }
    assert "# `heron`" in text and "python generate.py --adapter heron\n" in text
    assert "https://huggingface.co/owner/base" in text and 'base, adapter = "owner/base", "."' in text


@mutation(
    "lora/export/card.py",
    "known = base.hub_id if HUB_ID.fullmatch(base.hub_id) else None",
    "known = base.hub_id",
    case="/home/me/model",
)
@pytest.mark.parametrize(
    "hub_id", ["/home/me/model", "mymodel", "a/b/c", "a b/c", "a/b\nlicense: mit", "../x", "ä/b", "-/b"]
)
def test_a_base_that_is_on_no_hub_is_not_named(tmp_path, hub_id):
    front, text = adapter_card(tmp_path, hub_id=hub_id)
    assert "base_model" not in front and hub_id not in text and "a base model that is on no hub" in text


@mutation(
    "lora/export/card.py",
    "names = {name: _last_names(used.pop(name)) for name in PATHS if name in used}",
    "names = {name: used.pop(name) for name in PATHS if name in used}",
)
def test_settings_and_data_are_told_without_the_way_to_them(tmp_path):
    settings = {"template": "/home/me/t.jinja", "replay": ["a/b.jsonl:0.5", "hub:owner/set/c.jsonl:1"], "lr": 0.001}
    settings |= {"init_adapter": "C:\\me\\first", "model": "/home/me/model", "target": ["q_proj", "v_proj"]}
    _, text = adapter_card(tmp_path, made=MADE._replace(settings=MADE.settings | settings))
    for row in (
        "| data | `chats.jsonl:2` |",
        "| replay | `b.jsonl:0.5, c.jsonl:1` |",
        "| template | `t.jinja` |",
        "| init adapter | `first` |",
        "| steps | `4` |",
        "| rank | `4` |",
        "| lr | `0.001` |",
        "| target | `q_proj v_proj` |",
    ):
        assert row in text, row
    assert "home" not in text and "secret" not in text and "me\\" not in text and "| system" not in text


@mutation("lora/export/card.py", "all(isinstance(one, str) for one in given) else ()", "True else ()", case="[None]")
@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.json"])
def test_a_template_that_lies_in_the_tokenizers_files_goes_along(hub, tmp_path, name):
    folder = shutil.copytree(cli.adapter_folder(), tmp_path / "adapter")
    (folder / "passport.json").unlink()  # as PEFT leaves it
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / name).write_text(json.dumps({"chat_template": template}))
    assert push(hub, tmp_path, "--adapter", "adapter").code == 0
    assert hub.files[name] == (folder / name).read_bytes()


def test_a_passport_that_names_a_model_of_the_hub_goes_along(hub, tmp_path):
    shutil.copytree(cli.adapter_folder(), tmp_path / "adapter")
    papers = json.loads((tmp_path / "adapter/passport.json").read_text())
    papers["base"]["name"] = "owner/base"
    (tmp_path / "adapter/passport.json").write_text(json.dumps(papers))
    assert push(hub, tmp_path, "--adapter", "adapter").code == 0
    assert json.loads(hub.files["passport.json"]) == papers


def test_a_merged_model_is_uploaded_whole(hub, tmp_path):
    done = push(hub, tmp_path, "--adapter", cli.adapter_folder(), "--out", "out")
    assert done.code == 0 and done.out.endswith(f"\n{hub.address}/owner/heron\n"), done.err
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "receipt.json", "README.md"} <= set(hub.files)
    (tmp_path / "there.safetensors").write_bytes(hub.files["model.safetensors"])
    written = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(t, written[name]) for name, t in load_file(tmp_path / "there.safetensors").items())
    assert set(hub.objects) == {hashlib.sha256(hub.files["model.safetensors"]).hexdigest()}


@pytest.mark.parametrize(("path", "status"), [("/api/repos", 401), ("/api/repos", 403), ("/api/models", 403)])
def test_a_hub_that_says_no_is_one_line(hub, tmp_path, path, status):
    hub.says_no[path] = status
    done = push(hub, tmp_path, "--adapter", cli.adapter_folder())
    assert done.code == 3 and len(done.errors) == 1 and "Traceback" not in done.err, done.err
    assert re.fullmatch(r"error: upload failed in hub owner/heron: .*\. Set HF_TOKEN to .*", done.errors[0])
    assert hub.files == {} and done.out == ""


def test_a_hub_that_is_not_there_and_a_name_that_is_none(hub, tmp_path):
    env = hub.env(tmp_path / "cache") | {"HF_HUB_OFFLINE": "1"}
    argv = ("--adapter", cli.adapter_folder(), "--push")
    done = cli.call("merge", *argv, "owner/heron", cwd=tmp_path, env=env)
    assert done.code == 3 and len(done.errors) == 1 and "upload failed in hub owner/heron" in done.errors[0]
    for name in ("heron", "a/b/c", "../x", "a b/c", ""):
        done = cli.call("merge", *argv, name, cwd=tmp_path, env=env)
        assert done.code == 2 and "wrong --push in the command line" in done.errors[0]
    assert hub.made == []


def test_a_broken_adapter_is_not_uploaded(hub, tmp_path):
    shutil.copytree(cli.adapter_folder(), tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    done = push(hub, tmp_path, "--adapter", "adapter")
    assert done.code == 2 and "broken safetensors" in done.errors[0] and hub.made == []
