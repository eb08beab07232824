"""An adapter of a packed base is merged onto that base dequantised, or onto its 16-bit original, and the receipt says
how far both are from what was trained: each is computed here from the files alone."""

import json

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file

from lora import pretrained
from lora.adapter import store
from lora.adapter.variants import DoRALinear
from lora.export import receipt
from lora.pretrained import gguf_write
from tests import cli
from tests.adapters import deltas
from tests.export.test_receipt import by_hand
from tests.helpers import close, some_tokens
from tests.mutation import mutation
from tests.quantised_files import PACKINGS, trained_on, write_models, write_packed_adapter
from tests.scripts.test_commands import ok

TARGET = "model.layers.1.self_attn.q_proj"  # its rows are moved in a GGUF file of a Llama


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A 16-bit model, a Q4_1 file of it, and adapters of all packings, of LoRA and of DoRA."""
    folder = tmp_path_factory.mktemp("onto")
    write_models(folder)
    for quant in PACKINGS:
        write_packed_adapter(folder, quant, quant)
    write_packed_adapter(folder, "dora", "nf4", kind=DoRALinear)
    return folder


def merge(cwd, *argv, **how):
    return cli.call("merge", "--device", "cpu", *argv, cwd=cwd, **how)


def delta(work, adapter, W):
    """ΔW of TARGET on this W, float64."""
    sBA = deltas(work / adapter, work / "model")[TARGET]
    if adapter != "dora":
        return sBA
    magnitude = load_file(work / "dora/adapter_model.safetensors")[f"base_model.model.{TARGET}.lora_magnitude_vector"]
    V = W.double() + sBA
    return (magnitude.double() / V.norm(dim=1))[:, None] * V - W.double()


def in_gguf(path, name="blk.1.attn_q.weight"):
    [tensor] = [tensor for tensor in GGUFReader(path).tensors if tensor.name == name]
    rows = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float64))  # (4 heads of 8, 32)
    return rows.unflatten(0, (4, 4, 2)).transpose(1, 2).flatten(0, 2)


# ---- the weights -----------------------------------------------------------------------------------------------------


@mutation(
    "lora/export/onto.py",
    "W = tensor if is_low_rank(layer) else trained_on.read(name, trained_on.widest)",
    "W = tensor",
    case="onto-dora",
)
@mutation("merge.py", "target = find_onto(args.onto, base) if args.onto else base", "target = base", case="onto-nf4")
@pytest.mark.parametrize("adapter", [*PACKINGS, "dora"])
@pytest.mark.parametrize("onto", [False, True], ids=["trained", "onto"])
def test_what_is_written_is_the_sum_of_the_chosen_base_and_of_what_was_learned_on_the_trained_one(
    work, tmp_path, adapter, onto
):
    flags = ("--onto", work / "model") if onto else ()
    ok(merge(tmp_path, "--adapter", work / adapter, "--out", "out", "--dtype", "float32", *flags))
    dq = trained_on(work, "nf4" if adapter == "dora" else adapter).read(f"{TARGET}.weight", torch.float32)
    W = load_file(work / "model/model.safetensors")[f"{TARGET}.weight"].float() if onto else dq
    after = load_file(tmp_path / "out/model.safetensors")[f"{TARGET}.weight"]
    assert close(after, W.double() + delta(work, adapter, dq), 1e-6)
    assert (dq - load_file(work / "model/model.safetensors")[f"{TARGET}.weight"]).norm() > 1e-3 * dq.norm()


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize("onto", [False, True], ids=["trained", "onto"])
def test_a_gguf_file_holds_the_same_sum(work, tmp_path, kind, onto):
    flags = ("--onto", work / "model") if onto else ()
    ok(merge(tmp_path, "--adapter", work / "keep", "--out", "a.gguf", "--format", "gguf", "--gguf-type", kind, *flags))
    dq = in_gguf(work / "q4.gguf")
    W = load_file(work / "model/model.safetensors")[f"{TARGET}.weight"].double() if onto else dq
    assert close(in_gguf(tmp_path / "a.gguf"), W + delta(work, "keep", dq), {"f16": 1e-3, "q8_0": 1e-2}[kind])


@mutation(
    "lora/pretrained/gguf_write.py",
    "A, B = layout.maps(target, A, B.float() * (s * len(A) / alpha))",
    "B = B.float() * (s * len(A) / alpha)",
)
def test_an_adapter_alone_adds_to_the_blocks_it_was_trained_on_what_it_learned_there(work, tmp_path):
    ok(merge(tmp_path, "--adapter", work / "keep", "--out", "a.gguf", "--format", "gguf", "--adapter-only"))
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "a.gguf").tensors}
    A, B = (torch.from_numpy(tensors[f"blk.1.attn_q.weight.lora_{end}"].astype(np.float64)) for end in "ab")
    rows = (6 / 4 * B @ A).unflatten(0, (4, 4, 2)).transpose(1, 2).flatten(0, 2)
    assert close(rows, delta(work, "keep", None), 1e-6)


# ---- the receipt -----------------------------------------------------------------------------------------------------

PROMPTS = [some_tokens(n, vocab=290, seed=n).tolist() for n in (31, 9, 60)]


@mutation(
    "lora/export/receipt.py", "before.read(name, torch.float32)", "written.read(name, torch.float32)", case="onto-nf4"
)
@mutation(
    "lora/export/receipt.py", "(full.double() - dq.double())", "(full.double() - after.double())", case="onto-nf4"
)
@mutation(
    "lora/export/receipt.py",
    "                model.set_submodule(path, plain_linear(packed, empty))\n",
    "                pass\n",
    case="onto-nf4",
)
@pytest.mark.parametrize("adapter", ["nf4", "keep"])
@pytest.mark.parametrize("onto", ["trained", "onto"])
def test_the_reference_of_a_receipt_is_the_unmerged_adapter_on_the_packed_base(work, tmp_path, adapter, onto):
    onto = pretrained.find(str(work / "model")) if onto == "onto" else None
    flags = ("--onto", work / "model") if onto else ()
    ok(merge(tmp_path, "--adapter", work / adapter, "--out", "out", "--no-receipt", *flags))
    base, written = trained_on(work, "nf4" if adapter == "dora" else adapter), pretrained.find(str(tmp_path / "out"))
    found = receipt.make(base, work / adapter, written, PROMPTS, "cpu", onto)

    trained, plain, after = (pretrained.load_model(one) for one in (base, base, written))
    store.load(trained, work / adapter)
    assert found.merged == pytest.approx(by_hand(trained, after, PROMPTS), rel=1e-3, abs=1e-7)
    assert found.base == pytest.approx(by_hand(trained, plain, PROMPTS), rel=1e-3, abs=1e-7)
    assert found.share < 0.01 if onto is None else 0.01 < found.share < 1

    W16 = onto or (base.original if adapter == "nf4" else None)
    if W16 is None:  # the blocks are all there is
        assert found.packing is None and all(lost.packing is None for lost in found.layers.values())
        return
    squares = []
    for path, D in deltas(work / adapter, work / "model").items():
        W, dq = (one.read(f"{path}.weight", torch.float32).double() for one in (W16, base))
        squares.append(((W - dq).square().sum().item(), D.square().sum().item()))
        assert found.layers[path].figures()["packing"] == pytest.approx((squares[-1][0] / squares[-1][1]) ** 0.5)
    over, under = (sum(its) for its in zip(*squares, strict=True))
    assert found.packing == pytest.approx((over / under) ** 0.5) and found.packing > 0.05
    ratios = sorted(lost.figures()["packing"] for lost in found.layers.values())
    rows = dict(receipt.rows(found))
    assert rows["‖W16 - dq(W)‖ / ‖ΔW‖, all layers"] == f"{found.packing:.3g}"
    assert rows["‖W16 - dq(W)‖ / ‖ΔW‖, median layer"] == f"{ratios[len(ratios) // 2]:.3g}"


@mutation("lora/pretrained/gguf_write.py", "files.writing(path, check)", "files.writing(path)")
def test_a_gguf_file_beyond_the_tolerance_is_not_written_and_an_earlier_one_stays(work, tmp_path):
    argv = ("--adapter", work / "nf4", "--out", "a.gguf", "--format", "gguf")
    done = merge(tmp_path, *argv, "--tolerance", 0)
    assert done.code == 4 and "Give --gguf-type f32" in done.errors[0] and list(tmp_path.iterdir()) == []
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert merge(tmp_path, *argv, "--tolerance", 0, "--overwrite").code == 4
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"] and (tmp_path / "a.gguf").read_bytes() == b"GGUF"
    assert "lost of what the adapter changed" in ok(merge(tmp_path, *argv, "--overwrite"))


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_a_weight_as_a_gguf_file_holds_it_is_what_is_read_back(work, tmp_path, kind):
    base = pretrained.find(str(work / "model"))
    gguf_write.write_model(base, tmp_path / "a.gguf", lambda _, tensor: tensor.float(), kind)
    after, name = pretrained.find(str(tmp_path / "a.gguf")), f"{TARGET}.weight"
    assert torch.equal(gguf_write.rounded(base.read(name).float(), kind), after.read(name, torch.float32))


def test_onto_a_stranger_is_refused_by_its_receipt_and_onto_another_structure_at_once(work, tmp_path):
    cli.write_model(tmp_path / "stranger", seed=1, intermediate_size=64)
    argv = ("--adapter", work / "nf4", "--out", "out")
    done = merge(tmp_path, *argv, "--onto", "stranger")
    assert done.code == 4 and "over --tolerance 1; nothing is kept" in done.errors[0] and "Leave out --onto" in done.err
    cli.write_model(tmp_path / "wide", intermediate_size=96)
    done = merge(tmp_path, *argv, "--onto", "wide")
    [error] = done.errors
    assert done.code == 2 and error.startswith("error: wrong --onto in ")
    assert "model.layers.0.mlp.down_proj.weight is (32, 96), in " in error and "(32, 64)" in error
    done = merge(tmp_path, *argv, "--onto", work / "model", "--format", "gguf", "--adapter-only")
    assert done.code == 2 and "wrong --onto in the command line" in done.err
    assert not (tmp_path / "out").exists()


def test_card_and_receipt_say_base_packing_and_the_model_it_was_merged_onto(work, tmp_path):
    for name, flags in {"trained": (), "onto": ("--onto", work / "model")}.items():
        ok(merge(tmp_path, "--adapter", work / "keep", "--out", name, *flags))
        found = json.loads((tmp_path / name / "receipt.json").read_text())
        assert (found["trained_on"], found["quant"]) == ("q4.gguf", "keep")
        assert found["onto"] == (None if name == "trained" else "model")
        assert found["tolerance"] == (0.01 if name == "trained" else 1) and ("packing" in found) == (name == "onto")
        card = (tmp_path / name / "README.md").read_text()
        text = "those of its blocks, dequantised" if name == "trained" else "on `q4.gguf` in keep, whose weights are"
        assert text in card and str(work) not in card
