"""Models from the hub, imitated by a server on this machine: what is fetched, what works without it, and what happens
when it says no, breaks off, lies, or never answers."""

import contextlib
import hashlib
import http.server
import json
import re
import sys
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests import cli
from tests.adapters import write_head
from tests.mutation import mutation
from tests.scripts.test_commands import shard

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECOND = 1.0


class Hub(http.server.ThreadingHTTPServer):
    """`repos` maps owner/name to its files; `asked` lists what was requested: ("GET", "owner/name/config.json")."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.asked: list[tuple[str, str]] = []
        self.says_no: dict[str, tuple[int, str]] = {}  # path -> status and error code
        self.cut: dict[str, int] = {}  # file -> bytes it sends before it breaks off
        self.commit = COMMIT
        self.lies = False  # about sha256
        self.silent = threading.Event()

    def files_of(self, method: str) -> set[str]:
        return {path.split("/")[-1] for kind, path in self.asked if kind == method and "api/" not in path}

    def env(self, cache: Path) -> dict:
        address = f"http://127.0.0.1:{self.server_port}"
        return {"HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": None, "HF_HUB_DISABLE_XET": "1"}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        hub, path = self.server, self.path.split("?")[0].lstrip("/")
        hub.asked.append((self.command, path))
        if hub.silent.is_set():
            time.sleep(30 * SECOND)
            self.close_connection = True
            return
        for start, (status, code) in hub.says_no.items():
            if path.startswith(start):
                return self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": "no"})
        info = re.fullmatch(r"api/(?:models/|(?=datasets/))((?:datasets/)?[^/]+/[^/]+)(/revision/\w+)?", path)
        if info and info[1] in hub.repos:
            return self.send(200, json.dumps(self.describe(info[1])).encode(), {"Content-Type": "application/json"})
        tree = re.fullmatch(r"api/models/([^/]+/[^/]+)/tree/\w+", path)
        if tree and tree[1] in hub.repos:
            return self.send(200, json.dumps(self.tree(tree[1])).encode(), {"Content-Type": "application/json"})
        file = re.fullmatch(r"((?:datasets/)?[^/]+/[^/]+)/resolve/(\w+)/(.+)", path)
        if file and file[2] in (hub.commit, "main") and file[3] in hub.repos.get(file[1], {}):
            return self.send_file(hub.repos[file[1]][file[3]], file[3])
        self.send(404, b"", {"X-Error-Code": "EntryNotFound" if file and file[1] in hub.repos else "RepoNotFound"})

    def describe(self, repo: str) -> dict:
        siblings = []
        for name, data in self.server.repos[repo].items():
            entry = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            if name.endswith((".safetensors", ".bin")):
                sha256 = "0" * 64 if self.server.lies else hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        return {
            "id": repo,
            "modelId": repo,
            "sha": self.server.commit,
            "private": False,
            "tags": [],
            "siblings": siblings,
        }

    def tree(self, repo: str) -> list[dict]:
        """Its files, as the hub's other description of a repository has them."""
        return [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in self.server.repos[repo].items()
        ]

    def send_file(self, data: bytes, name: str):
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": self.server.commit,
            "Accept-Ranges": "bytes",
        }
        begin = int((re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")) or ["", "0"])[1])
        status = 200
        if begin:
            status, headers["Content-Range"] = 206, f"bytes {begin}-{len(data) - 1}/{len(data)}"
        self.send(status, data[begin:], headers, max(0, self.server.cut.get(name, len(data)) - begin))

    def send(self, status: int, data: bytes, headers: dict, most: int | None = None):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:most])
            if most is not None and most < len(data):
                self.close_connection = True


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    server.repos["owner/tiny"] = content(cli.model_folder()) | {
        "README.md": b"# tiny",
        "pytorch_model.bin": b"\x80\x02 a pickle",
        "onnx/model.onnx": b"large",
        "original/consolidated.00.safetensors": b"the same again",
        "consolidated.safetensors": b"the same again",
        "model.fp16.safetensors": b"the same again",
        "flax_model.msgpack": b"the same again",
        "tf_model.h5": b"the same again",
        "model.gguf": b"GGUF",
    }
    yield server
    stop(server)


def stop(server):
    server.shutdown()
    server.server_close()


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def ask(cwd, env, *argv, model="owner/tiny", **how):
    return cli.ask("--model", model, "--prompt", "hi", *argv, cwd=cwd, env=env, **how)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return cli.ask("--model", cli.model_folder(), "--prompt", "hi", cwd=tmp_path_factory.mktemp("expected")).out


SMALL = {"config.json", "tokenizer.json", "tokenizer_config.json"}


@mutation("lora/pretrained/hub.py", "allow_patterns=names", "allow_patterns=None")
def test_a_hub_id_answers_as_the_folder_and_only_what_is_read_is_fetched(hub, tmp_path, expected):
    done = ask(tmp_path, hub.env(tmp_path / "cache"))
    assert done.code == 0 and done.out == expected, done.err
    assert f"model    hub owner/tiny at {COMMIT[:12]}\n" in done.err
    assert hub.files_of("GET") == SMALL | {"model.safetensors"}


@mutation("lora/pretrained/hub.py", 'if file.rfilename in found and "/"', 'if ".safetensors" in file.rfilename and "/"')
def test_a_model_in_shards_is_fetched_whole_and_nothing_that_is_there_twice(hub, tmp_path, expected):
    weight_map = shard(cli.write_model(tmp_path / "model"))
    hub.repos["owner/shards"] = hub.repos["owner/tiny"] | content(tmp_path / "model")
    del hub.repos["owner/shards"]["model.safetensors"]
    done = ask(tmp_path, hub.env(tmp_path / "cache"), model="owner/shards")
    assert done.code == 0 and done.out == expected, done.err
    assert hub.files_of("GET") == SMALL | {"model.safetensors.index.json"} | set(weight_map.values())


def larger(folder, tower: str = "tower.safetensors") -> dict[str, bytes]:
    """The files of the tiny model in shards, the language model of a larger one whose tower has a file of its own."""
    weight_map, config = shard(cli.write_model(folder)), json.loads((folder / "config.json").read_text())
    for name in set(weight_map.values()):
        tensors = {
            f"language_model.{tensor}": value for tensor, value in safetensors.torch.load_file(folder / name).items()
        }
        safetensors.torch.save_file(tensors, folder / name)
    safetensors.torch.save_file({"vision_tower.x": torch.ones(3)}, folder / tower)
    weight_map = {f"language_model.{name}": file for name, file in weight_map.items()} | {"vision_tower.x": tower}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    text = config | {"model_type": "mistral", "sliding_window": None}
    config = {"model_type": "mistral3", "text_config": text, "vision_config": {}, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return content(folder)


@mutation("lora/pretrained/hub.py", "prequantised.plain(wrapped.text_config(raw))", "prequantised.plain(raw)")
@mutation("lora/pretrained/hub.py", "wrapped.files_of(raw, weight_map, f", "(lambda *_: set(weight_map.values()))(f")
def test_of_a_larger_model_the_language_model_is_fetched_and_not_its_towers(hub, tmp_path, expected):
    hub.repos["owner/larger"] = larger(tmp_path / "model")
    done = ask(tmp_path, hub.env(tmp_path / "cache"), model="owner/larger")
    assert done.code == 0 and done.out == expected, done.err
    assert f"hub owner/larger at {COMMIT[:12]}, without vision_tower (1 tensors)\n" in done.err
    parts = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert hub.files_of("GET") == SMALL | {"model.safetensors.index.json"} | parts


def test_weights_of_a_larger_model_that_is_not_supported_are_not_fetched(hub, tmp_path):
    files = larger(tmp_path / "model")
    config = json.loads(files["config.json"])
    config["text_config"]["model_type"] = "mistral4"
    hub.repos["owner/larger"] = files | {"config.json": json.dumps(config).encode()}
    done = ask(tmp_path, hub.env(tmp_path / "cache"), model="owner/larger")
    assert done.code == 2 and "owner/larger/config.json:model_type: 'mistral4'" in done.errors[0], done.err
    assert hub.files_of("GET") == {"config.json"}


@mutation("lora/pretrained/hub.py", '"LICENSE", value_head.FILE,', '"LICENSE",')
@mutation("lora/pretrained/hub.py", "if value_head.PICKLED in names and value_head.FILE not in names:", "if False:")
def test_a_reward_model_is_fetched_with_its_head_and_a_pickled_one_is_refused(hub, tmp_path):
    head = write_head(tmp_path) / "value_head.safetensors"
    hub.repos["owner/judge"] = hub.repos["owner/tiny"] | {head.name: head.read_bytes(), "value_head.bin": b"x"}
    done = ask(tmp_path, hub.env(tmp_path / "cache"), model="owner/judge")
    assert done.code == 0 and "note     owner/judge is a reward model" in done.err, done.err
    assert hub.files_of("GET") == SMALL | {"model.safetensors", head.name}
    hub.repos["owner/pickled"] = hub.repos["owner/tiny"] | {"value_head.bin": b"x"}
    done = ask(tmp_path, hub.env(tmp_path / "cache"), model="owner/pickled")
    assert done.code == 5 and "pickle in hub owner/pickled: value_head.bin" in done.errors[0]


def test_a_second_run_downloads_nothing(hub, tmp_path, expected):
    env = hub.env(tmp_path / "cache")
    assert ask(tmp_path, env).code == 0
    hub.asked.clear()
    done = ask(tmp_path, env)
    assert done.code == 0 and done.out == expected and hub.files_of("GET") == set()


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": "../model.safetensors"}, {"a": 5}], ids=str)
def test_an_index_that_names_no_files_is_one_line(hub, tmp_path, weight_map):
    shard(cli.write_model(tmp_path / "model"))
    index = json.dumps({"weight_map": weight_map}).encode()
    hub.repos["owner/shards"] = content(tmp_path / "model") | {"model.safetensors.index.json": index}
    done = ask(tmp_path, hub.env(tmp_path / "cache"), model="owner/shards")
    assert done.code in (2, 5) and len(done.errors) == 1 and "index" in done.errors[0]


@mutation("lora/pretrained/hub.py", "files.write_bytes(main, info.sha.encode())", "pass")
def test_what_was_fetched_once_works_without_the_hub(hub, tmp_path, expected):
    env = hub.env(tmp_path / "cache")
    assert ask(tmp_path, env).code == 0
    hub.asked.clear()
    offline = ask(tmp_path, env | {"HF_HUB_OFFLINE": "1"})
    assert offline.code == 0 and offline.out == expected and hub.asked == [], offline.err
    stop(hub)
    gone = ask(tmp_path, env)
    assert gone.code == 0 and gone.out == expected and gone.errors == [], gone.err


def test_an_adapter_made_on_a_hub_model_remembers_its_id(hub, tmp_path):
    env = hub.env(tmp_path / "cache")
    done = cli.train("out", cwd=tmp_path, model="owner/tiny", env=env)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == "owner/tiny"
    done = cli.ask("--adapter", "out", "--prompt", "hi", cwd=tmp_path, env=env)
    assert done.code == 0 and "model    hub owner/tiny at " in done.err, done.err


@mutation("lora/pretrained/hub.py", "except _library().errors.GatedRepoError:", "except ZeroDivisionError:")
@pytest.mark.parametrize(
    ("path", "status", "code", "message"),
    [
        (
            "api/models/owner/none",
            404,
            "RepoNotFound",
            r"no model in hub owner/none: no such repository, or it is priv",
        ),
        (
            "api/models/owner/none",
            401,
            "RepoNotFound",
            r"no model in hub owner/none: no such repository, or it is priv",
        ),
        ("api/models/owner/none", 401, "GatedRepo", r"no access to hub owner/none: the repository is gated\. .*TOKEN"),
        ("owner/none/resolve", 401, "GatedRepo", r"no access to hub owner/none: the repository is gated\. .*TOKEN"),
        ("owner/none/resolve", 403, "GatedRepo", r"no access to hub owner/none: the repository is gated\. .*TOKEN"),
    ],
    ids=["404", "401", "gated", "gated files, 401", "gated files, 403"],
)
def test_a_hub_that_says_no_is_bad_input(hub, tmp_path, path, status, code, message):
    hub.repos["owner/none"] = hub.repos["owner/tiny"]
    hub.says_no[path] = status, code
    done = ask(tmp_path, hub.env(tmp_path / "cache"), model="owner/none")
    assert done.code == 2 and len(done.errors) == 1 and re.search(message, done.errors[0]), done.err
    assert "Traceback" not in done.err and hub.files_of("GET") == set()


def test_a_repository_with_pickles_only_is_refused_and_they_are_not_fetched(hub, tmp_path):
    hub.repos["owner/bin"] = {"config.json": b"{}", "pytorch_model.bin": b"\x80\x02" + bytes(10**6)}
    done = ask(tmp_path, hub.env(tmp_path / "cache"), model="owner/bin")
    assert done.code == 5 and re.search(r"pickle in hub owner/bin: it has no safetensors", done.errors[0])
    assert hub.files_of("GET") == hub.files_of("HEAD") == set()


@mutation("lora/pretrained/hub.py", 'if "config.json" in names:', "if False:")
def test_weights_of_a_model_that_is_not_supported_are_not_fetched(hub, tmp_path):
    config = json.loads(hub.repos["owner/tiny"]["config.json"]) | {"quantization_config": {"quant_method": "gptq"}}
    hub.repos["owner/tiny-GPTQ-Int4"] = hub.repos["owner/tiny"] | {"config.json": json.dumps(config).encode()}
    done = ask(tmp_path, hub.env(tmp_path / "cache"), model="owner/tiny-GPTQ-Int4")
    assert done.code == 2 and re.search(r"quantised by gptq, .* made from, owner/tiny$", done.errors[0]), done.err
    assert hub.files_of("GET") == {"config.json"}


def test_a_repository_without_weights(hub, tmp_path):
    hub.repos["owner/data"] = {"README.md": b"", "data.parquet": b""}
    done = ask(tmp_path, hub.env(tmp_path / "cache"), model="owner/data")
    assert done.code == 2 and re.search(r"no weights in hub owner/data: there is no model\.safetensors", done.errors[0])


@mutation("lora/pretrained/hub.py", "revision=info.sha,", 'revision="main",')
def test_an_update_that_breaks_off_leaves_what_was_there_before(hub, tmp_path, expected):
    env = hub.env(tmp_path / "cache")
    assert ask(tmp_path, env).code == 0
    hub.commit = COMMIT[::-1]
    hub.repos["owner/tiny"]["model.safetensors"] += b" "
    hub.cut["model.safetensors"] = 5000
    assert ask(tmp_path, env, before=impatient).code == 3
    offline = ask(tmp_path, env | {"HF_HUB_OFFLINE": "1"})
    assert offline.code == 0 and offline.out == expected, offline.err


def impatient():
    """The client waits a second before it tries again, five times."""
    time.sleep = lambda seconds: None


def test_a_download_that_breaks_off_is_told_and_the_next_run_completes_it(hub, tmp_path, expected):
    env = hub.env(tmp_path / "cache")
    hub.cut["model.safetensors"] = 5000
    done = ask(tmp_path, env, before=impatient)
    assert done.code == 3 and done.out == "" and "Traceback" not in done.err
    [line] = done.errors
    assert re.fullmatch(r"error: download failed in hub owner/tiny: .*5000 bytes.*\. Run again; .*", line)
    hub.cut.clear()
    done = ask(tmp_path, env)
    assert done.code == 0 and done.out == expected, done.err


def test_an_incomplete_download_is_not_taken_for_a_model_when_the_hub_is_away(hub, tmp_path):
    env = hub.env(tmp_path / "cache")
    hub.cut["model.safetensors"] = 5000
    assert ask(tmp_path, env, before=impatient).code == 3
    done = ask(tmp_path, env | {"HF_HUB_OFFLINE": "1"})
    assert done.code in (2, 3) and len(done.errors) == 1 and "Traceback" not in done.err, done.err


# ---- the default model -----------------------------------------------------------------------------------------------

DEFAULT = "smollm2-135m-instruct"


def small_default(folder, seconds=5.0):
    """In the child: the default model is the tiny one, it lives in `folder`, and there is no package index."""

    def before():
        from lora.pretrained import default_model

        default_model.WEIGHTS, default_model.HUB_ID = folder / "weights", "owner/tiny"
        default_model.HUB_SECONDS = seconds
        sys.executable = str(folder / "no-python")

    (folder / "no-python").write_text("#!/bin/sh\necho 'ERROR: no index' >&2\nexit 1\n")
    (folder / "no-python").chmod(0o755)
    return before


def test_the_default_model_comes_from_the_hub_once_and_its_folder_says_so(hub, tmp_path, expected):
    env, before = hub.env(tmp_path / "cache"), small_default(tmp_path)
    done = ask(tmp_path, env, model=DEFAULT, before=before)
    assert done.code == 0 and done.out == expected, done.err
    folder = tmp_path / "weights" / DEFAULT
    assert {path.name for path in folder.iterdir()} == SMALL | {"model.safetensors", "source.json"}
    assert f"model    owner/tiny from the hub, commit {COMMIT[:12]}, bf16\n" in done.err
    assert json.loads((folder / "source.json").read_text())["commit"] == COMMIT
    hub.asked.clear()
    again = ask(tmp_path, env, model=DEFAULT, before=before)
    assert again.code == 0 and again.out == expected and hub.asked == []


@contextlib.contextmanager
def nothing_left(folder):
    """Under weights/ neither a model nor a part of one remains."""
    yield
    assert list((folder / "weights").iterdir()) == []


@mutation("lora/pretrained/default_model.py", "if name in stated and files.sha256(copy) != stated[name]:", "if False:")
def test_a_sha256_other_than_the_stated_one_is_refused(hub, tmp_path):
    hub.lies = True
    with nothing_left(tmp_path):
        done = ask(tmp_path, hub.env(tmp_path / "cache"), model=DEFAULT, before=small_default(tmp_path))
    assert done.code == 3 and re.search(r"damaged download in .*: its sha256 is not the one the hub st", done.errors[0])


def test_a_download_of_the_default_model_that_breaks_off_leaves_nothing(hub, tmp_path):
    hub.cut["model.safetensors"] = 5000
    before = small_default(tmp_path)
    with nothing_left(tmp_path):
        done = ask(tmp_path, hub.env(tmp_path / "cache"), model=DEFAULT, before=lambda: [before(), impatient()])
    assert done.code == 3 and "download failed in hub owner/tiny: " in done.errors[0]


def test_a_hub_that_never_answers_is_given_up_after_hub_seconds(hub, tmp_path):
    hub.silent.set()
    began = time.monotonic()
    with nothing_left(tmp_path):
        done = ask(tmp_path, hub.env(tmp_path / "cache"), model=DEFAULT, before=small_default(tmp_path, SECOND))
    assert SECOND < time.monotonic() - began < 60
    assert done.code == 3
    assert "the hub does not answer, so smollm2-135m-instruct comes from the package index" in done.err
    assert len(done.errors) == 2 and "no index" in done.errors[0] and "it does not answer" in done.errors[1]
    assert [path for _, path in hub.asked] == ["api/models/owner/tiny"]


# ---- data sets -------------------------------------------------------------------------------------------------------


def preview(cwd, env, *data):
    argv = ("--model", cli.model_folder(), "--preview", 1, *cli.ON_CPU, "--data", *data)
    return cli.call("train", *argv, cwd=cwd, env=env)


def test_a_file_of_a_data_set_is_read_from_the_hub_and_then_from_the_cache(hub, tmp_path):
    hub.repos["datasets/owner/chats"] = {"part/a.jsonl": cli.data_file().read_bytes(), "b.json": b"[]"}
    env = hub.env(tmp_path / "cache")
    expected = preview(tmp_path, {}, cli.data_file())
    for how in (env, env | {"HF_HUB_OFFLINE": "1"}):
        done = preview(tmp_path, how, "hub:owner/chats/part/a.jsonl")
        assert done.code == 0, done.err
        assert "data     hub:owner/chats/part/a.jsonl: 10 rows of messages\n" in done.err
        assert done.out.split("\n", 1)[1] == expected.out.split("\n", 1)[1]
    assert hub.files_of("GET") == {"a.jsonl"}
    weighted = preview(tmp_path, env, "hub:owner/chats/part/a.jsonl:2.5")
    assert weighted.code == 0 and "a.jsonl: 10 rows of messages, weight 2.5\n" in weighted.err


@pytest.mark.parametrize(
    ("name", "says_no", "code", "message"),
    [
        (
            "hub:owner/chats/none.jsonl",
            {},
            2,
            r"no file in hub:owner/chats/none\.jsonl: the data set owner/chats has no",
        ),
        ("hub:owner/none/a.jsonl", {}, 2, r"no data set in hub owner/none: no such repository, or it is priv"),
        (
            "hub:owner/chats/a.jsonl",
            {"api/datasets": (403, "GatedRepo")},
            2,
            r"no access to hub owner/chats: the reposit",
        ),
        (
            "hub:owner/chats/a.jsonl",
            {"api/datasets": (500, "")},
            3,
            r"no data set in hub owner/chats: it does not answer",
        ),
        ("hub:owner/chats", {}, 2, r"wrong name in hub:owner/chats: expected hub:owner/name/file"),
        ("hub:owner/chats/../a", {}, 2, r"wrong name in hub:owner/chats/\.\./a: expected hub:owner/name/file"),
    ],
)
def test_a_data_set_that_cannot_be_had_is_one_line(hub, tmp_path, name, says_no, code, message):
    hub.repos["datasets/owner/chats"] = {"a.jsonl": cli.data_file().read_bytes()}
    hub.says_no = says_no
    done = preview(tmp_path, hub.env(tmp_path / "cache"), name)
    assert done.code == code and len(done.errors) == 1 and re.search(message, done.err), done.err
    assert "Traceback" not in done.err
