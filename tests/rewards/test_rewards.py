"""All rewards of a run together: what is wrong is found before the model is loaded, values are weighed and summed."""

import math
from types import SimpleNamespace

import pytest

from data_gen.tasks import TASKS
from lora.errors import BadInput
from lora.rewards import Asked, Rewards
from tests.mutation import mutation

TEXT = {"prompt": "a text, so completions are texts"}


def rewards(*texts: str, timeout: float = 30) -> Rewards:
    args = SimpleNamespace(reward=list(texts), reward_timeout=timeout, micro_tokens=100, no_verify=False, full=False)
    return Rewards(args, TASKS, None, None)


def asked(*answers: tuple[str, int], row: dict | None = None) -> list[Asked]:
    return [Asked(row or {"a": 3, "b": 4}, [], text, tokens) for text, tokens in answers]


def rows(*given: dict) -> list:
    return [SimpleNamespace(row=row, where=f"d.jsonl:{i}", messages=[]) for i, row in enumerate(given, 1)]


@mutation(
    "lora/rewards/__init__.py",
    "max(0.0, 1 - abs(one.tokens - self.best) / self.best)",
    "1 - abs(one.tokens - self.best) / self.best",
)
@mutation(
    "lora/rewards/__init__.py",
    "1 - abs(one.tokens - self.best) / self.best)",
    "1 - abs(one.tokens - self.best) / one.tokens)",
)
def test_length_is_worth_most_at_n_tokens():
    with rewards("length:40") as one:
        assert one.score(asked(*(("", n) for n in (40, 20, 60, 0, 80, 500)))) == {"length": [1, 0.5, 0.5, 0, 0, 0]}


@mutation("lora/rewards/__init__.py", "[w * v for w, v in", "[v for w, v in")
@mutation("lora/rewards/__init__.py", "if values else math.nan for values in scored]", "for values in scored]")
def test_the_total_is_the_weighted_sum_of_what_could_be_scored(tmp_path):
    (tmp_path / "rules.py").write_text(
        "def good(completions): return [None if text == '' else len(text) for text in completions]\n"
        "def never(completions): return [None] * len(completions)\n"
    )
    with rewards(f"{tmp_path}/rules.py:good:0.5", "format:12:-1:2", "length:4:-1") as parts:
        parts.check(rows(TEXT))
        found = parts.score(asked(("=12", 4), ("12:-1", 2), ("", 4), row=TEXT))
        assert found == {"good": [3, 5, None], "format": [0, 1, 0], "length": [1, 0.5, 1]}
        assert parts.total(found) == [1.5 + 0 - 1, 2.5 + 2 - 0.5, 0 - 1]
    with rewards(f"{tmp_path}/rules.py:never", f"{tmp_path}/rules.py:good") as parts:
        parts.check(rows(TEXT))
        total = parts.total(parts.score(asked(("", 1), ("a", 1), row=TEXT)))
        assert math.isnan(total[0]) and total[1] == 1


@mutation("lora/rewards/__init__.py", 'yield f"no task for --reward {self.task} in {row.where}: {error}"', "raise")
def test_everything_that_is_wrong_is_found_before_the_model_is_loaded(tmp_path):
    (tmp_path / "rules.py").write_text("def f(completions, level): return [1]\ng = 3")
    names = (
        "multiply",
        f"{tmp_path}/rules.py:f",
        f"{tmp_path}/rules.py:g",
        f"{tmp_path}/none.py:f",
        f"{tmp_path}/judge",
    )
    with rewards(*names) as parts, pytest.raises(BadInput) as caught:
        parts.check(rows({"a": 3, "b": 4, "level": 1}, {"a": 3}))
    found = [problem.replace(str(tmp_path), "T") for problem in caught.value.problems]
    starts = (
        "wrong --reward in T/none.py: ",
        "wrong --reward in T/rules.py: g: ",
        "wrong --reward in T/judge: ",
        "no task for --reward multiply in d.jsonl:2: ",
        "no column 'level' in d.jsonl:2: f of T/rules.py",
    )
    assert all(line.startswith(start) for line, start in zip(found, starts, strict=True)), found
    assert all(part.worker.process is None or part.worker.process.poll() is not None for part in parts.parts[1:4])


def test_a_wrong_reward_begins_nothing():
    with pytest.raises(BadInput, match="N is '0'"):
        rewards("multiply", "length:0")


@mutation("lora/rewards/__init__.py", "if not sum(map(abs, values)) <= torch.finfo(torch.float32).max:", "if False:")
@pytest.mark.parametrize("parts", [(1.7e308, 1.7e308), (1e308 * 10, -1e308 * 10), (3.5e38,), (-3.5e38,)])
def test_a_sum_over_what_float32_holds_is_refused_in_a_line(parts):
    with rewards(*(f"length:{n}" for n in range(1, len(parts) + 1))) as all_of_them:
        values = {part.name: [value] for part, value in zip(all_of_them.parts, parts, strict=True)}
        with pytest.raises(BadInput, match="add up to more than float32 holds"):
            all_of_them.total(values)
        assert all_of_them.total({name: [3e38 / 2] for name in values}) == [3e38 / 2 * len(parts)]
