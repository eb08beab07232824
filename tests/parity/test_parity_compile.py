"""PyTorch's compiler making code, which takes a while; and bench/gpu.py, which in full needs a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora import ops
from lora.data import batch
from lora.device import check_compiler
from lora.errors import BadEnvironment
from lora.network.compiled import compile_blocks
from lora.network.rope import rope_table
from tests.helpers import patched, some_tokens, tiny_model
from tests.network.test_compile import OTHER, STEP, agree, loss_and_gradients

ROOT = Path(__file__).resolve().parents[2]
if os.environ.get("LORA_PARITY") != "1":
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    try:
        check_compiler(torch.device("cpu"))
    except BadEnvironment as why:
        pytest.skip(str(why), allow_module_level=True)

D, INNER, RANK, TOKENS = 32, 80, 4, 96


def kept_by(model, tokens) -> int:
    """Numbers that a forward pass keeps for the backward pass and that are there for every token."""
    cos, sin, _ = rope_table(model.config, tokens, model.dtype)
    kept, rope = {}, cos.numel() + sin.numel()

    def pack(tensor):
        if tensor.shape[:1] == (len(tokens),):
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.trunk(tokens, [len(tokens)])
    return sum(kept.values()) - rope


def test_compiled_blocks_compute_the_same_and_keep_nothing_that_is_cheap_to_form_again(monkeypatch):
    sizes = {"hidden_size": D, "intermediate_size": INNER, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = patched(tiny_model(num_hidden_layers=3, **sizes), rank=RANK).train()
    steps = [batch.micro_batches(step, TOKENS, fill=True) for step in (STEP, OTHER)]
    plain = [loss_and_gradients(model, batches) for batches in steps]
    compile_blocks(model, fullgraph=True)
    for batches, wanted in zip(steps, plain, strict=True):
        assert agree(loss_and_gradients(model, batches), wanted)

    def attend(q, k, v, *_):  # nothing of attention's own is kept
        return q + (k + v).repeat_interleave(2, dim=1)

    monkeypatch.setattr(ops, "attention", attend)
    # a block's input, what attention found, the sum of both; gate, up; x Aᵀ of seven layers
    a_layer = 3 * D + 2 * INNER + 7 * RANK
    last = D + 1  # the last norm is not compiled: its input and 1 / RMS
    assert kept_by(model, some_tokens(TOKENS)) == TOKENS * (3 * a_layer + last)


@pytest.mark.large
def test_the_gpu_benchmark_runs_and_finds_all_sides_alike(tmp_path):
    command = [sys.executable, "bench/gpu.py", "--smoke", "--workload", "packed", "--rounds", "1", "--out"]
    sides = ["--side", "compiled", "plain", "B1", "B0"]
    done = subprocess.run([*command, tmp_path / "gpu.json", *sides], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())["tiny packed"]
    assert list(found["sides"]) == ["compiled", "plain", "B1", "B0"] and all(found["sides"].values()), done.stdout
    for row in found["parity"].values():
        assert row["loss"] < 1e-5 and row["worst tensor"] < 1e-6
    assert "time over compiled's" in done.stdout
