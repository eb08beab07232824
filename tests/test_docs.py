"""README, chapters and pictures say what is there: links, paths, commands, flags, names, results."""

import ast
import importlib
import re
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from functools import cache
from io import StringIO
from pathlib import Path

import pytest

import lora
from bench import fits
from lora.network.families import FAMILIES, WRAPPERS
from lora.pretrained.gguf_names import ARCHITECTURES
from tests.mutation import mutation

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "experiments").rglob("*.md")]
TOP = {"lora", "docs", "tests", "bench", "experiments", "data_gen"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def prose(path: Path) -> str:
    return FENCE.sub("", read(path))


def quoted(path: Path) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`\n]+)`", prose(path))


def code(path: Path, language: str) -> list[str]:
    return [text for name, text in FENCE.findall(read(path)) if name == language]


def anchors(path: Path) -> set[str]:
    """Those that GitHub gives to a text's headings."""
    headings = re.findall(r"^#+ (.*)", read(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@mutation(
    "README.md",
    "## Chapters\n",
    "\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n## Chapters\n",
)
def test_the_readmes_are_doors():
    assert len(read(ROOT / "README.md").splitlines()) <= 200
    assert len(read(ROOT / "README.zh.md").splitlines()) <= 150


@mutation("README.md", "](docs/lora.svg)", "](docs/lora.png)")
@mutation("README.md", "CONTRIBUTING.md#what-will-be-refused", "CONTRIBUTING.md#what-is-refused")
def test_every_relative_link_and_picture_is_there():
    missing = []
    for path in TEXTS:
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            there = path.parent / file if file else path
            if not there.exists() or (anchor and anchor not in anchors(there)):
                missing.append(f"{path.relative_to(ROOT)}: {target}")
    assert not missing


@mutation("docs/scale.md", "`bench/results/memory.json`", "`bench/memory.json`")
def test_every_path_in_backticks_is_there():
    missing = []
    for path in TEXTS:
        for text in quoted(path):
            name = text.partition("::")[0].rstrip("/")
            if re.fullmatch(r"[\w.*-]+(/[\w.*-]+)+", name) and name.split("/")[0] in TOP:
                there = any(ROOT.glob(name))
            elif re.fullmatch(r"\w+\.py", name):
                there = any(ROOT.rglob(name))
            else:
                continue
            if not there:
                missing.append(f"{path.relative_to(ROOT)}: {text}")
    assert not missing


@cache
def names_of_tests() -> set[str]:
    return {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"^def (\w+)", read(path), re.M)
    }


@mutation(
    "docs/algebra.md",
    "`test_energy_keeps_the_least_rank_with_that_share`",
    "`test_energy_keeps_the_least_rank_with_a_share`",
)
def test_every_test_that_is_named_is_there():
    named = {text for path in TEXTS for text in quoted(path) if re.fullmatch(r"test_\w+", text)}
    assert named - {"test_unmerge_restores_every_bit"} <= names_of_tests()  # that one is an example of a name


@cache
def flags(script: str) -> set[str]:
    """Those that a script's --help lists; of programs that measure, those that stand in its source."""
    if "/" not in script or script.startswith("data_gen/"):
        with redirect_stdout(StringIO()) as out, suppress(SystemExit):
            importlib.import_module(script.removesuffix(".py").replace("/", ".")).main(["--help"])
        return set(re.findall(r"(?<![\w-])--\w[\w-]*", out.getvalue()))
    source, folder = read(ROOT / script), script.partition("/")[0]
    if folder == "experiments" or "parts.run(" in source:
        source += read(ROOT / folder / "parts.py")
    return set(re.findall(r'"(--\w[\w-]*)"', source))


def commands(path: Path) -> list[tuple[str, list[str]]]:
    """The scripts that a text runs, with their flags."""
    found = []
    for line in [*"".join(code(path, "")).splitlines(), *quoted(path)]:
        for script, words in re.findall(
            r"(?:\bpython |torchrun .*? |^(?=\S+ --))([\w/]+\.py)(?: |$)([^#|]*)", line.strip()
        ):
            found.append((script, re.findall(r"(?<!\S)--\w[\w-]*", words)))
    return found


@mutation("docs/evaluation.md", "--max-forgetting 1.5", "--most-forgetting 1.5")
@mutation("docs/scale.md", "29500 train.py --data", "29500 trane.py --data")
@mutation("docs/variants.md", "--lr-ratio-b 16 --lr", "--lr-ratio 16 --lr")
def test_every_command_uses_a_script_that_is_there_and_flags_that_it_knows():
    seen, wrong = 0, []
    for path in TEXTS:
        for script, words in commands(path):
            seen += 1
            if not (ROOT / script).exists() and not any(ROOT.rglob(script)):
                wrong.append(f"{path.name}: {script}")
            elif (ROOT / script).exists():
                wrong += [f"{path.name}: {script} {word}" for word in words if word not in flags(script)]
    assert not wrong and seen > 60


@mutation("docs/scale.md", "add `--fsdp`", "add `--shard`")
def test_every_flag_in_backticks_is_one_of_the_programs():
    makers = (f"data_gen/{path.name}" for path in (ROOT / "data_gen").glob("*.py") if "def main(" in read(path))
    programs = ("train.py", "generate.py", "evaluate.py", "merge.py", "experiments/persona/run.py", *makers)
    known = set().union(*map(flags, programs))
    wrong = []
    for path in TEXTS:
        for text in quoted(path):
            if text.startswith("--"):
                wrong += [f"{path.name}: {word}" for word in re.findall(r"--\w[\w-]*", text) if word not in known]
    assert not wrong


@mutation("docs/python.md", "lora.save_adapter(", "lora.write_adapter(")
@mutation("docs/python.md", "from lora.inference.several import Several", "from lora.inference.several import Switch")
def test_the_python_in_the_chapters_parses_and_its_names_are_there():
    blocks = [text for path in TEXTS for text in code(path, "python")]
    assert len(blocks) >= 4
    for text in blocks:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("lora"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lora":
                assert hasattr(lora, node.attr), node.attr


@mutation("README.md", "  text/          messages", "  texts/         messages")
def test_the_tree_is_the_librarys():
    [tree] = [text for text in code(ROOT / "README.md", "") if text.startswith("lora/\n")]
    told = {f"lora/{name}" for name in re.findall(r"^  (\w+)/ ", tree, re.MULTILINE)}
    there = {f"lora/{path.name}" for path in (ROOT / "lora").iterdir() if (path / "__init__.py").exists()}
    assert told == there


# ---- pictures --------------------------------------------------------------------------------------------------------


def marks(folder: Path) -> dict[str, str]:
    """What each picture was drawn of: a hash of the drawing program and of what it read."""
    return {path.name: re.search("<dc:source>(.*?)</dc:source>", read(path))[1] for path in folder.glob("*.svg")}


@mutation(
    "docs/figures.py",
    "for draw in (lora, way, packing, preview, loss, frontier, speed, where)",
    "for draw in (lora, way)",
)
@mutation("bench/results/train_speed.json", '"tokens/s": 357.03665435529194', '"tokens/s": 457.03665435529194')
@mutation("docs/data.md", "+ Ass│am│,│ with│ a│ little│ milk│.│<|im_end|>", "+ Ass│am│,│ with│ a│ little│ milk│.")
def test_figures_draws_the_pictures_that_are_there_from_the_results_that_are_there(tmp_path):
    command = [sys.executable, ROOT / "docs" / "figures.py", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    drawn, there = marks(tmp_path), marks(ROOT / "docs")
    assert drawn == there, "python docs/figures.py draws them anew"
    assert len(there) == 8
    used = "".join(map(read, TEXTS))
    assert all(name in used for name in there)


@pytest.mark.parametrize("page", [(255, 255, 255), (13, 17, 23)], ids=["white", "dark"])
@mutation("docs/figures.py", '"#7a7f87"', '"#24292f"', case="dark")
def test_every_colour_of_the_pictures_stands_out_from_both_pages(page):
    """Contrast as WCAG 2 defines it; 3 is its bound for large text and graphics."""
    source = read(ROOT / "docs" / "figures.py")

    def luminance(colour) -> float:
        parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    colours = re.findall(r'"#([0-9a-f]{6})"', source)
    assert len(colours) >= 6
    for colour in colours:
        two = sorted((luminance(page), luminance(bytes.fromhex(colour))))
        assert (two[1] + 0.05) / (two[0] + 0.05) >= 3, colour


@mutation("docs/models.md", "| **ERNIE 4.5**, dense (0.3B) | `ernie4_5` |", "| **ERNIE 4.5**, dense (0.3B) | `ernie` |")
@mutation("lora/pretrained/gguf_names.py", '("lfm2",), names=LFM2_NAMES', "names=LFM2_NAMES")
def test_the_chapter_on_models_lists_every_family_and_what_is_done_with_its_gguf():
    table = re.search(r"\| models \|.*?\n\n", read(ROOT / "docs/models.md"), re.DOTALL)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    kinds = {re.match(r"`(\w+)`", row[1])[1]: row for row in rows}
    assert kinds.keys() == FAMILIES.keys()
    outer = {kind: re.search(r"in `(\w+)`", row[1]) for kind, row in kinds.items()}
    named = {outer[kind][1] for kind in kinds if outer[kind]}
    assert named == WRAPPERS.keys() and all(kind in WRAPPERS[found[1]] for kind, found in outer.items() if found)
    read_as = {kind for row in ARCHITECTURES.values() for kind in (row.model_type, *(row.other or ())[2:])}
    written = {kind for row in ARCHITECTURES.values() for kind in row.written}
    assert {kind for kind, row in kinds.items() if "written" in row[3]} == written
    assert {kind for kind, row in kinds.items() if row[3].startswith(("read", "no", "written"))} == kinds.keys()
    assert {kind for kind, row in kinds.items() if row[3].startswith("read") and kind not in read_as} == {
        "mistral",
        "granitemoehybrid",
    }


def test_the_memory_of_models_is_that_of_the_plan():
    text = read(ROOT / "docs/models.md")
    for name, shown in (("LiquidAI/LFM2.5-350M", "LFM2.5-350M"), ("ibm-granite/granite-4.0-350m", "Granite-4.0-350M")):
        config = fits.real(name)
        figures = [fits.needed(config, quant, 512, again) / 1e9 for quant, again in fits.WAYS]
        assert f"| {shown} | {' | '.join(f'{figure:.1f}' for figure in figures)} |" in text
