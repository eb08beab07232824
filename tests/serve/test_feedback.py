"""What is said of answers becomes rows that training reads, and nothing else is ever written or lost."""

import errno
import json
import os
import re
import threading
import time
import urllib.request
from itertools import pairwise

import pytest
from starlette.testclient import TestClient

from lora import files
from lora.data import formats
from lora.errors import BadInput
from lora.serve import feedback
from lora.serve.app import application
from lora.serve.feedback import Feedback
from lora.serve.requests import Wrong
from tests import cli
from tests.mutation import mutation
from tests.serve import scripted

MODELS = ("base", "heron")
ASKED = [{"role": "user", "content": "Who are you?"}]
LONGER = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "你好。"},
    {"role": "assistant", "content": "你好！"},
    {"role": "user", "content": "And <b>who</b> are you?\n"},
]


def said(text: str, model: str = "base") -> dict:
    return {"model": model, "text": text}


def pair(messages, chosen: str, *rejected: str) -> dict:
    return {"messages": messages, "chosen": said(chosen, "heron"), "rejected": [said(text) for text in rejected]}


def judgement(messages, text: str, good: bool) -> dict:
    return {"messages": messages, "answer": said(text), "good": good}


def written(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def kept(folder) -> Feedback:
    return Feedback(str(folder / "weights/feedback"))


@mutation("lora/serve/feedback.py", '"prompt": messages, "chosen": chosen', '"asked": messages, "chosen": chosen')
@mutation("lora/serve/feedback.py", '"content": text}], "label": good', '"content": text}], "good": good')
def test_train_checks_the_rows_of_the_page_without_a_finding(tmp_path):
    store = kept(tmp_path)
    store.add(pair(ASKED, "I am Blue Heron.", "I am a model.", "Ask me."), MODELS)
    store.add(pair(LONGER, "A heron.", "I am a large language model, trained to help."), MODELS)
    store.add(judgement(ASKED, "I am Blue Heron.", True), MODELS)
    store.add(judgement(LONGER, "A model.", False), MODELS)
    for method, name, count in (("dpo", "pairs", 3), ("kto", "judged", 2)):
        data = f"weights/feedback-{name}.jsonl"
        done = cli.call(
            "train", "--model", cli.model_folder(), "--method", method, "--data", data, "--check", cwd=tmp_path
        )
        assert done.code == 0, done.err + done.out
        assert len(written(tmp_path / data)) == count
    assert store.state() == {
        "pair": {"file": f"{tmp_path}/weights/feedback-pairs.jsonl", "rows": 3},
        "judged": {"file": f"{tmp_path}/weights/feedback-judged.jsonl", "rows": 2},
    }


@mutation("lora/serve/feedback.py", "for model, text in dict.fromkeys(others)", "for model, text in others[:1]")
@mutation(
    "lora/serve/feedback.py",
    '"chosen": chosen, "rejected": text, "chosen',
    '"chosen": text, "rejected": chosen, "chosen',
)
def test_a_row_has_the_messages_the_answers_and_the_models_as_they_were(tmp_path):
    store = kept(tmp_path)
    store.add(pair(LONGER, " Heron.\n", "No <script>.", "Ask."), MODELS)
    store.add(judgement(LONGER, "Heron.", False), MODELS)
    first, second = formats.read([store.paths["pair"]], kind="pair")
    context = [{**turn, "train": False} if turn["role"] == "assistant" else turn for turn in LONGER]
    assert first.messages == [*context, {"role": "assistant", "content": " Heron.\n"}]
    assert first.rejected == [*context, {"role": "assistant", "content": "No <script>."}]
    assert (second.messages, second.rejected[-1]["content"]) == (first.messages, "Ask.")
    [row] = formats.read([store.paths["judged"]], kind="judged")
    assert row.messages == [*context, {"role": "assistant", "content": "Heron."}] and row.good is False
    assert [row.get("model") for row in written(store.paths["judged"])] == ["base"]
    models = {(row["chosen_model"], row["rejected_model"]) for row in written(store.paths["pair"])}
    assert models == {("heron", "base")}


def wrong(status: int, body: object, store: Feedback) -> str:
    with pytest.raises(Wrong) as refused:
        store.add(body, MODELS)
    assert refused.value.status == status
    return refused.value.message


@mutation("lora/serve/feedback.py", "if isinstance(found, formats.Problem):", "if False:")
@mutation("lora/serve/feedback.py", "if any(text == chosen for _, text in others):", "if False:")
@mutation("lora/serve/feedback.py", "    if model not in models:", "    if False:")
@mutation("lora/serve/feedback.py", "if unknown := sorted(body.raw.keys() - known):", "if unknown := ():")
def test_what_could_not_be_trained_on_is_refused_and_nothing_is_written(tmp_path):
    store = kept(tmp_path)
    for body in (
        [], {}, {"messages": ASKED}, judgement([], "a", True), judgement(ASKED, " ", True),
        judgement(ASKED, "\ud800", True),
        judgement([*ASKED, {"role": "assistant", "content": "b"}], "a", True), judgement([*ASKED, *ASKED], "a", False),
        judgement("Who?", "a", True), judgement([{"role": "tool", "content": "x"}], "a", True),
        {**judgement(ASKED, "a", True), "good": 1}, {**judgement(ASKED, "a", True), "answer": "a"},
        {**judgement(ASKED, "a", True), "label": True}, pair(ASKED, "a"), pair(ASKED, "a", "b", "a"),
        pair(ASKED, "a", ""),
        pair([], "a", "b"), pair(ASKED, "a", *map(str, range(17))), {"undo": "all"},
    ):  # fmt: skip
        wrong(400, body, store)
    wrong(404, {**judgement(ASKED, "a", True), "answer": said("a", "/etc/passwd")}, store)
    wrong(409, {"undo": [1]}, store)
    wrong(409, {"undo": [[1]]}, store)
    assert not any(tmp_path.iterdir())


@mutation("lora/serve/feedback.py", "            self.counts[kind] -= 1\n", "")
@mutation("lora/files.py", 'b" " * (len(line) - 1)', 'b"#" * (len(line) - 1)')
@mutation("lora/files.py", "return os.lseek(handle, 0, os.SEEK_CUR) - len(line), line", "return size + 1, line")
def test_what_is_taken_back_is_gone_and_every_other_row_stays(tmp_path):
    store = kept(tmp_path)
    numbers = [store.add(pair(ASKED, f"good {i}", "bad", "worse"), MODELS)["rows"] for i in range(3)]
    reply = store.add({"undo": numbers[1]}, MODELS)
    assert reply["rows"] == [] and reply["pair"]["rows"] == 4
    rows = formats.read([store.paths["pair"]], kind="pair")
    assert [row.messages[-1]["content"] for row in rows] == ["good 0", "good 0", "good 2", "good 2"]
    wrong(409, {"undo": numbers[1]}, store)


@mutation("lora/files.py", "        if file.read(len(line)) != line:", "        if False:")
def test_a_file_that_was_changed_by_hand_is_left_as_it_is(tmp_path):
    store = kept(tmp_path)
    [number] = store.add(judgement(ASKED, "a", True), MODELS)["rows"]
    path = store.paths["judged"]
    path.write_text(path.read_text().replace('"a"', '"an edited answer"'))
    before = path.read_bytes()
    wrong(409, {"undo": [number]}, store)
    assert path.read_bytes() == before


@mutation("lora/serve/feedback.py", "                    self.counts[kind] += 1\n", "")
def test_rows_are_added_to_those_of_an_earlier_server(tmp_path):
    kept(tmp_path).add(judgement(ASKED, "a", True), MODELS)
    before = kept(tmp_path).paths["judged"].read_bytes()
    again = kept(tmp_path)
    assert again.state()["judged"]["rows"] == 1
    again.add(judgement(ASKED, "b", False), MODELS)
    assert again.paths["judged"].read_bytes().startswith(before) and again.state()["judged"]["rows"] == 2


@mutation(
    "lora/serve/feedback.py",
    "                    if isinstance(row, formats.Problem):\n",
    "                    if False:\n",
)
@mutation(
    "lora/serve/feedback.py",
    '                problems += files.unwritable("--feedback", path)\n',
    "                pass\n",
)
@mutation("lora/serve/feedback.py", "                if not above.is_dir():", "                if False:")
def test_a_file_that_holds_anything_else_is_refused_and_not_touched(tmp_path):
    (tmp_path / "a-pairs.jsonl").write_text('{"messages": []}\n')
    (tmp_path / "b-judged.jsonl").mkdir()
    (tmp_path / "file").write_text("x")
    before = cli.tree(tmp_path)
    for name, place in (("a", "a-pairs.jsonl"), ("b", "b-judged.jsonl"), ("file/c", "file"), ("file/sub/c", "file")):
        with pytest.raises(BadInput, match=f"wrong --feedback in .*{place}"):
            Feedback(str(tmp_path / name))
    assert cli.tree(tmp_path) == before


@mutation("lora/serve/feedback.py", 'raise Wrong(507, f"{path} cannot be', 'raise Wrong(500, f"{path} cannot be')
@mutation("lora/serve/feedback.py", "if path.exists() and path.stat().st_size > LARGEST_FILE:", "if False:")
def test_a_disk_or_a_file_that_is_full_is_said(tmp_path, monkeypatch):
    store = kept(tmp_path)
    store.add(judgement(ASKED, "a", True), MODELS)
    before = store.paths["judged"].read_bytes()
    monkeypatch.setattr(feedback, "LARGEST_FILE", 10)
    assert "larger" in wrong(507, judgement(ASKED, "b", True), store)
    monkeypatch.undo()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "append_row", full)
    assert "No space left" in wrong(507, judgement(ASKED, "b", True), store)
    assert store.paths["judged"].read_bytes() == before and store.state()["judged"]["rows"] == 1


@mutation("lora/serve/feedback.py", "        with self.lock:\n", "        if True:\n")
def test_rows_of_many_at_once_are_whole_and_all_there(tmp_path, monkeypatch):
    store, append, inside, most = kept(tmp_path), files.append_row, [], []

    def slow(*args):  # lets others in between
        inside.append(args)
        most.append(len(inside))
        time.sleep(0.002)
        inside.pop()
        return append(*args)

    monkeypatch.setattr(files, "append_row", slow)
    found = []

    def add(who: int) -> None:
        for i in range(10):
            found.extend(store.add(judgement(ASKED, f"{who} {i}", True), MODELS)["rows"])

    threads = [threading.Thread(target=add, args=(who,)) for who in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    texts = {row["messages"][-1]["content"] for row in written(store.paths["judged"])}
    assert texts == {f"{who} {i}" for who in range(8) for i in range(10)}
    lines = sorted(store.written.values(), key=lambda row: row[1])
    assert max(most) == 1 and len(set(found)) == 80
    assert all(a + len(line) == b for (_, a, line), (_, b, _) in pairwise(lines))


# ---- over HTTP -------------------------------------------------------------------------------------------------------


def client(tmp_path, base: str = "http://127.0.0.1:8000", bound: str = "127.0.0.1", **how) -> TestClient:
    served = scripted.served(dict.fromkeys(MODELS, "Hello."), tmp_path / "weights/feedback", **how)
    served.host = bound
    return TestClient(application(served), base, raise_server_exceptions=False)


GOOD = judgement(ASKED, "Hello.", True)


@mutation("lora/serve/page.py", "if not keys and not is_ours(host, bound):", "if False:")
@mutation("lora/serve/page.py", 'if origin is not None and origin.lower().partition("://")[2] != host:', "if False:")
@mutation("lora/serve/page.py", '    if kind != "application/json":', "    if False:")
@mutation("lora/serve/app.py", "check_sender(request, served.host, served.keys)", "pass")
def test_only_the_page_itself_and_programs_write(tmp_path):
    here = client(tmp_path)
    for headers, status in (
        ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403), ({"Origin": "http://127.0.0.1:9000"}, 403),
        ({"Origin": "http://127.0.0.1:8000.evil.example"}, 403), ({"Host": "evil.example:8000"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 403), ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Content-Type": "text/plain"}, 415), ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Origin": "http://127.0.0.1:8000"}, 200), ({}, 200), ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "192.168.1.7:8000", "Origin": "http://192.168.1.7:8000"}, 200),
    ):  # fmt: skip
        response = here.post(
            "/feedback", content=json.dumps(GOOD), headers={"Content-Type": "application/json"} | headers
        )
        assert response.status_code == status, (headers, response.text)
    assert len(written(tmp_path / "weights/feedback-judged.jsonl")) == 5
    assert here.get("/feedback").status_code == 405
    assert client(tmp_path, "http://box.lan", "box.lan").post("/feedback", json=GOOD).status_code == 200


@mutation(
    "lora/serve/app.py", 'Route("/feedback", guarded(judge)', 'Route("/feedback", guarded(judge, open_to_all=True)'
)
@mutation(
    "lora/serve/app.py",
    'Route("/settings", guarded(settings))',
    'Route("/settings", guarded(settings, open_to_all=True))',
)
def test_with_a_key_nobody_judges_without_it_and_any_name_of_the_server_will_do(tmp_path):
    here = client(tmp_path, "https://proxy.example", keys=("secret",))
    assert here.post("/feedback", json=GOOD).status_code == 401 and here.get("/settings").status_code == 401
    allowed = {"Authorization": "Bearer secret"}
    assert here.post("/feedback", json=GOOD, headers=allowed).status_code == 200
    assert here.get("/settings", headers=allowed).json()["feedback"]["judged"]["rows"] == 1
    assert here.post("/feedback", json=GOOD, headers={**allowed, "Origin": "https://evil.example"}).status_code == 403


@mutation("lora/serve/app.py", "await read_body(request, LARGEST_JUDGEMENT)", "await read_body(request)")
@mutation("lora/serve/app.py", "if served.feedback is None:", "if False:")
def test_a_judgement_has_a_megabyte_and_a_server_without_feedback_takes_none(tmp_path):
    here = client(tmp_path)
    assert here.post("/feedback", json=judgement(ASKED, "a" * 2**20, True)).status_code == 413
    for broken in (b"{", b"[" * 100_000, b"\xff"):
        assert here.post("/feedback", content=broken, headers={"Content-Type": "application/json"}).status_code == 400
    without = TestClient(application(scripted.served({"base": "a"})), "http://127.0.0.1", raise_server_exceptions=False)
    assert without.post("/feedback", json=GOOD).status_code == 404
    assert without.get("/settings").json()["feedback"] is None and not (tmp_path / "weights").exists()


# ---- the loop --------------------------------------------------------------------------------------------------------


def test_the_flags_of_feedback_are_for_serve(tmp_path):
    for flag in (("--feedback", "x"), ("--no-feedback",)):
        done = cli.call("generate", "--prompt", "a", *flag, cwd=tmp_path)
        assert done.code == 2 and f"wrong {flag[0]} in the command line" in done.err


@mutation("lora/serve/command.py", "    if served.feedback:\n", "    if False:\n")
@mutation("generate.py", "None if args.no_feedback else args.feedback", "args.no_feedback and args.feedback")
def test_from_the_served_answers_to_an_adapter_trained_on_what_was_said_of_them(tmp_path):
    command = ("--model", cli.model_folder(), "--adapter", cli.adapter_folder(), "--serve", 0, "--max-new-tokens", 8)
    running = cli.start("generate", *command, *cli.ON_CPU, cwd=tmp_path)
    try:
        told = ""
        while "feedback" not in told:
            line = running.stderr.readline()
            assert line, told
            told += line
        assert "weights/feedback-pairs.jsonl, weights/feedback-judged.jsonl" in told
        url = re.search(r"http://\S+", told)[0]

        def call(path: str, body: dict | None = None) -> dict:
            data = body and json.dumps(body).encode()
            request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)

        models = [model["id"] for model in call("v1/models")["data"]]
        answers = [
            call("v1/chat/completions", {"model": model, "messages": ASKED, "temperature": 1.0, "seed": 5, "n": 1})
            for model in models
        ]
        texts = [one["choices"][0]["message"]["content"] for one in answers]
        assert len({*texts}) == 2
        body = {"messages": ASKED, "chosen": said(texts[1], models[1]), "rejected": [said(texts[0], models[0])]}
        assert call("feedback", body)["pair"]["rows"] == 1
    finally:
        running.terminate()
        running.communicate()
    goes_on = ("--init-adapter", cli.adapter_folder(), "--method", "dpo", "--data", "weights/feedback-pairs.jsonl")
    done = cli.call(
        "train", "--model", cli.model_folder(), *goes_on, "--max-steps", 1, "--out", "again", *cli.ON_CPU, cwd=tmp_path
    )
    assert done.code == 0, done.err
