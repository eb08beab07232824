"""One decoder for all families, with the hub's module names; what differs between families are values of the config.

Tokens are documents laid end to end: no batch axis and no padding. A tied model owns no `lm_head`.
RMSNorm: https://arxiv.org/abs/1910.07467. SwiGLU: https://arxiv.org/abs/2002.05202.
"""

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora.device import ROUND, upload
from lora.network.cache import Cache
from lora.network.config import ModelConfig
from lora.network.rope import rope_table, rotate
from lora.ops.attention import Documents, attend
from lora.ops.linear import together


def wide(dtype: torch.dtype) -> torch.dtype:
    """At least float32: what norms, softmax, angles and losses are computed in."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, offset: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.offset = eps, offset

    @property
    def gain(self) -> torch.Tensor:
        """What the normed are multiplied by, (D,): the weight; or offset + weight, in float32 as the reference does."""
        return self.offset + self.weight.to(wide(self.weight.dtype)) if self.offset else self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., D) -> (..., D)"""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self.plain(x)
        return _Normed.apply(x, self.gain, self.eps)

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """The formula as written; `forward` keeps less of it for the backward pass."""
        y = x.to(wide(x.dtype))
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.offset:
            return (self.gain * y).to(x.dtype)
        return self.weight * y.to(x.dtype)  # rounded before the weight, as the reference does


class _Normed(torch.autograd.Function):
    """n = x / RMS(x) and n w, with the gradient in closed form: ∂x = (g - n mean(g n)) / RMS(x) where g = w ∂L/∂(n w).

    Kept is n in the dtype of x, where autograd would keep x and n in float32.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        y = x.to(wide(x.dtype))
        scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        n = (y * scale).to(weight.dtype)
        ctx.save_for_backward(n.to(x.dtype), scale, weight)
        return (weight * n).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        n, scale, weight = ctx.saved_tensors
        d_weight = (gradient * n).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        g, n = (gradient * weight).to(scale.dtype), n.to(scale.dtype)
        g.addcmul_(n, (g * n).mean(-1, keepdim=True), value=-1).mul_(scale)
        return g.to(gradient.dtype), d_weight, None


@contextmanager
def formed_again(product: torch.Tensor, form: Callable[[], torch.Tensor]):
    """Inside the block autograd does not keep `product` for the backward pass: it calls `form` there."""
    place, shape = product.data_ptr(), product.shape  # the place alone: all empty tensors have the same

    def pack(kept: torch.Tensor):
        return form if kept.data_ptr() == place and kept.shape == shape else kept

    def unpack(kept):
        return kept() if kept is form else kept

    with saved_tensors_hooks(pack, unpack):
        yield


class Attention(nn.Module):
    """What lies before and after attention itself, which knows of documents and caches."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.index, self.head_dim = index, config.head_dim
        q_size, kv_size = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = (
                RMSNorm(config.head_dim, config.rms_norm_eps, config.norm_offset) for _ in range(2)
            )
        self.qk_norm, self.rope_interleaved = config.qk_norm, config.rope_interleaved
        self.rope, self.bounds = config.ropes[index], (config.windows[index], config.attn_logit_softcapping)
        self.stretch = (config.head_dim / config.query_pre_attn_scalar) ** 0.5  # attention itself divides by √d

    def heads(self, x, cos, sin) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x (T, D) -> queries (T, H, d), keys and values (T, KV, d)."""
        T, d = x.shape[0], self.head_dim
        q, k, v = (y.view(T, -1, d) for y in together(x, [self.q_proj, self.k_proj, self.v_proj]))
        if self.qk_norm:
            q, k = rather_again(self.q_norm, q), rather_again(self.k_norm, k)
        if self.rope:
            q, k = rotate(torch.cat((q, k), 1), cos, sin, self.rope_interleaved).split((q.shape[1], k.shape[1]), 1)
        return (q if self.stretch == 1 else q * self.stretch), k, v


# Of bf16 too they are computed in float32, and rounded.
ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = together(x, [self.gate_proj, self.up_proj])
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self.down_proj(rather_again(self.gated, gate, up))
        gate = self.activation(gate)
        product = gate * up
        with formed_again(product, lambda: gate * up):
            return self.down_proj(product)

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.activation(gate) * up


def rather_again(function: Callable, *arguments) -> torch.Tensor:
    """In compiled code the result is not kept for the backward pass, but formed again: it is cheap, and wide."""
    if not torch.compiler.is_compiling():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False)


class Block(nn.Module):
    """Attention stands between two halves that know nothing of documents: those can be compiled, for one T."""

    compiled: tuple[Callable, Callable] | None = None

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.norms = config.norms
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_offset)
        self.self_attn = Attention(config, index)
        for name in filter(None, config.norms[1:]):
            self.add_module(name, RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_offset))
        self.mlp = MLP(config)

    def normed(self, place: int, x: torch.Tensor) -> torch.Tensor:
        """x by the norm before attention, after it, before the MLP or after it; where there is none, x."""
        name = self.norms[place]
        return rather_again(getattr(self, name), x) if name else x

    def before(self, x, cos, sin):
        """x (T, D) -> q, k, v of `Attention.heads`."""
        return self.self_attn.heads(self.normed(0, x), cos, sin)

    def after(self, x, y):
        """x (T, D) and what attention found (T, H·d) -> (T, D)."""
        x = x + self.normed(1, self.self_attn.o_proj(y))
        return x + self.normed(3, self.mlp(self.normed(2, x)))

    def forward(self, x, cos, sin, documents: Documents, cache: Cache | None = None, rows=None) -> torch.Tensor:
        """x (T, D) -> (T, D), or of `rows` (N,) alone, (N, D): after attention no position needs another."""
        before, after = self.compiled if self.compiled and torch.is_grad_enabled() else (self.before, self.after)
        q, k, v = before(x, cos, sin)
        index, bounds = self.self_attn.index, self.self_attn.bounds
        y = attend(q, k, v, documents, *bounds) if cache is None else cache.attend(index, q, k, v, *bounds)  # (T, H, d)
        x, y = (x, y) if rows is None else (x[rows], y[rows])
        return after(x, y.flatten(1))


class Trunk(nn.Module):
    """Everything but the head; the hub calls it `model`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        # zeros, to be loaded: nn.Embedding's own normal_ on `meta` would import torch's compiler, more than a second
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.zeros(config.vocab_size, config.hidden_size), freeze=False
        )
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_offset)


class Model(nn.Module):
    """A causal language model: `logits = head(trunk(tokens, ...))`.

    With `checkpoint_activations` only the input of every block is kept for the backward pass, which computes the rest
    again (Chen et al. 2016, https://arxiv.org/abs/1604.06174): the same numbers, dropout included.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.checkpoint_activations, self.compiled = config, False, False
        self.model = Trunk(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def head_weight(self) -> torch.Tensor:
        """The vocabulary projection, (V, D): the embedding itself where it is tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def trunk(self, tokens, lengths: list[int] | None = None, positions=None, cache: Cache | None = None, rows=None):
        """tokens (T,): documents of `lengths` end to end, or the next tokens of a cache's rows -> hidden states (T, D).

        `positions` (T,) default to 0, 1, ... in each document, and go on where the cache stands. Where only some
        positions are wanted, `rows` (N,), the result is (N, D), and the last block leaves the others out.
        """
        lengths = lengths or [len(tokens)]
        if positions is None:
            starts = cache.lengths if cache else [0] * len(lengths)
            positions = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
            positions = upload(positions, tokens.device)
        c, positions = self.config, positions.to(tokens.device)
        tables = {kind: rope_table(c, positions, self.dtype, kind) for kind in set(c.ropes)}
        if cache:
            cache.begin(lengths)
        x = self.model.embed_tokens(tokens)  # (T, D)
        if c.embedding_scale != 1:
            x = x * torch.tensor(c.embedding_scale, dtype=x.dtype)  # rounded to the dtype, as the reference does
        documents = Documents(lengths) if cache else Documents.of(lengths, x.device, x.dtype, c.head_dim)
        if self.compiled and not cache and torch.is_grad_enabled():
            x.requires_grad_()  # as the input of every other block: else the first one would be compiled by itself
        again = self.checkpoint_activations and torch.is_grad_enabled() and cache is None
        count = len(tokens) if rows is None else len(rows)
        rows = rows if rows is None else F.pad(rows, (0, -count % ROUND))
        early = not (self.compiled and torch.is_grad_enabled())  # what is compiled always sees as many positions
        for block in self.model.layers:
            wanted = rows if early and block is self.model.layers[-1] else None
            cos, sin = tables[block.self_attn.rope]
            if again:
                x = checkpoint(block, x, cos, sin, documents, None, wanted, use_reentrant=False)
            else:
                x = block(x, cos, sin, documents, cache, wanted)
        if cache:
            cache.advance()
        return self.model.norm((x if early or rows is None else x[rows])[:count])

    def compile_blocks(self, **options) -> None:
        """From now on training runs compiled blocks, by `torch.compile` with `options`: once for all blocks that are
        patched alike, in the first step with `T` tokens a micro-batch, and once more in the first with another number.
        """
        self.compiled = True
        for block in self.model.layers:
            block.compiled = tuple(torch.compile(half, **options) for half in (block.before, block.after))

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (T, D) -> logits (T, V)."""
        cap = self.config.final_logit_softcapping
        logits = F.linear(hidden, self.head_weight) if self.config.tie_word_embeddings else self.lm_head(hidden)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(self, tokens, lengths=None, positions=None, cache=None) -> torch.Tensor:
        return self.head(self.trunk(tokens, lengths, positions, cache))

    def groups(self):
        """Lists of Linears of one input, for `linear.prepared`."""
        for block in self.model.layers:
            attention, mlp = block.self_attn, block.mlp
            yield [attention.q_proj, attention.k_proj, attention.v_proj]
            yield [attention.o_proj]
            yield [mlp.gate_proj, mlp.up_proj]
            yield [mlp.down_proj]

    def new_cache(self, rows: int, room: int) -> Cache:
        c = self.config
        return Cache(c.num_hidden_layers, rows, c.num_key_value_heads, room, c.head_dim, self.dtype, self.device)
