"""The loss by chunks equals the formula and the NumPy oracle, with gradients, and never holds all logits."""

import weakref

import numpy as np
import pytest
import torch

from lora.ops import fast_cross_entropy, plain
from lora.ops.fast_cross_entropy import cross_entropy
from tests import oracle
from tests.helpers import close
from tests.mutation import mutation


def loss_case(count: int = 23, width: int = 12, vocab: int = 37):
    generator = torch.Generator().manual_seed(count)
    hidden, head = (torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (count, vocab))
    return hidden, head, torch.randint(vocab, (count,), generator=generator)


def value_and_gradient(form, hidden, *rest):
    hidden = hidden.clone().requires_grad_()
    value = form(hidden, *rest)
    return value.detach(), torch.autograd.grad(3 * value, hidden)[0]


@mutation("lora/ops/fast_cross_entropy.py", "loss -= scores.gather(1, y).sum()", "loss -= scores.gather(1, y).mean()")
@mutation(
    "lora/ops/fast_cross_entropy.py",
    "for start in range(0, len(hidden), rows):",
    "for start in range(0, len(hidden) - rows + 1, rows) or [0]:",
)
@mutation("lora/ops/fast_cross_entropy.py", "scores.new_full(y.shape, -1.0)", "scores.new_full(y.shape, -0.999)")
@pytest.mark.parametrize("rows", [1, 5, 7, 22, 23, 24, 256])
def test_chunked_loss_equals_plain_loss_equals_the_numpy_oracle(rows):
    hidden, head, targets = loss_case()
    chunked = value_and_gradient(cross_entropy, hidden, head, targets, None, rows)
    formula = value_and_gradient(plain.cross_entropy, hidden, head, targets)
    logits = hidden.numpy() @ head.numpy().T
    total, count = oracle.nll(logits, targets.tolist(), [True] * 23)
    assert count == 23
    softmax = np.stack([oracle.softmax(row) for row in logits])
    softmax[np.arange(23), targets.numpy()] -= 1
    expected = torch.tensor(total, dtype=torch.float64), torch.from_numpy(3 * softmax @ head.numpy())
    for a, b, c in zip(chunked, formula, expected, strict=True):
        assert close(a, c, 1e-12) and close(b, c, 1e-12)


def test_chunked_loss_in_bfloat16_sums_in_float32():
    hidden, head, targets = loss_case(300, 16, 50)
    hidden, head = hidden.bfloat16(), head.bfloat16()
    loss = cross_entropy(hidden.clone().requires_grad_(), head, targets, rows=64)
    assert loss.dtype == torch.float32
    logits = (hidden @ head.T).double().numpy()
    assert close(loss, torch.tensor(oracle.nll(logits, targets.tolist(), [True] * 300)[0], dtype=torch.float64), 1e-5)


def test_a_loss_without_gradients_and_a_trainable_head_have_the_same_value():
    hidden, head, targets = loss_case()
    expected = plain.cross_entropy(hidden, head, targets)
    assert close(cross_entropy(hidden, head, targets, rows=5), expected, 1e-12)
    head = head.clone().requires_grad_()
    trained = torch.autograd.grad(cross_entropy(hidden, head, targets, rows=5), head)[0]
    assert close(trained, torch.autograd.grad(plain.cross_entropy(hidden, head, targets), head)[0], 1e-12)


def test_no_trained_position_is_a_loss_of_zero_and_no_gradient():
    hidden, head, targets = loss_case()
    value, gradient = value_and_gradient(cross_entropy, hidden[:0], head, targets[:0], None, 5)
    assert value == 0 and gradient.shape == (0, 12)


def test_logits_never_exist_for_more_positions_than_a_chunk(monkeypatch):
    sizes = []
    log_softmax = fast_cross_entropy.F.log_softmax
    monkeypatch.setattr(
        fast_cross_entropy.F, "log_softmax", lambda x, *a, **k: sizes.append(len(x)) or log_softmax(x, *a, **k)
    )
    hidden, head, targets = loss_case()
    value_and_gradient(cross_entropy, hidden, head, targets, None, 10)
    assert sizes == [10, 10, 3]


@mutation("lora/ops/fast_cross_entropy.py", "z = scores = e = None  # freed", "pass  # freed")
def test_no_logits_are_left_when_those_of_the_next_rows_are_formed(monkeypatch):
    formed, left = [], []

    def logits(*args):
        left.append(sum(reference() is not None for reference in formed))
        z = plain.logits(*args)
        formed.append(weakref.ref(z))
        return z

    monkeypatch.setattr(fast_cross_entropy, "logits", logits)
    hidden = torch.randn(1000, 8, requires_grad=True)
    fast_cross_entropy.cross_entropy(hidden, torch.randn(50, 8), torch.zeros(1000, dtype=torch.long)).backward()
    assert left == [0] * 4
