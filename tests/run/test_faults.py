"""A save may be killed at any operation on a file, or the operation may fail, or the power: what is believed afterwards
is whole, there always is something to believe, and the next save tidies up."""

import errno
import json
import os
import random
import shutil
import signal
import warnings
from functools import cache
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bench import kills
from lora import files, folders
from lora.adapter import passport, store, value_head
from lora.adapter.inject import inject
from lora.errors import BadEnvironment, BadInput
from lora.run import results
from lora.run.results import SETTINGS, WROTE, Results
from lora.run.trainable import Adapter
from lora.train import run_state
from lora.train.distributed import DistContext
from lora.train.record import Record
from tests import cli
from tests.faults import Blow, Disk, replay
from tests.mutation import mutation

# ---- a run in small --------------------------------------------------------------------------------------------------


@cache
def trained(step: int):
    """A patched model and its AdamW after so many steps."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 6), "v_proj": nn.Linear(8, 4)})
    inject(model, rank=2)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    for _ in range(step):
        for p in parameters.values():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return model, optimizer, parameters


def save(run: Path, step: int, keep: int = 9):
    model, optimizer, parameters = trained(step)
    state = run_state.State(step, 60, 0, {"rank": 2}, "data", "base")
    with run_state.disk_full(run, parameters):
        run_state.save(run, state, optimizer, parameters, lambda folder: store.save(model, folder, "base", {"a": 1}))
        run_state.prune(run, keep)


@cache
def a_run() -> Path:
    """With checkpoints after steps 1 and 2."""
    run = cli.scratch() / "faults"
    run.mkdir()
    save(run, 1), save(run, 2)
    return run


@cache
def whole(step: int) -> dict[str, str]:
    save(cli.scratch() / "whole", step)
    return cli.tree(run_state.at(cli.scratch() / "whole", step))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # a killed process loses nothing for want of it, and it is slow


@pytest.fixture
def new_run(tmp_path):
    """Makes fresh copies of the run."""
    numbers = iter(range(10**6))
    return lambda: shutil.copytree(a_run(), tmp_path / f"run{next(numbers)}")


def operations(run: Path, story) -> list:
    with Disk(run) as disk:
        story(run)
    return disk.ops


def moments(ops: list) -> list[tuple[int, str]]:
    """Before every operation, in the middle of every write, and after the last; after one is before the next."""
    found = [(at, part) for at, op in enumerate(ops) for part in ("before", "half") if part == "before" or op.data]
    return [*found, (len(ops) - 1, "after")]


def kill(run: Path, story, blow: Blow) -> None:
    """The story in a forked child that is killed there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads; the child uses none of them
        child = os.fork()
    if child == 0:
        try:
            with Disk(run, blow):
                story(run)
        finally:
            os._exit(70)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def hidden(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob(".*"))


def believed(run: Path) -> int:
    """The step of the newest checkpoint; all that have a name are whole."""
    for step in run_state.steps(run):
        assert cli.tree(run_state.at(run, step)) == whole(step)
    path, passed_over = run_state.newest(run)
    assert path is not None and passed_over == []
    return int(path.name)


def go_on(run: Path, keep: int) -> None:
    """What a continued run does: it sweeps and saves its next step."""
    folders.sweep(run), folders.sweep(run / run_state.FOLDER)
    save(run, believed(run) + 1, keep)


def check_tidy(run: Path, keep: int) -> None:
    last = believed(run)
    assert run_state.steps(run) == list(range(last - keep + 1, last + 1)) and hidden(run) == []


# ---- killed ----------------------------------------------------------------------------------------------------------


@mutation(
    "lora/folders.py",
    '    aside, old = (_beside(path, kind) for kind in ("partial", "old"))',
    '    aside, old = path, path.with_name(".old")',
)
@pytest.mark.parametrize("keep", [1, 2])
def test_a_save_killed_at_any_operation_leaves_the_old_or_the_new_checkpoint_and_the_next_save_tidies_up(new_run, keep):
    story = lambda run: save(run, 3, keep)  # noqa: E731
    ops, found = operations(new_run(), story), []
    for at, part in moments(ops):
        run = new_run()
        kill(run, story, Blow(at, part))
        found.append(believed(run))
        go_on(run, keep)
        check_tidy(run, keep)
    assert len(ops) > 40 and found == sorted(found) and set(found) == {2, 3}


def test_a_save_killed_and_killed_again_while_going_on_is_survived(new_run):
    story, again = (lambda run: save(run, 3, 1)), (lambda run: go_on(run, 1))
    chosen, ops = random.Random(0), operations(new_run(), story)
    for at, part in chosen.sample(moments(ops), 16):
        run, trial = new_run(), new_run()
        for copy in (run, trial):
            kill(copy, story, Blow(at, part))
        kill(run, again, Blow(*chosen.choice(moments(operations(trial, again)))))
        believed(run)
        again(run)
        check_tidy(run, 1)


@mutation("lora/folders.py", "if found and not any(", "if not any(")
def test_a_run_that_replaces_another_and_is_killed_as_it_starts_can_be_started_again(tmp_path):
    def start(place: Path) -> None:
        folders.check_out(place / "out", True, WROTE)
        with folders.live_folder(place / "out", True, lambda: True):
            files.write_json(place / "out" / SETTINGS, {"rank": 3})

    def earlier() -> Path:
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        place.mkdir()
        for run in (a_run(), a_run() / run_state.FOLDER / "000001"):
            shutil.copytree(run, place / "out", dirs_exist_ok=True)
        shutil.copytree(a_run(), place / ".out.b.1.old")  # of a run with another name
        return place

    wanted = [".out.b.1.old", "out", f"out/{SETTINGS}"]
    for at, part in moments(operations(earlier(), start)):
        place = earlier()
        kill(place, start, Blow(at, part))
        start(place)
        assert [name for name in cli.tree(place) if "/00" not in name and "1.old/" not in name] == wanted


def test_what_a_killed_process_with_our_number_left_is_not_in_the_way(new_run):
    run = new_run()
    place = run / run_state.FOLDER
    for name in (place / f".000003.{os.getpid()}.partial", *(place / f".00000{n}.{os.getpid()}.old" for n in (1, 2))):
        shutil.copytree(place / "000001", name)
    save(run, 3, 1)
    assert believed(run) == 3 and run_state.steps(run) == [3]
    shutil.copytree(run, run.with_name(f".{run.name}.{os.getpid()}.old"))
    with folders.live_folder(run, True, lambda: True):
        files.write_json(run / SETTINGS, {})
    assert [path.name for path in run.parent.iterdir()] == [run.name]


# ---- failed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "keep"), [(errno.ENOSPC, 1), (errno.EIO, 2)], ids=["full", "broken"])
def test_an_operation_that_fails_is_an_error_and_leaves_nothing_half_written(new_run, number, keep):
    ops = operations(new_run(), lambda run: save(run, 3, keep))
    for at, part in moments(ops)[:-1]:
        run = new_run()
        if ops[at].kind in ("unlink", "rmdir"):  # of what has lost its name already: left for the next sweep
            with Disk(run, Blow(at, part, number)):
                save(run, 3, keep)
            assert believed(run) == 3 and len({name.split("/")[1] for name in hidden(run)}) == 1
        else:
            with pytest.raises((OSError, BadEnvironment)) as raised, Disk(run, Blow(at, part, number)):
                save(run, 3, keep)
            good = run_state.at(run, believed(run))
            if number == errno.ENOSPC:
                assert f"the last good checkpoint is {good}" in str(raised.value) and "are free" in str(raised.value)
            else:
                assert raised.value.errno == errno.EIO and raised.value.filename
            assert hidden(run) == []
        go_on(run, keep)
        check_tidy(run, keep)


@mutation(
    "lora/files.py",
    """            os.ftruncate(handle, size)
""",
    "",
)
@pytest.mark.parametrize("fault", ["short", "error"])
def test_a_row_that_does_not_fit_on_the_disk_is_not_there_at_all(tmp_path, monkeypatch, fault):
    path, write = tmp_path / "metrics.jsonl", os.write
    files.append_row(path, {"step": 1})

    def broken(handle, data):
        if fault == "error":
            raise OSError(errno.ENOSPC, "no space left")
        return write(handle, data[: len(data) // 2])

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space") as raised:
        patch.setattr(os, "write", broken)
        files.append_row(path, {"step": 2})
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(path)
    files.append_row(path, {"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_a_run_goes_on_from_whole_rows_where_it_was_killed_within_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": None, "lr": 0.1, "grad_norm": None, "seconds": 0.5} for step in (1, 2, 3)]
    for row in rows[:2]:
        files.append_row(path, row)
    kill(tmp_path, lambda _: files.append_row(path, rows[2]), Blow(1, "half"))
    assert path.read_text().count("\n") == 2 and not path.read_text().endswith("\n")
    record = Record(path, 3, kept=2)
    assert record.rows == rows[:2]
    record.evaluated({"step": 3, "retention_kl": 0.0, "retention_loss": 0.0, "retention_loss_before": 0.0})
    record.close()
    rows[2] = record.rows[2]
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows


# ---- the order of writing, and power loss ----------------------------------------------------------------------------


@mutation(
    "lora/files.py",
    """            flush(file.fileno())
""",
    "",
)
def test_a_save_syncs_data_before_names_and_removes_old_checkpoints_last(new_run):
    run = new_run()
    ops = operations(run, lambda run: save(run, 3, 1))
    place = run / run_state.FOLDER
    aside, name = f".000003.{os.getpid()}.partial", "{}.{}.partial"
    words = [f"{op.kind} {(op.to or op.path).relative_to(place)}" for op in ops]
    words = [word for word, _ in groupby(words)]  # a large file takes many writes
    expected = [f"mkdir {aside}"]
    written = [store.CONFIG, store.PASSPORT, store.WEIGHTS, run_state.OPTIMIZER, run_state.STATE, run_state.MANIFEST]
    for name in written:
        partial = f"{aside}/.{name}.{os.getpid()}.partial"
        expected += [f"open {partial}", f"write {partial}", f"fsync {partial}", f"rename {aside}/{name}"]
        expected += [f"fsync {aside}"]
    count = len(expected)
    assert words[:count] == expected
    assert sorted(words[count : count + 6]) == sorted(f"fsync {aside}/{name}" for name in written)
    assert words[count + 6 : count + 9] == [f"fsync {aside}", "rename 000003", "fsync ."]
    old = f".{{:06d}}.{os.getpid()}.old"
    rest = words[count + 9 :]
    for step in (1, 2):
        there, rest = rest[:8], rest[8:]
        assert there[0] == f"rename {old.format(step)}" and there[-1] == f"rmdir {old.format(step)}"
        assert sorted(there[1:-1]) == sorted(f"unlink {old.format(step)}/{name}" for name in written)
    assert rest == []


@mutation(
    "lora/folders.py",
    """        _move(aside, path)
        sync(path.parent)
""",
    """        _move(aside, path)
""",
)
@mutation(
    "lora/folders.py",
    """        sync(folder.parent)
""",
    "",
)
@pytest.mark.parametrize(("earlier", "keep"), [(2, 1), (2, 2), (0, 1)])
def test_after_a_power_loss_at_any_moment_no_checkpoint_with_wrong_bytes_is_believed(tmp_path, new_run, earlier, keep):
    run = new_run()
    if earlier == 0:
        shutil.rmtree(run / run_state.FOLDER)
    before = {path: path.read_bytes() if path.is_file() else None for path in run.rglob("*")}
    ops = operations(run, lambda run: save(run, 3, keep))
    named = next(i for i, op in enumerate(ops) if op.to == run_state.at(run, 3))
    lasting = next((i for i, op in enumerate(ops) if i > named and op.kind == "rename"), len(ops))
    known, found = {}, set()
    for done, disk in replay(run, before, ops):
        key = frozenset(disk.items())
        if key not in known:
            known[key] = newest_on(disk, run, tmp_path / f"disk{len(known)}")
        step, found = known[key], found | {(done, known[key])}
        if done >= lasting:
            assert step == 3, f"after {done} of {len(ops)} operations"
        elif earlier:
            assert step in (2, 3), f"after {done} of {len(ops)} operations"
    assert len(known) > len(ops) / 2 and len({step for _, step in found}) == 2


def newest_on(disk: dict, run: Path, place: Path) -> int | None:
    """The step of the newest checkpoint on a disk, which is whole."""
    for path, data in disk.items():
        copy = place / path.relative_to(run)
        copy.mkdir() if data is None else copy.write_bytes(data)
    path, _ = run_state.newest(place)
    if path is not None:
        assert cli.tree(path) == whole(int(path.name))
    shutil.rmtree(place)
    return path and int(path.name)


# ---- damaged ---------------------------------------------------------------------------------------------------------


def check_passed_over(run: Path, what) -> None:
    path, lines = run_state.newest(run)
    assert path == run_state.at(run, 1), what
    assert len(lines) == 1 and lines[0].startswith(f"{run_state.at(run, 2)}: ") and len(lines[0]) > 80, what


def test_a_checkpoint_with_a_byte_changed_cut_off_or_missing_is_passed_over(new_run):
    run = new_run()
    for file in sorted(run_state.at(run, 2).iterdir()):
        data = file.read_bytes()
        for place in range(0, len(data), 1 if file.name == run_state.MANIFEST else 11):
            file.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            check_passed_over(run, (file.name, place))
        for size in (0, 1, len(data) // 2, len(data) - 2):
            file.write_bytes(data[:size])
            check_passed_over(run, (file.name, size))
        file.write_bytes(data + b"x")
        check_passed_over(run, (file.name, "longer"))
        file.unlink()
        check_passed_over(run, (file.name, "missing"))
        with pytest.raises(BadInput, match="broken checkpoint in"):
            run_state.find(run_state.at(run, 2))
        os.mkfifo(file)
        check_passed_over(run, (file.name, "a pipe"))
        file.unlink()
        file.mkdir()
        check_passed_over(run, (file.name, "a folder"))
        file.rmdir()
        file.symlink_to(file)
        check_passed_over(run, (file.name, "a link to itself"))
        file.unlink()
        file.write_bytes(data)
    assert believed(run) == 2


SEAL = {"bytes": 1, "sha256": "00"}
NAMES = ("", ".", "..", "a/b", "../state.json", "/etc/passwd", "a\0b", "\ud800", "x" * 5000, "checkpoints")
MANIFESTS = [
    *(b"", b"\xff\xfe", b"[" * 100_000, b"1" * 10_000, b"null", b"3", b'"x"', b"[]", b"{}", b'{"format": 1}'),
    *({"format": 1, "files": files} for files in (None, [], {}, "x", 1)),
    *({"format": format} for format in (None, 2, "1", [1], {"a": 1}, 1e999)),
    *({"format": 1, "files": {run_state.OPTIMIZER: s, run_state.STATE: s}} for s in (None, 1, [], "x", {}, SEAL)),
    *({"format": 1, "files": {run_state.OPTIMIZER: SEAL, run_state.STATE: SEAL, name: SEAL}} for name in NAMES),
    *({"format": 1, "files": {name: SEAL, run_state.OPTIMIZER: SEAL, run_state.STATE: SEAL}} for name in NAMES),
]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=range(len(MANIFESTS)))
def test_a_manifest_of_anything_else_is_passed_over(new_run, manifest):
    run = new_run()
    text = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    (run_state.at(run, 2) / run_state.MANIFEST).write_bytes(text)
    check_passed_over(run, manifest)


WRONG = {
    "step": (None, -1, 1.5, "2", True, []),
    "settings": (None, 1, []),
    "evaluations": (None, {}, "x"),
    "data": (None, 1, []),
    "format": (None, 2, 1.0, "1"),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_state_of_other_types_is_passed_over_though_its_seal_is_right(new_run, key, value):
    run = new_run()
    path = run_state.at(run, 2)
    state = json.loads((path / run_state.STATE).read_text())
    files.write_json(path / run_state.STATE, state | {key: value})
    manifest = json.loads((path / run_state.MANIFEST).read_text())
    data = (path / run_state.STATE).read_bytes()
    manifest["files"][run_state.STATE] = {"bytes": len(data), "sha256": files.sha256(path / run_state.STATE)}
    files.write_json(path / run_state.MANIFEST, manifest)
    check_passed_over(run, (key, value))


# ---- the end of a run ------------------------------------------------------------------------------------------------


ADAPTER = tuple(name for name in passport.ADAPTER if name != value_head.FILE)  # a reward model has it
TEMPLATE, SOURCES = "{{ messages }}", SimpleNamespace(held_out=None)
ALONE = DistContext(0, 1, torch.device("cpu"))


def results_of(run: Path, step: int, best: int | None = None) -> Results:
    """What writes a run that stands after a step; without a base model, as nothing here asks for one."""
    model, optimizer, _ = trained(step)
    base = SimpleNamespace(hub_id="base")
    args = SimpleNamespace(max_forgetting=None, keep=1, method="sft")
    plan = SimpleNamespace(base=base, examples=[], sources=SOURCES, reference=None, preview=lambda args: {})
    evaluations = [] if best is None else [{"step": best, "eval_loss": 1.0}]
    state = run_state.State(step, 60, 0, {"rank": 2}, "data", "base", evaluations=evaluations)
    return Results(Adapter(model, base, TEMPLATE, {"a": 1}), plan, args, run, state, optimizer, ALONE)


def publish(run: Path, step: int, best: int | None = None) -> None:
    results_of(run, step, best).publish(SimpleNamespace(rows=[], seconds=1.0), f"after step {step}")


@pytest.mark.parametrize("best", [None, 1])
def test_a_run_killed_before_it_removed_older_checkpoints_does_so_when_it_goes_on(new_run, best):
    run = new_run()
    save(run, 3)
    with results_of(run, 3, best).folder():
        assert run_state.steps(run) == ([3] if best is None else [best, 3])


@pytest.mark.parametrize(("best", "earlier"), [(2, None), (None, 1)], ids=["best-first", "last-again"])
def test_the_end_of_a_run_killed_anywhere_leaves_whole_files_and_can_be_repeated(
    tmp_path, new_run, monkeypatch, best, earlier
):
    monkeypatch.setattr(results, "draw", lambda rows, path, *_: files.write_bytes(path, b"a picture"))
    story = lambda run: publish(run, 3, best)  # noqa: E731

    def start():
        run = new_run()
        save(run, 3)
        for step in (1, 2, 3):
            (run_state.at(run, step) / ADAPTER[0]).write_text(TEMPLATE)
        if earlier:
            publish(run, earlier)
        return run

    def final(run):
        there = (path for path in run.iterdir() if path.is_file() and path.name[0] != ".")
        return {path.name: path.read_bytes().replace(run.name.encode(), b"run") for path in there}  # as the card has it

    run = start()
    old, ops = final(run), operations(run, story)
    new = final(run)
    assert set(new) == {*ADAPTER, SETTINGS, "loss.png", "README.md"} and new[store.WEIGHTS] != old.get(store.WEIGHTS)
    for at, part in moments(ops):
        for number in (None, errno.ENOSPC):
            run = start()
            if number is None:
                kill(run, story, Blow(at, part))
            elif part != "after":
                with pytest.raises(OSError) as raised, Disk(run, Blow(at, part, number)):
                    story(run)
                assert raised.value.errno == number and hidden(run) == []
            there = final(run)
            assert all(data in (old.get(name), new[name]) for name, data in there.items())
            if there.get(store.WEIGHTS) == new[store.WEIGHTS]:
                assert all(there[name] == new[name] for name in ADAPTER)
            folders.sweep(run)
            story(run)
            assert final(run) == new and hidden(run) == []


# ---- training, killed and gone on with -------------------------------------------------------------------------------


@mutation(
    "lora/train/run_state.py", '    optimizer.load_state_dict(optimizer.state_dict() | {"state": found})', "    pass"
)
@mutation(
    "train.py",
    """            torch.manual_seed(run_state.dropout_seed(args.seed, state.step, processes.rank))
""",
    "",
)
def test_a_run_killed_once_ends_as_if_it_never_was(tmp_path):
    argv = [*kills.flags(False, "sft", tmp_path), "--max-steps", "8"]
    trees = []
    for blow in (None, Blow(100, "half")):  # in the second of three saves, about
        folder = tmp_path / str(blow is None)
        folder.mkdir()
        before = Disk(folder / "work", blow).__enter__ if blow else None
        code = kills.train(folder, argv, before)
        if blow:
            assert code == -signal.SIGKILL and run_state.newest(folder / "work/out")[0] is not None
            code = kills.train(folder, [*argv, "--resume"])
        assert code == 0, (folder / "log").read_text()
        trees.append(kills.outcome(folder / "work"))
    assert trees[0] == trees[1] and len(trees[0]) > 20


@pytest.mark.parametrize("count", [10, pytest.param(50, marks=pytest.mark.large)])
def test_training_survives_kills_at_random_moments_bit_for_bit(tmp_path, capsys, count):
    code = kills.main(["--kills", str(count), "--out", str(tmp_path / "kills.jsonl")])
    said = capsys.readouterr().out
    assert code == 0 and " 0 differences" in said, said
    rows = kills.read(tmp_path / "kills.jsonl")
    assert sum(row["kills"] for row in rows) >= count and all(row["same"] for row in rows)
    assert len({step for row in rows for step in row["from"]}) > min(5, count // 5)
