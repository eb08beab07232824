"""Micro-batches of one length, and blocks compiled for it: the same loss, gradients and counts; compiled once.

Here the compiler only traces: a backend that runs what it is given and counts. `test_parity_compile.py` makes code.
"""

import json

import pytest
import torch

from lora import device
from lora.adapter.inject import lora_layers
from lora.data import batch
from lora.errors import BadEnvironment
from lora.network.compiled import as_written, compile_blocks
from lora.run import compiling
from lora.train.step import accumulate, train_step
from tests.cli import ON_CPU, call, data_file, model_folder
from tests.helpers import close, far, objective_of, patched, random_example, tiny_model
from tests.mutation import mutation
from tests.network.test_families import family_config, model_of

TOL = 1e-11


STEP = [random_example(prompt, answer, answer) for prompt, answer in ((20, 5), (3, 7), (12, 26), (2, 40), (25, 2))]
OTHER = [random_example(prompt, answer, answer) for prompt, answer in ((9, 9), (30, 11), (4, 4), (4, 30))]
LONG = random_example(30, 300, 300)


@pytest.fixture
def model():
    return patched(tiny_model(num_hidden_layers=3)).train()


@pytest.fixture
def graphs():
    """What the tracing backend was given."""
    torch.compiler.reset()
    yield []
    torch.compiler.reset()


def compiled(model, graphs):
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_blocks(model, backend=backend, fullgraph=True)
    return model


def adapter(model) -> list[torch.nn.Parameter]:
    return [p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]


def loss_and_gradients(model, batches, seed=5) -> tuple[float, torch.Tensor]:
    for p in adapter(model):
        p.grad = None
    torch.manual_seed(seed)
    loss, _ = accumulate(objective_of(model), batches)
    return float(loss), torch.cat([p.grad.flatten() for p in adapter(model)])


def agree(got, wanted) -> bool:
    return abs(got[0] - wanted[0]) <= TOL * abs(wanted[0]) and close(got[1], wanted[1], TOL)


# ---- one length ------------------------------------------------------------------------------------------------------


@mutation("lora/data/batch.py", "[False] * (padding + 1)", "[True] * (padding + 1)")
@mutation("lora/data/batch.py", "    batch.padding = padding\n", "")
@pytest.mark.parametrize("size", [48, 64, 100, 1000])
def test_filled_micro_batches_have_one_length_and_change_neither_loss_nor_gradients_nor_counts(model, size):
    plain, filled = batch.micro_batches(STEP, size), batch.micro_batches(STEP, size, fill=True)
    assert len(plain) == len(filled) and any(b.padding for b in filled)
    assert {len(b.tokens) for b in filled} == {sum(b.lengths) for b in filled} == {size}
    assert agree(loss_and_gradients(model, filled), loss_and_gradients(model, plain))
    found = []
    for batches in (plain, filled):
        optimizer = torch.optim.SGD(adapter(model), lr=0.0)
        found.append(train_step(objective_of(model), batches, optimizer, 0.0))
    assert found[0].tokens == found[1].tokens == sum(len(e.tokens) - 1 for e in STEP)
    assert found[0].trained_tokens == found[1].trained_tokens == sum(sum(e.trained) for e in STEP)


def test_an_example_over_the_budget_is_filled_up_to_a_multiple():
    [first, last] = batch.micro_batches([random_example(3, 7, 7), LONG], 64, fill=True)
    assert (len(first.tokens), first.padding) == (64, 64 - 9)
    assert (len(last.tokens), last.padding) == (512, 512 - 329)


# ---- compiled --------------------------------------------------------------------------------------------------------


@mutation("lora/network/compiled.py", "            x.requires_grad_()", "            pass")
def test_one_compilation_serves_all_blocks_and_steps_and_changes_nothing(model, graphs):
    first, second = (batch.micro_batches(step, 64, fill=True) for step in (STEP, OTHER))
    plain = [loss_and_gradients(model, batches) for batches in (first, second)]
    assert far(plain[0][1], plain[1][1], TOL)
    compiled(model, graphs)
    assert agree(loss_and_gradients(model, first), plain[0])
    assert len(graphs) == 2  # before attention and after it
    assert agree(loss_and_gradients(model, second), plain[1])
    assert len(graphs) == 2


@mutation("lora/network/compiled.py", "output(*found)), alpha=block.multiplier)", "output(*found)))", case="granite")
@pytest.mark.parametrize(
    "kind",
    ["smollm3", "gemma3_text", "granite", "granitemoehybrid", "olmo3", "exaone4", "hunyuan_v1_dense", "ministral3",
     "qwen3_5_text", "lfm2"],
)  # fmt: skip
def test_blocks_of_other_families_are_compiled_to_the_same(kind, graphs):
    """Some layers without RoPE; two RoPEs, windows; norms before, after, of projections, heads and what is turned;
    multipliers, biases, other names; Gated DeltaNet and gates; short convolutions."""
    model = patched(model_of(family_config(kind, 1) | {"vocab_size": 131})).train()
    batches = [batch.collate(STEP[:3])]
    wanted = loss_and_gradients(model, batches)
    assert agree(loss_and_gradients(compiled(model, graphs), batches), wanted)
    assert graphs


@mutation("lora/network/compiled.py", 'model.device.type == "cpu" or None', "None")
def test_on_a_cpu_one_compilation_serves_every_length(model, graphs):
    lengths = [batch.micro_batches([random_example(1, n, n)], 1) for n in (40, 90, 140)]
    plain = [loss_and_gradients(model, batches) for batches in lengths]
    compiled(model, graphs)
    for batches, wanted in zip(lengths, plain, strict=True):
        assert agree(loss_and_gradients(model, batches), wanted)
        assert len(graphs) == 2


def test_taken_back_blocks_run_as_written(model, graphs):
    batches = batch.micro_batches(STEP, 1000)
    wanted = loss_and_gradients(model, batches)
    as_written(compiled(model, graphs))
    found = loss_and_gradients(model, batches)
    assert found[0] == wanted[0] and torch.equal(found[1], wanted[1]) and not graphs


@mutation("lora/network/compiled.py", "if cache is not None or not torch.is_grad_enabled():", "if cache is not None:")
@torch.no_grad()
def test_evaluations_and_answers_run_as_written(model, graphs):
    [b] = batch.micro_batches(STEP, 1000)
    wanted = model.trunk(b.tokens, b.lengths)
    compiled(model, graphs)
    assert torch.equal(model.trunk(b.tokens, b.lengths), wanted)
    cache = model.new_cache(len(b.lengths), max(b.lengths))
    assert close(model.trunk(b.tokens, b.lengths, cache=cache), wanted, TOL)
    assert not graphs


@pytest.mark.parametrize("way", ["checkpointed", "dropout", "some layers"])
def test_compiled_with_what_else_there_is(graphs, way):
    targets = ("all",) if way != "some layers" else ("re:model.layers.[02].(self_attn.q_proj|mlp.*)",)
    model = patched(tiny_model(num_hidden_layers=3), dropout=0.3 * (way == "dropout"), targets=targets).train()
    batches = batch.micro_batches(STEP, 64, fill=True)
    wanted = loss_and_gradients(model, batches)
    model.checkpoint_activations = way == "checkpointed"
    assert agree(loss_and_gradients(compiled(model, graphs), batches), wanted)
    assert len(graphs) == (4 if way == "some layers" else 2)


@mutation(
    "lora/ops/__init__.py",
    "        return checkpoint(formula, *inputs, use_reentrant=False)",
    "        return formula(*inputs)",
)
def test_what_is_cheap_to_form_again_is_not_kept(graphs):
    """A graph marks it: the two norms, and the product of gate and up."""
    model = compiled(patched(tiny_model()).train(), graphs)
    loss_and_gradients(model, batch.micro_batches(STEP, 64, fill=True))
    marked = [sum("checkpoint" in str(node.target) for node in graph.graph.nodes) for graph in graphs]
    assert sorted(marked) == [1, 2]


# ---- the command -----------------------------------------------------------------------------------------------------


def traced_only():
    """The compiler makes no code, which would take half a minute."""
    compile_ = torch.compile
    torch.compile = lambda function, **options: compile_(function, **{**options, "backend": "eager"})


def losses(folder) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_a_compiled_run_says_that_it_takes_time_and_learns_the_same(tmp_path):
    same = ("--model", model_folder(), "--data", data_file(), "--max-steps", 3, "--micro-tokens", 128, *ON_CPU)
    plain = call("train", *same, "--out", "plain", cwd=tmp_path)
    done = call("train", *same, "--out", "compiled", "--compile", cwd=tmp_path, before=traced_only)
    assert (plain.code, done.code) == (0, 0), done.err
    assert "compile  making code for the blocks" in done.err and "compile  done in" in done.err
    assert "compile  " not in plain.err
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    again = call("train", "--resume", "--out", "plain", "--max-steps", 4, "--schedule", "constant", cwd=tmp_path)
    assert "--schedule" in again.err  # which is compared; whether blocks are compiled is not


def long_runs() -> None:
    """A few steps are a long run, and nothing is made for one length alone."""
    compiling.WORTH = 1.0
    batch.filled = None
    traced_only()


def broken_compiler() -> None:
    long_runs()

    def compile_(function, **options):
        def fail(*args):
            raise RuntimeError("CppCompileError: no such thing\nand more of it")

        return fail

    torch.compile = compile_


SHORT_RUN = ("--data", data_file(), "--max-steps", 2, "--micro-tokens", 128, *ON_CPU)


@mutation("lora/run/plan.py", 'fill = args.compile and args.device != "cpu"', "fill = args.compile")
@mutation("lora/run/compiling.py", "plainly = args.no_compile or", "plainly =")
def test_a_long_run_on_a_cpu_is_compiled_unasked_unless_it_is_told_not_to(tmp_path):
    same = ("--model", model_folder(), *SHORT_RUN)
    for more, makes in ((), True), (("--no-compile",), False), (("--plain",), False), (("--dropout", "0.1"), False):
        done = call("train", *same, *more, "--out", "run", "--overwrite", cwd=tmp_path, before=long_runs)
        assert done.code == 0 and ("compile  done in" in done.err) is makes, done.err
    assert "compile  " not in call("train", *same, "--out", "short", cwd=tmp_path, before=traced_only).err


@mutation("lora/run/compiling.py", "        as_written(model)\n", "")
@mutation("lora/run/compiling.py", "        if asked:\n", "        if True:\n")
def test_where_the_compiler_fails_a_run_that_did_not_ask_goes_on_as_written(tmp_path):
    same = ("--model", model_folder(), *SHORT_RUN)
    done = call("train", *same, "--out", "run", cwd=tmp_path, before=broken_compiler)
    assert done.code == 0, done.err
    assert "note: the blocks are not compiled: RuntimeError: CppCompileError: no such thing." in done.err
    assert "and more of it" not in done.err
    plain = call("train", *same, "--out", "plain", "--no-compile", cwd=tmp_path)
    assert plain.code == 0 and losses(tmp_path / "run") == losses(tmp_path / "plain")
    asked = call("train", *same, "--out", "asked", "--compile", cwd=tmp_path, before=broken_compiler)
    assert asked.code == 3 and "error: no compiled blocks in this environment: RuntimeError" in asked.err


def test_compile_and_fsdp_are_refused_together(tmp_path):
    done = call("train", "--model", model_folder(), "--compile", "--fsdp", cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    assert done.err.strip() == "error: contradiction in the command line: --compile and --fsdp. Leave out one of them"


def test_without_a_compiler_one_line_says_so(tmp_path):
    env = {"PATH": str(tmp_path), "CXX": ""}
    done = call("train", "--model", model_folder(), "--compile", *ON_CPU, cwd=tmp_path, env=env)
    assert done.code == 3 and done.err.startswith("error: no C++ compiler in this environment: --compile calls ")
    assert done.err.count("\n") == 1


def test_a_gpu_needs_a_c_compiler_only(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "")
    with pytest.raises(BadEnvironment, match="no C compiler in this environment: --compile calls gcc"):
        device.check_compiler(torch.device("cuda"))
    (tmp_path / "clang").touch(0o755)
    device.check_compiler(torch.device("cuda"))
