"""Packed weights take the memory that the formula says, loading takes little more, and a run is told what it needs."""

import os
import re
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch

from lora.errors import BadInput
from lora.network.config import ModelConfig
from lora.network.decoder import Model
from lora.pretrained import empty_model, find, load_model, smallest
from lora.quant.gguf import TYPES
from lora.quant.int8 import Int8
from lora.quant.packed import Packed
from lora.run.adapter import on_meta
from lora.run.plan import Plan
from lora.run.settings import TrainSettings
from lora.train import memory
from tests import cli
from tests.helpers import as_written, tiny_config
from tests.mutation import mutation
from tests.network.test_families import folder_of
from tests.train.test_memory import BIG, settings
from tests.train.test_memory import arguments as of_a_run

LARGE = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 2, "num_attention_heads": 8,
         "num_key_value_heads": 8, "vocab_size": 300}  # fmt: skip


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """117 MB of random bfloat16 weights, 16.8 MB the largest."""
    raw = tiny_config(**LARGE)
    model = Model(ModelConfig.from_json(raw)).bfloat16()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    return folder_of(model, raw, tmp_path_factory.mktemp("large") / "model")


LOADING = """
import re, sys
from pathlib import Path
import torch
from lora.heap import resident_memory
from lora.pretrained import find, load_model
small, folder, quant = sys.argv[1:]
load_model(find(small, quant), torch.bfloat16)  # what is imported and set up once
before = resident_memory()
model = load_model(find(folder, quant), torch.bfloat16)
held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
peak = re.search("VmHWM: *(.*) kB", Path("/proc/self/status").read_text().replace("\\t", " "))  # not the parent's, too
print(int(peak[1]) * 1024 - before, sum(held.values()))
"""


@mutation("lora/pretrained/quantised.py", 'step = nf4.BLOCK * max(1, AT_ONCE["cpu"] // (nf4.BLOCK * columns))',
          "step = rows", case="nf4")  # fmt: skip
@mutation("lora/quant/nf4.py", "return NF4(shape, codes, *pack_scales(absmax - mean), mean)",
          "return NF4(shape, codes, absmax)", case="nf4")  # fmt: skip
@pytest.mark.parametrize("quant, bits", [("nf4", 4.127), ("int8", 8 + 32 / 1024)], ids=["nf4", "int8"])
def test_loading_never_holds_the_model_in_both_forms_and_ends_with_the_formulas_bytes(large, quant, bits):
    words = [sys.executable, "-c", LOADING, str(cli.model_folder()), str(large), quant]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # no holes in glibc's heap, which differ from run to run
    done = subprocess.run(words, capture_output=True, text=True, cwd=cli.ROOT, timeout=60, env=env)
    assert done.returncode == 0, done.stderr
    growth, held = map(int, done.stdout.split())
    sizes = {name: prod(shape) for name, (_, shape) in find(str(large)).header.items()}
    formula = sum(size * (bits / 8 if name.endswith("_proj.weight") else 2) for name, size in sizes.items())
    assert abs(held - formula) < 0.01 * formula
    assert growth < formula + 2 * max(sizes.values()) + 8e6, (growth, formula)


@pytest.mark.parametrize("quant", ["nf4", "int8", "keep"])
def test_the_bytes_that_are_foretold_are_those_that_are_held(quant):
    base = find(str(cli.gguf_file("Q8_0")), quant)
    model = load_model(base)
    for path, module in model.named_modules():
        if isinstance(module, Packed):
            tables = sum(b.nbytes for name, b in module.named_buffers() if name in ("pairs", "map", "mean"))
            foretold = base.nbytes(path.replace(".packed", ".weight"))
            assert abs(module.nbytes - tables - foretold) <= 4, path  # scales of scales are of whole blocks
            if quant == "keep":
                kind = TYPES[module.kind]
                assert foretold == prod(module.shape) * kind.bytes / kind.block


# ---- what is wrong with a file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quant", "kind"), [("nf4", "folder"), ("int8", "folder"), ("nf4", "gguf"), ("int8", "gguf"), ("keep", "gguf")]
)
def test_a_file_that_becomes_shorter_while_it_is_read_is_one_line(tmp_path, kind, quant):
    folder = cli.write_model(tmp_path / "model")
    path = folder / "model.safetensors"
    if kind == "gguf":
        folder = path = tmp_path / "model.gguf"
        path.write_bytes(cli.gguf_file("Q8_0").read_bytes())
    base = find(str(folder), quant)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(BadInput, match=r"shorter|has been cut") as caught:
        load_model(base)
    assert "\n" not in str(caught.value)


@mutation("lora/pretrained/load.py", "        if not packed.is_finite():", "        if False:", case="inf")
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_scales_that_are_not_finite_are_named_in_one_line_and_end_with_2(tmp_path, value):
    data, base = cli.gguf_file("Q8_0").read_bytes(), find(str(cli.gguf_file("Q8_0")), "keep")
    name = "model.layers.1.mlp.up_proj.weight"
    block = base.packed(name).data[3].numpy().tobytes()
    assert data.count(block) == 1
    broken = torch.tensor(value, dtype=torch.float16).numpy().tobytes() + block[2:]
    (tmp_path / "model.gguf").write_bytes(data.replace(block, broken))
    done = cli.train("out", "--model", "model.gguf", "--quant", "keep", cwd=tmp_path)
    line = f"error: wrong tensor in {tmp_path / 'model.gguf'}:{name}: values that are not finite. Download it again"
    assert done.code == 2 and done.errors == [line]


# ---- what a run is expected to need ----------------------------------------------------------------------------------


def arguments(quant: str | None, folder, **changes) -> tuple:
    """Those of `memory.expected` for a run on a base in a folder."""
    base = find(str(folder), quant)
    s = settings(quant=quant, **changes)
    packed = base if quant else smallest(base)
    return on_meta(s, empty_model(base)), s, [60] * 8, 4, {packed.quant: memory.PackedSizes.of(packed)}


@mutation("lora/train/memory.py", "- packed.numbers) * size", ") * size")
@mutation("lora/train/memory.py", " + packed.bytes,", ",")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant", ["nf4", "int8", None])
def test_weights_are_counted_as_they_are_held(large, quant, dtype):
    counted = memory.parts(*arguments(quant, large, dtype=dtype))["weights"]
    model = load_model(find(str(large), quant), getattr(torch, dtype))
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert abs(counted - held) < 0.01 * held


def test_numbers_are_counted_of_a_weight_or_where_blocks_are_computed_again_of_one_or_as_written_of_all(large):
    found = {}
    for again in (False, True):
        run = {"checkpoint_activations": again, "device": "cuda", "dtype": "float32", "target": ["q_proj"]}
        packed, dense = (memory.parts(*arguments(quant, large, **run)) for quant in ("nf4", None))
        found[again] = packed["backward or the loss"] - dense["backward or the loss"]
        assert packed["blocks"] == dense["blocks"]
    largest, block = 1024 * 8192, 4 * 1024**2 + 3 * 1024 * 8192
    assert block * 4 * 0.9 < found[True] - memory.DECODING * largest <= block * 4
    assert largest * 4 * 0.9 < found[False] - memory.DECODING * largest <= largest * 4
    with as_written():
        run = {"device": "cuda", "dtype": "float32"}
        packed, dense = (memory.parts(*arguments(quant, large, **run)) for quant in ("nf4", None))
    assert packed["blocks"] - dense["blocks"] == 2 * block * 4


@mutation("lora/train/memory.py", "if needed(quant=quant) <= room:", "if False:")
def test_where_packing_would_fit_that_is_the_advice_and_where_it_would_not_a_smaller_model():
    run = {"device": "cuda", "dtype": "float32", "checkpoint_activations": True, "micro_tokens": 64, "shape": BIG}
    block = 4 * 512**2 + 3 * 512 * 1024
    run["packings"] = {"nf4": memory.PackedSizes(24 * block // 2, 24 * block, block, 512 * 1024)}
    packed = memory.expected(*of_a_run(quant="nf4", **run))
    assert packed < 0.6 * memory.expected(*of_a_run(**run))
    assert memory.advice(1.01 * packed, *of_a_run(**run)) == "Add --quant nf4"
    assert "--quant" not in memory.advice(0.99 * packed, *of_a_run(**run))
    assert "--quant" not in memory.advice(0.99 * packed, *of_a_run(quant="nf4", **run))


@mutation("lora/run/plan.py", "if args.full or args.fsdp or args.compile:", "if False:")
def test_packing_is_no_advice_where_it_cannot_be_combined():
    base, plan = find(str(cli.model_folder())), Plan.__new__(Plan)
    plan.base = base
    for words, known in ((), ["nf4"]), (["--full"], []), (["--fsdp"], []), (["--compile"], []):
        assert list(plan._packings(TrainSettings.resolve(words, ""))) == known


def test_a_run_says_what_it_needs_packed_before_it_loads(tmp_path):
    said = {}
    for quant in ("nf4", "none"):
        done = cli.train(quant, "--quant", quant, cwd=tmp_path)
        assert done.code == 0, done.err
        said[quant] = done.err.index("memory   about ") < done.err.index("saved ")
    assert all(said.values())


def flags_of(tensor: torch.Tensor) -> list[str]:
    """What Linux notes of the memory that the middle of a tensor is in (proc_pid_smaps(5))."""
    address, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@mutation("lora/quant/packed.py", "        huge_pages(values)\n", "")
@mutation("lora/heap.py", "mmap.MADV_HUGEPAGE", "mmap.MADV_NOHUGEPAGE")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no such pages")
def test_the_numbers_of_a_large_weight_come_into_memory_by_large_pages():
    large, small = (
        Int8((rows, 8192), torch.ones(rows, 8192, dtype=torch.int8), torch.ones(rows)) for rows in (4096, 8)
    )
    numbers = large.dequantise(torch.bfloat16)
    assert "hg" in flags_of(numbers) and bool((numbers == 1).all())
    assert "hg" not in flags_of(small.dequantise(torch.bfloat16))
