"""Documents end to end in one call of a kernel for documents of several lengths, whose form PyTorch changed.

There is no such kernel for a CPU, so plain versions of PyTorch's `varlen_attn` stand in for it, with the arguments it
had in 2.11 and those it has had since 2.12.
"""

from unittest.mock import patch

import pytest
import torch
import torch.nn.attention.varlen as kernels
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lora import ops
from lora.ops import fast_attention, flash_attention, plain
from tests.helpers import close, far, some_tokens, tiny_model
from tests.mutation import mutation
from tests.network.test_config import CALM

TOL = 1e-12
LENGTHS = [5, 1, 12, 7]
H, KV, D = 6, 3, 8


def by_mask(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, window_size):
    """As documented: (T, H, d), query i of a document sees keys i - left to i + right; -1 is no limit. A document's
    tokens beyond the longest length are not seen by a kernel, which is told it."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    T, (left, right) = len(q), window_size
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    place = torch.arange(T)
    document = (place[:, None] >= cu_seq_q[None, 1:].long()).sum(1)  # (T,)
    offset = place - cu_seq_q.long()[document.clamp(max=len(cu_seq_q) - 2)]
    seen = document[:, None] == document[None, :]
    distance = place[None, :] - place[:, None]
    seen &= (distance <= right) if right >= 0 else True
    seen &= (-distance <= left) if left >= 0 else True
    seen &= (offset < max_k)[None, :] & (offset < max_q)[:, None]
    scores = torch.einsum("thd,shd->hts", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hts,shd->thd", weights, v)


def since_2_12(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
               window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):  # fmt: skip
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError("the same number of heads, or enable_gqa")
    return by_mask(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size)


def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
    return by_mask(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size)


@pytest.fixture(params=[since_2_12, of_2_11])
def stand_in(request, monkeypatch):
    """The calls that the kernel gets, while the CPU counts as a device that has it."""
    calls = []

    def seen(*args, **kwargs):
        calls.append(args)
        return request.param(*args, **kwargs)

    seen.__wrapped__ = request.param  # whose arguments inspect.signature reports
    monkeypatch.setattr(kernels, "varlen_attn", seen)
    monkeypatch.setattr(flash_attention, "takes_documents", lambda *_: True)
    flash_attention._varlen.cache_clear()
    yield calls
    flash_attention._varlen.cache_clear()


def some_heads(lengths=LENGTHS, seed=0) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = [(sum(lengths), heads, D) for heads in (H, KV, KV)]
    return [torch.randn(s, generator=random, dtype=torch.float64, requires_grad=True) for s in shapes]


def with_gradients(function, tensors) -> list[torch.Tensor]:
    """The output, and the gradients of a weighted sum of it."""
    out = function(*tensors)
    random = torch.Generator().manual_seed(9)
    weights = torch.randn(out.shape, generator=random, dtype=out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), tensors)]


@mutation(
    "lora/ops/flash_attention.py",
    "window_size=(window - 1 if window else -1, 0), **grouped)",
    "window_size=(window - 1 if window else -1, -1), **grouped)",
)
@mutation(
    "lora/ops/flash_attention.py",
    "upload([0, *accumulate(lengths)], device, torch.int32)",
    "upload([0, *accumulate(lengths[::-1])], device, torch.int32)",
)
@mutation("lora/ops/flash_attention.py", '"enable_gqa" in signature(varlen_attn).parameters', "False")
def test_one_call_for_all_documents_gives_what_each_alone_gives_and_its_gradients(stand_in):
    tensors = some_heads()
    got = with_gradients(lambda q, k, v: ops.attention(q, k, v, LENGTHS), tensors)
    for ours, wanted in zip(got, with_gradients(lambda *x: plain.attention(*x, LENGTHS), tensors), strict=True):
        assert close(ours, wanted, TOL)
        assert far(wanted, torch.zeros_like(wanted), TOL)
    assert len(stand_in) == 1
    assert stand_in[0][3].tolist() == [0, 5, 6, 18, 25] and stand_in[0][5:] == (12, 12)


def test_a_model_tells_the_kernel_of_its_documents_once_for_all_layers(stand_in, monkeypatch):
    model, tokens = tiny_model(), some_tokens(sum(LENGTHS))
    got = model.trunk(tokens, LENGTHS)
    assert len(stand_in) == 2 and stand_in[0][3] is stand_in[1][3] is stand_in[1][4]
    monkeypatch.setattr(flash_attention, "takes_documents", lambda *_: False)
    assert close(got, model.trunk(tokens, LENGTHS), TOL)
    assert len(stand_in) == 2


@mutation(
    "lora/ops/flash_attention.py",
    "window_size=(window - 1 if window else -1, 0)",
    "window_size=(window if window else -1, 0)",
)
def test_the_kernel_is_told_of_a_window_that_a_document_exceeds(stand_in):
    tensors = some_heads()
    for window, cap, calls in ((4, None, 1), (12, None, 2), (4, 1.5, 2)):
        got = with_gradients(lambda q, k, v, w=window, c=cap: ops.attention(q, k, v, LENGTHS, w, c), tensors)
        wanted = with_gradients(lambda *x, w=window, c=cap: plain.attention(*x, LENGTHS, w, c), tensors)
        assert all(close(a, b, TOL) for a, b in zip(got, wanted, strict=True))
        assert len(stand_in) == calls  # it knows of no caps


@pytest.mark.parametrize("window", [None, 4])
def test_the_installed_kernel_takes_these_arguments(window):
    """On `meta`, where shapes are computed and nothing else."""
    q, k, v = (x.detach().to("meta", torch.bfloat16).requires_grad_() for x in some_heads())
    out = flash_attention.attention(q, k, v, LENGTHS, window)
    out.sum().backward()
    assert (out.shape, k.grad.shape, v.grad.shape) == (q.shape, k.shape, v.shape)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "capability", "answer"),
    [
        ("cuda", torch.bfloat16, 64, (8, 0), True),
        ("cuda", torch.float16, 128, (9, 0), True),
        ("cuda", torch.float32, 64, (9, 0), False),
        ("cuda", torch.bfloat16, 64, (7, 5), False),
        ("cuda", torch.bfloat16, 20, (9, 0), False),
        ("cuda", torch.bfloat16, 264, (9, 0), False),
        ("cpu", torch.bfloat16, 64, (9, 0), False),
        ("mps", torch.float16, 64, (9, 0), False),
    ],
)
def test_the_kernel_is_used_where_it_is_one(monkeypatch, device, dtype, head_dim, capability, answer):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert flash_attention.takes_documents(torch.device(device), dtype, head_dim) is answer


# ---- a CPU: documents in rectangles, and the gradient in closed form ------------------------------------------------


@mutation("lora/ops/fast_attention.py", "dtype=dtype).triu(1)", "dtype=dtype).triu(2)")
@mutation("lora/ops/fast_attention.py", "torch.bmm(g, values.mT), P, -1", "torch.bmm(g, values.mT), 2 * P, -1")
@mutation("lora/ops/fast_attention.py", "scale, block.sees(d_K), not block.first)", "scale, block.sees(d_K), False)")
@mutation("lora/ops/fast_attention.py", "        G.index_fill_(0, order.filled, 0)\n", "")
@hypothesis_settings(max_examples=60, **CALM)
@given(
    st.lists(st.integers(1, 70), min_size=1, max_size=7), st.sampled_from((16, 48, 1000)), st.sampled_from((0, 2**30))
)
def test_documents_in_rectangles_equal_each_alone_with_their_gradients(lengths, rows, kept):
    tensors = some_heads(lengths)
    with patch.object(fast_attention, "ROWS", rows), patch.object(fast_attention, "KEPT_BYTES", kept):
        got = with_gradients(lambda q, k, v: fast_attention.attention(q, k, v, lengths), tensors)
    for ours, wanted in zip(got, with_gradients(lambda *x: plain.attention(*x, lengths), tensors), strict=True):
        assert close(ours, wanted, TOL)


@mutation("lora/ops/fast_attention.py", "q.element_size() > KEPT_BYTES", "q.element_size() > 10**12")
@mutation("lora/ops/flash_attention.py", "is_causal=mask is None", "is_causal=False")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_weights_are_formed_again_and_change_no_bit_of_the_gradients(dtype):
    tensors = [x.detach().to(dtype).requires_grad_() for x in some_heads([40, 90])]
    found, kept = [], []
    for limit in (2**30, 0):
        with patch.object(fast_attention, "KEPT_BYTES", limit):
            kept.append(sum(x.numel() for x in fast_attention.attention(*tensors, [40, 90]).grad_fn.saved_tensors))
            found.append(with_gradients(lambda q, k, v: fast_attention.attention(q, k, v, [40, 90]), tensors))
    (out, *gradients), (kernels_out, *again) = found
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    assert close(kernels_out, out, 4 * torch.finfo(dtype).eps)
    assert kept[1] == (H + 2 * KV) * (40 + 90) * D < kept[0]


def test_bfloat16_weights_are_off_by_one_unit_in_the_last_place_at_most():
    scores = torch.randn(50, 300, generator=torch.Generator().manual_seed(1)).mul(4).bfloat16()
    found, exact = scores.softmax(-1).double(), scores.double().softmax(-1)
    assert ((found - exact).abs() / exact).max() < 2**-7


def test_every_document_lies_in_one_rectangle_that_it_fills_to_four_fifths():
    lengths = (60, 17, 200, 58, 190, 33, 1)
    rectangles = fast_attention._rectangles(lengths)
    found = torch.cat([rectangle.flatten() for rectangle in rectangles])
    assert sorted(found[found >= 0].tolist()) == list(range(sum(lengths)))
    assert [rectangle.shape for rectangle in rectangles] == [(2, 208), (2, 64), (1, 48), (1, 32), (1, 16)]
