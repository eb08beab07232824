"""Chunks of the gated delta rule equal the recurrence, whatever the documents; so does the convolution before it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora import ops
from lora.ops import fast_gated_delta, fast_short_convolution, plain
from tests.helpers import DELTAS, close, far, patched, some_tokens, tiny_model
from tests.mutation import mutation

TOL = 1e-9


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Of 8 positions, so that short documents have several."""
    monkeypatch.setattr(fast_gated_delta, "CHUNK", 8)
    fast_gated_delta._layout.cache_clear()
    yield
    fast_gated_delta._layout.cache_clear()


def inputs(lengths, key_heads=1, group=1, d=4, value_dim=5, states=True, seed=0) -> list[torch.Tensor]:
    """q, k, v, g, β and states, float64."""
    random, heads, T = torch.Generator().manual_seed(seed), key_heads * group, sum(lengths)

    def normal(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64)

    rates = normal(T, heads).exp() / 3, torch.rand(T, heads, generator=random, dtype=torch.float64)
    found = [normal(T, key_heads, d), normal(T, key_heads, d), normal(T, heads, value_dim), -rates[0], 0.02 + rates[1]]
    found += [normal(len(lengths), heads, d, value_dim)] if states else []
    return [x.requires_grad_() for x in found]


def all_of(form, given, lengths, last: bool = True) -> list[torch.Tensor]:
    """Outputs, last states, and gradients of a weighted sum of both, or of outputs alone."""
    found = form.gated_delta(*given[:5], lengths, *given[5:])
    random = torch.Generator().manual_seed(7)
    weighted = [(y * torch.randn(y.shape, generator=random, dtype=y.dtype)).sum() for y in found]
    return [*found, *torch.autograd.grad(sum(weighted[: 1 + last]), given)]


@mutation("lora/ops/fast_gated_delta.py", "learned.addcmul_(S, self.fade[here])", "learned.add_(S)")
@mutation("lora/ops/fast_gated_delta.py", "ended, S = [S[len(P) :], *ended]", "ended, S = [*ended, S[len(P) :]]")
@mutation("lora/ops/fast_gated_delta.py", "weights[:, 1].diagonal(dim1=-2, dim2=-1).zero_()", "pass")
@mutation("lora/ops/fast_gated_delta.py", "of_rows[:, CHUNK:] += of_columns", "pass")
@mutation("lora/ops/fast_gated_delta.py", "dc[go, -1] += ", "dc[go, 0] += ")
@mutation("lora/ops/fast_gated_delta.py", "torch.cat((dS, d_last[len(dS) : len(K)]))", "dS")
@mutation("lora/ops/fast_gated_delta.py", "d_before[:n] += dS", "pass")
@mutation("lora/ops/fast_gated_delta.py", "x.unflatten(1, (KH, -1)).sum(2)", "x.unflatten(1, (-1, KH)).sum(1)")
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 26), min_size=1, max_size=6), key_heads=st.integers(1, 2), group=st.integers(1, 3),
    d=st.integers(1, 7), value_dim=st.integers(1, 7), states=st.booleans(), last=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_chunks_equal_the_recurrence_with_all_gradients(lengths, last, **how):
    given = inputs(lengths, **how)
    found, wanted = (all_of(form, given, lengths, last) for form in (fast_gated_delta, plain))
    assert all(close(a, b, TOL) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("lengths", [[9, 17, 3], [1, 1]])
def test_gradients_are_those_of_differences(lengths):
    given = inputs(lengths, group=2, d=3, value_dim=2)
    assert torch.autograd.gradcheck(lambda *x: fast_gated_delta.gated_delta(*x[:5], lengths, x[5]), given)


def test_a_document_is_alone_in_its_batch():
    lengths = [13, 1, 30, 8]
    given = inputs(lengths)
    together, _ = fast_gated_delta.gated_delta(*given[:5], lengths, given[5])
    assert far(together[:13], together[14:27], TOL)
    parts = zip(*(x.split(lengths) for x in given[:5]), given[5].split(1), strict=True)
    alone = [fast_gated_delta.gated_delta(*part[:5], [n], part[5])[0] for n, part in zip(lengths, parts, strict=True)]
    assert close(together, torch.cat(alone), TOL)


@mutation("lora/ops/fast_gated_delta.py", "c[:, None, :]).tril_()", "c[:, None, :])")
def test_what_fades_at_once_is_forgotten_without_a_nan():
    """e^{c_i - c_j} of the future is infinite."""
    given = inputs([20], seed=1)
    given[3] = (given[3].detach() - 200).requires_grad_()
    found, wanted = (all_of(form, given, [20]) for form in (fast_gated_delta, plain))
    assert all(close(a, b, TOL) for a, b in zip(found, wanted, strict=True))


@mutation("lora/ops/fast_gated_delta.py", "F.threshold(x, -60.0,", "F.threshold(x, -600.0,")
def test_no_weight_is_so_small_that_a_cpu_is_slow_with_it():
    """With decays of real models a step took 1.7 times as long."""
    q, k, v, g, beta = (x.detach().float() for x in inputs([20], states=False))
    chunks = fast_gated_delta._Chunks(q, k, v, 20 * g, beta, (20,))
    for x in (chunks.rows, chunks.omega, chunks.fade, chunks.products(slice(0, 3))[2]):
        assert (x == 0).any() and x[x != 0].abs().min() > 1e-32


@mutation("lora/ops/fast_gated_delta.py", "beta, states, U.to(v.dtype))", "beta, states, U.to(v.dtype), out)")
def test_beside_its_inputs_one_number_for_each_of_the_values_is_saved():
    """So memory is linear in the length: states of chunks are formed again."""
    q, k, v, g, beta = (x.detach().float().requires_grad_() for x in inputs([40, 3], states=False))
    saved = fast_gated_delta.gated_delta(q, k, v.bfloat16(), g, beta, [40, 3])[0].grad_fn.saved_tensors
    beside = [x for x in saved if x is not None and not any(x.shape == y.shape for y in (q, v, g))]
    assert [(x.shape, x.dtype) for x in beside] == [((6, 8, 5), torch.bfloat16)]  # six chunks of one head


@mutation("lora/ops/fast_short_convolution.py", "(before[rows] >= back)", "(before[rows] >= 0)")
@mutation("lora/ops/fast_short_convolution.py", "if backwards else places", "if not backwards else places")
@mutation("lora/ops/fast_short_convolution.py", "*reversed(products)], 1)", "*products], 1)")
@settings(max_examples=40, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), size=st.integers(2, 5), seed=st.integers(0, 99))
def test_shifted_sums_equal_the_convolution_with_gradients(lengths, size, seed):
    random = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(n, 3, generator=random, dtype=torch.float64) for n in (sum(lengths), size))
    x, w = x.requires_grad_(), w.T.contiguous().requires_grad_()
    found, wanted = [], []
    for form, into in ((fast_short_convolution, found), (plain, wanted)):
        y = form.short_convolution(x, w, lengths)
        into += [y, *torch.autograd.grad((y * y.detach().cos()).sum(), (x, w))]
    assert all(close(a, b, TOL) for a, b in zip(found, wanted, strict=True))


def test_activations_that_are_computed_again_give_the_same_gradients():
    model, tokens, found = patched(tiny_model(**DELTAS), dropout=0.2).train(), some_tokens(50), []
    parameters = [p for p in model.parameters() if p.requires_grad]
    for model.checkpoint_activations in (False, True):
        torch.manual_seed(0)
        loss = ops.cross_entropy(model.trunk(tokens, [33, 17]), model.head_weight, tokens)
        found.append(torch.autograd.grad(loss, parameters))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and far(found[0][0], 0 * found[0][0], 1e-6)
