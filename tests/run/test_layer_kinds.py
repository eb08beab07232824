"""Models whose layers differ from Llama's, by command: which Linears train, with every kind of method, and merged."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from lora.adapter.targets import GROUPS, find_targets, linears
from lora.files import Safetensors, write_tensors
from lora.network.config import ModelConfig
from lora.network.decoder import Model
from tests.cli import SIZES, ask, call, scratch, train, write_model
from tests.methods.linked import data_of, rewarded
from tests.mutation import mutation
from tests.network.test_families import NEW, family_config, model_of, on_disk

HYBRIDS = pytest.mark.parametrize("kind", ["lfm2", "qwen3_5_text"])
ATTENTION, MLP = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
NAMED = {  # where they are called otherwise, or are others
    "lfm2": ({"q_proj", "k_proj", "v_proj", "in_proj", "out_proj"}, {"w1", "w2", "w3"}),
    "qwen3_5_text": (ATTENTION | {"in_proj_qkv", "in_proj_z", "out_proj"}, MLP),
    "granitemoehybrid": (ATTENTION, {"gate_proj", "up_proj", "output_linear"}),
}
SMALL = {  # which no group names: gates of a row a head, and what tokens bring to layers
    "qwen3_5_text": {"in_proj_a", "in_proj_b"},
    "gemma4_text": {"per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"},
}


@cache
def folder_of(kind: str) -> Path:
    folder = write_model(scratch() / kind)
    raw = family_config(kind) | {
        "vocab_size": SIZES["vocab_size"],
        "vocab_size_per_layer_input": 300,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    write_tensors(folder / "model.safetensors", on_disk(model_of(raw, dtype=torch.float32)), {"format": "pt"})
    return folder


def names(paths) -> set[str]:
    return {path.rsplit(".", 1)[-1] for path in paths}


# ---- targets ---------------------------------------------------------------------------------------------------------


@mutation("lora/adapter/targets.py", '"in_proj", "out_proj")', '"out_proj")', case="lfm2")
@mutation("lora/adapter/targets.py", '"output_linear", "w1"', '"w1"', case="granitemoehybrid")
@pytest.mark.parametrize("kind", NEW)
def test_groups_name_what_mixes_positions_the_mlp_and_both(kind):
    with torch.device("meta"):
        model = Model(ModelConfig.from_json(family_config(kind)))
    attention, mlp = NAMED.get(kind, (ATTENTION, MLP))
    found = {group: find_targets(model, [group]) for group in GROUPS}
    assert (names(found["attention"]), names(found["mlp"])) == (attention, mlp)
    assert set(found["attention"]) | set(found["mlp"]) == set(found["all"])
    assert names(linears(model).keys() - set(found["all"])) - {"lm_head"} == SMALL.get(kind, set())


@mutation("lora/run/adapter.py", "{len(paths):>4} of", "{len(targets):>4} of", case="lfm2")
@HYBRIDS
def test_train_says_which_linears_of_how_many_layers_it_matched(kind, tmp_path):
    done = train("run", "--max-steps", 1, model=folder_of(kind), cwd=tmp_path)
    assert done.code == 0, done.err
    lines = [line.split() for line in done.err.splitlines() if line.startswith("  ") and " rank " in line]
    matched = {name: int(count) for name, count, *_ in lines}
    assert matched == {
        "lfm2": {"in_proj": 2, "out_proj": 3, **dict.fromkeys(("q_proj", "k_proj", "v_proj"), 1),
                 **dict.fromkeys(("w1", "w2", "w3"), 3)},
        "qwen3_5_text": {**dict.fromkeys(("in_proj_qkv", "in_proj_z", "out_proj"), 2), **dict.fromkeys(ATTENTION, 1),
                         **dict.fromkeys(MLP, 3)},
    }[kind]  # fmt: skip
    assert len({line.index(" of ") for line in done.err.splitlines() if " rank " in line and line[:2] == "  "}) == 1


# ---- methods ---------------------------------------------------------------------------------------------------------


@HYBRIDS
@pytest.mark.parametrize("method", ["dpo", "reward", "grpo"])
def test_a_step_of_every_kind_of_method_moves_the_adapter_on_every_kind_of_layer(method, kind, tmp_path):
    how = ("--method", method, "--data", data_of(method), "--max-steps", 2, "--batch-size", 3, *rewarded(method))
    done = train("run", *how, model=folder_of(kind), cwd=tmp_path)
    assert done.code == 0, done.err
    saved = Safetensors(tmp_path / "run/adapter_model.safetensors")
    moved = {name for name in saved.header if name.endswith("lora_B.weight") and saved.read(name).abs().max() > 0}
    assert len(moved) == len(saved.header) // 2 == {"lfm2": 17, "qwen3_5_text": 19}[kind]
    assert (tmp_path / "run/value_head.safetensors").exists() == (method == "reward")


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [(), ("--quant", "nf4")], ids=["", "nf4"])
@pytest.mark.parametrize("kind", ["phi3", "gemma2", "gemma4_text", "granitemoehybrid", "lfm2", "qwen3_5_text"])
def test_what_is_trained_answers_the_same_merged(kind, how, tmp_path):
    folder = folder_of(kind)
    assert train("run", *how, model=folder, cwd=tmp_path).code == 0
    assert call("merge", "--adapter", "run", "--out", "merged", "--dtype", "float32", cwd=tmp_path).code == 0
    sources = (("--adapter", "run"), ("--model", "merged"), ("--model", folder))
    answers = [ask(*source, "--prompt", "What is 1 and 2?", cwd=tmp_path).out for source in sources]
    assert answers[0] == answers[1] != answers[2]
