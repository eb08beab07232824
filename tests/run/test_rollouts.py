"""A run that learns from its own answers: what it tells, how often the model is passed, when it ends."""

import json
import os
import shutil
import signal
import sys

import pytest
import torch

from lora.inference import rollout
from lora.methods import METHODS
from lora.run import results
from lora.train import run_state, stopping
from tests import cli
from tests.methods.linked import SAMPLING, prompts_file, rewarded
from tests.mutation import mutation
from tests.run.test_resume import copy_of, go_on, ordinary, result

RUN = ("--max-steps", 4, "--batch-size", 3, "--micro-tokens", 90, "--save-every", 2, "--lr", 0.01, "--rank", 4)


def train(*argv, cwd, method="grpo", model=None, **how):
    inputs = ("--model", model or cli.model_folder(), "--method", method, "--data", prompts_file(), "--out", "out")
    return cli.call("train", *inputs, *RUN, *cli.ON_CPU, *rewarded(method), *argv, cwd=cwd, **how)


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def function(folder, body: str) -> str:
    """A reward of the user's own, in a file of `folder`, as --reward names it."""
    (folder / "own.py").write_text(f"def own(completions, **columns):\n    {body}\n")
    return f"{folder / 'own.py'}:own"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of each method that nobody interrupts."""
    folder = tmp_path_factory.mktemp("rollouts")
    for method in SAMPLING:
        (folder / method).mkdir()
        done = train(cwd=folder / method, method=method)
        assert done.code == 0, done.err
    return folder


# ---- what is told ----------------------------------------------------------------------------------------------------


@mutation(
    "lora/run/rollouts.py",
    'found["length"] = sum(len(one.tokens) for one in answers)',
    'found["length"] = len(answers)',
)
def test_a_step_tells_rewards_by_part_and_what_its_answers_are_like(tmp_path):
    keep = f"import json; open({str(tmp_path / 'seen')!r}, 'a').write(json.dumps(completions) + chr(10))"
    own = function(tmp_path, f"{keep}; return [float(i % 8 == 0) for i, _ in enumerate(completions)]")
    done = cli.call(
        "train",
        "--model",
        cli.model_folder(),
        "--method",
        "grpo",
        "--data",
        prompts_file(),
        "--out",
        "out",
        *RUN,
        *cli.ON_CPU,
        "--reward",
        own,
        "length:4:0.5",
        "--group",
        4,
        "--max-new-tokens",
        8,
        cwd=tmp_path,
    )
    assert done.code == 0, done.err
    first, seen = (
        rows(tmp_path / "out")[0],
        [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()],
    )
    texts = seen[0]
    assert len(texts) == 12  # 3 prompts, 4 answers each; of each two groups one has a right answer
    assert first["reward_own"] == pytest.approx(2 / 12)
    assert first["reward"] == pytest.approx(first["reward_own"] + 0.5 * first["reward_length"])
    assert 1 < first["length"] <= 8 and 0 <= first["ended"] <= 1 and first["entropy"] > 0
    assert [one["reward_own"] for one in first["samples"]] == [1.0, 0.0]
    assert all(one["answer"] in texts[:4] for one in first["samples"])


@mutation(
    "lora/run/rollouts.py",
    "its = scored(rewards)\n    return sum(its), len(its)",
    "its = scored(rewards)\n    return sum(its), len(rewards)",
)
@pytest.mark.parametrize("method", SAMPLING)
def test_answers_that_cannot_be_scored_are_left_out_of_what_is_told(tmp_path, method):
    own = function(tmp_path, "return [None if i % 4 == 1 else 2.0 * (i % 4 == 0) for i, _ in enumerate(completions)]")
    inputs = ("--model", cli.model_folder(), "--method", method, "--data", prompts_file(), "--out", "out")
    how = ("--reward", own, "--group", 4, "--max-new-tokens", 8)
    done = cli.call("train", *inputs, *RUN, *cli.ON_CPU, *how, cwd=tmp_path)
    assert done.code == 0, done.err
    assert all(row["reward"] == pytest.approx(2 / 3) for row in rows(tmp_path / "out"))


@mutation("lora/export/report.py", 'lines += ["", note]', "pass")
@pytest.mark.parametrize("method", SAMPLING)
def test_the_report_says_why_the_loss_says_little_and_shows_answers_with_their_rewards(whole, method):
    text = (whole / method / "out/report.md").read_text()
    assert METHODS[method].NOTE in text and "Watch the reward" in text
    first = rows(whole / method / "out")[0]
    assert "| step | prompt | answer | reward |" in text and f"| {first['reward']:.4f} |" in text
    assert "reward: vowels" in text and "reward: multiply" in text
    assert (whole / method / "out/loss.png").stat().st_size > 10_000


@mutation("lora/run/rollouts.py", "places[len(found) : len(found) + len(some)]", "places[: len(some)]")
def test_how_many_prompts_are_sampled_at_a_time_changes_nothing(tmp_path, whole):
    done = train("--micro-tokens", 7, "--max-steps", 1, cwd=tmp_path)  # one prompt at a time, one answer a batch
    assert done.code == 0, done.err
    one, other = rows(tmp_path / "out")[0], rows(whole / "grpo/out")[0]
    assert all(one[name] == other[name] for name in ("samples", "reward", "length", "tokens"))
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


# ---- how often the model is passed -----------------------------------------------------------------------------------


def passes(tmp_path, *argv, method) -> list[str]:
    """Of the second step, every pass through the model without a cache: with gradients (g) or without (n)."""
    made = tmp_path / "passes"

    def before():
        train, decoder = sys.modules["train"], sys.modules["lora.network.decoder"]
        trunk = decoder.Model.trunk
        rollouts = train.Rollouts.micro_batches

        def counted(self, tokens, lengths=None, positions=None, cache=None):
            if cache is None:
                with made.open("a") as file:
                    file.write("g" if torch.is_grad_enabled() else "n")
            return trunk(self, tokens, lengths, positions, cache)

        def begun(*given):
            made.write_text("")
            return rollouts(*given)

        decoder.Model.trunk, train.Rollouts.micro_batches = counted, begun

    done = train("--micro-tokens", 10000, "--max-steps", 2, *argv, cwd=tmp_path, method=method, before=before)
    assert done.code == 0, done.err
    return made.read_text()


@pytest.mark.parametrize(
    ("method", "argv", "expected"),
    [
        ("grpo", (), "g"),
        ("grpo", ("--kl", 0.1), "ng"),
        ("grpo", ("--updates", 3), "ggg"),
        ("rloo", (), "ng"),
        ("rloo", ("--kl", 0), "g"),
        ("ppo", (), "nngggg"),
        ("ppo", ("--updates", 1, "--kl", 0), "ng"),
    ],
)
def test_there_is_one_pass_an_update_one_for_the_reference_and_one_for_values(tmp_path, method, argv, expected):
    assert passes(tmp_path, *argv, method=method) == expected


# ---- the reference ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def second(tmp_path_factory, whole):
    """A run from the adapter of another one, with both in one folder."""
    folder = tmp_path_factory.mktemp("second")
    shutil.copytree(whole / "grpo/out", folder / "first")
    done = train("--init-adapter", "first", "--kl", 0.1, cwd=folder)
    assert done.code == 0, done.err
    return folder


@mutation(
    "lora/run/reference.py",
    "return sets.in_place(self.model, self.adapter) if self.folder else disabled(self.model)",
    "return disabled(self.model)",
)
def test_the_reference_of_a_run_from_an_adapter_is_the_model_with_that_adapter(second):
    found = rows(second / "out")
    assert found[0]["kl"] == pytest.approx(0, abs=1e-7) and found[1]["kl"] > 1e-5


@mutation(
    "lora/run/reference.py",
    "self.folder = kept",
    "pass",
)
def test_a_resumed_run_has_kept_the_adapter_it_compares_with(second, tmp_path):
    copy_of(second / "out", tmp_path / "out", 2)
    done = go_on(cwd=tmp_path)  # where there is no folder `first`
    assert done.code == 0, done.err
    assert result(tmp_path / "out", 4) == result(second / "out", 4)


def test_without_an_adapter_to_start_from_the_reference_is_the_base_and_nothing_is_kept(whole):
    assert not (whole / "ppo/out" / results.REFERENCE_ADAPTER).exists()
    assert rows(whole / "ppo/out")[0]["kl"] == pytest.approx(0, abs=1e-7)


# ---- when it ends ----------------------------------------------------------------------------------------------------


@mutation(
    "lora/run/rollouts.py", 'found["no_signal"] = sum(len(set(its)) < 2', 'found["no_signal"] = sum(len(set(its)) < 1'
)
@mutation("lora/train/stopping.py", "without >= (args.patience or math.inf)", "without >= math.inf")
@mutation("lora/run/rollouts.py", 'before + 1 if found["no_signal"] == 1 else 0', "before + 1")
def test_steps_without_a_signal_end_the_run_with_what_to_do_and_only_in_a_row(tmp_path):
    own = function(
        tmp_path,
        "import os; n = len(os.listdir('steps')); open(f'steps/{n}', 'w').close(); "
        "return [float(i % 2 and n == 1) for i, _ in enumerate(completions)]",
    )
    (tmp_path / "steps").mkdir()
    inputs = ("--model", cli.model_folder(), "--method", "grpo", "--data", prompts_file(), "--out", "out")
    how = ("--reward", own, "--group", 4, "--max-new-tokens", 4, "--patience", 2, "--max-steps", 9)
    done = cli.call("train", *inputs, *RUN, *how, *cli.ON_CPU, cwd=tmp_path)
    assert done.code == 0, done.err
    assert [row["no_signal"] for row in rows(tmp_path / "out")] == [1.0, 0.0, 1.0, 1.0]
    assert f"no group of the last 2 steps had a signal (--patience). {stopping.NO_SIGNAL}" in done.err


@mutation("lora/train/record.py", "if self._silent() == SILENT:", "if self._silent() > SILENT:")
def test_without_patience_ten_such_steps_are_told_once(tmp_path):
    inputs = ("--model", cli.model_folder(), "--method", "rloo", "--data", prompts_file(), "--out", "out")
    how = ("--reward", function(tmp_path, "return [0] * len(completions)"), "--max-new-tokens", 2, "--max-steps", 10)
    done = cli.call("train", *inputs, *RUN, *how, *cli.ON_CPU, cwd=tmp_path)
    assert done.code == 0 and done.err.count(stopping.NO_SIGNAL) == 1, done.err
    assert len(rows(tmp_path / "out")) == 10


@mutation("lora/run/rollouts.py", " and not has_value_head(self.args.method):", ":")
@mutation("lora/train/record.py", ' and "value_loss" not in row', "")
def test_ppo_whose_values_tell_equal_rewards_of_a_group_apart_goes_on_and_patience_counts_evaluations(tmp_path):
    own = function(tmp_path, "return [i // 2 % 3 for i, _ in enumerate(completions)]")
    how = ("--reward", own, "--group", 2, "--max-new-tokens", 2, "--max-steps", 10, "--patience", 3, "--updates", 1)
    inputs = ("--model", cli.model_folder(), "--method", "ppo", "--data", prompts_file(), "--out", "out")
    how = (*how, "--eval-fraction", 0.3, "--eval-every", 5, "--retention", ordinary())
    done = cli.call("train", *inputs, *RUN, *how, *cli.ON_CPU, cwd=tmp_path)
    assert done.code == 0 and stopping.NO_SIGNAL not in done.err, done.err
    steps = [row for row in rows(tmp_path / "out") if "loss" in row]
    assert [row["no_signal"] for row in steps] == [1.0] * 10


@mutation("lora/run/settings.py", "or by_group)", "or samples(self.method))")
def test_the_patience_of_ppo_needs_evaluations(tmp_path):
    done = train("--patience", 2, method="ppo", cwd=tmp_path)
    assert done.code == 2 and "wrong --patience in the command line: no loss is evaluated" in done.errors[0]


@mutation(
    "lora/run/rollouts.py", '**found} if "reward" in found else found', '**found} if "reward" in found else {"loss": 0}'
)
@mutation("lora/train/stopping.py", 'if with_loss else fitting[-1]["step"]', "if True else None")
def test_held_out_answers_that_cannot_be_scored_have_no_loss_and_are_not_the_best(tmp_path):
    inputs = ("--model", cli.model_folder(), "--method", "grpo", "--data", prompts_file(), "--out", "out")
    how = ("--reward", function(tmp_path, "return [None] * len(completions)"), "--eval-fraction", 0.3,
           "--retention", ordinary())  # fmt: skip
    done = cli.call("train", *inputs, *RUN, *how, "--max-new-tokens", 4, "--max-steps", 1, *cli.ON_CPU, cwd=tmp_path)
    assert done.code == 0, done.err
    evaluated = [row for row in rows(tmp_path / "out") if "eval_length" in row]
    assert evaluated and not any("eval_loss" in row or "eval_reward" in row for row in evaluated)
    scored = [{"step": 1, "eval_loss": 2.0}, {"step": 2, "eval_loss": 1.0}, {"step": 3}]
    assert stopping.best(scored) == 2 and stopping.best([{"step": 3}]) == 3


@mutation("lora/run/reference.py", "for name in (store.WEIGHTS, store.CONFIG))", "for name in (store.CONFIG,))")
@pytest.mark.parametrize("lost", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_reference_of_which_a_file_is_lost_is_read_from_the_adapter_of_the_start_and_told(tmp_path, lost):
    cli.train("start", "--lr", 0.01, "--max-steps", 1, cwd=tmp_path)
    flags = ("--kl", 0.1, "--schedule", "constant", "--max-steps")
    inputs = ("--model", cli.model_folder(), "--method", "grpo", "--data", prompts_file(), "--init-adapter", "start")
    how = (*inputs, *RUN[2:-2], *cli.ON_CPU, *rewarded("grpo"), *flags)
    assert cli.call("train", *how, 2, "--out", "out", cwd=tmp_path).code == 0
    (tmp_path / "out" / results.REFERENCE_ADAPTER / lost).unlink()
    done = cli.call("train", "--resume", "--out", "out", "--max-steps", 3, cwd=tmp_path)
    assert done.code == 0 and "is not whole; the model of step 0 is read from start" in done.err, done.err
    assert cli.call("train", *how, 3, "--out", "whole", cwd=tmp_path).code == 0
    assert rows(tmp_path / "out")[-1]["loss"] == rows(tmp_path / "whole")[-1]["loss"]


@mutation(
    "train.py",
    "            except Interrupted:\n                continue\n",
    "            except Interrupted:\n                raise\n",
)
@mutation(
    "lora/run/rollouts.py",
    "if self.stop.code and self.processes.size == 1:\n            raise Interrupted",
    "if False:\n            raise Interrupted",
)
def test_a_signal_ends_a_run_while_answers_are_sampled_and_it_goes_on_from_there(tmp_path, whole):
    def before():
        tokens, calls = rollout.sample_tokens, [0]

        def stopped(*given):
            calls[0] += 1
            if calls[0] == 20:  # a step samples up to 8 tokens; so this is in the third
                os.kill(os.getpid(), signal.SIGINT)
            assert calls[0] < 22
            return tokens(*given)

        rollout.sample_tokens = stopped

    done = train(cwd=tmp_path, before=before)
    assert done.code == 130 and "stopped after step 2 of 4" in done.err, done.err
    assert go_on(cwd=tmp_path).code == 0
    assert result(tmp_path / "out", 4) == result(whole / "grpo/out", 4)


# ---- evaluations -----------------------------------------------------------------------------------------------------


@mutation("lora/run/rollouts.py", '"loss": -found["reward"]', '"loss": found["reward"]')
def test_held_out_prompts_are_answered_greedily_and_the_best_reward_is_kept(tmp_path):
    held_out = ("--eval-data", prompts_file(), "--eval-every", 2, "--retention", ordinary())
    done = train(*held_out, cwd=tmp_path)
    assert done.code == 0, done.err
    found = [row for row in rows(tmp_path / "out") if "eval_reward" in row]
    assert [row["step"] for row in found] == [0, 2, 4]
    assert all(row["eval_loss"] == -row["eval_reward"] for row in found)
    assert all(
        {"eval_reward_vowels", "eval_reward_multiply", "eval_length", "eval_ended"} <= row.keys() for row in found
    )
    best = max(found[1:], key=lambda row: row["eval_reward"])["step"]
    last = run_state.at(tmp_path / "out", best) / "adapter_model.safetensors"
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == last.read_bytes()
    assert "reward" in next(line for line in done.err.splitlines() if line.startswith("eval     step"))


def test_the_card_says_which_rewards_it_was_trained_with(whole):
    for method in SAMPLING:
        text = (whole / method / "out/README.md").read_text()
        assert f"rewards of answers that it gave itself: {method}" in text and "multiply:0.5" in text


@mutation("lora/run/results.py", "if samples(self.args.method) else ''", "if False else ''")
def test_a_step_that_diverges_by_its_rewards_says_that_they_may_weigh_less(tmp_path):
    own = function(tmp_path, "return [(-1) ** i * 1e30 for i, _ in enumerate(completions)]")
    inputs = ("--model", cli.model_folder(), "--method", "rloo", "--data", prompts_file(), "--out", "out")
    done = cli.call("train", *inputs, *RUN, "--reward", own, "--max-new-tokens", 4, *cli.ON_CPU, cwd=tmp_path)
    assert done.code == 4 and done.errors[0].endswith("or give --reward a smaller weight"), done.err


@mutation("lora/run/plan.py", "args.max_new_tokens >= args.max_len", "args.max_new_tokens > args.max_len")
def test_answers_that_leave_no_room_for_a_prompt_are_refused(tmp_path):
    done = train("--max-new-tokens", 40, "--max-len", 40, cwd=tmp_path)
    assert done.code == 2 and len(done.errors) == 1 and "wrong --max-new-tokens" in done.errors[0], done.err
