"""A run's state on disk: written whole, verified before it is believed.

    checkpoints/000050/               after 50 steps
        adapter_model.safetensors ... a complete adapter or model, as the caller writes it
        optimizer.safetensors         the optimizer's state: <parameter>.exp_avg, .exp_avg_sq, .step
        state.json                    `State`
        MANIFEST.json                 size and sha256 of every other file

What a step does is a pure function of the settings and its number (order of examples, dropout), so there is no
generator and no place in the data to save.
"""

import errno
import hashlib
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from lora import files, folders
from lora.errors import ENVIRONMENT_ERRNOS, BadEnvironment, BadInput

FOLDER, OPTIMIZER, STATE, MANIFEST = "checkpoints", "optimizer.safetensors", "state.json", "MANIFEST.json"
FORMAT = 1
# these errors say nothing about the file itself
NOW = (errno.EIO, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class State:
    """Where a run stands after `step` of `total` steps, and what must be the same where it is resumed."""

    step: int
    total: int
    warmup: int  # steps
    settings: dict
    data: str  # fingerprints
    base: str
    skipped: int = 0  # steps left out because they were not finite
    rows: int = 0  # in metrics.jsonl
    evaluations: list = field(default_factory=list)
    carried: dict = field(default_factory=dict)  # numbers that a method hands from step to step
    examined: str = ""  # fingerprint of what evaluations measure on
    computed: dict = field(default_factory=dict)  # the machine: bits are promised on the same one only
    format: int = FORMAT


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """The seed of one process's dropout in one step; there is no state of a generator to save."""
    return seed_of(f"{seed}/step {step}/rank {rank}")


def seed_of(name: str) -> int:
    """The seed of a generator whose draws depend on a name and nothing else."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1


def at(run: Path, step: int) -> Path:
    """The folder of the checkpoint after a step."""
    return Path(run) / FOLDER / f"{step:06d}"


def steps(run: Path) -> list[int]:
    """The steps of all checkpoints of a run, good or not."""
    names = (path.name for path in (Path(run) / FOLDER).glob("*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdecimal() and name == at(run, int(name)).name)


def ours(run: Path) -> list[int]:
    """The steps of the checkpoints that were written to the end; we may remove them."""
    return [step for step in steps(run) if (at(run, step) / MANIFEST).exists()]


# ---- writing ---------------------------------------------------------------------------------------------------------


def save(run: Path, state: State, optimizer, parameters: dict, write: Callable[[Path], None]) -> Path:
    """Write the checkpoint of a step; `parameters` are those of `optimizer` by name. Appears whole or not at all."""
    path = at(run, state.step)
    with folders.new_folder(path) as folder:
        write(folder)
        _write_optimizer(folder / OPTIMIZER, optimizer, parameters)
        files.write_json(folder / STATE, asdict(state))
        found = {file.name: _seal(file) for file in sorted(folder.iterdir())}
        files.write_json(folder / MANIFEST, {"format": FORMAT, "files": found})
    return path


@contextmanager
def disk_full(run: Path, parameters: dict):
    """Where the disk is full inside the block, BadEnvironment says how many bytes a checkpoint needs and how many are
    free, and which checkpoint is good."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        good, _ = newest(run)
        needed, free = size(sum(p.nbytes for p in parameters.values())), folders.free_bytes(run)
        why, fix = ENVIRONMENT_ERRNOS[error.errno].split(". ")
        again = "then go on with --resume" if good else "then start again"
        known = "" if free is None else f", {free:,} are free"
        why += f"; a checkpoint needs {needed:,} bytes{known}; {last_good(run)}"
        raise BadEnvironment(f"file operation failed in {error.filename or run}: {why}. {fix}, {again}") from error


def size(trained: int) -> int:
    """Bytes of a checkpoint: what trains, its two moments, and some room for the small files."""
    return 3 * trained + 2**20


def _seal(path: Path) -> dict:
    return {"bytes": path.stat().st_size, "sha256": files.sha256(path)}


def _write_optimizer(path: Path, optimizer: torch.optim.Optimizer, parameters: dict) -> None:
    tensors = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{key}"] = value
    files.write_tensors(path, tensors)


def prune(run: Path, keep: int, also: Iterable[int] = ()) -> None:
    """Remove all but the `keep` newest checkpoints and those of the steps `also`."""
    there = ours(run)
    for step in set(there[:-keep]) - set(also):
        folders.remove_folder(at(run, step))


# ---- reading ---------------------------------------------------------------------------------------------------------


def fault(path: Path) -> str | None:
    """Why a checkpoint cannot be believed; None where every file is what its manifest says."""
    try:
        manifest = files.read_json(path / MANIFEST)
        listed = manifest.get("files")
        if manifest.get("format") != FORMAT or not isinstance(listed, dict):
            return f"{MANIFEST} is of another format"
        if missing := [name for name in (OPTIMIZER, STATE) if name not in listed]:
            return f"{MANIFEST} does not list {missing[0]}"
        for name, seal in listed.items():
            if Path(name).name != name or not files.is_regular(path / name):
                return f"{name} is missing"
            if not isinstance(seal, dict) or (path / name).stat().st_size != seal.get("bytes"):
                return f"{name} has {(path / name).stat().st_size} bytes, not those of the manifest"
            if files.sha256(path / name) != seal.get("sha256"):
                return f"{name} is not what was written (sha256)"
        if (step := read_state(path).step) != int(path.name):
            return f"it says step {step}"
    except BadInput as error:
        return str(error)
    except OSError as error:
        if error.errno in NOW:
            raise
        return error.strerror or str(error)
    return None


def newest(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run that can be believed, and a line for each later one that cannot."""
    passed_over = []
    for step in reversed(steps(run)):
        why = fault(at(run, step))
        if why is None:
            return at(run, step), passed_over
        passed_over.append(f"{at(run, step)}: {why}")
    return None, passed_over


def last_good(run: Path) -> str:
    """For messages that end a run."""
    good, _ = newest(run)
    return f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"


def find(named: Path) -> tuple[Path, Path, list[str]]:
    """What `--resume` means by the folder of a run or checkpoint: the run, the checkpoint, why others were passed over.

    Raises BadInput where there is none to believe.
    """
    named, place = Path(named), Path(named).resolve()
    if place.parent.name == FOLDER and place.name.isdecimal():
        named = named if named.parent.name == FOLDER and named.name == place.name else place
        if why := fault(named):
            raise BadInput(f"broken checkpoint in {named}: {why}. Give another one, or --resume alone")
        return named.parent.parent, named, []
    if place.name == FOLDER or not named.name or named.is_symlink():
        named = place.parent if place.name == FOLDER else place
    path, passed_over = newest(named)
    if path is None:
        why = "; ".join(passed_over) or f"there is no folder in {named / FOLDER}"
        raise BadInput(f"no checkpoint in {named}: {why}. Start again with --overwrite, or give --out or --resume DIR")
    return named, path, passed_over


def read_state(path: Path) -> State:
    """Raises BadInput for a file that is not a state of this format."""
    found = files.read_json(path / STATE)
    for entry in fields(State):
        value = found.get(entry.name)
        if type(value) is not entry.type or (entry.type is int and value < 0):
            raise BadInput(f"broken checkpoint in {path / STATE}:{entry.name}: {value!r:.50}. Give another checkpoint")
    rows = found["evaluations"]
    if not all(isinstance(row, dict) and isinstance(row.get("step"), int) for row in rows):
        raise BadInput(f"broken checkpoint in {path / STATE}:evaluations: no list of rows. Give another checkpoint")
    if found["step"] > found["total"]:
        raise BadInput(f"broken checkpoint in {path / STATE}:step: over {found['total']}. Give another checkpoint")
    if found["format"] != FORMAT:
        raise BadInput(f"newer checkpoint in {path / STATE}:format: {found['format']}. Use a newer version")
    return State(**{entry.name: found[entry.name] for entry in fields(State)})


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, parameters: dict) -> None:
    """Give `optimizer` its state back, bit for bit. Raises BadInput where tensors and parameters do not fit."""
    file, states = files.Safetensors(path / OPTIMIZER), {}
    for name in file.header:
        owner, _, key = name.rpartition(".")
        value = file.read(name)
        if owner not in parameters or value.shape not in ((), parameters[owner].shape):
            raise BadInput(f"wrong tensor in {path / OPTIMIZER}:{name}: it fits no parameter. Give another checkpoint")
        states.setdefault(owner, {})[key] = value
    names = {parameter: name for name, parameter in parameters.items()}
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    found = {i: states[name] for i, name in enumerate(order) if name in states}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": found})
