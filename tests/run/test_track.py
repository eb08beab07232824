"""--track: trackers get the rows of metrics.jsonl; stand-ins for their packages say what was called."""

import json
import subprocess
import sys
import threading
import types
from importlib.machinery import ModuleSpec

import pytest

from lora.run import track
from tests import cli
from tests.mutation import mutation

HOW = ("--max-steps", 4, "--batch-size", 3, "--eval-fraction", 0.2, "--eval-every", 2)


class StandIn(types.ModuleType):
    """A package whose every call is noted in a file, as `name(args)`; `broken` raises in the calls so named."""

    def __init__(self, name: str, to, broken: str = ""):
        super().__init__(name)
        self.__spec__, self.to, self.broken = ModuleSpec(name, None, origin="a stand-in"), to, broken
        self.info = types.SimpleNamespace(run_id="7")

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **how):
            if name == self.broken:
                raise ConnectionError("no network\nat all")
            told = [name, args, {key: str(value) for key, value in how.items()}]
            with open(self.to, "a") as file:
                file.write(json.dumps(told, default=str) + "\n")
            return self

        return call


def stand_in(name: str, to, broken: str = ""):
    return lambda: sys.modules.update({name: StandIn(name, to, broken)})


def calls(path, *names: str) -> list:
    return [call for call in map(json.loads, path.read_text().splitlines()) if call[0] in names]


def numbers_of(folder) -> list:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], {k: v for k, v in row.items() if k not in ("step", "samples")}) for row in rows]


@mutation("lora/run/track.py", 'os.environ.setdefault("WANDB_MODE", "offline") != "online"', "True")
@mutation("lora/train/record.py", "            tell(row)\n", "            pass\n")
def test_wandb_gets_every_row_offline(tmp_path):
    to = tmp_path / "calls"
    before = stand_in("wandb", to)

    def with_mode() -> None:
        before()
        opened = track.TRACKERS["wandb"]

        def noting(*how):
            found = opened(*how)
            with open(to, "a") as file:
                file.write(json.dumps(["mode", [track.os.environ["WANDB_MODE"]], {}]) + "\n")
            return found

        track.TRACKERS["wandb"] = noting

    done = cli.train("run", *HOW, "--track", "wandb", cwd=tmp_path, env={"WANDB_MODE": None}, before=with_mode)
    assert done.code == 0, done.err
    [(_, _, how)] = calls(to, "init")
    assert (how["project"], how["name"]) == ("lora", "run") and "'rank': 4" in how["config"]
    assert calls(to, "mode")[0][1] == ["offline"] and len(calls(to, "finish")) == 1
    assert [(int(how["step"]), args[0]) for _, args, how in calls(to, "log")] == numbers_of(tmp_path / "run")


@mutation("lora/run/track.py", "for first in range(0, len(params), 100)", "for first in range(0, 1, 100)")
def test_mlflow_gets_settings_and_every_row(tmp_path, monkeypatch):
    to = tmp_path / "calls"
    monkeypatch.setitem(sys.modules, "mlflow", StandIn("mlflow", to))
    for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    settings = {f"setting {i}": i for i in range(130)} | {"none": None}
    write, close = track.mlflow(tmp_path / "run", settings, 0)
    write({"loss": 1.5}, 3)
    close()
    logged = [args[0] for _, args, _ in calls(to, "log_params")]
    assert [len(part) for part in logged] == [100, 30] and {**logged[0], **logged[1]} == {
        name: str(value) for name, value in settings.items() if value is not None
    }
    assert calls(to, "set_experiment")[0][1] == ["lora"] and calls(to, "start_run")[0][2]["run_name"] == "run"
    assert calls(to, "log_metrics") == [["log_metrics", [{"loss": 1.5}], {"step": "3", "run_id": "7"}]]
    assert len(calls(to, "end_run")) == 1 and track.os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


@mutation("lora/run/track.py", "        except Exception as error:", "        except ValueError as error:")
@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_one_warning_and_the_run_is_the_same(tmp_path, broken):
    assert cli.train("without", *HOW, cwd=tmp_path).code == 0
    before = stand_in("wandb", tmp_path / "calls", broken)
    done = cli.train("with", *HOW, "--track", "wandb", cwd=tmp_path, before=before)
    warnings = [line for line in done.err.splitlines() if "--track" in line]
    assert (
        warnings == ["warning: --track wandb failed; the run goes on without it: ConnectionError: no network"]
        and "Traceback" not in done.err
    )
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("without", "with")]
    assert done.code == 0 and files[0].read_bytes() == files[1].read_bytes()


@mutation("lora/run/track.py", "self.thread.join(PATIENCE)", "self.thread.join()")
def test_a_tracker_that_hangs_holds_no_step_and_the_end_for_a_while_only(tmp_path, monkeypatch, capsys):
    hanging = threading.Event()
    monkeypatch.setitem(track.TRACKERS, "wandb", lambda *how: (lambda *row: hanging.wait(20), lambda: None))
    monkeypatch.setattr(track, "PATIENCE", 0.1)
    tracker = track.Tracker("wandb", tmp_path, {}, 0)
    for step in range(1000):
        tracker({"step": step, "loss": 1.0})
    tracker.close()
    assert "--track wandb did not end in" in capsys.readouterr().err and not hanging.is_set()
    hanging.set()


@mutation("lora/run/settings.py", "return found + track.missing(self.track) + ", "return found + ")
def test_a_package_that_is_missing_is_one_line_before_anything_is_read(tmp_path):
    def without() -> None:
        track.find_spec = lambda name: ModuleSpec(name, None) if name == "wandb" else None  # a folder called wandb

    done = cli.call("train", "--data", "nothing.jsonl", "--track", "wandb", "mlflow", cwd=tmp_path, before=without)
    errors = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert done.code == 2 and len(errors) == 2 and "model " not in done.err
    assert "no wandb here" in errors[0] and "-m pip install mlflow" in errors[1]


def test_no_tracker_is_imported_unasked():
    code = f"import sys; sys.path[:0] = [{str(cli.ROOT)!r}]; import train; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not {f"'{name}'" for name in track.TRACKERS} & set(done.stdout.split(", "))


@mutation("lora/run/track.py", "type(value) in (int, float)", "isinstance(value, (int, float))")
def test_what_is_no_number_is_not_drawn():
    row = {"step": 3, "loss": None, "lr": 0.5, "samples": {"a": "b"}, "ended": True, "tokens": 7}
    assert track.numbers(row) == {"lr": 0.5, "tokens": 7}
