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
from tests.adapters import write_head
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
    "names = {name: _last_names(left.pop(name)) for name in PATHS if name in left}",
    "names = {name: left.pop(name) for name in PATHS if name in left}",
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
@pytest.mark.parametrize("given", [3, 0.5, [None], [["a"]], {"a": 1}, "a=1", None], ids=str)
def test_edited_settings_do_not_break_the_card(tmp_path, given):
    for name, value, there in (("good", ["enable_thinking=false"], True), ("edited", given, False)):
        made = card.Made({**MADE.settings, "template_arg": value}, ROWS, 4)
        assert ("'enable_thinking': False" in adapter_card(tmp_path, name, made)[1]) == there


def test_figures_are_those_up_to_the_step_that_was_saved(tmp_path):
    _, text = adapter_card(tmp_path)
    for row in (
        "| loss on what was learned, 2 steps | 3.6250 | 3.1250 |",
        "| loss on held-out data | 3.5000 | 2.2500 |",
        "| loss on ordinary conversations | 2.5000 | 2.7500 |",
        "| forgotten of them: KL from the base |  | 0.1250 |",
    ):
        assert row in text, row
    _, text = adapter_card(tmp_path, "bare", MADE._replace(rows=[{"step": 1, "loss": None}, {"step": "x"}, {}]))
    assert "What was measured" not in text


HOSTILE = ["---", "a: b", "`x` | <script>", "# y", "'\"", "\x1b[2J", "日本", "%s {{ 7*7 }}", "x\nlicense: evil"]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_breaks_the_card(tmp_path, name):
    settings = MADE.settings | {"data": [name], "system": f"{name}\n```\n---", "target": [name]}
    front, text = adapter_card(tmp_path, name, MADE._replace(settings=settings))
    assert set(front) == {"base_model", "library_name", "pipeline_tag", "tags"}
    assert "\x1b" not in text and "49" not in text and text.count("\n```") == 4
    for line in text.splitlines():
        outside = re.sub(r"`[^`]*`", "", line)  # of a code span
        assert "<script>" not in outside or line.startswith(("messages = ", "python generate.py ")), line
    snippet = re.search(r"```python\n(.*?)\n```\n", text, re.DOTALL)[1]
    found = {}
    exec(re.search(r"^messages = .*$", snippet, re.MULTILINE)[0], found)
    assert found["messages"][0] == {"role": "system", "content": f"{name}\n```\n---"}


LICENSES = {
    "front matter": ("README.md", "---\nlanguage: en\nlicense: llama3.1\n---\n# x\nlicense: other\n", "llama3.1"),
    "quoted": ("README.md", "---\nlicense: 'mit'\n---\n", "mit"),
    "below it": ("README.md", "---\nlanguage: en\n---\nlicense: mit\n", None),
    "no front matter": ("README.md", "license: mit\n", None),
    "a list": ("README.md", "---\nlicense:\n- mit\n---\n", None),
    "another line": ("README.md", "---\nlicense: mit, {x: y}\n---\n", None),
    "Apache": ("LICENSE", "\n      Apache License\n   Version 2.0, January 2004\n", "apache-2.0"),
    "MIT": ("LICENSE", "MIT License\n\nCopyright", "mit"),
    "unknown": ("LICENSE", "All rights reserved", None),
}


@pytest.mark.parametrize("case", LICENSES)
def test_the_license_is_the_one_that_the_base_states(tmp_path, case):
    name, text, expected = LICENSES[case]
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / name).write_text(text)
    front, _ = adapter_card(tmp_path, folder=tmp_path / "base")
    assert front.get("license") == expected


def test_a_gguf_file_states_its_license_in_its_header(tmp_path):
    base = {"folder": tmp_path / "x.gguf", "metadata": {"general.license": "apache-2.0"}}
    assert adapter_card(tmp_path, **base)[0]["license"] == "apache-2.0"
    base["metadata"] = {"general.license": ["x"]}
    assert "license" not in adapter_card(tmp_path, "other", **base)[0]


# ---- where it is written ---------------------------------------------------------------------------------------------


def test_train_and_merge_write_cards_and_the_merged_one_tells_of_both(tmp_path):
    front, text = read(cli.adapter_folder())
    assert front == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora"]}
    assert "| rank | `4` |" in text and "| data | `chats.jsonl` |" in text and str(cli.scratch()) not in text
    losses = [json.loads(line)["loss"] for line in (cli.adapter_folder() / "metrics.jsonl").read_text().splitlines()]
    assert f"| loss on what was learned, 1 steps | {losses[0]:.4f} | {losses[1]:.4f} |" in text
    out = ok(cli.call("merge", "--adapter", cli.adapter_folder(), "--out", "out", cwd=tmp_path))
    front, text = read(tmp_path / "out")
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["lora"]}
    assert "# `out`" in text and "python generate.py --model out\n" in text and "| rank | `4` |" in text
    for line in out.splitlines():
        what, value = re.split(r"  +", line, maxsplit=1)
        assert f"| {what} | {value} |" in text


def test_an_adapter_made_elsewhere_is_merged_into_a_card_without_its_history(tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors", "settings.json"):
        (tmp_path / "adapter").mkdir(exist_ok=True)
        shutil.copy(cli.adapter_folder() / name, tmp_path / "adapter")
    for broken in (None, b"no json\n", b"[1]\n", b"\xff"):
        if broken:
            (tmp_path / "adapter/metrics.jsonl").write_bytes(broken)
        argv = ("--adapter", "adapter", "--model", cli.model_folder(), "--out", "out", "--overwrite", "--no-receipt")
        ok(cli.call("merge", *argv, cwd=tmp_path))
        _, text = read(tmp_path / "out")
        assert "## " not in text and "merged into its weights" in text


# ---- to the hub ------------------------------------------------------------------------------------------------------


class Hub(http.server.ThreadingHTTPServer):
    """What huggingface_hub asks of a hub to upload a folder: to make a repository, how to send each file, to take large
    ones by git-lfs, and the commit, whose lines hold the small ones."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.objects, self.made, self.tokens = {}, {}, [], set()
        self.says_no: dict[str, int] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def env(self, cache) -> dict:
        token = {"HF_TOKEN": "hf_secret"}
        return {"HF_ENDPOINT": self.address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": None,
                "HF_HUB_DISABLE_XET": "1"} | token  # fmt: skip


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        self.answer()

    def do_PUT(self):
        self.answer()

    def answer(self):
        hub, path = self.server, self.path.split("?")[0]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        for start, status in hub.says_no.items():
            if path.startswith(start):
                return self.send(status, {"error": "you may not"})
        if self.command == "PUT":
            hub.objects[path.removeprefix("/objects/")] = body
            return self.send(200, {})
        hub.tokens.add(self.headers["Authorization"])
        lines = [json.loads(line) for line in body.splitlines()]
        if path == "/api/validate-yaml":
            front = yaml.safe_load(lines[0]["content"].split("---\n")[1])
            return self.send(200, {"errors": [] if front["tags"] == ["lora"] else [{"message": "no"}], "warnings": []})
        if path == "/api/repos/create":
            hub.made.append(lines[0])
            return self.send(200, {"url": f"{hub.address}/owner/heron", "name": "owner/heron"})
        if path == "/api/models/owner/heron/preupload/main":
            large = lambda name: "lfs" if name.endswith(".safetensors") else "regular"  # noqa: E731
            files = [
                {"path": f["path"], "uploadMode": large(f["path"]), "shouldIgnore": False} for f in lines[0]["files"]
            ]
            return self.send(200, {"files": files})
        if path == "/owner/heron.git/info/lfs/objects/batch":
            objects = [
                {**o, "actions": {"upload": {"href": f"{hub.address}/objects/{o['oid']}"}}} for o in lines[0]["objects"]
            ]
            return self.send(200, {"transfer": "basic", "objects": objects})
        if path == "/api/models/owner/heron/commit/main":
            for line in lines:
                if line["key"] == "file":
                    hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                if line["key"] == "lfsFile":
                    hub.files[line["value"]["path"]] = hub.objects[line["value"]["oid"]]
            return self.send(200, {"commitUrl": f"{hub.address}/owner/heron/commit/1", "commitOid": "1"})
        self.send(404, {"error": f"no {path}"})

    def send(self, status: int, value: dict):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def hub():
    server = Hub()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def push(hub, cwd, *argv):
    return cli.call("merge", "--push", "owner/heron", *argv, cwd=cwd, env=hub.env(cwd / "cache"))


@mutation("lora/export/push.py", "private=True", "private=False")
def test_an_adapter_is_uploaded_with_its_card_and_without_what_is_private(hub, tmp_path):
    done = push(hub, tmp_path, "--adapter", cli.adapter_folder())
    assert done.code == 0 and done.out == f"{hub.address}/owner/heron\n", done.err
    public = {"README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"}
    assert set(hub.files) == public  # its passport names a folder of this machine
    assert all(hub.files[name] == (cli.adapter_folder() / name).read_bytes() for name in public)
    assert [(made["name"], made["organization"], made["visibility"]) for made in hub.made] == [
        ("heron", "owner", "private")
    ]
    assert hub.tokens == {"Bearer hf_secret"} and "hf_secret" not in done.err
    assert f"the base's place on this machine to all who may read it: {cli.model_folder()}" in done.err


@mutation("lora/adapter/passport.py", "store.PASSPORT, value_head.FILE, store", "store.PASSPORT, store")
@mutation("lora/export/push.py", "    value_head.read(folder)\n", "")
def test_a_reward_model_is_uploaded_with_its_head_and_not_with_a_broken_one(hub, tmp_path):
    folder = write_head(shutil.copytree(cli.adapter_folder(), tmp_path / "adapter"))
    assert push(hub, tmp_path, "--adapter", "adapter").code == 0
    assert hub.files["value_head.safetensors"] == (folder / "value_head.safetensors").read_bytes()
    (folder / "value_head.safetensors").write_bytes(b"broken")
    done = push(hub, tmp_path, "--adapter", "adapter")
    assert done.code == 2 and "value_head.safetensors" in done.errors[0]


@mutation("lora/export/push.py", "([Path(template).name] if template else [])", "[]")
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
