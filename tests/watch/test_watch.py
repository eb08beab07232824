"""--watch: the page shows what the run's files say, shows no other file, and neither changes nor stops the run."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora import address
from lora.errors import BadInput
from lora.watch import app, asked, command
from lora.watch.reading import PIECE, Run
from tests import cli
from tests.mutation import mutation
from tests.watch.serving import EVALUATION, STEP, ask, served, write_run

HOW = ("--max-steps", 6, "--batch-size", 3, "--eval-fraction", 0.2, "--eval-every", 2, "--dropout", 0.2)


def read(run: Run, start: int = 0, mark: int = 0) -> dict:
    return run.rows(start, mark)


# ---- reading ---------------------------------------------------------------------------------------------------------


@mutation("lora/watch/reading.py", 'whole = piece.rfind(b"\\n") + 1  #', "whole = len(piece)  #")
def test_a_row_that_is_half_written_is_shown_when_it_is_whole(tmp_path):
    run = Run(write_run(tmp_path / "a", STEP))
    line = json.dumps(STEP | {"step": 2}).encode() + b"\n"
    with open(tmp_path / "a/metrics.jsonl", "ab") as file:
        for i in range(len(line)):
            file.write(line[i : i + 1])
            file.flush()
            found = read(run)
            assert [row["step"] for row in found["rows"]] == ([1] if i + 1 < len(line) else [1, 2])
    first = len(json.dumps(STEP)) + 1
    assert read(run, first, Run(tmp_path / "a").rows(0, 0)["mark"])["reset"]  # not the mark of that place


@mutation("lora/watch/reading.py", 'found |= {"next": start + whole,', 'found |= {"next": whole,')
def test_rows_come_once_each_by_their_offset(tmp_path):
    run, seen, place = Run(write_run(tmp_path / "a", STEP)), [], (0, 0)
    for step in range(2, 8):
        found = read(run, *place)
        assert not found["reset"]
        seen, place = seen + found["rows"], (found["next"], found["mark"])
        with open(tmp_path / "a/metrics.jsonl", "a") as file:
            file.write(json.dumps(STEP | {"step": step}) + "\n")
    assert [row["step"] for row in seen] == [1, 2, 3, 4, 5, 6]


@mutation("lora/watch/reading.py", " or _mark(file, start) != mark):", "):")
@mutation("lora/watch/reading.py", '"reset": found["reset"] and start == 0}', '"reset": False}')
def test_a_file_that_was_cut_or_replaced_is_read_from_its_beginning(tmp_path):
    rows = [STEP | {"step": n} for n in range(1, 7)]
    run = Run(write_run(tmp_path / "a", *rows))
    found = read(run)
    other = [*rows[:3], *(row | {"loss": 3.5} for row in rows[3:])]  # resumed from step 3: as many bytes
    for now in (rows[:3], other):
        write_run(tmp_path / "a", *now)
        again = read(run, found["next"], found["mark"])
        assert again["reset"] and again["rows"] == now
    assert not read(run, again["next"], again["mark"])["reset"]


@mutation("lora/watch/reading.py", "parse_constant=lambda name: None", "parse_constant=float")
def test_lines_that_make_no_sense_are_left_out_and_all_else_is_json_that_a_page_reads(tmp_path):
    run = Run(write_run(tmp_path / "a", STEP))
    with open(tmp_path / "a/metrics.jsonl", "ab") as file:
        file.write(b'nonsense\n[1]\n\xff\xfe\n{"step": 2, "loss": NaN}\n' + b"[" * 100_000 + b"\n")
    assert read(run)["rows"] == [STEP, {"step": 2, "loss": None}]


@mutation("lora/watch/reading.py", '"more": len(piece) == PIECE}', '"more": False}')
def test_a_long_run_comes_in_pieces_and_a_line_that_never_ends_does_not_stop_it(tmp_path):
    rows = [STEP | {"step": n} for n in range(1, 2 * PIECE // len(json.dumps(STEP)))]
    run, seen, found = Run(write_run(tmp_path / "a", *rows)), [], {"next": 0, "mark": 0, "more": True}
    while found["more"]:
        found = read(run, found["next"], found["mark"])
        assert len(json.dumps(found)) < 1.5 * PIECE
        seen += found["rows"]
    assert seen == rows
    (tmp_path / "a/metrics.jsonl").write_bytes(b"x" * (PIECE + 10) + b"\n" + json.dumps(STEP).encode() + b"\n")
    found = read(run)
    assert (found["rows"], found["more"]) == ([], True)
    assert read(run, found["next"], found["mark"])["rows"] == [STEP]


@mutation("lora/watch/reading.py", "return self.earlier is None or", "return True or")
def test_the_run_that_will_be_replaced_is_not_taken_for_the_one_that_begins(tmp_path):
    folder = write_run(tmp_path / "a", STEP)
    run = Run(folder, replaces=True)
    assert read(run)["rows"] == [] and run.about()["settings"] == {} and run.data() == {}
    (folder / "settings.json").rename(tmp_path / "old")  # as --overwrite moves the folder away
    assert read(run)["rows"] == []
    write_run(folder, STEP | {"step": 5})
    assert read(run)["rows"] == [STEP | {"step": 5}] and run.about()["settings"]


@mutation("lora/watch/reading.py", "pid is not None and is_alive(pid)", "pid is not None")
def test_a_run_is_running_ended_or_stopped(tmp_path):
    ended, killed, going = (write_run(tmp_path / name, STEP, ended=None) for name in ("ended", "killed", "going"))
    write_run(ended, STEP)
    child = subprocess.Popen(["true"])
    child.wait()
    (tmp_path / ".killed.lock").write_text(str(child.pid))
    (tmp_path / ".going.lock").write_text(str(os.getpid()))
    (tmp_path / ".soon.lock").write_text(str(os.getpid()))
    states = [read(Run(folder))["state"] for folder in (ended, killed, going, tmp_path / "soon")]
    assert states == ["ended", "stopped", "running", "starting"]


@mutation("lora/watch/reading.py", '.replace("\\\\|", "|")', "")
def test_what_changed_is_read_from_the_report(tmp_path):
    folder = write_run(tmp_path / "a", STEP)
    table = "| asked | before | after |\n| --- | --- | --- |\n| Who? | a \\| b | <b>I</b> |\n"
    (folder / "report.md").write_text(f"# a\n\n## What changed\n\n{table}\n## Settings\n\n| x | y | z |\n")
    assert Run(folder).about()["changed"] == [["Who?", "a | b", "<b>I</b>"]]


# ---- the server ------------------------------------------------------------------------------------------------------


@mutation("lora/watch/app.py", "run = runs[int(found[1])]", "run = runs[0]")
def test_two_runs_lie_over_each_other(tmp_path):
    a, b = write_run(tmp_path / "a", STEP, EVALUATION), write_run(tmp_path / "b", STEP | {"loss": 9.0})
    with served(a, b) as port:
        assert [about["name"] for about in json.loads(ask(port, "/runs")[1])] == ["a", "b"]
        first, second = (json.loads(ask(port, f"/runs/{i}/rows?from=0&mark=0")[1]) for i in (0, 1))
    assert first["rows"] == [STEP, EVALUATION] and second["rows"] == [STEP | {"loss": 9.0}]


@mutation("lora/watch/app.py", "elif found and int(found[1]) < len(runs):", "elif found:")
def test_no_path_leads_to_any_other_file(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("the secret")
    folder = write_run(tmp_path / "a", STEP)
    (folder / "optimizer.safetensors").write_text("the secret")
    paths = ["/secret", "/../secret", "/runs/../secret", "/runs/0/../../secret", "/runs/0/settings.json",
             "/runs/1/rows", "/runs/-1/rows", "/runs/0/rows/../../../secret", f"/runs/0/{secret}", f"//{secret}",
             "/runs/0/data%2f..", "/%2e%2e/secret", "/runs/0/optimizer.safetensors", "/page.html", "/app.py",
             "/runs/99999999999/rows",
             "*", "/runs/0/rows%00"]  # fmt: skip
    with served(folder) as port:
        for path in paths:
            status, text = ask(port, path)
            assert status == 404 and "secret" not in text, path
        for query in ("from=-1", "from=x&mark=y", "from=99999999999999999999", "mark=1&from=", "a" * 4000):
            status, text = ask(port, f"/runs/0/rows?{query}")
            assert status == 200 and json.loads(text)["rows"] == [STEP], query


@mutation("lora/watch/app.py", "if self.server.local and not LOCAL", "if False and not LOCAL")
def test_another_sites_name_that_leads_here_is_refused(tmp_path):
    with served(write_run(tmp_path / "a", STEP)) as port:
        assert (
            ask(port, "/runs", Host="evil.example:80")[0] == ask(port, "/runs", Host="localhost.evil.example")[0] == 403
        )
        assert ask(port, "/runs", Host="localhost:8001")[0] == ask(port, "/runs", Host="[::1]:8001")[0] == 200


@mutation("lora/watch/app.py", "            self.room.release()", "            pass")
def test_a_connection_gives_its_room_back(tmp_path):
    with served(write_run(tmp_path / "a", STEP)) as port:
        assert [ask(port, "/runs")[0] for _ in range(2 * app.AT_ONCE)] == [200] * 2 * app.AT_ONCE


@mutation("lora/watch/app.py", "\"default-src 'none'\"", "\"default-src 'self'\"")
@mutation("lora/watch/page.html", 'asked: "问题", answer', "answer")
def test_the_page_may_run_its_own_script_and_nothing_else_and_sets_text_only():
    page = app.PAGE.read_text()
    rules = app.policy(page)
    assert rules.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in rules
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|\bFunction\(|https?://", page)
    assert not re.search(r"<[^>]+\s(on\w+|style|src)=", page.partition("<script>")[0])
    english, chinese = re.findall(r"^  (?:en|zh): \{\n(.*?)^  \}", page, re.DOTALL | re.MULTILINE)
    assert re.findall(r"\b(\w+): ", re.sub(r'"[^"]*"', '""', english)) == re.findall(
        r"\b(\w+): ", re.sub(r'"[^"]*"', '""', chinese)
    )


@mutation("lora/watch/reading.py", "import zlib\n", "import zlib\nimport torch\n")
def test_watching_loads_no_torch():
    code = f"import sys; sys.path[:0] = [{str(cli.ROOT)!r}]; import lora.watch.command; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


# ---- beside a run ----------------------------------------------------------------------------------------------------


def adapter(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def page_of(err: str) -> int:
    return int(re.search(r"^watch    http://127\.0\.0\.1:(\d+)/$", err, re.MULTILINE)[1])


@mutation("lora/run/plan.py", '"total": self.total, ', '"total": 1, ')
def test_with_a_page_the_run_is_the_same_to_the_bit_and_the_page_shows_it(tmp_path):
    assert cli.train("without", *HOW, cwd=tmp_path).code == 0
    done = cli.train("with", *HOW, "--watch", "127.0.0.1:0", cwd=tmp_path)
    assert done.code == 0
    rows = json.loads(ask(page_of(done.err), "/runs/0/rows?from=0&mark=0")[1])  # the page stays for a moment
    assert rows["state"] == "ended" and [row["step"] for row in rows["rows"] if "loss" in row] == [1, 2, 3, 4, 5, 6]
    data = json.loads(ask(page_of(done.err), "/runs/0/data")[1])
    trained = [texts for trained, texts in data["examples"][0]["sides"][0]["rows"] if trained]
    assert data["total"] == 6 and "".join(trained[0]) == "It is 2, as 1 and 1 are 2.<|im_end|>"
    assert adapter(tmp_path / "without") == adapter(tmp_path / "with")
    settings = [json.loads((tmp_path / name / "settings.json").read_text()) for name in ("without", "with")]
    assert settings[0] == settings[1]


def kill_the_page_before_step(step: int):
    def prepare() -> None:
        import train

        made, started = train.train_step, []
        popen = subprocess.Popen

        def watched(*args, **kwargs):
            started.append(popen(*args, **kwargs))
            return started[-1]

        def with_kill(*args, **kwargs):
            nonlocal step
            step -= 1
            if step == 0:
                started[0].send_signal(signal.SIGKILL)
                started[0].wait()
            return made(*args, **kwargs)

        subprocess.Popen, train.train_step = watched, with_kill

    return prepare


def test_a_page_that_is_killed_takes_no_step_from_the_run(tmp_path):
    assert cli.train("without", *HOW, cwd=tmp_path).code == 0
    done = cli.train("with", *HOW, "--watch", "127.0.0.1:0", cwd=tmp_path, before=kill_the_page_before_step(3))
    assert (done.code, adapter(tmp_path / "with")) == (0, adapter(tmp_path / "without"))


def test_a_client_that_never_reads_does_not_hold_the_run(tmp_path):
    """More connections than there is room for, all silent, from before the first step."""

    def prepare() -> None:
        listen, kept = address.listen, []

        def listening(host, port):
            listener = listen(host, port)
            for _ in range(2 * app.AT_ONCE):
                kept.append(socket.socket())
                kept[-1].setblocking(False)
                kept[-1].connect_ex(listener.getsockname())
            return listener

        address.listen = listening
        prepare.kept = kept

    assert cli.train("without", *HOW, cwd=tmp_path).code == 0
    done = cli.train("with", *HOW, "--watch", "127.0.0.1:0", cwd=tmp_path, before=prepare)
    assert (done.code, adapter(tmp_path / "with")) == (0, adapter(tmp_path / "without"))


@mutation("lora/watch/command.py", "except (BadEnvironment, OSError, ValueError) as error:", "except OSError as error:")
def test_an_address_that_is_taken_is_a_note_and_the_run_goes_on(tmp_path):
    with address.listen(address.LOOPBACK, 0) as taken:
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        done = cli.train("run", *HOW, "--watch", where, cwd=tmp_path)
        alone = cli.call("train", "--watch", where, "run", cwd=tmp_path)
    [note] = [line for line in done.err.splitlines() if "no page" in line]
    assert done.code == 0 and where in note and "python train.py --watch run" in note
    assert (alone.code, alone.err.count("error: no server at")) == (3, 1)


@mutation("lora/watch/command.py", "                process.stdin.close()", "                pass")
def test_the_page_ends_with_the_run(tmp_path, capsys):
    with command.beside(write_run(tmp_path / "a", STEP), ["0"], True, True):
        port = page_of(capsys.readouterr().err)
        assert json.loads(ask(port, "/runs/0/rows")[1])["rows"] == [STEP]
    assert ask(port, "/runs/0/rows")[0] == 200  # for who looks on
    deadline = time.monotonic() + app.GRACE + 20
    with pytest.raises(OSError):
        while time.monotonic() < deadline:
            ask(port, "/runs/0/rows")
            time.sleep(0.2)


# ---- the flag --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, places",
    [
        (["9000"], [("127.0.0.1", 9000)]),
        (["0.0.0.0:80"], [("0.0.0.0", 80)]),
        (["[::1]:80"], [("::1", 80)]),
        ([], [("127.0.0.1", port) for port in range(8001, 8011)]),
        (["weights/a", "9000", "./8001"], [("127.0.0.1", 9000)]),
    ],
)
@mutation("lora/watch/asked.py", r'r"([^/\\]*:)?[0-9]+"', 'r"[0-9]+"', case="given1-places1")
def test_numbers_are_addresses_and_all_else_is_folders(given, places):
    assert asked.places(given) == places
    assert asked.folders(given) == [text for text in given if "/" in text]


def test_an_address_that_makes_no_sense_is_one_line():
    for text in ("99999", ":80"):
        with pytest.raises(BadInput, match="no PORT or HOST:PORT"):
            asked.places([text])


@mutation("train.py", "        watch.check_alone(args.given)\n", "")
def test_what_contradicts_a_page_is_refused_in_one_line(tmp_path):
    def refused(*words) -> str:
        done = cli.call("train", *words, cwd=tmp_path)
        [line] = [line for line in done.err.splitlines() if line.startswith("error:")]
        assert done.code == 2
        return line

    assert "--data, --rank" in refused("--rank", 4, "--watch", "a", "--data", "x.jsonl")
    assert "no run in a" in refused("--watch", "a")
    assert "8001 and 8002" in refused("--watch", "8001", "8002")
    assert "8001 and 8002" in refused("--watch", "8001", "8002", "a")
    assert "--preview and --watch" in refused("--preview", 1, "--watch")


@mutation("lora/run/settings.py", '"without training", saved=False, bare=True)', '"without training", bare=True)')
def test_a_resumed_run_may_be_watched_and_its_settings_do_not_say_so(tmp_path):
    assert cli.train("run", *HOW, "--watch", "0", cwd=tmp_path).code == 0
    assert "watch" not in json.loads((tmp_path / "run/settings.json").read_text())
    done = cli.call("train", "--resume", "--out", "run", "--watch", "0", cwd=tmp_path)
    assert done.code == 0 and page_of(done.err)
