"""The receipt of a merge: its figures are what a plain computation in float64 finds, and beyond --tolerance nothing is
written."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora import pretrained
from lora.adapter.inject import disabled, lora_layers
from lora.adapter.merge import merge, merged_weight, unload
from lora.errors import BadEnvironment
from lora.export import receipt
from tests import cli
from tests.helpers import patched, snapshot, some_tokens, tiny_model
from tests.mutation import mutation
from tests.scripts.test_commands import ok

PROMPTS = [some_tokens(n, seed=n).tolist() for n in (31, 9, 60)]


class Written:
    """The tensors of a model, as a checkpoint offers them."""

    widest = None

    def __init__(self, model):
        self.tensors = snapshot(model)

    def read(self, name, dtype=None):
        return self.tensors[name]


def merged(model, dtype=None) -> Written:
    """What merge.py would write of a patched model."""
    model = copy.deepcopy(model)
    for layer in lora_layers(model).values():
        layer.merged_weight = merged_weight(layer.base.weight, layer.delta(), dtype)
    return Written(unload(model).to(dtype or model.dtype))


def model_of(dtype=torch.bfloat16, **how):
    """A model with weights of that dtype, computing in float32, with its adapter."""
    return patched(tiny_model(dtype).to(torch.float32), **how)


@torch.no_grad()
def by_hand(one, other, prompts):
    """max |Δlogit|, mean and max KL, same top-1, from probabilities in float64."""
    worst, kl, same = 0.0, [], []
    for ids in prompts:
        a, b = (model(torch.tensor(ids)).double() for model in (one, other))
        worst = max(worst, (a - b).abs().max().item())
        p, q = a.softmax(-1), b.softmax(-1)
        kl += (p * (p / q).log()).sum(-1).tolist()
        same += [int(x.topk(1).indices == y.topk(1).indices) for x, y in zip(a, b, strict=True)]
    return worst, sum(kl) / len(kl), max(kl), sum(same) / len(same)


# ---- the figures -----------------------------------------------------------------------------------------------------


@mutation("lora/export/receipt.py", "F.kl_div(log_q, log_p,", "F.kl_div(log_p, log_q,")
def test_figures_are_those_of_a_plain_computation():
    model = model_of()
    written, base = merged(model, torch.bfloat16), copy.deepcopy(model)
    after = tiny_model(torch.float32)
    after.load_state_dict(written.tensors)
    with disabled(base):
        expected = by_hand(model, after, PROMPTS), by_hand(model, base, PROMPTS)
    # `base` is disabled only inside: what it computed there is what is compared
    found = receipt.measure(model, written, PROMPTS)
    assert (found.prompts, found.positions) == (3, 100)
    for difference, values in zip((found.merged, found.base), expected, strict=True):
        assert difference == pytest.approx(values, rel=1e-4, abs=1e-7)
    assert found.share == pytest.approx(expected[0][1] / expected[1][1], rel=1e-4)
    assert 1e-5 < found.share < 0.05 and found.base.mean_kl > 0.1 and found.merged.same_top1 > 0.9


@mutation(
    "lora/export/receipt.py",
    "(after.double() - (W.double() + D.double()))",
    "(after.double() - (W.double() + D.double()).bfloat16().double())",
)
def test_the_share_lost_to_rounding_is_that_of_the_frobenius_norms():
    model, other = model_of(), model_of()
    written = merged(model, torch.bfloat16)
    found = receipt.measure(model, written, PROMPTS).layers
    assert found.keys() == lora_layers(other).keys()
    for path, layer in lora_layers(other).items():
        W, D = (t.double().detach().numpy() for t in (layer.base.weight, layer.delta()))
        after = written.read(f"{path}.weight").double().numpy()
        error = sum((a - w - d) ** 2 for a, w, d in zip(after.flat, W.flat, D.flat, strict=True))
        assert found[path].rounding == pytest.approx(math.sqrt(error / (D**2).sum()), rel=1e-6)
        assert 1e-4 < found[path].rounding < 0.1
        assert found[path].unchanged == pytest.approx(((after == W) & (D != 0)).mean(), abs=1e-12)


def test_elements_too_small_for_the_weight_are_counted_and_zeros_are_not():
    model = model_of(targets=["q_proj"])
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.base.weight.fill_(1.0)
            layer.lora_A.zero_(), layer.lora_B.zero_()
            layer.lora_A[0, :3], layer.lora_B[:, 0] = torch.tensor([1e-4, 1e-4, 1.0]), layer.rank / layer.alpha
    found = receipt.measure(model, merged(model, torch.bfloat16), PROMPTS).layers
    assert all(lost.unchanged == pytest.approx(2 / 3) for lost in found.values())  # of each row's three


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 1e-9), (torch.float16, 1e-4), (torch.bfloat16, 1e-2)], ids=str
)
def test_the_finer_the_dtype_the_less_is_lost(dtype, most):
    model = model_of()
    found = receipt.measure(model, merged(model, dtype), PROMPTS)
    assert 0 <= found.share < most and found.share > most / 10**6


def test_at_the_end_the_model_holds_what_was_written_and_there_never_was_a_second_one():
    model = model_of()
    written, places = merged(model, torch.bfloat16), {p.data_ptr() for p in model.parameters()}
    receipt.measure(model, written, PROMPTS)
    assert not lora_layers(model) and {p.data_ptr() for p in model.parameters()} <= places
    assert all(torch.equal(tensor, written.read(name).float()) for name, tensor in model.state_dict().items())


def test_prompts_are_taken_until_there_are_enough_positions():
    prompts = [[1] * 400, [2] * 600, [3] * 100, [4] * 100]
    assert [len(ids) for ids in receipt.first(prompts, 1024)] == [400, 600, 24]
    assert list(receipt.first(prompts[2:], 1024)) == prompts[2:]


def test_a_machine_without_room_for_it_is_told_before_anything_is_merged():
    model = tiny_model(torch.float32)
    receipt.check_room(model, None), receipt.check_room(model, receipt.needed(model))
    assert receipt.needed(model) > 4 * sum(p.numel() for p in model.parameters())
    with pytest.raises(BadEnvironment, match=r"out of memory in this merge: .* Add --no-receipt"):
        receipt.check_room(model, receipt.needed(model) - 1)


# ---- the command -----------------------------------------------------------------------------------------------------


def command(cwd, *argv, **how):
    return cli.call(
        "merge", "--adapter", cli.adapter_folder(), "--out", "out", "--device", "cpu", *argv, cwd=cwd, **how
    )


def read(folder):
    return json.loads((folder / "out/receipt.json").read_text())


@pytest.mark.parametrize("base", ["folder", "gguf"])
@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
def test_merge_writes_a_receipt_and_prints_it(tmp_path, base, dtype):
    model = cli.gguf_file() if base == "gguf" else cli.model_folder()
    out = ok(command(tmp_path, "--model", model, "--dtype", dtype))
    found = read(tmp_path)
    figures = {"format", "prompts", "positions", "merged", "base", "share", "tolerance", "layers"}
    assert set(found) == figures | {"trained_on", "quant", "onto"}
    assert (found["trained_on"], found["quant"], found["onto"]) == (Path(model).name, None, None)
    assert found["positions"] == receipt.POSITIONS and found["tolerance"] == 0.01
    assert len(found["layers"]) == 14 and all(set(x) == {"rounding", "unchanged"} for x in found["layers"].values())
    assert out.count("\n") == 10 and f"{100 * found['share']:.2g}%" in out and f"{found['merged']['max_kl']:.2e}" in out
    assert found["share"] < {"auto": 0.01, "float32": 1e-6, "float16": 1e-3}[dtype]


def test_the_prompts_of_a_file_are_compared(tmp_path):
    (tmp_path / "prompts").write_text("Hello.\nWhat is 1 and 2?\n")
    ok(command(tmp_path, "--prompts", "prompts"))
    assert read(tmp_path)["prompts"] == 2 and read(tmp_path)["positions"] < 100
    done = command(tmp_path, "--prompts", "none", "--overwrite")
    assert done.code == 2 and "missing file in none" in done.errors[0]


def test_without_a_receipt_the_weights_are_the_same(tmp_path):
    ok(command(tmp_path))
    (tmp_path / "out").rename(tmp_path / "with")
    assert ok(command(tmp_path, "--no-receipt")) == "" and not (tmp_path / "out/receipt.json").exists()
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("with", "out"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_beyond_the_tolerance_nothing_is_written_and_an_earlier_model_stays(tmp_path):
    done = command(tmp_path, "--tolerance", 0)
    assert done.code == 4 and "lost of what the adapter changed" in done.out
    assert done.errors[0].startswith("error: merged model too far from the adapter in out: ")
    assert "Merge with --dtype float32" in done.errors[0] and list(tmp_path.iterdir()) == []
    ok(command(tmp_path, "--dtype", "float32", "--tolerance", 1e-6))
    before = cli.tree(tmp_path)
    assert command(tmp_path, "--tolerance", 0, "--overwrite").code == 4 and cli.tree(tmp_path) == before


@mutation(
    "lora/export/proof.py",
    """        receipt.check(found, tolerance, self.out, args.adapter, kind, self.onto)
""",
    "",
)
def test_a_layer_that_was_written_wrong_is_noticed(tmp_path):
    """As a bug in the writer would: one layer of the fourteen without its ΔW."""

    def forget():
        write = pretrained.write_model

        def broken(checkpoint, folder, change, dtype=None, spoken=None):
            path = "model.layers.1.mlp.down_proj.weight"
            write(checkpoint, folder, lambda name, t: t if name == path else change(name, t), dtype, spoken)

        pretrained.write_model = broken

    done = command(tmp_path, before=forget)
    assert done.code == 4 and "100.00% in model.layers.1.mlp.down_proj" in done.out, done.out


def test_an_adapter_that_rounding_loses_is_not_merged_unless_in_float32(tmp_path):
    """ΔW 10⁻⁵ of what it was: in bfloat16 almost none of it is left."""
    shutil.copytree(cli.adapter_folder(), tmp_path / "small", ignore=shutil.ignore_patterns("checkpoints"))
    path = tmp_path / "small/adapter_model.safetensors"
    save_file({name: t * 1e-5 if "lora_B" in name else t for name, t in load_file(path).items()}, path)
    argv = ("--adapter", "small", "--out", "out", "--device", "cpu")
    done = cli.call("merge", *argv, cwd=tmp_path)
    assert done.code == 4 and "--dtype float32" in done.errors[0] and not (tmp_path / "out").exists()
    ok(cli.call("merge", *argv, "--dtype", "float32", cwd=tmp_path))


@pytest.mark.parametrize("missing", ["template", "tokenizer"])
def test_a_base_model_without_template_has_a_receipt_and_one_without_tokenizer_has_none(tmp_path, missing):
    model = cli.write_model(tmp_path / "model")
    shutil.copytree(cli.adapter_folder(), tmp_path / "adapter", ignore=shutil.ignore_patterns("checkpoints"))
    for name in ("passport.json", "chat_template.jinja"):  # as one made elsewhere
        (tmp_path / "adapter" / name).unlink()
    config = json.loads((model / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    if missing == "tokenizer":
        (model / "tokenizer.json").unlink()
    done = cli.call("merge", "--adapter", "adapter", "--model", "model", "--out", "out", cwd=tmp_path)
    ok(done)
    assert (tmp_path / "out/receipt.json").exists() == (missing == "template")
    assert ("there is no receipt" in done.err) == (missing == "tokenizer")


def test_the_model_in_the_receipt_is_the_one_that_memory_would_merge():
    model = model_of()
    twin, written = copy.deepcopy(model), merged(model, None)
    merge(twin)
    found = receipt.measure(model, written, PROMPTS)
    assert by_hand(twin, model, PROMPTS)[0] == 0 and found.merged.mean_kl < 1e-9
