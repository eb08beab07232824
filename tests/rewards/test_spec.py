"""--reward NAME[:WEIGHT]: what each spelling means, and which are refused."""

import pytest

from data_gen.tasks import TASKS
from lora.errors import BadInput
from lora.rewards import parse, parse_all, spec
from tests.mutation import mutation


@pytest.mark.parametrize(
    ("text", "kind", "name", "target", "weight"),
    [
        ("multiply", "task", "multiply", "multiply", 1.0),
        ("countdown:-0.5", "task", "countdown", "countdown", -0.5),
        ("length:40", "length", "length", "40", 1.0),
        ("length:40:0.5", "length", "length", "40", 0.5),
        (r"format:^\d+:\d+$", "format", "format", r"^\d+:\d+$", 1.0),
        (r"format:^\d+:\d+$:2", "format", "format", r"^\d+:\d+$", 2.0),
        ("format:at 12:30", "format", "format", "at 12", 30.0),
        ("format:at 12:30:1", "format", "format", "at 12:30", 1.0),
        ("rules.py:good", "function", "good", "rules.py:good", 1.0),
        ("a:b/rules.py:good:1e-3", "function", "good", "a:b/rules.py:good", 1e-3),
        (r"C:\x\rules.py:good:+2", "function", "good", r"C:\x\rules.py:good", 2.0),
        ("x.py:y/rules.py:gut_è", "function", "gut__", "x.py:y/rules.py:gut_è", 1.0),
        ("rules.py:nan", "function", "nan", "rules.py:nan", 1.0),
        ("weights/calm-judge", "model", "calm_judge", "weights/calm-judge", 1.0),
        ("weights/judge.2/:.5", "model", "judge_2", "weights/judge.2/", 0.5),
        (r"D:\judge", "model", r"D__judge", r"D:\judge", 1.0),
        ("./multiply", "model", "multiply", "./multiply", 1.0),
    ],
)
@mutation("lora/rewards/spec.py", 'FUNCTION = re.compile(r"(.+', 'FUNCTION = re.compile(r"([^:]+')
@mutation("lora/rewards/spec.py", "before, colon, number = text.rpartition", "before, colon, number = text.partition")
@mutation(
    "lora/rewards/spec.py", 're.sub("[^A-Za-z0-9_]", "_", name)', 're.sub("[^A-Za-z0-9_.]", "_", name)',
    case="weights/judge.2/:.5-model-judge_2-weights/judge.2/-0.5",
)  # fmt: skip
def test_a_reward_is_read_with_its_last_number_as_the_weight(text, kind, name, target, weight):
    assert parse(text) == (kind, name, target, weight)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("multiply:0", "weighs nothing"), ("multiply:nan", "weighs nothing"), ("x.py:f:-inf", "weighs nothing"),
        ("x.py:f:nan", "weighs nothing"),
        ("judge:1e999", "weighs nothing"), ("format:at 12:0", "behind a regular expression"),
        ("multiply:much", "'much' for a weight"), ("multiply:1:2", "'1:2' for a weight"), ("multiply:", "for a weight"),
        ("length", "says no N"), ("length:", "says no N"), ("length:0", "N is '0'"), ("length:-4", "N is '-4'"),
        ("length:4.5", "N is '4.5'"), ("length:x:2", "N is 'x'"), ("length:٤", "N is '٤'"), ("length:9999999", "N is"),
        ("format", "says no REGEX"), ("format:", "says no REGEX"), ("format::2", "empty regular expression"),
        ("format:(", "no regular expression: missing )"), ("format:" + "(" * 5000, "no regular expression"),
        ("rules.py", "names no function"), ("rules.py:2", "names no function"), ("rules.py:2x", "names no function"),
        ("rules.py:", "names no function"), ("", "names nothing"), (" ", "names nothing"), (":3", "names nothing"),
    ],
)  # fmt: skip
@mutation(
    "lora/rewards/spec.py",
    "if not math.isfinite(weight) or weight == 0:",
    "if weight == 0:",
    case="judge:1e999-weighs nothing",
)
@mutation(
    "lora/rewards/spec.py",
    "if not math.isfinite(weight) or weight == 0:",
    "if not math.isfinite(weight):",
    case="multiply:0-weighs nothing",
)
def test_a_wrong_reward_is_refused_with_the_reason(text, why):
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert why in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(BadInput, match=r"^wrong --reward in the command line: "):
        parse_all([text])


def test_all_wrong_rewards_are_named_at_once():
    with pytest.raises(BadInput) as caught:
        parse_all(["length:0", "multiply", "multiply:0", "rules.py"])
    assert len(caught.value.problems) == 3


@mutation("lora/rewards/spec.py", "if number > 1 else spec)", "if number > 2 else spec)")
def test_parts_of_one_name_are_numbered():
    given = ["format:a", "format:b", "x.py:format", "length:4", "a/judge", "b/judge:2", "multiply"]
    names = [one.name for one in parse_all(given)]
    assert names == ["format", "format-2", "format-3", "length", "judge", "judge-2", "multiply"]


def test_the_tasks_that_are_parsed_are_those_that_there_are():
    assert {*spec.TASKS} == TASKS.keys()
