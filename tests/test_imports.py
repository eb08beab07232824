"""The parts of the library meet only in the scripts, the runtime needs no other LoRA library, nothing is unpickled."""

import ast
import configparser
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import metadata
from pathlib import Path

import pytest

from tests.mutation import mutation

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [name for name in ("train.py", "generate.py", "evaluate.py", "merge.py") if (ROOT / name).exists()]
LIBRARY = sorted((ROOT / "lora").rglob("*.py"))
PRODUCT = [*LIBRARY, *(ROOT / name for name in SCRIPTS), *sorted((ROOT / "data_gen").rglob("*.py"))]
GROUND = ("errors", "files", "folders", "device", "heap", "settings", "threads", "address")
LAYERS = {  # a part of the library -> the parts it may import, besides itself and the ground
    "ops": (),
    "quant": ("ops",),
    "adapter": ("ops", "quant"),
    "network": ("ops",),
    "text": (),
    "watch": (),
    "data": ("text",),
    "pretrained": ("ops", "quant", "adapter", "network", "text"),
    "train": ("ops", "quant"),
    "methods": ("ops", "quant", "adapter", "network", "text", "data", "pretrained", "train"),
    "inference": ("ops", "quant", "adapter", "network", "text", "data", "pretrained", "train"),
    "rewards": ("ops", "quant", "adapter", "network", "text", "data", "pretrained", "train", "inference", "methods"),
    "serve": ("ops", "quant", "adapter", "network", "text", "data", "pretrained", "train", "inference"),
    "export": ("ops", "quant", "adapter", "network", "text", "data", "pretrained", "train", "inference", "methods"),
    "run": (
        "ops",
        "quant",
        "adapter",
        "network",
        "text",
        "data",
        "pretrained",
        "train",
        "inference",
        "methods",
        "rewards",
        "export",
        "watch",
    ),
}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; `from lora import files` is `lora.files`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def of_ours(path: Path) -> set[str]:
    """The modules of this library among a file's imports."""
    modules = {name_of(p) for p in LIBRARY}
    found = set()
    for name in imports_of(path):
        while name not in modules and "." in name:
            name = name.rpartition(".")[0]
        if name in modules:
            found.add(name)
    return found


@mutation(
    "lora/adapter/inject.py",
    "from lora.adapter.layer import LoRALinear",
    """from lora.adapter.layer import LoRALinear
from lora.network import decoder""",
)
@mutation(
    "lora/train/step.py",
    "from lora.errors import BadNumbers",
    """from lora.errors import BadNumbers
import lora.adapter.merge""",
)
def test_imports_go_down_the_layers_only():
    parts = {name_of(path).split(".")[1] for path in LIBRARY if path.parent.name != "lora"}
    assert parts == set(LAYERS)
    for path in LIBRARY:
        part = name_of(path).partition(".")[2].partition(".")[0]
        for name in of_ours(path) - {"lora"} if part in LAYERS else ():
            other = name.split(".")[1]
            assert other in (part, *LAYERS[part], *GROUND), f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("name", GROUND)
def test_the_ground_imports_only_errors_and_files_of_ours(name):
    below = {"lora.threads", "lora.errors", "lora.files", "lora"} - {f"lora.{name}"}
    assert of_ours(ROOT / "lora" / f"{name}.py") <= below
    if name in ("errors", "threads"):
        assert of_ours(ROOT / "lora" / f"{name}.py") <= {"lora.threads", "lora"} - {f"lora.{name}"}
        foreign = (
            {i.split(".")[0] for i in imports_of(ROOT / "lora" / f"{name}.py")} - sys.stdlib_module_names - {"lora"}
        )
        assert not foreign  # it is there before torch is, for Ctrl-C


def test_no_script_imports_a_script():
    for path in [*LIBRARY, *(ROOT / name for name in SCRIPTS)]:
        scripts = {name.removesuffix(".py") for name in SCRIPTS} & {name.split(".")[0] for name in imports_of(path)}
        assert not scripts, f"{path.name} imports {scripts}"


def test_no_import_leads_back_to_where_it_came_from():
    graph = {name_of(path): of_ours(path) - {name_of(path), "lora"} for path in LIBRARY}
    TopologicalSorter(graph).prepare()  # a CycleError names those of the circle


def test_only_files_and_folders_write():
    """`open(..., "w")`, os.replace, shutil.rmtree and the like occur in lora/files.py and lora/folders.py only."""
    writers = {"replace", "rename", "write_bytes", "write_text", "rmtree", "copyfile", "move", "unlink", "touch"}
    for path in LIBRARY:
        if name_of(path) in ("lora.files", "lora.folders", "lora.pretrained.default_model"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            of_module = isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
            if of_module and node.func.value.id in ("os", "shutil"):
                assert node.func.attr not in writers, f"{path.name}:{node.lineno}"
            if isinstance(node.func, ast.Name) and node.func.id == "open":
                modes = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
                assert all(mode in ("r", "rb") for mode in modes), f"{path.name}:{node.lineno}"


def test_importing_all_scripts_loads_neither_transformers_nor_peft():
    names = [name.removesuffix(".py") for name in SCRIPTS]
    assert {"train", "generate", "merge"} <= set(names)
    code = (
        f"import importlib, sys; sys.path.insert(0, {str(ROOT)!r}); import lora\n"
        f"for name in {names}: importlib.import_module(name)\n"
        "for name in lora.__all__: getattr(lora, name)\n"
        "print(sorted({'transformers', 'peft', 'accelerate', 'trl', 'lightning', 'datasets', 'matplotlib'} & "
        "{name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


OTHERWISE = {"playwright", "yaml"}  # its tests are skipped where it is not; huggingface-hub's own


@mutation("setup.cfg", "    httpx>=0.28\n", "")
def test_what_a_test_imports_is_installed_with_the_tests():
    """Whoever has the referees, too, has more, and would not see that something is missing."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"] + setup["options.extras_require"]["test"]
    installed = {"lora", *re.findall(r"^[\w-]+", lines, re.MULTILINE)}
    providers = metadata.packages_distributions()  # module -> the packages that bring it
    tests = [path for path in (ROOT / "tests").rglob("test_*.py") if path.parent.name != "parity"]
    missing = {
        f"{name_of(path)}: {module}"
        for path in tests
        for module in {name.split(".")[0] for name in imports_of(path)} - OTHERWISE
        if module in providers and not installed & {name.lower().replace("_", "-") for name in providers[module]}
    }
    assert not missing


def test_importing_errors_loads_no_torch():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import lora.errors; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve",
                     "transformers", "peft"}  # fmt: skip
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__", "execfile"}
FORBIDDEN_CALLS = {("torch", "load"), ("torch", "save"), ("os", "system"), ("os", "popen"), ("np", "load"),
                   ("yaml", "load"), ("torch", "jit")}  # fmt: skip


def violations(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            pairs = {(node.module, alias.name) for alias in node.names}
            found += [name for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
            found += [".".join(pair) for pair in pairs & FORBIDDEN_CALLS]
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_NAMES and isinstance(node.ctx, ast.Load):
            found.append(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in FORBIDDEN_CALLS:
                found.append(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.keyword) and node.arg in ("shell", "trust_remote_code", "allow_pickle"):
            found.append(node.arg)
    return found


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_evaluated_or_given_to_a_shell(path):
    assert violations(path.read_text()) == []


@pytest.mark.parametrize("source", ["import pickle", "from pickle import loads", "x = torch.load(p)", "eval('1')",
                                    "from torch import load", "subprocess.run(x, shell=True)", "import peft.utils",
                                    "f = exec", "os.system('x')"])  # fmt: skip
def test_the_search_for_forbidden_code_finds_it(source):
    assert violations(source)
