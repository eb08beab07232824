"""A run on a packed base: of every method it is the run on a folder that holds the numbers, killed it goes on bit for
bit, and its adapter knows the packing."""

import json
import shutil

import pytest
import torch

from lora import pretrained
from lora.files import write_tensors
from tests import cli
from tests.methods.linked import data_of, rewarded
from tests.mutation import mutation
from tests.run.test_resume import EVALUATED, go_on, kill_before_step, metrics, ordinary
from tests.run.test_resume import result as whole_result
from tests.run.test_resume import train as long_run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By the name of a packing a folder of what that makes of the base, in float32."""
    found = {}
    for quant in ("nf4", "int8"):
        folder = cli.write_model(tmp_path_factory.mktemp(quant) / "model")
        base = pretrained.find(str(folder), quant)
        numbers = {name: base.read(name, torch.float32) for name in base.header}
        write_tensors(folder / "model.safetensors", numbers, {"format": "pt"})
        found[quant] = folder
    return found


def result(out) -> tuple:
    return metrics(out), {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


METHODS = {"sft": (), "dpo": (), "kto": (), "reward": (), "grpo": ("--kl", 0.1), "rloo": (), "ppo": ()}


@mutation("train.py", "load_model(plan.base, base_dtype(args)", "load_model(plan.base.original, base_dtype(args)",
          case="sft")  # fmt: skip
@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_every_method_is_the_run_on_the_numbers(tmp_path, folders, method):
    how = ("--method", method, "--data", data_of(method), "--max-steps", 2, "--batch-size", 3, "--micro-tokens", 60)
    how = (*how, *METHODS[method], *rewarded(method), "--eval-fraction", 0.3, "--retention", ordinary())
    one = cli.train("one", *how, "--quant", "nf4", cwd=tmp_path)
    other = cli.train("other", *how, "--model", folders["nf4"], cwd=tmp_path)
    assert one.code == other.code == 0, one.err + other.err
    assert result(tmp_path / "one") == result(tmp_path / "other")
    assert len(result(tmp_path / "one")[0]) >= 2


def test_an_int8_run_is_the_run_on_the_numbers(tmp_path, folders):
    assert cli.train("one", "--quant", "int8", "--dora", cwd=tmp_path).code == 0
    assert cli.train("other", "--model", folders["int8"], "--dora", cwd=tmp_path).code == 0
    assert result(tmp_path / "one") == result(tmp_path / "other")


# ---- resuming --------------------------------------------------------------------------------------------------------


def packed(quant: str) -> tuple:
    return ("--quant", quant, "--model", cli.gguf_file("Q8_0") if quant == "keep" else cli.model_folder())


@pytest.mark.parametrize("quant", ["nf4", "int8", "keep"])
def test_a_killed_run_on_a_packed_base_goes_on_bit_for_bit(tmp_path, quant):
    how = (*packed(quant), *EVALUATED)
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    done = long_run("out", *how, cwd=tmp_path / "a")
    assert done.code == 0, done.err
    assert long_run("out", *how, cwd=tmp_path / "b", before=kill_before_step(6)).code == 137
    done = go_on(cwd=tmp_path / "b")
    assert done.code == 0, done.err
    assert whole_result(tmp_path / "a/out") == whole_result(tmp_path / "b/out")
    assert json.loads((tmp_path / "b/out/passport.json").read_text())["base"]["quant"] == quant


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs that are done, by what their bases were packed in."""
    folder = tmp_path_factory.mktemp("runs")
    for name, argv in {
        "nf4": packed("nf4"),
        "none": (),
        "keep": packed("keep"),
        "gguf": ("--model", cli.gguf_file("Q8_0")),
    }.items():
        done = cli.train(name, *argv, cwd=folder)
        assert done.code == 0, done.err
    return folder


@mutation("lora/run/settings.py", 'as it was trained", one_of("none", *QUANT))',
          'as it was trained", one_of("none", *QUANT), free=True)', case="nf4-int8")  # fmt: skip
@pytest.mark.parametrize(
    ("run", "given", "line"),
    [
        ("nf4", "int8", "int8, the run has nf4"),
        ("nf4", "none", "None, the run has nf4"),
        ("none", "nf4", "nf4, the run has None"),
    ],
    ids=["nf4-int8", "nf4-none", "none-nf4"],
)  # fmt: skip
def test_a_run_goes_on_in_its_own_packing_alone(tmp_path, runs, run, given, line):
    shutil.copytree(runs / run, tmp_path / "out")
    done = go_on("--quant", given, cwd=tmp_path)
    assert done.code == 2
    assert done.errors == [f"error: changed --quant in the command line: {line}. Leave it out, or start a new run"]


@pytest.mark.parametrize("argv", [("--quant", "none"), ()])
def test_a_run_without_packing_goes_on_whether_that_is_said_or_not(tmp_path, runs, argv):
    shutil.copytree(runs / "none", tmp_path / "out")
    assert go_on(*argv, cwd=tmp_path).code == 0


# ---- an adapter and its packing --------------------------------------------------------------------------------------


@mutation("lora/adapter/passport.py", "quant = asked or (quant_of(folder) if folder else None)", "quant = asked")
def test_a_run_that_begins_with_an_adapter_takes_over_its_packing(tmp_path, runs):
    done = cli.train("out", "--init-adapter", runs / "nf4", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "Linears in nf4" in done.err
    assert json.loads((tmp_path / "out/settings.json").read_text())["quant"] == "nf4"
    assert json.loads((tmp_path / "out/passport.json").read_text())["base"]["quant"] == "nf4"


WRONG = {  # adapter, what is given, how its training and this base are called, the fix
    ("nf4", "none"): ("nf4", "16 bit", "nf4"),
    ("nf4", "int8"): ("nf4", "int8", "nf4"),
    ("none", "nf4"): ("16 bit", "nf4", "none"),
}


@mutation("lora/adapter/passport.py", "same_structure and numbers(its.get(\"quant\")) != numbers(base.quant)",
          "False", case="nf4-none")  # fmt: skip
@pytest.mark.parametrize(("adapter", "quant"), WRONG, ids=map("-".join, WRONG))
def test_an_adapter_on_another_packing_is_told_apart_by_every_command_unless_insisted(tmp_path, runs, adapter, quant):
    its, this, fix = WRONG[adapter, quant]
    where = runs / adapter
    for call in (
        lambda *argv: cli.train("out", "--init-adapter", where, *argv, cwd=tmp_path),
        lambda *argv: cli.ask("--adapter", where, "--prompt", "hi", *argv, cwd=tmp_path),
    ):
        done = call("--quant", quant)
        assert done.code == 2 and len(done.errors) == 1
        model = cli.model_folder()
        why = f"the adapter was trained on {model} in {its}, this is {model} in {this}"
        assert done.errors[0].startswith(f"error: wrong base in {where}/passport.json: {why}. Give --quant {fix}, or -")
        assert call("--quant", quant, "--no-verify").code == 0


@mutation("lora/adapter/passport.py", 'return None if quant == "keep" else quant', "return quant", case="gguf-keep")
@pytest.mark.parametrize(("adapter", "quant"), [("keep", "none"), ("gguf", "keep")], ids=["keep-none", "gguf-keep"])
def test_blocks_that_are_kept_are_the_same_base_as_their_numbers(tmp_path, runs, adapter, quant):
    answers = [cli.ask("--adapter", runs / adapter, "--prompt", "hi", *argv, cwd=tmp_path)
               for argv in ((), ("--quant", quant))]  # fmt: skip
    assert [done.code for done in answers] == [0, 0] and answers[0].out == answers[1].out
