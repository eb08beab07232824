"""A command's settings: typed fields that are its flags, in groups."""

import json

import pytest
from safetensors.torch import load_file

from lora import settings
from lora.errors import BadInput
from lora.run.settings import TrainSettings
from lora.run.use_settings import EvaluateSettings, GenerateSettings, MergeSettings
from tests import cli
from tests.helpers import close
from tests.mutation import mutation

CLASSES = {"train": TrainSettings, "generate": GenerateSettings, "evaluate": EvaluateSettings, "merge": MergeSettings}


@mutation("lora/settings.py", "key=lambda one: GROUPS.index(one.group)", "key=lambda one: one.name")
def test_help_of_train_shows_its_flags_in_ten_groups_in_this_order(tmp_path):
    lines = cli.call("train", "--help", cwd=tmp_path).out.splitlines()
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    groups = ("model", "data", "method", "reinforcement", "adapter", "optimisation", "evaluation", "saving", "watching",
              "hardware")  # fmt: skip
    assert titles == ["options:", *(f"{group}:" for group in groups)]
    first = next(one.name for one in TrainSettings.flags().values() if one.group == "adapter")
    assert lines[lines.index("adapter:") + 1].startswith(f"  --{first.replace('_', '-')}")
    assert list(dict.fromkeys(one.group for one in TrainSettings.flags().values())) == list(groups)


@pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES)
def test_what_is_not_given_is_the_default_and_of_the_type_of_its_field(kind):
    args = kind.resolve([], "")
    assert args.given == set() and len(kind.flags()) > 17
    for name, one in kind.flags().items():
        value = getattr(args, name)
        assert value == one.default and one.kind in (bool, int, float, str)
        assert value is None or all(type(v) is one.kind for v in (value if one.many else [value]))
        assert one.group in settings.GROUPS and one.help


MANY = [(kind, one) for kind in CLASSES.values() for one in kind.flags().values() if one.many]
VALUES = ("q_proj=8", "k_proj=4", "v_proj=2")  # which a flag of nearly any range takes


@mutation("lora/settings.py", '"action": "extend" if one.many else "store",', '"action": "store",')
@pytest.mark.parametrize(("kind", "one"), MANY, ids=[f"{kind.__name__} {one.flag}" for kind, one in MANY])
def test_a_flag_of_several_values_that_is_given_again_adds_to_them(kind, one, tmp_path):
    """Of every command; what it adds to is never its default, nor what a config file or a saved run says."""
    a, b, c = ("wandb", "mlflow", "trackio") if one.name == "track" else VALUES
    assert getattr(kind.resolve([one.flag, a, b, one.flag, c], ""), one.name) == [a, b, c]
    assert getattr(kind.resolve([one.flag, a], ""), one.name) == [a]
    assert getattr(kind.resolve([one.flag, a], "", saved={one.name: [b, c]}), one.name) == [a]
    if "config" in kind.flags():
        (tmp_path / "c.json").write_text(json.dumps({one.name: [b, c]}))
        config = ["--config", str(tmp_path / "c.json")]
        assert getattr(kind.resolve(config, ""), one.name) == [b, c]
        assert getattr(kind.resolve([*config, one.flag, a, one.flag, c], ""), one.name) == [a, c]


def test_many_flags_are_known():
    assert {"data", "replay", "eval_data", "target", "adapter", "combine", "extract"} <= {one.name for _, one in MANY}


@mutation(
    "lora/settings.py", "{name: getattr(self, name) for name, one in self.flags().items() if one.saved}", "vars(self)"
)
def test_what_is_saved_is_json_without_places_and_switches_of_the_command():
    saved = TrainSettings.resolve(["--out", "x", "--overwrite", "--plain", "--rank", "3"], "").to_save()
    assert json.loads(json.dumps(saved)) == saved and saved["rank"] == 3
    assert not saved.keys() & {
        "given",
        "out",
        "overwrite",
        "preview",
        "check",
        "watch",
        "track",
        "resume",
        "config",
        "compile",
        "no_compile",
        "plain",
    }


# ---- --plain ---------------------------------------------------------------------------------------------------------


def no_fast_version() -> None:
    from lora.ops import fast_attention, fast_log_probs, fast_lora, fast_rms_norm, fast_swiglu

    def fail(*args, **kwargs):
        raise AssertionError("a fast version was called")

    for module in (fast_attention, fast_log_probs, fast_lora, fast_rms_norm, fast_swiglu):
        for name in set(vars(module)) & {"attention", "log_probs", "lora_linear", "linears", "rms_norm", "swiglu"}:
            setattr(module, name, fail)


@mutation("train.py", "    ops.use_plain(args.plain)", "    pass")
def test_a_plain_run_calls_no_fast_version_and_learns_the_same_in_float32(tmp_path):
    assert cli.train("fast", "--max-steps", 4, cwd=tmp_path).code == 0
    done = cli.train("plain", "--max-steps", 4, "--plain", cwd=tmp_path, before=no_fast_version)
    assert done.code == 0, done.err
    assert cli.train("none", cwd=tmp_path, before=no_fast_version).code == 1  # they are called without it
    rows = [
        [json.loads(line)["loss"] for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
        for out in ("fast", "plain")
    ]
    assert len(rows[0]) == 4 and all(abs(a - b) < 1e-4 for a, b in zip(*rows, strict=True))
    fast, plain = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("fast", "plain"))
    assert fast.keys() == plain.keys()
    assert all(close(plain[name], fast[name], 1e-4) for name in fast)


# ---- flags of methods ------------------------------------------------------------------------------------------------

LINE = "contradiction in the command line:"
FOREIGN = {  # flags, and the line that refuses them
    "--loss ipo": "--method sft and --loss, which is for dpo, grpo. Leave it out",
    "--beta 0.2": "--method sft and --beta, which is for dpo, kto. Leave it out",
    "--method reward --beta 0.2": "--method reward and --beta, which is for dpo, kto. Leave it out",
    "--method kto --loss hinge": "--method kto and --loss, which is for dpo, grpo. Leave it out",
    "--method kto --margin 1": "--method kto and --margin, which is for dpo, reward. Leave it out",
    "--method reward --sft-weight 1": "--method reward and --sft-weight, which is for dpo. Leave it out",
    "--method dpo --good-weight 2": "--method dpo and --good-weight, which is for kto. Leave it out",
    "--method dpo --bad-weight 2": "--method dpo and --bad-weight, which is for kto. Leave it out",
    "--method dpo --center 0.1": "--method dpo and --center, which is for reward. Leave it out",
    "--method kto --label-smoothing 0.2": "--method kto and --label-smoothing, which is for dpo. Leave it out",
    "--method dpo --label-smoothing 0.2": "--loss sigmoid and --label-smoothing, which is for cdpo, robust. "
    "Leave it out",
    "--method dpo --loss ipo --margin 1": "--loss ipo and --margin, which is for sigmoid, cdpo, robust, sigmoid_norm, "
    "simpo. Leave it out",
    "--method dpo --loss orpo --margin 0": "--loss orpo and --margin, which is for sigmoid, cdpo, robust, "
    "sigmoid_norm, simpo. Leave it out",
    "--method dpo --train-on last": "--method dpo and --train-on, which is for sft. Leave it out",
    "--method reward --train-on all": "--method reward and --train-on, which is for sft. Leave it out",
    "--method kto --overlong split": "--method kto and --overlong split, which is for documents. Leave it out",
    "--method reward --full": "--method reward and --full: a value head stands beside an adapter. Leave out --full",
    "--reward length:3": "--method sft and --reward, which is for grpo, rloo, ppo. Leave it out",
    "--method dpo --group 4": "--method dpo and --group, which is for grpo, rloo, ppo. Leave it out",
    "--method dpo --loss dapo": "--method dpo and --loss dapo. Give one of sigmoid, ipo, hinge, cdpo, robust, "
    "sigmoid_norm, simpo, orpo, apo_zero",
}
SAMPLED = {  # flags of a method that samples its answers, and the line that refuses them
    "--method grpo --loss ipo": "--method grpo and --loss ipo. Give one of dapo, grpo, bnpo, dr_grpo",
    "--method rloo --loss dapo": "--method rloo and --loss, which is for dpo, grpo. Leave it out",
    "--method rloo --scale none": "--method rloo and --scale, which is for grpo. Leave it out",
    "--method grpo --gamma 0.9": "--method grpo and --gamma, which is for ppo. Leave it out",
    "--method rloo --kl-target 3": "--method rloo and --kl-target, which is for ppo. Leave it out",
    "--method grpo --whiten-rewards": "--method grpo and --whiten-rewards, which is for ppo. Leave it out",
    "--method ppo --beta 0.1": "--method ppo and --beta, which is for dpo, kto. Leave it out",
    "--method ppo --full": "--method ppo and --full: a value head stands beside an adapter. Leave out --full",
    "--method grpo --full --kl 0.1": "--method grpo and --full with --kl: the model of step 0 would be a second one. "
    "Leave out --kl",
    "--method rloo --full": "--method rloo and --full without --kl 0: the model of step 0 would be a second one. "
    "Add --kl 0",
    "--method grpo --replay x:0.5": "--method grpo and --replay, which has no rewards. Leave it out",
    "--method rloo --dropout 0.1": "--method rloo and --dropout, which would sample from one model and train another. "
    "Leave it out",
    "--method ppo --kl 0 --kl-target 6": "--method ppo and --kl-target without a --kl to adapt. Leave out --kl 0",
    "--method ppo --compile": "--method ppo and --compile. Leave it out",
    "--method grpo --fsdp": "--method grpo and --fsdp. Leave it out",
    "--method grpo --overlong truncate": "--method grpo and --overlong truncate, which would cut questions. "
    "Give drop or error",
    "--method grpo --overlong split": "--method grpo and --overlong split, which is for documents. Leave it out",
    "--method ppo --train-on all": "--method ppo and --train-on, which is for sft. Leave it out",
    "--method grpo --group 1": "--method grpo and --group 1: an answer is compared with others of its group. "
    "Give 2 or more",
}  # fmt: skip


@mutation(
    "lora/methods/reward.py",
    'SETTINGS = ("margin", "center")',
    'SETTINGS = ("beta", "margin", "center")',
    case="--method reward --beta 0.2",
)
@mutation(
    "lora/run/settings.py",
    'elif self.method == "dpo" and (loss := self.loss or "sigmoid") not in of_losses.get(name, dpo.LOSSES):',
    "elif False:",
    case="--method dpo --loss ipo --margin 1",
)
@mutation("lora/run/settings.py", 'if self.train_on != "assistant":', "if False:", case="--method dpo --train-on last")
@mutation(
    "lora/run/settings.py", "if has_value_head(self.method) and self.full:", "if False:", case="--method reward --full"
)
@pytest.mark.parametrize("words", FOREIGN)
def test_a_flag_that_changes_nothing_with_this_method_or_loss_is_refused(words):
    args = TrainSettings.resolve([*words.split(), "--data", "x"], "")
    assert args.contradictions() == [f"{LINE} {FOREIGN[words]}"]


@mutation("lora/run/settings.py", 'self.quant not in (None, "none")', "self.quant is not None", case="none")
@pytest.mark.parametrize("quant", ["nf4", "int8", "keep", "none"])
def test_what_cannot_be_done_with_packed_weights_is_refused_by_name(quant):
    others = {"--full": "--full, which trains what would be packed", "--fsdp": "--fsdp, which shards numbers",
              "--compile": "--compile"}  # fmt: skip
    for flag, what in others.items():
        args = TrainSettings.resolve(["--quant", quant, flag], "")
        refused = [f"{LINE} --quant and {what}. Leave out one of them"]
        assert args.contradictions() == ([] if quant == "none" else refused)


@pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize("word", ["4bit", "NF4", "", "q4_k_m"])
def test_a_packing_that_is_none_is_refused_with_those_that_are(kind, word):
    with pytest.raises(BadInput, match=r"--quant .*none, nf4, int8, keep"):
        kind.resolve(["--quant", word], "")


@mutation("lora/run/settings.py", "if samples(self.method) else []", "if False else []",
          case="--method rloo --dropout 0.1")  # fmt: skip
@mutation("lora/run/settings.py", "self.group == 1 and self.method", "self.method", case="--method rloo --scale none")
@pytest.mark.parametrize("words", SAMPLED)
def test_a_flag_that_makes_no_sense_where_answers_are_sampled_is_refused(words):
    args = TrainSettings.resolve([*words.split(), "--data", "x", "--reward", "length:3"], "")
    assert args.contradictions() == [f"{LINE} {SAMPLED[words]}"]


@mutation("lora/run/settings.py", "if not self.reward and not self.check and self.preview is None:", "if False:")
@mutation("lora/run/settings.py", "*rewards.wrong(self.reward or ())", "")
@pytest.mark.parametrize("method", ["grpo", "rloo", "ppo"])
def test_a_method_that_samples_needs_rewards_but_to_look_at_the_data(method):
    def lines(*words: str) -> list[str]:
        return TrainSettings.resolve(["--method", method, *words], "").contradictions()

    [missing] = lines("--data", "x")
    assert missing.startswith(f"missing --reward in the command line: --method {method} learns from rewards. Add --rew")
    assert lines("--data", "x", "--check") == lines("--data", "x", "--preview", "1") == []
    assert len(lines("--data", "x", "--reward", "length:none", "format:[")) == 2


@pytest.mark.parametrize(
    "words",
    ["--method grpo --loss dr_grpo --scale none --kl 0.1 --epsilon 0.3 --epsilon-high 0.4 --updates 2",
     "--method grpo --temperature 0.7 --max-new-tokens 9 --reward-timeout 3",
     "--method grpo --full --kl 0", "--method rloo --full --kl 0", "--method rloo --group 2 --overlong error",
     "--method ppo --group 1 --gamma 0.9 --lam 1 --value-weight 1 --value-clip 0.1 --whiten-rewards --kl-target 6 "
     "--kl-horizon 5 --no-end-penalty 1", "--method ppo --patience 3 --eval-fraction 0.1",
     "--method grpo --patience 3"],
)  # fmt: skip
def test_flags_of_sampling_are_taken(words):
    argv = [*words.split(), "--data", "x", "--reward", "length:3", "multiply:0.5"]
    assert TrainSettings.resolve(argv, "").contradictions() == []


@pytest.mark.parametrize(
    "words",
    ["--method dpo --loss robust --label-smoothing 0.2 --margin 1 --beta 0.2 --sft-weight 1", "--method dpo --full",
     "--method dpo --loss simpo --margin 0", "--method kto --beta 1 --good-weight 2 --bad-weight 0 --full",
     "--method reward --margin 1 --center 0.1", "--method dpo --overlong truncate", "--train-on last --overlong split"],
)  # fmt: skip
def test_flags_that_are_of_the_method_are_taken(words):
    assert TrainSettings.resolve([*words.split(), "--data", "x"], "").contradictions() == []


@mutation("lora/run/settings.py", "if not self.data and not self.check:", "if False:", case="dpo")
@pytest.mark.parametrize(
    ("method", "what"),
    [(name, "pairs of a chosen and a rejected answer") for name in ("dpo", "reward")]
    + [("kto", "answers judged good or bad")]
    + [(name, "its own answers to prompts") for name in ("grpo", "rloo", "ppo")],
    ids=["dpo", "reward", "kto", "grpo", "rloo", "ppo"],
)
def test_a_method_that_learns_from_other_rows_needs_data(method, what):
    rewards = ["--reward", "length:3"] if method in ("grpo", "rloo", "ppo") else []
    [line] = TrainSettings.resolve(["--method", method, *rewards], "").contradictions()
    assert line == f"missing --data in the command line: --method {method} learns from {what}. Add FILE"


def test_all_that_is_wrong_with_a_method_is_said_at_once_and_nothing_is_made(tmp_path):
    words = ("--method", "reward", "--full", "--beta", 1, "--loss", "ipo", "--overlong", "split")
    done = cli.call("train", *words, cwd=tmp_path)
    assert done.code == 2 and len(done.errors) == 5 and list(tmp_path.iterdir()) == [], done.err


@pytest.mark.parametrize(
    "words", ["--beta 0", "--label-smoothing 0.5", "--label-smoothing -0.1", "--margin -1", "--loss bco",
              "--method trpo", "--sft-weight nan", "--center -1", "--good-weight inf"]
)  # fmt: skip
def test_numbers_and_names_outside_their_range_are_refused(words):
    with pytest.raises(BadInput):
        TrainSettings.resolve(["--method", "dpo", *words.split()], "")
