"""Keys and values of what a batch has seen, for decoding: one position a row and forward pass, or many."""

import torch
from torch.nn import functional as F

from lora.model.attention import one_document


class Cache:
    """Keys and values of a batch: per layer (B, KV, room, d), row b holding `lengths[b]` positions.

    A forward pass calls `begin` once, `attend` in every layer, and `advance` once.
    """

    def __init__(self, layers: int, rows: int, kv_heads: int, room: int, head_dim: int, dtype, device):
        shape = (layers, rows, kv_heads, room, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * rows

    def begin(self, new: list[int]) -> None:
        """`new[b]` positions of row b come next. Where it is one for every row, what all layers share is made here."""
        self.new, self.room = new, max(self.lengths) + 1
        self.where, self.mask = (slice(None), slice(None), self.room - 1), None  # all rows end in the same column
        if max(new) == 1 == min(new) and min(self.lengths) + 1 < self.room:
            device, ends = self.keys.device, torch.tensor(self.lengths, device=self.keys.device)  # (B,)
            self.where = (torch.arange(len(ends), device=device), slice(None), ends)
            beyond = torch.arange(self.room, device=device) > ends[:, None]  # (B, room)
            zeros = torch.zeros(beyond.shape, dtype=self.keys.dtype, device=device)
            self.mask = zeros.masked_fill(beyond, float("-inf"))[:, None, None]  # added to scores (B, KV, G, room)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Append k, v (T, KV, d), new positions end to end, and let each of q (T, H, d) see all up to its own."""
        keys, values = self.keys[layer], self.values[layer]
        if max(self.new) == 1 == min(self.new):
            return self._attend_one(keys, values, q, k, v)
        outputs = []
        for row, (q1, k1, v1) in enumerate(zip(*(x.split(self.new) for x in (q, k, v)), strict=True)):
            start, end = self.lengths[row], self.lengths[row] + self.new[row]
            keys[row, :, start:end], values[row, :, start:end] = k1.transpose(0, 1), v1.transpose(0, 1)
            outputs.append(one_document(q1, keys[row, :, :end].transpose(0, 1), values[row, :, :end].transpose(0, 1)))
        return torch.cat(outputs)

    def _attend_one(self, keys, values, q, k, v):
        """One new position in every row, all rows at once. The queries of a group stand where positions would, (B, KV,
        G, d): PyTorch's kernel then reads each key once for all of them."""
        (B, H, d), KV = q.shape, k.shape[1]
        keys[self.where], values[self.where] = k, v
        q = q.reshape(B, KV, H // KV, d)
        out = F.scaled_dot_product_attention(q, keys[:, :, : self.room], values[:, :, : self.room], attn_mask=self.mask)
        return out.view(B, H, d)

    def advance(self) -> None:
        self.lengths = [length + n for length, n in zip(self.lengths, self.new, strict=True)]

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.lengths = [self.lengths[row] for row in rows]
