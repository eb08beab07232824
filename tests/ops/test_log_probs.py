"""The loss by chunks equals the formula and the NumPy oracle, with gradients, and never holds all logits."""

import weakref

import numpy as np
import pytest
import torch

from lora.ops import fast_log_probs, plain
from tests import oracle
from tests.helpers import close
from tests.mutation import mutation


def cross_entropy(*how, **rows) -> torch.Tensor:
    return -fast_log_probs.log_probs(*how, **rows).sum()


def loss_case(count: int = 23, width: int = 12, vocab: int = 37):
    generator = torch.Generator().manual_seed(count)
    hidden, head = (torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (count, vocab))
    return hidden, head, torch.randint(vocab, (count,), generator=generator)


def value_and_gradient(form, hidden, *rest):
    hidden = hidden.clone().requires_grad_()
    value = form(hidden, *rest)
    return value.detach(), torch.autograd.grad(3 * value, hidden)[0]


@mutation("lora/ops/fast_log_probs.py", "found[part] = scores.gather(1, y)[:, 0]", "found[part] = scores[:, 0]")
@mutation("lora/ops/fast_log_probs.py", "1, y, scores.new_ones(y.shape)", "1, y, scores.new_full(y.shape, 0.999)")
@pytest.mark.parametrize("rows", [1, 5, 7, 22, 23, 24, 256])
def test_chunked_loss_equals_plain_loss_equals_the_numpy_oracle(rows):
    hidden, head, targets = loss_case()
    chunked = value_and_gradient(cross_entropy, hidden, head, targets, None, 1.0, rows)
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


@mutation("lora/ops/fast_log_probs.py", "d_hidden = None if d_hidden is None else (d_hidden * upstream[:, None])",
          "d_hidden = None if d_hidden is None else (d_hidden * upstream.mean())")  # fmt: skip
@mutation("lora/ops/fast_log_probs.py", "True, upstream[part, None])", "True, upstream[:1, None].expand(len(z), 1))")
@mutation("lora/ops/fast_log_probs.py", "else e.div_(temperature)", "else e")
@mutation("lora/ops/fast_log_probs.py", "else some / temperature, -1", "else some * temperature, -1")
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("rows", [1, 5, 22, 23, 256])
def test_every_position_has_a_gradient_of_its_own(rows, cap, temperature):
    """Of Σ_n g_n log p_n with another g_n each, as preference losses have it; the head trains, too."""
    hidden, head, targets = loss_case()
    weights, found = torch.linspace(-1, 2, 23, dtype=torch.float64), []
    for form, more in ((plain.log_probs, ()), (fast_log_probs.log_probs, (rows,))):
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden, head)]
        values = form(*inputs, targets, cap, temperature, *more)
        found.append([values, *torch.autograd.grad((weights * values).sum(), inputs)])
    assert all(close(a, b, 1e-12) for a, b in zip(*found, strict=True))


def test_no_trained_position_is_a_loss_of_zero_and_no_gradient():
    hidden, head, targets = loss_case()
    value, gradient = value_and_gradient(cross_entropy, hidden[:0], head, targets[:0], None, 1.0, 5)
    assert value == 0 and gradient.shape == (0, 12)


def test_logits_never_exist_for_more_positions_than_a_chunk(monkeypatch):
    sizes = []
    log_softmax = fast_log_probs.F.log_softmax
    monkeypatch.setattr(
        fast_log_probs.F, "log_softmax", lambda x, *a, **k: sizes.append(len(x)) or log_softmax(x, *a, **k)
    )
    hidden, head, targets = loss_case()
    value_and_gradient(cross_entropy, hidden, head, targets, None, 1.0, 10)
    assert sizes == [10, 10, 3]


@mutation("lora/ops/fast_log_probs.py", "z = None  # freed", "pass  # freed")
def test_no_logits_are_left_when_those_of_the_next_rows_are_formed(monkeypatch):
    formed, left = [], []

    def logits(*args):
        left.append(sum(reference() is not None for reference in formed))
        z = plain.logits(*args)
        formed.append(weakref.ref(z))
        return z

    monkeypatch.setattr(fast_log_probs, "logits", logits)
    hidden = torch.randn(1000, 8, requires_grad=True)
    cross_entropy(hidden, torch.randn(50, 8), torch.zeros(1000, dtype=torch.long)).backward()
    assert left == [0] * 4
