"""Full fine-tuning: every gradient is the formula's, a step is AdamW's, the result is a model folder like any other."""

import copy
import json
import os
import shutil
import signal

import pytest
import torch
from torch.nn import functional as F

from lora.data.batch import micro_batches
from lora.ops import fast_log_probs
from lora.ops import plain as formulas
from lora.pretrained import ModelFolder, load_model
from lora.run.trainable import AllWeights
from lora.train import memory, run_state
from lora.train.evaluate import Retention
from lora.train.step import train_step
from tests import cli, oracle
from tests.helpers import (
    as_written,
    close,
    far,
    objective_of,
    random_example,
    same,
    snapshot,
    some_tokens,
    tiny_config,
    tiny_model,
)
from tests.mutation import mutation
from tests.train.test_memory import arguments, name_of, saved_bytes

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


EXAMPLES = [random_example(3, 8, 1), random_example(1, 5, 2), random_example(6, 1, 3)]
BATCHES = micro_batches(EXAMPLES, 12)  # two of them


def gradients(model, objective) -> dict[str, torch.Tensor]:
    model.requires_grad_().zero_grad()
    for b in BATCHES:
        objective(b).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


# ---- the gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [{"tie_word_embeddings": True}, {}, {"model_type": "qwen2"}], ids=["tied", "untied", "biases"]
)
def test_every_gradient_is_that_of_the_plain_formula(shape):
    """Autograd's of the formula as written, entry by entry; and along a random direction of every weight, what the
    float64 oracle's loss differs by."""
    model, raw = tiny_model(F64, **shape), tiny_config(**shape)
    found = gradients(model, objective_of(model))

    def plain(b):
        return formulas.cross_entropy(model(b.tokens, b.lengths)[b.trained], torch.eye(131, dtype=F64), b.targets)

    with as_written():
        expected = gradients(model, plain)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, gradient in found.items():
        assert gradient.any() and close(gradient, expected[name], 1e-11), name

    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}

    def loss(name: str, moved: torch.Tensor) -> float:
        changed = weights | {name: weights[name] + moved.numpy()}
        of = (oracle.nll(oracle.logits(raw, changed, e.tokens[:-1]), e.tokens[1:], e.trained[1:])[0] for e in EXAMPLES)
        return sum(of)

    draw = torch.Generator().manual_seed(4)
    for name, gradient in found.items():
        way = torch.randn(gradient.shape, generator=draw, dtype=F64)
        way *= 1e-5 / way.norm()
        slope = (loss(name, way) - loss(name, -way)) / 2
        assert abs(slope - (gradient * way).sum()) < 1e-6 * 1e-5 * max(1, gradient.norm()), name


@mutation("lora/ops/fast_log_probs.py", "d_head += z.T", "d_head[:] = z.T")
def test_the_gradient_of_a_bf16_head_adds_up_in_float32():
    """The same tokens in every chunk of rows: sums of equal bf16 numbers would stop growing."""
    draw = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(2, 16, generator=draw).bfloat16(), torch.randn(31, 16, generator=draw).bfloat16()
    hidden, head, targets = hidden.repeat(600, 1), head.requires_grad_(), torch.tensor([3, 7] * 600)
    (-fast_log_probs.log_probs(hidden, head, targets, rows=2).sum()).backward()
    found, wide = head.grad, head.detach().double().requires_grad_()
    formulas.cross_entropy(hidden.double(), wide, targets).backward()
    assert found.dtype == BF16 and (found - wide.grad).norm() < 0.01 * wide.grad.norm()


# ---- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_is_adamws_on_the_plain_model(tied):
    model = tiny_model(F64, tie_word_embeddings=tied)
    other = copy.deepcopy(model)
    masters = AllWeights(model, F64)
    assert masters.parameters == dict(model.named_parameters())
    optimizer = torch.optim.AdamW(masters.parameters.values(), lr=1.0, weight_decay=0.1)
    expected = torch.optim.AdamW(other.requires_grad_().parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        result = train_step(objective_of(model), BATCHES, optimizer, 0.01, 0.5)
        masters.sync_model()
        expected.zero_grad()
        logits = [other(torch.tensor(e.tokens[:-1])) for e in EXAMPLES]
        targets = [torch.tensor(e.tokens[1:]).where(torch.tensor(e.trained[1:]), -100) for e in EXAMPLES]
        F.cross_entropy(torch.cat(logits), torch.cat(targets)).backward()
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        expected.step()
        assert abs(result.grad_norm - norm) < 1e-10 and norm > 0.5
    for name, weight in model.named_parameters():
        assert close(weight, other.get_parameter(name), 1e-10), name


@mutation("lora/run/trainable.py", "gradient if master.grad is None else master.grad.add_(gradient)", "gradient")
@mutation("lora/run/trainable.py", "weight.copy_(master)", "weight.copy_(weight)")
def test_masters_take_the_gradients_of_a_bf16_model_add_them_in_float32_and_are_rounded_into_it():
    """The same bits as AdamW on float32 copies that get the sum of each micro-batch's gradients."""
    model = tiny_model(F32)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}  # not those of a bf16 file
    other = copy.deepcopy(model).bfloat16().requires_grad_()
    masters = AllWeights(model, BF16)
    assert model.dtype == BF16 and same(weights, {name: p.detach() for name, p in masters.parameters.items()})
    optimizer = torch.optim.AdamW(masters.parameters.values(), lr=1.0, fused=True)

    sums = {name: torch.zeros_like(p) for name, p in weights.items()}
    count = sum(len(b.targets) for b in BATCHES)
    for b in BATCHES:
        other.zero_grad()
        (objective_of(other)(b) / count).backward()
        for name, p in other.named_parameters():
            sums[name] += p.grad.float()
    copies = {name: torch.nn.Parameter(p.clone()) for name, p in weights.items()}
    for name, p in copies.items():
        p.grad = sums[name]
    torch.optim.AdamW(copies.values(), lr=0.01, fused=True).step()

    train_step(objective_of(model), BATCHES, optimizer, 0.01)
    masters.sync_model()
    assert all(p.grad is None for p in (*model.parameters(), *masters.parameters.values()))
    assert same({n: p.detach() for n, p in copies.items()}, {n: p.detach() for n, p in masters.parameters.items()})
    assert same({n: p.detach().bfloat16() for n, p in copies.items()}, snapshot(model))


def test_updates_that_bf16_weights_would_swallow_add_up_in_the_masters():
    model = tiny_model(F32).bfloat16().float()
    masters, start = AllWeights(model, BF16), snapshot(model)
    optimizer = torch.optim.AdamW(masters.parameters.values(), fused=True)
    swallowing = tiny_model(BF16).requires_grad_()
    plain = torch.optim.AdamW(swallowing.parameters(), fused=True)
    for _ in range(40):
        kept = train_step(objective_of(model), BATCHES, optimizer, 3e-5)
        masters.sync_model()
        lost = train_step(objective_of(swallowing), BATCHES, plain, 3e-5)

    def changed(model) -> float:
        pairs = [(start[name], tensor) for name, tensor in snapshot(model).items() if "proj" in name]
        return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)

    assert kept.unchanged < 0.4 < 0.8 < lost.unchanged  # rows of the embedding that no token asks for stay in both
    assert changed(swallowing) < 0.3 < 0.6 < changed(model)


@mutation("lora/train/evaluate.py", "head.clone() if head.requires_grad else head if own is not head else None", "None")
@pytest.mark.parametrize("tied", [True, False])
def test_forgetting_is_measured_against_the_heads_of_both(tied):
    model = tiny_model(F64, tie_word_embeddings=tied)
    base = copy.deepcopy(model)
    masters = AllWeights(model, F64)
    trunk = lambda b: model.trunk(b.tokens, b.lengths)[b.trained]  # noqa: E731
    meter = Retention(trunk, lambda: model.head_weight, BATCHES, lambda: torch.no_grad())
    assert meter().kl == 0
    optimizer = torch.optim.AdamW(masters.parameters.values())
    train_step(objective_of(model), BATCHES, optimizer, 0.05)
    masters.sync_model()
    rows = [(base(b.tokens, b.lengths)[b.trained], model(b.tokens, b.lengths)[b.trained], b.targets) for b in BATCHES]
    before, now, targets = (torch.cat(part).detach() for part in zip(*rows, strict=True))
    kl = F.kl_div(now.log_softmax(-1), before.log_softmax(-1), log_target=True, reduction="batchmean")
    expected = torch.stack([kl, F.cross_entropy(before, targets), F.cross_entropy(now, targets)])
    assert close(torch.tensor(meter(), dtype=F64), expected, 1e-12) and kl > 0.01


# ---- the command -----------------------------------------------------------------------------------------------------

STEPS = 5
RUN = ("--full", "--max-steps", STEPS, "--batch-size", 3, "--micro-tokens", 60, "--lr", 3e-3, "--save-every", 2)
EVALUATED = ("--eval-fraction", 0.2, "--eval-every", 3, "--keep", 9, "--dtype", "bfloat16", "--retention", "kept.jsonl")
BESIDE = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
          "tokenizer_config.json"]  # fmt: skip
CHECKPOINT = sorted([*BESIDE, "optimizer.safetensors", "state.json", "MANIFEST.json"])


def train(out, *argv, cwd, **how):
    inputs = ("--model", cli.model_folder(), "--data", cli.data_file(), "--out", out)
    return cli.call("train", *inputs, *cli.ON_CPU, *RUN, *argv, cwd=cwd, **how)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A short run in float32, and one in bf16 with evaluations."""
    folder = tmp_path_factory.mktemp("full")
    (folder / "kept.jsonl").write_text(cli.rows([[("user", "Say something."), ("assistant", "The sea is deep.")]]))
    for out, argv in (("plain", ()), ("evaluated", EVALUATED)):
        done = train(out, *argv, cwd=folder)
        assert done.code == 0, done.err
        (folder / f"{out}.err").write_text(done.err)
    return folder


def metrics(out) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row.keys() - {"seconds", "tokens_per_second"}} for row in rows]


def test_the_folder_is_a_plain_model_and_so_is_every_checkpoint(runs):
    folders = [f"checkpoints/{step:06d}" for step in (4, 5)]
    inner = [f"{folder}/{name}" for folder in folders for name in CHECKPOINT]
    made = [
        "settings.json",
        "metrics.jsonl",
        "preview.json",
        "loss.png",
        "report.md",
        "README.md",
        *BESIDE,
        "checkpoints",
        *folders,
        *inner,
    ]
    assert sorted(cli.tree(runs / "plain")) == sorted(made)
    config = json.loads((runs / "evaluated" / "config.json").read_text())
    assert config == json.loads((cli.model_folder() / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    for place, kind in (("plain", "F32"), ("evaluated", "BF16"), ("evaluated/checkpoints/000005", "F32")):
        assert {stored for stored, _ in ModelFolder(runs / place).header.values()} == {kind}
    said = (runs / "plain.err").read_text()
    assert "full     all of them train" in said and said.endswith("Try it:  python generate.py --model plain\n")


def test_it_computes_what_the_trained_weights_compute(runs):
    """The weights are those of the checkpoint that counts, rounded; all of them changed, and the loss fell."""
    tokens = some_tokens(40, 300)
    base = load_model(str(cli.model_folder()))
    for out, step, dtype in (("plain", 5, F32), ("evaluated", None, BF16)):
        rows = [row for row in metrics(runs / out) if "eval_loss" in row and row["step"]]
        step = step or min(rows, key=lambda row: row["eval_loss"])["step"]
        found = load_model(str(runs / out), dtype)
        kept = load_model(str(run_state.at(runs / out, step)), F32)
        assert same(snapshot(kept.to(dtype)), snapshot(found))
        assert torch.equal(found(tokens), kept(tokens)) and far(found(tokens), base.to(dtype)(tokens), 1e-4)
        for name, weight in snapshot(base.float()).items():
            assert (weight != found.state_dict()[name]).float().mean() > 0.02, name
        losses = [row["loss"] for row in metrics(runs / out) if "loss" in row]
        assert losses[-1] < losses[0] - 0.3


def test_steps_of_the_command_are_adamws_on_the_plain_model(runs):
    """Gradient norms and the first update, from the losses it reports: the first is the base's."""
    row = metrics(runs / "plain")[0]
    weights = {step: ModelFolder(run_state.at(runs / "plain", step)).read for step in (4, 5)}
    last = metrics(runs / "plain")[-1]
    moved = torch.cat([(weights[5](n) - weights[4](n)).flatten() for n in load_model(str(runs / "plain")).state_dict()])
    assert row["unchanged"] < 0.5 and 0 < moved.abs().max() <= 3 * last["lr"] < 3e-3


@mutation("train.py", "        trainable.restore(start)", "        trainable.sync_model()")
@pytest.mark.parametrize("out, step", [("plain", 4), ("evaluated", 2)])
def test_a_run_that_is_gone_on_with_has_the_bits_of_one_that_was_not_interrupted(runs, tmp_path, out, step):
    shutil.copytree(runs / out, tmp_path / out)
    shutil.copy(runs / "kept.jsonl", tmp_path)
    for later in run_state.steps(tmp_path / out):
        if later > step:
            shutil.rmtree(run_state.at(tmp_path / out, later))
    for name in ("model.safetensors", "config.json"):
        (tmp_path / out / name).unlink()
    done = cli.call("train", "--resume", "--out", out, cwd=tmp_path)
    assert done.code == 0, done.err
    assert metrics(tmp_path / out) == metrics(runs / out)
    trees = [cli.tree(folder / out) for folder in (tmp_path, runs)]
    names = [name for name in trees[1] if name.endswith((".safetensors", "config.json", "settings.json"))]
    assert len(names) > 5 and {n: trees[0].get(n) for n in names} == {n: trees[1][n] for n in names}
    answers = [(folder / out / "report.md").read_text().split("## What changed")[1] for folder in (tmp_path, runs)]
    assert answers[0].split("## Settings")[0] == answers[1].split("## Settings")[0]  # before is the base's


def test_the_other_commands_take_it_as_a_model(runs, tmp_path):
    asked = cli.ask("--model", runs / "plain", "--prompt", "What is 1 and 2?", cwd=tmp_path)
    base = cli.ask("--model", cli.model_folder(), "--prompt", "What is 1 and 2?", cwd=tmp_path)
    assert (asked.code, base.code) == (0, 0) and asked.out != base.out
    argv = ("--model", runs / "plain", "--data", cli.data_file(), "--no-generate", "--out", "e.json", *cli.ON_CPU)
    scored = cli.call("evaluate", *argv, cwd=tmp_path)
    assert scored.code == 0, scored.err
    loss = json.loads((tmp_path / "e.json").read_text())["figures"]["base"]["loss"]
    assert loss < metrics(runs / "plain")[0]["loss"] - 0.3
    adapter = cli.train("small", "--model", runs / "plain", cwd=tmp_path)
    assert adapter.code == 0, adapter.err


@pytest.mark.parametrize("script, argv", [("merge", ("--out", "merged")), ("generate", ("--prompt", "a"))])
def test_where_an_adapter_is_meant_the_error_says_that_it_is_a_model(runs, tmp_path, script, argv):
    done = cli.call(script, "--adapter", runs / "plain", *argv, cwd=tmp_path)
    [line] = done.errors
    assert done.code == 2 and "whole model" in line and "--model" in line


@pytest.mark.parametrize(
    "argv, names",
    [
        (("--rank", 4, "--dropout", 0.1, "--init-adapter", "x"), ("--rank", "--dropout", "--init-adapter")),
        (("--target", "all", "--alpha", 16, "--adapter-dtype", "float32"), ("--target", "--alpha", "--adapter-dtype")),
        (("--fsdp",), ("--fsdp",)),
    ],
)
def test_what_belongs_to_adapters_is_refused_in_one_line(tmp_path, argv, names):
    done = train("out", *argv, cwd=tmp_path)
    [line] = done.errors
    assert done.code == 2 and "contradiction" in line and all(name in line for name in ("--full", *names))
    assert not (tmp_path / "out").exists()


def test_the_settings_of_a_run_are_a_config_of_one(runs, tmp_path):
    saved = json.loads((runs / "plain" / "settings.json").read_text())
    assert saved["full"] is True and saved["rank"] is None
    done = cli.call("train", "--config", runs / "plain" / "settings.json", "--out", "again", cwd=tmp_path)
    assert done.code == 0, done.err
    assert metrics(tmp_path / "again") == metrics(runs / "plain")


@mutation(
    "lora/folders.py",
    "if path.resolve() in (source.resolve(), *source.resolve().parents):",
    "if path.resolve() == source.resolve():",
)
def test_overwrite_replaces_an_earlier_run_and_never_the_base(runs, tmp_path):
    shutil.copytree(runs / "plain", tmp_path / "out")
    (tmp_path / "out" / "model-00001-of-00002.safetensors").write_bytes(b"")
    before = cli.tree(tmp_path / "out")
    done = train("out", "--overwrite", "--model", "out/checkpoints/000005", cwd=tmp_path)
    assert done.code == 2 and "which is read" in done.errors[0] and cli.tree(tmp_path / "out") == before
    assert train("out", "--overwrite", "--seed", 1, cwd=tmp_path).code == 0
    after = cli.tree(tmp_path / "out")
    assert after["model.safetensors"] != before["model.safetensors"] and "model-00001-of-00002.safetensors" not in after


def kill_in_publishing() -> None:
    """Before its first weights are written; of several files some would be new and some old."""
    from lora import files

    publish = AllWeights.publish

    def watched(*given):
        files.write_safetensors = lambda *args, **more: os.kill(os.getpid(), signal.SIGKILL)
        publish(*given)

    AllWeights.publish = watched


@mutation(
    "lora/run/trainable.py",
    """        (out / "config.json").unlink(missing_ok=True)
""",
    "",
)
def test_a_result_that_was_half_replaced_when_it_was_killed_is_no_model(tmp_path):
    assert train("out", "--schedule", "constant", cwd=tmp_path).code == 0
    killed = cli.call("train", "--resume", "--out", "out", "--max-steps", 7, cwd=tmp_path, before=kill_in_publishing)
    assert killed.code == 128 + signal.SIGKILL
    done = cli.call("generate", "--model", "out", "--prompt", "hi", *cli.ON_CPU, cwd=tmp_path)
    assert done.code == 2 and "config.json" in done.errors[0]
    done = cli.call("train", "--resume", "--out", "out", cwd=tmp_path)
    assert done.code == 0, done.err
    assert cli.call("generate", "--model", "out", "--prompt", "hi", *cli.ON_CPU, cwd=tmp_path).code == 0


# ---- memory ----------------------------------------------------------------------------------------------------------


@mutation("lora/train/memory.py", "trained - sum(largest.values())", "trained - 2 * sum(largest.values())")
@mutation("lora/train/memory.py", " * (not args.full or size < 4)", "")
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_weights_masters_gradients_and_moments_are_counted_to_the_byte(dtype):
    model = tiny_model(F32)
    masters = AllWeights(model, dtype)
    optimizer = torch.optim.AdamW(masters.parameters.values(), fused=True)
    objective_of(model)(BATCHES[0]).backward()
    optimizer.step()
    moments = [m for state in optimizer.state.values() for m in state.values() if m.dim()]
    trained = list(masters.parameters.values())
    held = [*trained, *(p.grad for p in trained), *moments]
    held += [p.clone() for p in trained] + [p.clone() for p in trained]  # before and after the step
    own = {p.untyped_storage().data_ptr(): p.nbytes for p in (*held, *model.parameters())}
    found = memory.parts(*arguments([2], dtype=name_of(dtype), full=True, rank=0, adapter_dtype=None))
    assert found["copies at the step"] > 0
    assert sum(found.values()) - found["runtime"] - found["compiled kernels"] == pytest.approx(sum(own.values()))


@mutation("lora/run/adapter.py", "if not args.full:", "if args.init:")
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_what_is_counted_on_meta_is_to_the_byte_what_autograd_saves(dtype):
    shape, lengths = {"hidden_size": 48, "intermediate_size": 112, "head_dim": 8}, [90, 40, 1]
    model = tiny_model(F32, **shape).train()
    AllWeights(model, dtype)
    on_meta, *_ = arguments(shape=shape, dtype=name_of(dtype), full=True)
    assert sum(memory.saved_by_blocks(on_meta, tuple(lengths))) == saved_bytes(model, lengths)
