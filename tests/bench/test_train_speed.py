"""The judgement of bench/train_speed.py: what it lets pass as the same work, and what it counts."""

import pytest
import torch

from bench import train_speed
from lora.text.chat import Example
from tests.mutation import mutation


def seen(dtype="bfloat16", **changed) -> dict:
    """What a side's process reports, or another that differs from it by what rounding does to `dtype`."""
    noise = {"float32": 1e-6, "bfloat16": 1e-2}[dtype] * changed.pop("noisy", 0)
    random = torch.Generator().manual_seed(0)
    gradients = {name: torch.randn(400, generator=random, dtype=torch.float64) for name in "ab"}
    for tensor in gradients.values():
        tensor += noise * torch.randn(400, generator=random, dtype=torch.float64)
    return {"rows": [{"loss": 2.0, "norm": 1.0} | changed, {"loss": 1.9, "norm": 0.9}], "gradients": gradients}


def other_tensor(run: dict, share: float) -> dict:
    """With one tensor of the gradient turned: `share` of it is another direction."""
    run["gradients"]["b"] += share * run["gradients"]["b"].roll(1)
    return run


def later(run: dict, **changed) -> dict:
    """With another second step."""
    run["rows"][1] |= changed
    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_is_no_difference(dtype, capsys):
    train_speed.agree("rows", dtype, {"ours": seen(dtype), "B0": seen(dtype, noisy=1), "B1": seen(dtype, noisy=1)})
    assert capsys.readouterr().out.count("parity    rows") == 3


@mutation("bench/train_speed.py", "if not row[name] < bound:", "if row[name] > bound:")
@mutation("bench/train_speed.py", "return torch.tensor(list(values)).max().item()", "return max(values)")
@pytest.mark.parametrize("side", ["B0", "B1"])
@pytest.mark.parametrize(
    "dtype, what, peer",
    [
        ("float32", "loss", seen("float32", loss=2.0001)),
        ("float32", "norm", seen("float32", norm=1.0001)),
        ("float32", "worst tensor", other_tensor(seen("float32"), 1e-4)),
        ("bfloat16", "mean loss", seen(loss=2.04)),
        ("bfloat16", "norm", seen(norm=1.03)),
        ("bfloat16", "1 - cosine", other_tensor(seen(), 0.5)),
        ("bfloat16", "mean loss", seen(loss=float("nan"))),
        ("float32", "loss", later(seen("float32"), loss=float("nan"))),
    ],
)
def test_more_than_rounding_voids_the_speed(side, dtype, what, peer):
    runs = {"ours": seen(dtype), "B0": seen(dtype), "B1": seen(dtype)} | {side: peer}
    with pytest.raises(SystemExit, match=f"void: rows in {dtype}, ours and {side}: {what} "):
        train_speed.agree("rows", dtype, runs)


@mutation(
    "bench/train_speed.py",
    '"its worst tensor": worst(apart(a, b) for a, b in pairs),',
    '"its worst tensor": min(apart(a, b) for a, b in pairs),',
)
def test_one_wrong_tensor_among_many_voids_the_speed():
    def many(run):
        return run | {"gradients": run["gradients"] | {f"c{i}": torch.ones(4000).double() for i in range(9)}}

    runs = {"ours": many(seen()), "B0": many(other_tensor(seen(), 0.5)), "B1": many(seen())}
    with pytest.raises(SystemExit, match="its worst tensor"):
        train_speed.agree("rows", "bfloat16", runs)


def test_examples_have_the_lengths_and_shares_of_their_workload_and_the_same_seed_gives_them_again():
    shape, text = train_speed.WORKLOADS["short"], list(range(1000))
    steps = train_speed.make_steps(shape, text, 20, "seed")
    assert steps == train_speed.make_steps(shape, text, 20, "seed") != train_speed.make_steps(shape, text, 20, "other")
    examples = [Example(*example) for step in steps for example in step]
    assert len(examples) == 20 * shape.examples
    for example in examples:
        size, trained = len(example.tokens), sum(example.trained)
        assert shape.low <= size <= shape.high and 0.3 * size - 1 <= trained <= 0.5 * size + 1
        assert example.trained == [False] * (size - trained) + [True] * trained
    assert len({len(example.tokens) for example in examples}) > 50


@mutation(
    "bench/train_speed.py",
    'rows["ours" if side == mine else side], strict=True)',
    'sorted(rows["ours" if side == mine else side], key=str), strict=True)',
)
def test_ratios_are_taken_step_by_step(monkeypatch):
    """A peer that is always three times as slow: however uneven the steps and rounds, that is the ratio, without a
    spread."""
    monkeypatch.setattr(train_speed.machine, "with_amx", lambda: False)
    times = [[1.0, 4.0, 2.0], [3.0, 12.0, 6.0]]

    def run(factor, peak):
        rows = [[{"seconds": factor * t, "matmul seconds": t / 2} for t in times_] for times_ in times]
        return [{"peak": peak} for _ in times], rows

    sides = {"ours": run(1.5, 2.2e9), "compiled": run(1, 2e9), "B0": run(3, 8e9), "B1": run(2.5, 4e9)}
    found = train_speed.reached(
        "short",
        {side: runs for side, (runs, _) in sides.items()},
        {side: rows for side, (_, rows) in sides.items()},
    )
    assert {key: round(row["value"], 9) for key, row in found.items()} == {
        "matmuls": 2, "peak GB": 2.2, "compiled": 1.5, "B0": 3, "B1": 2.5, "memory": 0.25, "memory B1": 0.5,
    }  # fmt: skip
    assert (
        found["B0"]["from"] == found["B0"]["to"] and [found[key]["met"] for key in ("B0", "B1", "memory")] == [True] * 3
    )
    assert not found["matmuls"]["met"]
