"""evaluate.py on pairs and judged answers, each figure by its formula; and what a run of a method leaves to be read."""

import json
import math
import shlex
import shutil

import pytest
import torch
from safetensors.torch import load_file

from lora import pretrained
from lora.adapter import store
from lora.inference.session import load_chat
from lora.train.record import draw, panels_of
from tests import cli
from tests.adapters import write_adapter, write_head
from tests.methods.linked import SAMPLING, prompts_file, rewarded
from tests.mutation import mutation
from tests.run.test_resume import go_on, ordinary, result
from tests.scripts.test_commands import ok

PAIRS = [
    {"prompt": f"What is {a}?", "chosen": f"It is {a}, {'yes ' * a}.", "rejected": f"Ask {'them ' * (3 - a)}about {a}."}
    for a in range(4)
]
JUDGED = [{"prompt": p["prompt"], "completion": p[k], "label": k == "chosen"} for p in PAIRS for k in list(p)[1:]]
DATA = {"reward": PAIRS, "dpo": PAIRS, "kto": JUDGED}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    write_head(write_adapter(folder / "judge", 1))
    write_adapter(folder / "talker", 2)
    for name, rows in (("pairs", PAIRS), ("judged", JUDGED), ("chats", [json.loads(cli.rows(cli.CONVERSATIONS[:1]))])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def evaluate(work, *argv, data="pairs.jsonl"):
    return cli.call("evaluate", "--no-retention", *cli.ON_CPU, "--data", data, *argv, cwd=work)


def figures(work, *argv, **how) -> dict:
    ok(evaluate(work, *argv, "--out", "figures.json", **how))
    return json.loads((work / "figures.json").read_text())["figures"]


def log_probs(work, adapter: str | None) -> torch.Tensor:
    """Σ log p of both answers of every pair, (4, 2), a token at a time from whole logits."""
    base = pretrained.find(str(cli.model_folder()))
    model, chat = pretrained.load_model(base), load_chat(base, work / adapter if adapter else None)
    if adapter:
        store.load(model, work / adapter)

    def of(question: str, answer: str) -> float:
        prompt = chat.prompt([{"role": "user", "content": question}])
        ids = [*prompt, *chat.tokenizer.encode_plain(answer), chat.end_of_turn]
        logs = model(torch.tensor(ids)).double().log_softmax(-1)
        return sum(logs[t - 1, ids[t]].item() for t in range(len(prompt), len(ids)))

    with torch.no_grad():
        return torch.tensor([[of(p["prompt"], p[side]) for side in ("chosen", "rejected")] for p in PAIRS])


@mutation("lora/run/measured.py", "key=lambda i: size_of([examples[i]])", "key=lambda i: i")
def test_evaluate_prints_pair_accuracy_scores_and_loss_of_a_reward_model_and_writes_both_scores_of_every_row(work):
    found = figures(work, "--adapter", "judge", "talker")  # --method reward by itself
    assert found["base"] == found["talker"] == {}
    written = [json.loads(line) for line in (work / "figures.predictions/judge.jsonl").read_text().splitlines()]
    head, base = load_file(work / "judge/value_head.safetensors"), pretrained.find(str(cli.model_folder()))
    model, chat = pretrained.load_model(base), load_chat(base, work / "judge")
    store.load(model, work / "judge")
    for row, scores in zip(PAIRS, written, strict=True):
        for side in ("chosen", "rejected"):
            ids = [*chat.prompt([{"role": "user", "content": row["prompt"]}]), *chat.tokenizer.encode_plain(row[side])]
            hidden = model.trunk(torch.tensor([*ids, chat.end_of_turn]))[-1]
            expected = (head["v_head.summary.weight"][0] @ hidden + head["v_head.summary.bias"]).item()
            assert scores[side] == pytest.approx(expected, abs=1e-5), row
    margins = [row["chosen"] - row["rejected"] for row in written]
    judge = found["judge"]
    assert 0 < judge["accuracy"] < 1 and judge["accuracy"] == sum(m > 0 for m in margins) / 4
    assert judge["score_margin"] == pytest.approx(sum(margins) / 4, abs=1e-5)
    assert judge["score_chosen"] == pytest.approx(sum(row["chosen"] for row in written) / 4, abs=1e-5)
    assert judge["loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 4, abs=1e-5)
    done = evaluate(work, "--adapter", "judge", "talker")
    assert "note     base has no value head, so it has no scores" in done.err
    assert "pairs whose chosen answer has the higher score" in done.out and "loss a pair" in done.out


@mutation("lora/run/measured.py", "            with disabled(self.model):\n", "            if True:\n", case="0.1")
@mutation("evaluate.py", "method=args.method, beta=args.beta", "method=args.method", case="0.5")
@mutation("lora/run/measured.py", "return found if self.column.adapter else own", "return found", case="0.1")
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_evaluate_measures_a_dpo_adapter_by_its_change_from_the_base(work, beta):
    found = figures(work, "--adapter", "talker", "--method", "dpo", *(() if beta == 0.1 else ("--beta", beta)))
    base, now = log_probs(work, None), log_probs(work, "talker")
    rewards = beta * (now - base)
    margins = rewards[:, 0] - rewards[:, 1]
    talker = found["talker"]
    assert talker["accuracy"] == (margins > 0).double().mean().item()
    for name, value in {
        "reward_chosen": rewards[:, 0].mean(),
        "reward_rejected": rewards[:, 1].mean(),
        "reward_margin": margins.mean(),
        "log_prob_chosen": now[:, 0].mean(),
        "log_prob_rejected": now[:, 1].mean(),
        "loss": -torch.nn.functional.logsigmoid(margins).mean(),
    }.items():
        assert talker[name] == pytest.approx(value.item(), abs=1e-4), name
    assert set(found["base"]) == {"log_prob_chosen", "log_prob_rejected", "length_chosen", "length_rejected"}
    assert found["base"]["log_prob_chosen"] == pytest.approx(base[:, 0].mean().item(), abs=1e-4)


def test_evaluate_measures_a_kto_adapter_on_judged_answers(work):
    found = figures(work, "--adapter", "talker", "--method", "kto", data="judged.jsonl")
    change = 0.1 * (log_probs(work, "talker") - log_probs(work, None)).mean(0)
    talker = found["talker"]
    assert talker["reward_good"] == pytest.approx(change[0].item(), abs=1e-4)
    assert talker["reward_bad"] == pytest.approx(change[1].item(), abs=1e-4)
    assert 0 <= talker["accuracy"] <= 1 and set(found["base"]) == {"log_prob_good", "log_prob_bad", "length"}


WRONG = {
    "rows of conversations": (("--adapter", "judge"), "--method sft", "chats.jsonl"),
    "judged rows": (("--adapter", "judge"), "--method kto", "judged.jsonl"),
    "no head anywhere": (("--adapter", "talker", "--method", "reward"), "no value head", "pairs.jsonl"),
    "beta of reward": (("--adapter", "judge", "--beta", 1), "--beta, which is for dpo and kto", "pairs.jsonl"),
    "beta of sft": (("--adapter", "talker", "--beta", 1), "--beta, which is for --method dpo", "chats.jsonl"),
    "answers of dpo": (
        ("--adapter", "talker", "--method", "dpo", "--predictions", "p"), "has none", "pairs.jsonl"),
    "pairs for sft": (("--adapter", "talker"), "Give --method dpo", "pairs.jsonl"),
}  # fmt: skip


@mutation("evaluate.py", "    problems += wrong_for_method(args)\n", "", case="beta of sft")
@mutation("evaluate.py", "    check_head(args, value_head.of(model))\n", "", case="no head anywhere")
@pytest.mark.parametrize("case", WRONG)
def test_what_a_method_cannot_measure_is_one_line_with_the_way(work, case):
    argv, word, data = WRONG[case]
    done = evaluate(work, *argv, data=data)
    assert done.code == 2 and done.out == "" and word in done.err, done.err
    assert len(done.errors) == (len(JUDGED) if case == "judged rows" else len(PAIRS) if case == "pairs for sft" else 1)


@mutation("lora/inference/prompts.py", 'isinstance(row.get("chosen"), float)', "True")
def test_scores_replace_earlier_scores_but_never_a_file_of_pairs(work, tmp_path):
    argv = ("--adapter", work / "judge", "--predictions", "out")
    pairs = [{key: row[key] for key in ("chosen", "rejected")} for row in PAIRS]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/judge.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    done = evaluate(tmp_path, *argv, data=work / "pairs.jsonl")
    assert done.code == 2 and "it holds no predictions" in done.err
    (tmp_path / "out/judge.jsonl").unlink()
    for _ in range(2):
        ok(evaluate(tmp_path, *argv, data=work / "pairs.jsonl"))


def test_a_task_is_scored_as_ever_by_an_adapter_with_a_head(work):
    argv = ("--task", "multiply", "--rows", 1, "--digits", 1, "--no-generate", "--no-retention", *cli.ON_CPU)
    assert "loss, nats per token" in ok(cli.call("evaluate", "--adapter", "judge", *argv, cwd=work))


# ---- what a run leaves -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(work):
    """A run of each method, with what is held out measured."""
    for method, rows in DATA.items():
        data = "judged.jsonl" if rows is JUDGED else "pairs.jsonl"
        beta = ("--beta", 0.2) if method == "dpo" else ()
        held_out = ("--eval-fraction", 0.3, "--retention", ordinary())
        done = cli.train(method, "--method", method, *beta, *held_out, cwd=work, data=data)
        assert done.code == 0, done.err
        assert "accuracy" in done.err
    return work


@mutation("lora/run/results.py", '["--method", args.method] if', "[] if", case="dpo")
@mutation("lora/run/results.py", '["--beta", f"{args.beta:g}"] if', "[] if", case="dpo")
@pytest.mark.parametrize("method", DATA)
def test_a_report_has_the_figures_of_its_method_and_its_evaluation_can_be_run_as_it_stands(runs, method):
    text = (runs / method / "report.md").read_text()
    rows = [json.loads(line) for line in (runs / method / "metrics.jsonl").read_text().splitlines()]
    name = {"reward": "score_chosen", "dpo": "reward_chosen", "kto": "reward_bad"}[method]
    assert f"| step | {'loss an answer' if method == 'kto' else 'loss a pair'} |" in text
    for key in (name, f"eval_{name}"):
        [*_, last] = [row[key] for row in rows if key in row]
        assert f"| {last:.4f} |" in text, key
    assert ("| center |" in text) == (method == "reward") and ("| loss | sigmoid |" in text) == (method == "dpo")
    [line] = [line for line in text.splitlines() if "evaluate.py" in line]
    assert f"--method {method}" in line and ("--beta 0.2" in line) == (method == "dpo")
    ok(cli.call("evaluate", *shlex.split(line)[2:], "--no-retention", *cli.ON_CPU, cwd=runs))


@mutation("lora/export/card.py", 'aim=_aim(made.settings) if made else ""', 'aim=""', case="dpo")
@mutation("lora/methods/__init__.py", "if method in SETTINGS.get(name, (method,))}", "}", case="dpo")
@pytest.mark.parametrize("method", DATA)
def test_a_card_says_what_was_trained_for_and_how_far_it_came(runs, method):
    text = (runs / method / "README.md").read_text()
    assert {
        "reward": "It is a reward model, trained on pairs",
        "dpo": "DPO, loss `sigmoid`, β `0.2`, compared with the model it started from",
        "kto": "KTO, β `0.1`",
    }[method] in text
    what = {
        "reward": "pairs whose chosen answer has the higher score, held out",
        "dpo": "pairs whose chosen answer has the higher reward, held out",
        "kto": "answers that moved, compared with z, the way they are judged, held out",
    }[method]
    evaluated = [json.loads(line) for line in (runs / method / "metrics.jsonl").read_text().splitlines()]
    accuracies = [row["eval_accuracy"] for row in evaluated if "eval_accuracy" in row]
    assert f"| {what} | {accuracies[0]:.4f} | " in text
    assert ("good weight" in text) == (method == "kto") and ("| label smoothing |" not in text)
    assert ("pipeline_tag: text-classification" in text.replace('"', "")) == (method == "reward")
    assert ("`stage: rm`" in text) == (method == "reward") == ("python evaluate.py --adapter reward --data" in text)


@mutation("lora/train/record.py", 'PANELS = {"log_prob_": ', 'PANELS = {"log-prob_": ')
def test_the_picture_shows_both_sides(runs, tmp_path):
    panels = {}
    for method in DATA:
        rows = [json.loads(line) for line in (runs / method / "metrics.jsonl").read_text().splitlines()]
        panels[method] = panels_of([row for row in rows if "loss" in row])
        draw(rows, tmp_path / "x.png", "x", loss="loss a pair")
        assert (tmp_path / "x.png").read_bytes() == (tmp_path / "x.png").read_bytes() and (
            runs / method / "loss.png"
        ).exists()
    assert panels["reward"] == {"score": ["score_chosen", "score_rejected", "score_margin"]}
    assert panels["dpo"].keys() == {"log p, nats", "reward"}
    assert panels["dpo"]["log p, nats"] == ["log_prob_chosen", "log_prob_rejected"]
    assert set(panels["kto"]["reward"]) == {"reward_good", "reward_bad"}


@mutation(
    "lora/run/results.py",
    "REPORT, REFERENCE, REFERENCE_ADAPTER, card.FILE",
    "REPORT, REFERENCE_ADAPTER, card.FILE",
    case="dpo",
)
@pytest.mark.parametrize("method", DATA)
def test_a_run_of_a_method_is_replaced_by_one_of_sft_of_which_nothing_is_left(runs, tmp_path, method):
    shutil.copytree(runs / method, tmp_path / "out")
    assert (tmp_path / "out/reference.safetensors").exists() == (method != "reward")
    done = cli.train("out", "--overwrite", "--max-steps", 1, cwd=tmp_path)
    assert done.code == 0, done.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*cli.RUN_FILES, "checkpoints"}


@mutation("lora/run/adapter.py", "if has_value_head(args.method):", "if False:", case="judge-reward")
@pytest.mark.parametrize(
    ("start", "method", "said"),
    [
        ("judge", "reward", "head     judge: its value head goes on"),
        ("talker", "reward", "head     talker: it has no value head, so that begins at zero"),
        ("judge", "dpo", "note     judge: its value head is left behind, as --method dpo trains none"),
        ("talker", "dpo", None),
    ],
    ids=["judge-reward", "talker-reward", "judge-dpo", "talker-dpo"],
)
def test_the_head_of_an_adapter_goes_on_or_begins_at_zero_or_is_left_behind(work, tmp_path, start, method, said):
    shutil.copytree(work / start, tmp_path / start)
    argv = ("--method", method, "--init-adapter", start, "--max-steps", 1, "--lr", 1e-9)
    done = cli.call("train", "--model", cli.model_folder(), "--data", work / "pairs.jsonl", "--out", "out", *argv,
                    *cli.ON_CPU, cwd=tmp_path)  # fmt: skip
    assert done.code == 0, done.err
    assert (said in done.err) if said else ("value head" not in done.err)
    head = tmp_path / "out/value_head.safetensors"
    assert head.exists() == (method == "reward")
    if method == "reward":
        weight = load_file(head)["v_head.summary.weight"]
        given = load_file(work / "judge/value_head.safetensors")["v_head.summary.weight"]
        assert (weight - (given if start == "judge" else torch.zeros(1, 32))).abs().max() < 1e-6


@mutation(
    "lora/run/trainable.py", "value_head.place(model, None)  # of a base that scores", "pass  # of a base that scores"
)
@mutation("lora/run/trainable.py", "value_head.of(model) or value_head.add(", "value_head.add(")
def test_a_merged_reward_model_as_base_keeps_its_head_for_reward_alone(work, tmp_path):
    ok(cli.call("merge", "--adapter", work / "judge", "--out", "merged", "--no-receipt", cwd=tmp_path))
    common = ("--model", "merged", "--max-steps", 1, "--lr", 1e-9, *cli.ON_CPU)
    for out, argv in {
        "reward": ("--method", "reward", "--data", work / "pairs.jsonl"),
        "dpo": ("--method", "dpo", "--data", work / "pairs.jsonl"),
        "full": ("--full", "--data", work / "chats.jsonl"),
    }.items():
        done = cli.call("train", *common, *argv, "--out", out, cwd=tmp_path)
        assert done.code == 0, done.err
        assert (tmp_path / out / "value_head.safetensors").exists() == (out == "reward")
    given, now = (
        load_file(p)["v_head.summary.weight"]
        for p in (work / "judge/value_head.safetensors", tmp_path / "reward/value_head.safetensors")
    )
    assert (given - now).abs().max() < 1e-6


@mutation("lora/run/results.py", "if args.response_key else []", "if args.prompt_key else []")
def test_the_evaluation_of_pairs_under_a_key_of_their_own_can_be_run_as_it_stands(tmp_path):
    rows = [{"frage": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ok(cli.train("out", "--method", "dpo", "--prompt-key", "frage", cwd=tmp_path, data="pairs.jsonl"))
    [line] = [line for line in (tmp_path / "out/report.md").read_text().splitlines() if "evaluate.py" in line]
    assert "--prompt-key frage" in line and "--response-key" not in line
    ok(cli.call("evaluate", *shlex.split(line)[2:], "--no-retention", *cli.ON_CPU, cwd=tmp_path))


# ---- answers that the model samples ----------------------------------------------------------------------------------


def sampled(out, *argv, cwd, method="grpo", data=None, **how):
    words = (*rewarded(method), "--micro-tokens", 90, "--rank", 4, "--batch-size", 3, "--save-every", 2, *argv)
    return cli.train(out, "--method", method, *words, cwd=cwd, data=data or prompts_file(), **how)


def learned(folder) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


@mutation("lora/run/plan.py", '"" if what == "prompts" else f", {learned:,} trained', 'f", {learned:,} trained')
@pytest.mark.parametrize("method", SAMPLING)
def test_a_run_learns_from_a_task_and_a_function_of_the_users_and_logs_what_its_method_measures(tmp_path, method):
    done = sampled("out", "--max-steps", 3, "--kl", 0.1, cwd=tmp_path, method=method)
    assert done.code == 0, done.err
    assert "prompts  9, 153 tokens\n" in done.err and "own.py:vowels + multiply:0.5" in done.err
    rows = learned(tmp_path / "out")
    measured = {
        "reward",
        "reward_vowels",
        "reward_multiply",
        "no_signal",
        "entropy",
        "length",
        "ended",
        "kl",
        "clipped",
    }
    measured |= {"policy_loss", "value_loss", "explained", "kl_coefficient"} if method == "ppo" else set()
    for row in rows:
        assert measured <= row.keys() and all(math.isfinite(row[name]) for name in measured)
        assert row["reward"] == pytest.approx(row["reward_vowels"] + 0.5 * row["reward_multiply"], abs=1e-12)
        assert 0 <= row["no_signal"] <= 1 and 0 <= row["ended"] <= 1 and 0 < row["length"] <= 8
        assert 0 < row["entropy"] < math.log(300) and 0 <= row["clipped"] <= 1
    assert len(rows) == 3 and rows[0]["kl"] == pytest.approx(0, abs=1e-4) and abs(rows[-1]["kl"]) > 1e-3
    assert any(row["reward_vowels"] for row in rows)
    adapter = load_file(tmp_path / "out/adapter_model.safetensors")
    assert all(part.abs().max() > 0 for name, part in adapter.items() if "lora_B" in name)
    assert (tmp_path / "out/value_head.safetensors").exists() == (method == "ppo")


BROKEN = {  # what a function does in its fifth call, and the line that ends the run
    "raises": ("1 / 0", "it raises ZeroDivisionError"),
    "is not a number": ("return [float('nan')] * len(completions)", "nan"),
    "one value too few": ("return [1.0] * (len(completions) - 1)", "11 values"),
    "takes too long": ("__import__('time').sleep(60)", "it took more than 1 s"),
    "ends its process": ("__import__('os')._exit(3)", "exit code 3"),
}
OWN = """
calls = 0

def own(completions, **columns):
    global calls
    calls += 1
    if calls == 5:
        {}
    return [len(set(text)) / 10 for text in completions]
"""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    (folder / "own.py").write_text(OWN.format("pass"))
    done = sampled("out", "--reward", "own.py:own", *SHORT, cwd=folder)
    assert done.code == 0, done.err
    return folder / "out"


SHORT = ("--max-steps", 7, "--reward-timeout", 1)


@mutation("lora/run/settings.py", "between(0.01, 1e6), free=True)", "between(0.01, 1e6))", case="takes too long")
@pytest.mark.parametrize("case", BROKEN)
def test_a_reward_function_that_breaks_ends_the_run_with_one_line_and_its_checkpoint_goes_on(tmp_path, unbroken, case):
    body, why = BROKEN[case]
    (tmp_path / "own.py").write_text(OWN.format(body))
    done = sampled("out", "--reward", "own.py:own", *SHORT, cwd=tmp_path)
    [line] = done.errors
    assert done.code == 2 and line.startswith("error: wrong --reward in own.py"), done.err
    assert why in line and "--resume goes on" in line and "Traceback" not in done.err
    assert [row["step"] for row in learned(tmp_path / "out")] == [1, 2, 3, 4]
    (tmp_path / "own.py").write_text(OWN.format("pass"))
    done = go_on("--reward-timeout", 30, cwd=tmp_path)
    assert done.code == 0 and "step 4 of 7" in done.err, done.err
    (metrics, tensors, _), (expected, same, _) = result(tmp_path / "out", 7), result(unbroken, 7)
    assert metrics == expected and tensors == same


WRONG_ROWS = {  # flags, a row, and the line that refuses it
    "no columns of the task": ((), {"prompt": "Hi", "letters": "a"}, "no task for --reward multiply in a.jsonl:2: "),
    "no column of the function": ((), {"prompt": "What is 1 and 2?"}, "no column 'letters' in a.jsonl:2: vowels of "),
    "a document": ((), {"text": "Once."}, "unknown row in a.jsonl:2: a document asks nothing."),
    "a prompt that ends with an answer": (
        (), {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "wrong row in a.jsonl:2: message 2 of assistant is its last, expected a question of the user"),
    "a prompt without room": (("--overlong", "error", "--max-len", 30), {"prompt": "a" * 300, "letters": "a"},
                              "too long in a.jsonl:2: "),
    "tools": ((), {"prompt": "Hi", "letters": "a", "tools": [{"name": "x"}]}, "unknown row in a.jsonl:2: it has tools"),
    "a response key": (("--response-key", "letters"), {"prompt": "What is 1 and 2?", "letters": "a"},
                       "contradiction in the command line: --method grpo and --response-key: "),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_ROWS)
def test_what_a_method_that_samples_cannot_use_is_one_line_before_the_model_is_loaded(tmp_path, case):
    argv, row, expected = WRONG_ROWS[case]
    good = {"prompt": "What is 1 and 2?", "letters": "aeiou"}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
    base = cli.write_model(tmp_path / "model")
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-1000] + b"\xff" * 1000)
    done = sampled("out", *argv, cwd=tmp_path, data="a.jsonl", model=base)
    [line] = done.errors
    assert done.code == 2 and line.startswith(f"error: {expected}"), done.err
    assert line.count(". ") and not (tmp_path / "out").exists()


def test_pairs_and_judged_answers_are_prompts_too(work, tmp_path):
    for data in ("pairs.jsonl", "judged.jsonl"):
        argv = ("--method", "rloo", "--reward", "length:3", "--max-new-tokens", 4, "--group", 2, "--max-steps", 1)
        done = cli.train("out", *argv, "--overwrite", cwd=tmp_path, data=work / data)
        assert done.code == 0 and "prompts  " in done.err, done.err


@mutation("lora/adapter/passport.py", 'return (read(folder) or {}).get("method") == "ppo"', "return False")
@mutation("lora/export/card.py", "value_head.has(folder) and not passport.of_policy(folder)", "value_head.has(folder)")
@mutation("merge.py", "    if passport.of_policy(args.adapter):\n", "    if False:\n")
@mutation("lora/run/adapter.py", "if has_value_head(args.method):", 'if args.method == "reward":')
@mutation("lora/rewards/reward_model.py", "elif passport.of_policy(folder):", "elif False:")
def test_the_value_head_of_a_ppo_run_is_not_taken_for_that_of_a_reward_model(tmp_path):
    ok(sampled("out", "--max-steps", 1, cwd=tmp_path, method="ppo"))
    assert (tmp_path / "out/value_head.safetensors").exists()
    card = (tmp_path / "out/README.md").read_text()
    assert "text-generation" in card and "python generate.py --adapter out" in card and "stage: rm" not in card
    ok(done := cli.ask("--adapter", "out", "--prompt", "Hello.", cwd=tmp_path))
    assert "reward model" not in done.err
    few = ("--rows", 2, "--no-generate", "--no-retention", *cli.ON_CPU)
    ok(done := cli.call("evaluate", "--adapter", "out", "--data", cli.data_file(), *few, cwd=tmp_path))
    assert "nats per token" in done.out
    ok(cli.call("merge", "--adapter", "out", "--out", "merged", "--no-receipt", cwd=tmp_path))
    assert not (tmp_path / "merged/value_head.safetensors").exists()
    refused = sampled("two", "--reward", "out", cwd=tmp_path)
    assert refused.code == 2 and "foresees rewards and scores nothing" in refused.errors[0]
    ok(done := sampled("on", "--max-steps", 1, "--init-adapter", "out", "--lr", 1e-9, cwd=tmp_path, method="ppo"))
    assert "head     out: its value head goes on" in done.err
    heads = [load_file(tmp_path / run / "value_head.safetensors")["v_head.summary.weight"] for run in ("out", "on")]
    assert (heads[0] - heads[1]).abs().max() < 1e-6 < heads[0].abs().max()


@mutation("lora/run/settings.py", '            del found["loss"]\n', "            pass\n")
def test_settings_of_an_older_run_which_have_dpos_loss_whatever_the_method_are_a_config(tmp_path):
    ok(cli.train("out", cwd=tmp_path))
    settings = json.loads((tmp_path / "out/settings.json").read_text())
    (tmp_path / "old.json").write_text(json.dumps(settings | {"loss": "sigmoid"}))
    ok(cli.call("train", "--config", "old.json", "--out", "again", cwd=tmp_path))
