"""A run that was killed, stopped or failed goes on bit for bit; what decides the result must be as it was; one run a
folder."""

import errno
import json
import os
import re
import shutil
import signal
import sys

import pytest
import torch

from lora import folders
from lora.adapter import value_head
from lora.errors import BadEnvironment
from lora.run.settings import TrainSettings
from lora.train import run_state, stopping
from tests import cli
from tests.methods.linked import SAMPLING, data_of, rewarded
from tests.mutation import mutation

STEPS = 9
WHOLE = ("--max-steps", STEPS, "--batch-size", 3, "--dropout", 0.2, "--micro-tokens", 40, "--save-every", 2)
TIMES = ("seconds", "tokens_per_second")


def kill_before_step(step):
    """SIGKILL to itself when a step begins: in 4 steps an epoch of 10 rows ends."""

    def before():
        train, calls = sys.modules["train"], [0]
        whole = train.train_step

        def counted(*args, **kwargs):
            calls[0] += 1
            if calls[0] == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*args, **kwargs)

        train.train_step = counted

    return before


def kill_in_accumulation(step):
    """SIGKILL after the first of a step's micro-batches."""

    def before():
        from lora.train import step as module

        calls, whole = [0], module.accumulate

        def first_only(objective, batches, count=None):
            calls[0] += 1
            if calls[0] < step:
                return whole(objective, batches, count)
            assert len(batches) > 1
            objective(batches[0]).backward()
            os.kill(os.getpid(), signal.SIGKILL)

        module.accumulate = first_only

    return before


def metrics(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def result(out, step=STEPS):
    """Everything that must be equal: losses, norms, rates and evaluations as written, adapter and moments as bytes."""
    last = run_state.at(out, step)
    paths = (out / "adapter_model.safetensors", last / "adapter_model.safetensors", last / run_state.OPTIMIZER)
    return metrics(out), [path.read_bytes() for path in paths], (out / "settings.json").read_text()


def train(out, *argv, cwd, **how):
    return cli.train(out, *WHOLE, *argv, cwd=cwd, **how)


def go_on(*argv, cwd, out="out", **how):
    """Nothing but --resume and the folder: the run's own settings stand."""
    return cli.call("train", "--resume", "--out", out, *argv, cwd=cwd, **how)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    done = train("out", cwd=folder)
    assert done.code == 0, done.err
    return folder / "out"


def copy_of(run, to, step):
    """As if the run had been killed after `step`, which has a checkpoint."""
    shutil.copytree(run, to)
    for later in run_state.steps(to):
        if later > step:
            shutil.rmtree(run_state.at(to, later))


KILLS = {
    "the end of an epoch": kill_before_step(4),
    "after a save": kill_before_step(5),
    "in an accumulation": kill_in_accumulation(6),
    "the last step": kill_before_step(9),
}


@mutation("train.py", "        run_state.load_optimizer(resumed.path, optimizer, trainable.parameters)", "        pass")
@mutation(
    "train.py",
    "            torch.manual_seed(run_state.dropout_seed(args.seed, state.step, processes.rank))",
    "            pass",
)
@mutation("train.py", "islice(plan.steps(args), state.step, None)", "plan.steps(args)")
@mutation(
    "train.py",
    "    if start:  # until here the model was the base",
    "    if args.init_adapter:",
)
@mutation("lora/train/record.py", ".splitlines()[:count]", ".splitlines()")
@pytest.mark.parametrize("kill", KILLS.values(), ids=KILLS)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, whole, kill):
    assert train("out", cwd=tmp_path, before=kill).code == 128 + signal.SIGKILL
    done = go_on(cwd=tmp_path)
    assert done.code == 0, done.err
    assert result(tmp_path / "out") == result(whole)
    assert sorted(cli.tree(tmp_path / "out")) == cli.run_tree(8, 9)


def test_killed_again_and_again_with_all_flags_typed_again_it_is_the_same_run(tmp_path, whole):
    assert train("out", cwd=tmp_path, before=kill_before_step(3)).code == 137
    for _ in range(2):
        assert train("out", "--resume", cwd=tmp_path, before=kill_before_step(3)).code == 137
    assert run_state.steps(tmp_path / "out") == [4, 6]
    assert train("out", "--resume", cwd=tmp_path).code == 0
    assert result(tmp_path / "out") == result(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, whole, number):
    def stop_in_step_5():
        module, calls = sys.modules["train"], [0]
        step = module.train_step

        def counted(*args, **kwargs):
            calls[0] += 1
            if calls[0] == 5:
                os.kill(os.getpid(), number)
            return step(*args, **kwargs)

        module.train_step = counted

    done = train("out", cwd=tmp_path, before=stop_in_step_5)
    assert done.code == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert "stopped after step 5 of 9" in done.err and "Go on with: python train.py --resume --out out" in done.err
    assert json.loads((tmp_path / "out/settings.json").read_text())["ended"] == "stopped by a signal after step 5"
    assert run_state.newest(tmp_path / "out") == (tmp_path / "out/checkpoints/000005", [])
    assert cli.ask("--adapter", "out", "--prompt", "hi", cwd=tmp_path).code == 0
    assert cli.ask("--adapter", "out/checkpoints/000005", "--prompt", "hi", cwd=tmp_path).code == 0
    assert go_on(cwd=tmp_path).code == 0
    assert result(tmp_path / "out") == result(whole)


def test_going_on_with_a_run_that_is_done_changes_nothing(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "out")
    before = cli.tree(tmp_path / "out")
    done = go_on(cwd=tmp_path)
    assert done.code == 0
    after = cli.tree(tmp_path / "out")
    assert {path for path in before if before[path] != after[path]} <= {"loss.png"}


def ordinary():
    """A few conversations for the meter; those that ship with the project take a tiny model long."""
    path = cli.scratch() / "ordinary.jsonl"
    path.write_text(cli.rows([[("user", f"Name {n} birds."), ("assistant", "Owl, " * n)] for n in range(2, 6)]))
    return path


EVALUATED = ("--eval-fraction", 0.3, "--eval-every", 2, "--retention", ordinary())


def test_a_run_with_evaluations_goes_on_bit_for_bit_with_its_best_adapter(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    done = train("out", *EVALUATED, cwd=tmp_path / "a")
    assert done.code == 0, done.err
    assert train("out", *EVALUATED, cwd=tmp_path / "b", before=kill_before_step(8)).code == 137
    done = go_on(cwd=tmp_path / "b")
    assert done.code == 0, done.err
    one, other = tmp_path / "a/out", tmp_path / "b/out"
    assert result(one) == result(other)
    rows = [row for row in metrics(one) if "eval_loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 8, 9]
    best = min(rows[1:], key=lambda row: row["eval_loss"])["step"]
    adapter = "adapter_model.safetensors"
    assert (one / adapter).read_bytes() == (run_state.at(one, best) / adapter).read_bytes()
    assert f"best     step {best}" in done.err and best in run_state.steps(one)


LOSSES = {"dpo": (), "kto": ("--bad-weight", 0.8), "reward": ("--center", 0.01), "grpo": ("--kl", 0.1),
          "rloo": ("--temperature", 1.5), "ppo": ("--kl-target", 0.5, "--kl-horizon", 50)}  # fmt: skip
HEADS = ("reward", "ppo")


@mutation(
    "lora/adapter/store.py",
    """    value_head.restore(model, folder)
""",
    "",
    case="reward",
)
@mutation(
    "train.py", "        plan.reference = reference.of_step_0(", "        resumed or reference.of_step_0(", case="dpo"
)
@mutation("train.py", "Objective(plan.method, model, args, state.carried)", "Objective(plan.method, model, args, {})",
          case="ppo")  # fmt: skip
@mutation(
    "lora/inference/rollout.py", 'name = f"{seed}/step', "name = f\"{__import__('os').getpid()}/step", case="grpo"
)
@pytest.mark.parametrize("method", LOSSES)
def test_a_killed_run_of_every_method_goes_on_bit_for_bit_with_its_evaluations(tmp_path, method):
    how = ("--method", method, "--data", data_of(method), "--micro-tokens", 90, *LOSSES[method], *EVALUATED)
    how = (*how, *rewarded(method))
    place = 5 if method != "ppo" else 18  # the second of four updates in step 5
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    done = train("out", *how, cwd=tmp_path / "a")
    assert done.code == 0, done.err
    assert train("out", *how, cwd=tmp_path / "b", before=kill_in_accumulation(place)).code == 137
    done = go_on(cwd=tmp_path / "b")
    assert done.code == 0, done.err
    one, other = tmp_path / "a/out", tmp_path / "b/out"
    assert result(one) == result(other)
    name = "reward_vowels" if method in SAMPLING else "accuracy"
    assert any(name in row for row in metrics(one)) and any(f"eval_{name}" in row for row in metrics(one))
    if method in HEADS:
        names = (value_head.FILE, f"checkpoints/{STEPS:06d}/{value_head.FILE}")
        assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_evaluating_and_sampling_do_not_change_the_curve(tmp_path):
    curves = []
    for name, argv in (
        ("plain", ()),
        ("examined", ("--eval-data", cli.data_file(), "--eval-every", 1, "--retention", ordinary())),
    ):
        done = train(name, *argv, cwd=tmp_path)
        assert done.code == 0, done.err
        curves.append([row for row in metrics(tmp_path / name) if "loss" in row])
        last = run_state.at(tmp_path / name, STEPS)
        curves[-1].append((last / "adapter_model.safetensors").read_bytes())
    assert curves[0] == curves[1]


@mutation(
    "lora/run/evaluator.py",
    "        return self.wanted and on_time and all(",
    "        return self.wanted and on_time and not state.rows and all(",
)
def test_a_signal_in_an_evaluation_ends_it_and_the_run_goes_on_bit_for_bit(tmp_path):
    def stop_in_evaluation():
        from lora.run import evaluator

        measure, calls = evaluator.measure, [0]

        def counted(*args):
            calls[0] += 1
            if calls[0] == 3:  # that of step 4
                os.kill(os.getpid(), signal.SIGTERM)
            return measure(*args)

        evaluator.measure = counted

    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    assert train("out", *EVALUATED, cwd=tmp_path / "a").code == 0
    assert train("out", *EVALUATED, cwd=tmp_path / "b", before=stop_in_evaluation).code == 143
    assert [row["step"] for row in metrics(tmp_path / "b/out") if "eval_loss" in row] == [0, 2]
    assert go_on(cwd=tmp_path / "b").code == 0
    assert result(tmp_path / "a/out") == result(tmp_path / "b/out")


# ---- which checkpoint ------------------------------------------------------------------------------------------------


@mutation("lora/train/run_state.py", 'if files.sha256(path / name) != seal.get("sha256"):', "if False:")
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(tmp_path, whole):
    copy_of(whole, tmp_path / "out", 9)
    data = (tmp_path / "out/checkpoints/000009/optimizer.safetensors").read_bytes()
    (tmp_path / "out/checkpoints/000009/optimizer.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    done = go_on(cwd=tmp_path)
    assert done.code == 0, done.err
    assert "passed over out/checkpoints/000009: optimizer.safetensors is not what was written (sha256)" in done.err
    assert "resume   out/checkpoints/000008, step 8 of 9" in done.err
    assert result(tmp_path / "out") == result(whole)


def test_a_named_checkpoint_is_gone_on_with_and_later_ones_stay_until_it_has_saved(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "out")
    before = cli.tree(tmp_path / "out")
    for how in ({"before": kill_before_step(1)}, {"before": stop_before_a_step}):
        done = cli.call("train", "--resume", "out/checkpoints/000008", cwd=tmp_path, **how)
        assert done.code in (137, 143), done.err
        assert cli.tree(tmp_path / "out") == before  # whoever makes no step loses nothing
        (tmp_path / ".out.lock").unlink(missing_ok=True)
    for named in ("out/checkpoints/000008/", tmp_path / "link"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(tmp_path / "out/checkpoints/000008")
        assert cli.call("train", "--resume", named, "--save-every", 99, cwd=tmp_path).code == 0
        assert result(tmp_path / "out")[:2] == result(whole)[:2]


def stop_before_a_step():
    train = sys.modules["train"]
    results = train.Results

    def stopped(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return results(*args)

    stop = train.StopFlag
    train.StopFlag = lambda: setattr(train, "Results", stopped) or stop()


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (("--out", "none"), r"no checkpoint in none: there is no folder in none/checkpoints"),
        (("--out", "empty"), r"no checkpoint in empty: "),
        (("--out", "damaged"), r"no checkpoint in damaged: damaged/checkpoints/000002: .*MANIFEST\.json"),
        (("--resume", "damaged/checkpoints/000002"), r"broken checkpoint in damaged/checkpoints/000002: "),
        ((), r"no run in weights/self-introduction: there is nothing to resume"),
        (("--data", "x.jsonl"), r"no run in weights/x: there is nothing to resume"),
        (("--out", "other", "--resume", "out"), r"contradiction in the command line: --out other, and --resume out"),
        (("--out", "out", "--overwrite"), r"contradiction in the command line: --resume and --overwrite"),
    ],
)
def test_without_a_checkpoint_to_believe_it_ends_with_2_and_changes_nothing(tmp_path, whole, argv, line):
    (tmp_path / "empty").mkdir()
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "damaged/checkpoints/000002").mkdir(parents=True)
    before = cli.tree(tmp_path)
    done = cli.call("train", *(() if "--resume" in argv else ("--resume",)), *argv, cwd=tmp_path)
    assert done.code == 2 and re.search(f"error: {line}", done.err), done.err
    assert cli.tree(tmp_path) == before


def test_a_kill_before_the_first_checkpoint_leaves_a_folder_that_a_new_run_may_replace(tmp_path):
    assert train("out", cwd=tmp_path, before=kill_before_step(2)).code == 137
    assert go_on(cwd=tmp_path).code == 2
    assert train("out", cwd=tmp_path).code == 2
    assert train("out", "--overwrite", cwd=tmp_path).code == 0


def without(key):
    return lambda row: {name: value for name, value in row.items() if name != key}


@pytest.mark.parametrize(
    "edit",
    [
        None,
        without("grad_norm"),
        without("seconds"),
        lambda row: row | {"lr": "0.1"},
        lambda row: row | {"loss": True},
        lambda row: row | {"eval_loss": []},
        lambda row: {"step": 1, "seconds": 1.0},
        lambda row: [row],
    ],
    ids=["lost", "no norm", "no seconds", "a text", "a truth", "a list", "neither step nor evaluation", "no object"],
)
@mutation("lora/train/record.py", "for name in {*NUMBERS[kind], *others})", "for name in others)", case="no norm")
@mutation("lora/train/record.py", "for name in {*NUMBERS[kind], *others})", "for name in NUMBERS[kind])", case="a list")
@mutation("lora/train/record.py", "not all(map(is_row, rows))", "False", case="no seconds")
def test_metrics_that_were_lost_or_edited_do_not_stop_a_run(tmp_path, whole, edit):
    copy_of(whole, tmp_path / "out", 8)
    path = tmp_path / "out/metrics.jsonl"
    lines = path.read_text().splitlines()
    path.unlink()
    if edit:
        lines[3] = json.dumps(edit(json.loads(lines[3])))
        path.write_text("\n".join(lines) + "\n")
    done = go_on(cwd=tmp_path)
    assert done.code == 0 and "it begins anew" in done.err
    assert metrics(tmp_path / "out") == metrics(whole)[8:]
    assert result(tmp_path / "out")[1] == result(whole)[1]


# ---- what must be as it was ------------------------------------------------------------------------------------------

IDENTITY = [  # a flag, and another value than the run has
    ("--rank", 5), ("--alpha", 3), ("--dropout", 0.3), ("--lr", 0.01), ("--batch-size", 4), ("--seed", 1),
    ("--micro-tokens", 64), ("--warmup", 3), ("--schedule", "linear"), ("--weight-decay", 0.1), ("--clip", 2),
    ("--target", "attention"), ("--train-on", "last"), ("--overlong", "error"), ("--max-len", 200),
    ("--system", "Be kind."), ("--template", "plain"), ("--date", "2025-02-01"), ("--adapter-dtype", "bfloat16"),
    ("--dtype", "bfloat16"), ("--eval-fraction", 0.5), ("--layers", "0"), ("--rank-pattern", "q_proj=3"),
    ("--alpha-pattern", "q_proj=3"), ("--init", "gaussian"), ("--lr-ratio-b", 4), ("--rslora",), ("--dora",),
    ("--leading-answers", "drop"), ("--control-tokens",),
]  # fmt: skip


SWITCH = ("--template-arg", "enable_thinking=false")  # one more, which this template does not read
OF_METHODS = [  # each by itself: some contradict each other
    ("--method", "dpo"), ("--loss", "ipo"), ("--beta", 0.2), ("--label-smoothing", 0.2), ("--sft-weight", 0.1),
    ("--margin", 0.5), ("--good-weight", 1.2), ("--bad-weight", 1.2), ("--center", 0.01),
    ("--reward", "length:5"), ("--group", 4), ("--temperature", 1.5), ("--max-new-tokens", 5), ("--kl", 0.2),
    ("--epsilon", 0.1), ("--epsilon-high", 0.3), ("--scale", "none"), ("--updates", 2), ("--gamma", 0.9),
    ("--lam", 0.9), ("--value-weight", 0.5), ("--value-clip", 0.1), ("--whiten-rewards",), ("--kl-target", 6),
    ("--kl-horizon", 100), ("--no-end-penalty", 1), ("--quant", "int8"),
]  # fmt: skip


def test_every_setting_that_decides_what_is_learned_is_tried():
    tried = {flag.removeprefix("--").replace("-", "_") for flag, *_ in [*IDENTITY, *OF_METHODS, SWITCH]}
    # these change nothing here by themselves
    alone = {"prompt_key", "response_key", "no_system", "init_adapter", "no_verify", "full"}
    assert tried | alone == {one.name for one in TrainSettings.flags().values() if one.decisive}


def test_all_changed_settings_are_named_at_once_and_nothing_is_touched(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "out")
    before = cli.tree(tmp_path)
    done = go_on(*(word for pair in IDENTITY for word in pair), cwd=tmp_path)
    assert done.code == 2
    lines = "\n".join(done.errors)
    shown = [flag for flag, *_ in IDENTITY if f"changed {flag} in the command line" in lines]
    assert len(done.errors) == 21 and len(shown) == 20 and "and 10 more" in lines  # not the data: flags changed them
    assert cli.tree(tmp_path) == before


@mutation("lora/settings.py", "if known[name] != value]", "if known[name] != value and isinstance(value, str)]")
@pytest.mark.parametrize("words", [*IDENTITY, *OF_METHODS, SWITCH], ids=lambda words: words[0])
def test_a_changed_setting_is_named(words):
    args = TrainSettings.resolve([str(word) for word in words], "")
    old = TrainSettings.resolve([], "").to_save()
    name = words[0].removeprefix("--").replace("-", "_")
    assert args.changed(old) == [name]


@pytest.mark.parametrize(
    ("method", "words", "was"),
    [("dpo", ("--beta", 0.3), "0.1"), ("dpo", ("--loss", "simpo"), "sigmoid"), ("kto", ("--good-weight", 2), "1.0"),
     ("reward", ("--margin", 1), "0.0"), ("grpo", ("--group", 8), "4"), ("rloo", ("--kl", 0), "0.05"),
     ("ppo", ("--updates", 2), "4")],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else value,
)  # fmt: skip
def test_a_run_of_another_method_goes_on_with_its_own_settings_or_not_at_all(tmp_path, method, words, was):
    how = ("--method", method, "--data", data_of(method), "--max-steps", 3, *rewarded(method))
    updates = 4 if method == "ppo" else 1
    done = train("out", *how, cwd=tmp_path, before=kill_before_step(3 * updates))
    assert done.code == 137, done.err
    (tmp_path / ".out.lock").unlink()
    before = cli.tree(tmp_path)
    done = go_on(*words, cwd=tmp_path)
    [line] = done.errors
    assert done.code == 2 and f"changed {words[0]} in the command line: " in line and f"the run has {was}." in line
    assert cli.tree(tmp_path) == before


@mutation("lora/run/resume.py", "if plan.data_fingerprint != old.data and", "if False and")
def test_other_data_and_another_base_are_refused_by_their_content(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "same.jsonl").write_bytes(cli.data_file().read_bytes())
    (tmp_path / "other.jsonl").write_text(cli.data_file().read_text().replace("It is", "That is", 1))
    other = cli.write_model(tmp_path / "model", seed=1)
    done = go_on("--data", "other.jsonl", "--model", other, cwd=tmp_path)
    assert done.code == 2 and len(done.errors) == 2
    assert "changed --data in other.jsonl" in done.err and f"changed --model in {other}" in done.err
    shutil.copytree(cli.model_folder(), tmp_path / "moved")
    done = go_on("--data", "same.jsonl", "--model", "moved", cwd=tmp_path)
    assert done.code == 0, done.err


@mutation(
    "lora/adapter/passport.py",
    "{contents(read, header)}",
    "{contents(read, [name for name in header if 'proj' in name])}",
)
def test_one_value_of_the_base_that_no_adapter_touches_is_noticed(tmp_path, whole):
    from safetensors.torch import load_file, save_file

    shutil.copytree(whole, tmp_path / "out")
    shutil.copytree(cli.model_folder(), tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors["model.norm.weight"][3] *= 2
    save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    assert "changed --model" in go_on("--model", "model", cwd=tmp_path).err


def test_saving_evaluation_and_keeping_may_change_and_the_result_is_the_same(tmp_path, whole):
    copy_of(whole, tmp_path / "out", 8)
    held_out = ("--eval-data", cli.data_file(), "--eval-every", 3, "--retention", ordinary())
    done = go_on("--save-every", "10min", "--keep", 5, *held_out, cwd=tmp_path)
    assert done.code == 0, done.err
    assert result(tmp_path / "out")[1][1:] == result(whole)[1][1:]
    assert [row for row in metrics(tmp_path / "out") if "loss" in row] == metrics(whole)


def test_more_steps_with_a_constant_schedule_are_those_of_a_longer_run(tmp_path):
    constant = ("--schedule", "constant", "--warmup", 2)
    assert train("long", *constant, cwd=tmp_path).code == 0
    assert train("out", *constant, "--max-steps", 5, cwd=tmp_path).code == 0
    done = go_on("--max-steps", STEPS, cwd=tmp_path)
    assert done.code == 0, done.err
    assert result(tmp_path / "out")[:2] == result(tmp_path / "long")[:2]
    done = go_on("--max-steps", 3, cwd=tmp_path)
    assert done.code == 2 and "changed --max-steps in the command line: 3 steps, not 9; 9 are done" in done.err


@mutation(
    "lora/run/resume.py",
    "if plan.total != old.total and (falling or plan.total < old.step) and (other or not problems):",
    "if plan.total != old.total and plan.total < old.step:",
)
def test_more_steps_with_a_falling_rate_are_refused(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "out")
    done = go_on("--max-steps", 12, cwd=tmp_path)
    assert done.code == 2 and "only a constant schedule can go on for longer" in done.err


@mutation("lora/run/resume.py", "and (other or not problems):", "and True:", case="--batch-size")
@mutation("lora/run/resume.py", "and not data_flags.intersection(changed):", "and True:", case="--template")
@pytest.mark.parametrize("words", [("--batch-size", 2), ("--template", "plain"), ("--max-len", 45), ("--epochs", 1)],
                         ids=lambda words: words[0])  # fmt: skip
def test_a_resume_names_what_was_changed_and_not_what_follows_from_it(tmp_path, words):
    """Another batch size makes other numbers of steps, another template other examples."""
    inputs = ("--model", cli.model_folder(), "--data", cli.data_file(), "--out", "out", "--epochs", 2)
    first = cli.call("train", *inputs, *cli.ON_CPU, cwd=tmp_path)
    assert first.code == 0, first.err
    done = go_on(*words, cwd=tmp_path)
    assert done.code == 2 and len(done.errors) == 1, done.err
    assert f"changed {words[0]} in the command line" in done.errors[0]


def test_another_machine_is_said_because_the_last_bits_may_differ(tmp_path, whole):
    copy_of(whole, tmp_path / "out", 8)
    done = go_on(cwd=tmp_path, before=lambda: setattr(torch, "get_num_threads", lambda: 2))
    assert "note     threads: 2, was 1; what follows may differ in the last bits" in done.err
    assert (
        "note     threads" not in go_on(cwd=tmp_path, before=lambda: setattr(torch, "get_num_threads", lambda: 2)).err
    )


# ---- one run a folder ------------------------------------------------------------------------------------------------


@mutation("lora/folders.py", "        lock.acquire()", "        pass")
@pytest.mark.parametrize("argv", [(), ("--overwrite",), ("--resume",)])
def test_a_second_run_in_a_folder_is_refused_with_the_pid_of_the_first(tmp_path, whole, argv):
    shutil.copytree(whole, tmp_path / "out")
    before = cli.tree(tmp_path / "out")
    with folders.locked(tmp_path / "out"):
        done = train("out", *argv, cwd=tmp_path)
    assert done.code == 3
    [line] = done.errors
    assert line.startswith(f"error: busy --out in out: another run, process {os.getpid()}, writes it.")
    assert cli.tree(tmp_path / "out") == before and not list(tmp_path.glob(".*"))


def test_a_killed_process_leaves_no_lock(tmp_path):
    child = os.fork()
    if child == 0:
        held = folders.locked(tmp_path / "out")
        held.__enter__()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / ".out.lock").exists()
    with folders.locked(tmp_path / "out"), pytest.raises(BadEnvironment, match=str(os.getpid())):
        folders.locked(tmp_path / "out").__enter__()
    assert list(tmp_path.iterdir()) == []


@mutation("lora/folders.py", "(errno.ENOLCK, *UNSUPPORTED)", "UNSUPPORTED", case="ENOLCK")
@mutation("lora/folders.py", "(errno.ENOLCK, *UNSUPPORTED)", "(errno.ENOLCK,)", case="EINVAL")
@pytest.mark.parametrize("name", ["ENOLCK", "EINVAL", "EOPNOTSUPP", "ENOSYS"])
def test_a_file_system_without_locks_gets_a_note(tmp_path, monkeypatch, capsys, name):
    def flock(handle, how):
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr("fcntl.flock", flock)
    with folders.locked(tmp_path / "out"):
        pass
    assert capsys.readouterr().err.startswith(f"note     {tmp_path}: its file system has no locks")
    assert list(tmp_path.iterdir()) == []


@mutation(
    "lora/folders.py",
    "            name.unlink()",
    "            (lock.release(), [os.sched_yield() for _ in range(50)], name.unlink())",
)
def test_of_many_that_come_and_go_one_at_a_time_has_the_lock(tmp_path):
    """Four processes take and release it, 200 times each; while one has it, it makes a file that must not exist yet."""
    children = []
    for _ in range(4):
        if (child := os.fork()) == 0:
            for _ in range(200):
                try:
                    with folders.locked(tmp_path / "out"):
                        os.close(os.open(tmp_path / "mine", os.O_CREAT | os.O_EXCL))
                        os.unlink(tmp_path / "mine")
                except BadEnvironment:
                    pass
                except BaseException:
                    os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert list(tmp_path.iterdir()) == []


# ---- numbers that are not finite, disks that are full ----------------------------------------------------------------


def spoil_step(*which):
    """The losses of these steps are NaN."""

    def before():
        train, calls = sys.modules["train"], [0]
        step = train.train_step

        def spoilt(objective, *args, **kwargs):
            calls[0] += 1
            factor = float("nan") if calls[0] in which else 1.0
            return step(lambda batch: objective(batch) * factor, *args, **kwargs)

        train.train_step = spoilt

    return before


@mutation("train.py", "if state.skipped > args.skip_nonfinite:", "if state.skipped > args.skip_nonfinite + 1:")
def test_a_loss_that_is_not_finite_ends_the_run_with_4_naming_step_rows_and_checkpoint(tmp_path, whole):
    done = train("out", cwd=tmp_path, before=spoil_step(6))
    assert done.code == 4
    [line] = done.errors
    data = re.escape(str(cli.data_file()))
    rows = rf"rows {data}:\d+, {data}:\d+, {data}:\d+"
    last = r"the last good checkpoint is out/checkpoints/000004\. Lower --lr"
    assert re.match(rf"error: training diverged in step 6: loss nan, gradient norm nan; {rows}; {last}", line), line
    assert go_on(cwd=tmp_path).code == 0  # the weights were not stepped: without the fault it is the whole run
    assert result(tmp_path / "out") == result(whole)


def test_without_a_checkpoint_a_diverged_run_leaves_no_folder(tmp_path):
    done = train("out", cwd=tmp_path, before=spoil_step(1))
    assert done.code == 4 and "there is no checkpoint yet" in done.err
    assert list(tmp_path.iterdir()) == []


def test_steps_that_are_not_finite_are_left_out_if_asked_for(tmp_path):
    done = train("out", "--skip-nonfinite", 2, cwd=tmp_path, before=spoil_step(3, 6))
    assert done.code == 0, done.err
    rows = metrics(tmp_path / "out")
    assert [row["step"] for row in rows if row["loss"] is None] == [3, 6] and len(rows) == STEPS
    assert "skipped  step 6: loss nan, gradient norm nan; 2 of --skip-nonfinite 2" in done.err
    assert train("more", "--skip-nonfinite", 1, cwd=tmp_path, before=spoil_step(3, 6)).code == 4


def test_a_skipped_step_changes_neither_weights_nor_moments(tmp_path):
    assert (
        train("out", "--skip-nonfinite", 9, "--save-every", 1, "--keep", 9, cwd=tmp_path, before=spoil_step(3)).code
        == 0
    )
    before, after = (run_state.at(tmp_path / "out", step) for step in (2, 3))
    for name in ("adapter_model.safetensors", run_state.OPTIMIZER):
        assert (before / name).read_bytes() == (after / name).read_bytes()


@mutation(
    "lora/folders.py",
    """    if free is not None and free < needed:
""",
    """    if free is not None and free < needed // 9:
""",
)
def test_too_little_room_is_said_before_the_model_is_loaded(tmp_path):
    def full():
        usage = shutil.disk_usage(tmp_path)
        shutil.disk_usage = lambda path: usage._replace(free=2**20 + 1)

    done = train("out", "--keep", 3, cwd=tmp_path, before=full)
    assert done.code == 3 and list(tmp_path.iterdir()) == []
    [line] = done.errors
    needed = 4 * (3 * 4 * 4 * sum_of_shapes() + 2**20)
    assert f"a run with 3 checkpoints (--keep) needs {needed:,} bytes, 1,048,577 are free" in line
    assert "training:" not in done.err


def sum_of_shapes():
    """in + out of all target Linears of the tiny model."""
    D, F, heads, kv, layers = 32, 48, 32, 16, 2
    return layers * (4 * D + 2 * heads + 2 * kv + 3 * (D + F))


@pytest.mark.parametrize("number", [28, 122, 27], ids=["ENOSPC", "EDQUOT", "EFBIG"])
def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint_and_says_the_bytes(tmp_path, whole, number):
    def fill_up():
        from lora import files

        fsync, calls = os.fsync, [0]

        def full(handle):
            calls[0] += 1
            if calls[0] > 40:
                raise OSError(number, os.strerror(number))
            return fsync(handle)

        files.os.fsync = full

    done = train("out", cwd=tmp_path, before=fill_up)
    assert done.code == 3
    [line] = done.errors
    assert re.search(
        r"a checkpoint needs [\d,]+ bytes, [\d,]+ are free; the last good checkpoint is out/checkpoints/00000\d", line
    )
    assert "then go on with --resume" in line
    assert not [path for path in (tmp_path / "out").rglob(".*")]
    assert go_on(cwd=tmp_path).code == 0
    assert result(tmp_path / "out") == result(whole)


# ---- when to end -----------------------------------------------------------------------------------------------------


def rows(*losses, kl=()):
    found = [{"step": 10 * i, "eval_loss": loss} for i, loss in enumerate(losses)]
    for row, value in zip(found, kl, strict=False):
        row["retention_kl"] = value
    return found


@mutation("lora/train/stopping.py", "return min(with_loss", "return max(with_loss")
@mutation("lora/train/stopping.py", 'if row["step"] > 0 and not _forgot(row, most)]', 'if row["step"] > 0]')
@pytest.mark.parametrize(
    ("evaluations", "most", "step"),
    [
        (rows(), None, None),
        (rows(1.0), None, None),  # the start is no result
        (rows(1.0, 3.0, 2.0, 2.0), None, 20),  # the first of equals
        (rows(1.0, 0.9, 0.5, kl=(0, 0.1, 0.3)), 0.2, 10),
        (rows(1.0, 0.9, kl=(0, 0.5)), 0.2, None),
        ([{"step": 5, "retention_kl": 0.1}, {"step": 9, "retention_kl": 0.15}], 0.2, 9),
    ],
)
def test_the_best_evaluation_is_the_lowest_loss_within_the_limit(evaluations, most, step):
    assert stopping.best(evaluations, most) == step


@mutation(
    "lora/train/stopping.py",
    "len(losses) - 1 - losses.index(min(losses)) >= patience",
    "len(losses) - losses.index(min(losses)) >= patience",
)
def test_patience_counts_evaluations_since_the_best():
    assert stopping.why_end(rows(9.0, 2.0, 1.0, 1.5), patience=2) is None
    assert "step 20 in 2 (--patience)" in stopping.why_end(rows(9.0, 2.0, 1.0, 1.5, 1.0), patience=2)
    assert stopping.why_end(rows(1.0, 2.0), patience=1) is None  # the start does not count
    assert stopping.why_end(rows(1.0, 2.0, 3.0)) is None


def test_a_run_ends_by_patience_with_the_best_adapter_and_says_so_last(tmp_path):
    argv = ("--eval-data", cli.data_file(), "--eval-every", 1, "--patience", 1, "--lr", 1.0, "--max-steps", 30)
    done = train("out", *argv, "--retention", ordinary(), cwd=tmp_path)
    assert done.code == 0, done.err
    ended = json.loads((tmp_path / "out/settings.json").read_text())["ended"]
    assert "(--patience)" in ended and done.err.rstrip().splitlines()[-1].endswith(ended)
    assert len(metrics(tmp_path / "out")) < 60
    assert ended.capitalize() in (tmp_path / "out/report.md").read_text()
    again = cli.call("train", "--config", "out/settings.json", "--out", "again", cwd=tmp_path)  # `ended` is no setting
    assert again.code == 0, again.err


def test_a_run_ends_where_it_forgot_too_much_with_the_last_adapter_within_the_limit(tmp_path):
    done = train("out", "--max-forgetting", 0.5, "--eval-every", 1, "--retention", ordinary(), "--lr", 0.01,
                 "--max-steps", 30, cwd=tmp_path)  # fmt: skip
    assert done.code == 0, done.err
    kls = [row["retention_kl"] for row in metrics(tmp_path / "out") if "retention_kl" in row]
    assert kls[0] == 0 and kls[-1] > 0.5 >= kls[-2]
    best = len(kls) - 2
    adapter = "adapter_model.safetensors"
    assert (tmp_path / "out" / adapter).read_bytes() == (run_state.at(tmp_path / "out", best) / adapter).read_bytes()
    assert "over --max-forgetting 0.5" in done.err.rstrip().splitlines()[-1]


# ---- starting from an adapter ----------------------------------------------------------------------------------------


@mutation(
    "train.py",
    "    if start:  # until here the model was the base",
    "    if resumed:",
)
@mutation("lora/run/adapter.py", "vars(args).update(its, target=", "vars(args).update(target=")
@pytest.mark.parametrize("flag", ["--init-adapter", "--previous_lora_weights"])
def test_a_run_from_an_adapter_has_its_rank_alpha_and_targets_and_starts_at_its_loss(tmp_path, flag):
    first = ("--rank", 3, "--alpha", 7, "--target", "q_proj", "down_proj", "--eval-data", cli.data_file(),
             "--retention", ordinary())  # fmt: skip
    assert train("first", *first, cwd=tmp_path).code == 0
    inputs = ("--model", cli.model_folder(), "--data", cli.data_file(), "--micro-tokens", 40, *first[-4:])
    done = cli.call("train", *inputs, flag, "first", "--out", "next", "--max-steps", 2, *cli.ON_CPU, cwd=tmp_path)
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "next/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 7, ["down_proj", "q_proj"])
    losses = [row["eval_loss"] for row in metrics(tmp_path / "first") if "eval_loss" in row]
    best = min(losses[1:])
    assert metrics(tmp_path / "next")[0]["eval_loss"] == best  # the adapter in `first` is its best
    again = cli.call("train", "--config", "next/settings.json", "--out", "again", cwd=tmp_path)
    assert again.code == 0, again.err
    assert metrics(tmp_path / "again") == metrics(tmp_path / "next")


def test_flags_that_contradict_the_adapter_are_all_refused(tmp_path):
    adapter = cli.adapter_folder()
    done = cli.train("out", "--init-adapter", adapter, "--rank", 5, "--alpha", 1, "--target", "mlp", cwd=tmp_path)
    assert done.code == 2 and len(done.errors) == 3 and not list(tmp_path.iterdir())
    for flag, its in (("--rank", "4"), ("--alpha", "32"), ("--target", "14 linears")):
        assert re.search(rf"contradiction in the command line: {flag} .* has {its}", done.err)
    assert cli.train("out", "--init-adapter", adapter, "--rank", 4, "--target", "all", cwd=tmp_path).code == 0


def test_an_adapter_of_another_base_is_refused_unless_one_insists(tmp_path):
    other = cli.write_model(tmp_path / "model", seed=1)
    done = cli.train("out", "--init-adapter", cli.adapter_folder(), cwd=tmp_path, model=other)
    assert done.code == 2 and "wrong base" in done.err
    assert cli.train("out", "--init-adapter", cli.adapter_folder(), "--no-verify", cwd=tmp_path, model=other).code == 0


# ---- what changes between a run and its continuation -----------------------------------------------------------------


@mutation("lora/run/results.py", "{stopping.best(part, most) for part in seen} - {None}", "()")
def test_the_best_checkpoint_as_an_older_one_sees_it_stays_too(tmp_path):
    """Losses 5, 4, 6, 3 after steps 2, 4, 6, 8: whoever goes on from step 6 needs step 4, though 8 is the best."""
    losses = iter((9.0, 5.0, 4.0, 6.0, 3.0, 7.0))
    argv = ("--eval-data", cli.data_file(), "--eval-every", 2, "--retention", ordinary(), "--keep", 3)
    done = train("out", *argv, cwd=tmp_path, before=lambda: scripted(losses))
    assert done.code == 0, done.err
    assert run_state.steps(tmp_path / "out") == [4, 6, 8, 9]
    done = cli.call(
        "train", "--resume", "out/checkpoints/000006", cwd=tmp_path, before=lambda: scripted(iter((8.0,) * 9))
    )
    assert done.code == 0 and "best     step 4" in done.err, done.err


def scripted(losses):
    from lora.run import evaluator

    evaluator.measure = lambda *args: {"loss": next(losses)}


def test_a_best_checkpoint_that_is_gone_is_said_and_does_not_end_the_run(tmp_path):
    argv = ("--eval-data", cli.data_file(), "--eval-every", 2, "--retention", ordinary(), "--keep", 1)
    done = train("out", *argv, cwd=tmp_path, before=lambda: scripted(iter((9.0, 2.0, 5.0, 5.0, 5.0, 5.0))))
    assert done.code == 0 and run_state.steps(tmp_path / "out") == [2, 9]
    shutil.rmtree(tmp_path / "out/checkpoints/000002")
    done = go_on("--eval-every", 3, cwd=tmp_path)
    assert done.code == 0 and "the checkpoint of step 2, the best so far, is not there" in done.err, done.err
    assert "best     step 9" in done.err


def test_evaluations_on_other_rows_do_not_count(tmp_path):
    (tmp_path / "easy.jsonl").write_text(cli.rows([[("user", "Hello."), ("assistant", "Hi!")]]))
    how = ("--eval-every", 2, "--retention", ordinary(), "--max-steps", 6, "--schedule", "constant", "--warmup", 1)
    assert train("out", *how, "--eval-data", "easy.jsonl", cwd=tmp_path).code == 0
    done = go_on("--eval-data", cli.data_file(), "--max-steps", 8, cwd=tmp_path)
    assert done.code == 0 and "earlier ones do not count any more" in done.err
    rows = [row for row in metrics(tmp_path / "out") if "eval_loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 6, 8]  # the same step, on the new rows
    best = min(rows[4:], key=lambda row: row["eval_loss"])["step"]
    assert f"best     step {best}:" in done.err


def test_a_signal_after_the_last_step_leaves_a_run_that_is_done(tmp_path):
    def stop_in_publish():
        from lora.run import results

        draw = results.draw
        results.draw = lambda *args: [draw(*args), os.kill(os.getpid(), signal.SIGTERM)]

    done = train("out", cwd=tmp_path, before=stop_in_publish)
    assert done.code == 143 and "the run is done and out is saved, but for report.md" in done.err
    assert json.loads((tmp_path / "out/settings.json").read_text())["ended"] == "all steps are done"
    assert go_on(cwd=tmp_path).code == 0 and (tmp_path / "out/report.md").exists()


def test_where_nothing_is_within_the_limit_it_is_said_that_the_adapter_is_the_last_one(tmp_path):
    argv = ("--max-forgetting", 0.0, "--eval-every", 2, "--retention", ordinary())
    done = train("out", *argv, cwd=tmp_path)
    assert done.code == 0 and done.err.rstrip().endswith("none was within it, so the last one is kept")


def test_a_run_remembers_its_device(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "out")

    def only_cpu():
        machine = sys.modules["train"].machine
        machine.choose_device = lambda name: torch.device({"cpu": "cpu"}[name])

    assert go_on(cwd=tmp_path, before=only_cpu).code == 0


# ---- nothing of the user's is lost -----------------------------------------------------------------------------------


def test_what_a_killed_run_was_to_replace_is_back_with_the_next_one(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "out")
    before = cli.tree(tmp_path / "out")
    assert train("out", "--overwrite", cwd=tmp_path, before=kill_before_step(2)).code == 137
    assert len(list(tmp_path.glob(".out.*.old"))) == 1
    done = train("out", cwd=tmp_path)  # refused: the earlier run is there
    assert done.code == 2 and "that one is back" in done.err and cli.tree(tmp_path / "out") == before
    assert train("out", "--overwrite", cwd=tmp_path, before=kill_before_step(4)).code == 137  # it has saved step 2
    assert train("out", "--overwrite", cwd=tmp_path).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and result(tmp_path / "out") == result(whole)


def test_a_template_and_an_adapter_that_a_run_began_with_need_not_be_there_to_go_on(tmp_path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
                                      "{% if add_generation_prompt %}[assistant]{% endif %}")  # fmt: skip
    assert train("a", "--template", "t.jinja", cwd=tmp_path).code == 0
    inputs = ("--model", cli.model_folder(), "--data", cli.data_file(), *cli.ON_CPU, "--init-adapter", "a")
    inputs += ("--max-steps", 6, *WHOLE[2:])
    for out in ("whole", "out"):
        how = {"before": kill_before_step(4)} if out == "out" else {}
        done = cli.call("train", *inputs, "--out", out, cwd=tmp_path, **how)
        assert done.code == (137 if out == "out" else 0), done.err
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "t.jinja").unlink()
    done = go_on(cwd=tmp_path)
    assert done.code == 0, done.err
    assert result(tmp_path / "out", 6)[:2] == result(tmp_path / "whole", 6)[:2]


def test_files_that_only_look_like_leftovers_are_left_alone(tmp_path, whole):
    copy_of(whole, tmp_path / "out", 8)
    for name in (".thesis.old", ".x.partial", "notes.txt", "checkpoints/999999/mine"):
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("mine")
    (tmp_path / "out/.metrics.jsonl.77.partial").write_text("of a killed run")
    done = go_on(cwd=tmp_path)
    assert done.code == 0 and "passed over out/checkpoints/999999" in done.err
    left = cli.tree(tmp_path / "out")
    assert {".thesis.old", ".x.partial", "notes.txt", "checkpoints/999999/mine"} <= set(left)
    assert ".metrics.jsonl.77.partial" not in left and result(tmp_path / "out") == result(whole)


def test_a_checkpoint_that_cannot_be_read_now_is_not_passed_over(tmp_path, whole):
    shutil.copytree(whole, tmp_path / "out")
    before = cli.tree(tmp_path / "out")

    def broken_disk():
        from lora import files

        def fail(path):
            raise OSError(5, "Input/output error", str(path))

        files.sha256 = fail

    assert go_on(cwd=tmp_path, before=broken_disk).code == 3
    assert cli.tree(tmp_path / "out") == before
