"""A command's settings: typed fields that are its flags, in groups."""

import json

import pytest
from safetensors.torch import load_file

from lora import settings
from lora.run.settings import TrainSettings
from lora.run.use_settings import EvaluateSettings, GenerateSettings, MergeSettings
from tests import cli
from tests.helpers import close
from tests.mutation import mutation

CLASSES = {"train": TrainSettings, "generate": GenerateSettings, "evaluate": EvaluateSettings, "merge": MergeSettings}


@mutation("lora/settings.py", "key=lambda one: GROUPS.index(one.group)", "key=lambda one: one.name")
def test_help_of_train_shows_its_flags_in_eight_groups_in_this_order(tmp_path):
    lines = cli.call("train", "--help", cwd=tmp_path).out.splitlines()
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    groups = ("model", "data", "method", "adapter", "optimisation", "evaluation", "saving", "hardware")
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
VALUES = ("q_proj=8", "k_proj=4", "v_proj=2")  # which a flag of any range takes


@mutation("lora/settings.py", '"action": "extend" if one.many else "store",', '"action": "store",')
@pytest.mark.parametrize(("kind", "one"), MANY, ids=[f"{kind.__name__} {one.flag}" for kind, one in MANY])
def test_a_flag_of_several_values_that_is_given_again_adds_to_them(kind, one, tmp_path):
    """Of every command; what it adds to is never its default, nor what a config file or a saved run says."""
    a, b, c = VALUES
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
    assert not saved.keys() & {"given", "out", "overwrite", "preview", "check", "resume", "config", "compile", "plain"}


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
