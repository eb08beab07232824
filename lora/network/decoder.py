"""A causal language model: hidden states of `layers`, and a head. A tied model owns no `lm_head`."""

import torch
from torch import nn

from lora import ops
from lora.device import upload
from lora.network.cache import Cache
from lora.network.config import ModelConfig
from lora.network.gemma4 import Gemma4Trunk
from lora.network.layers import Trunk
from lora.network.rope import rope_table


class Model(nn.Module):
    """A causal language model: `logits = head(trunk(tokens, ...))`.

    With `checkpoint_activations` only the input of every block is kept for the backward pass, which computes the rest
    again (Chen et al. 2016, https://arxiv.org/abs/1604.06174): the same numbers, dropout included.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.checkpoint_activations = config, False
        self.model = (Trunk if config.gemma4 is None else Gemma4Trunk)(config)
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

    def trunk(self, tokens, lengths: list[int] | None = None, positions=None, cache: Cache | None = None):
        """tokens (T,): documents of `lengths` end to end, or the next tokens of a cache's rows -> hidden states (T, D).

        `positions` (T,) default to 0, 1, ... in each document, and go on where the cache stands.
        """
        lengths = lengths or [len(tokens)]
        if positions is None:
            starts = cache.lengths if cache else [0] * len(lengths)
            positions = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
            positions = upload(positions, tokens.device)
        positions = positions.to(tokens.device)
        ropes = {kind: rope_table(self.config, positions, self.dtype, kind) for kind in set(self.config.ropes)}
        if cache:
            cache.begin(lengths)
        recompute = self.checkpoint_activations and torch.is_grad_enabled() and cache is None
        hidden = self.model(tokens, ropes, lengths, cache, recompute)
        if cache:
            cache.advance()
        return hidden

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states (T, D) -> logits (T, V)."""
        if self.config.tie_word_embeddings:
            return ops.logits(hidden, self.head_weight, self.config.final_logit_softcapping)
        return ops.soft_cap(self.lm_head(hidden), self.config.final_logit_softcapping)  # it may have an adapter

    def forward(self, tokens, lengths=None, positions=None, cache=None) -> torch.Tensor:
        return self.head(self.trunk(tokens, lengths, positions, cache))

    def groups(self):
        """Lists of Linears of one input, for `ops.fast_decoding`, and every other Linear in a list of its own."""
        for block in self.model.layers:
            groups = [getattr(block, block.mixer).group(), [block.mlp.gate_proj, block.mlp.up_proj]]
            yield from groups
            seen = {part for group in groups for module in group for part in module.modules()}
            for module in block.modules():  # an adapter's layer comes before its base
                if module not in seen and (type(module) is nn.Linear or hasattr(module, "low_rank")):
                    yield [module]
                    seen.update(module.modules())
        if not self.config.tie_word_embeddings:
            yield [self.lm_head]

    def new_cache(self, rows: int, room: int) -> Cache:
        return Cache(self.config.head_dims, rows, self.config.num_key_value_heads, room, self.dtype, self.device)
