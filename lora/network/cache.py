"""What layers remember of what a batch has seen, for decoding: one position a row and forward pass, or many."""

import torch
from torch.nn import functional as F

from lora import ops


class Cache:
    """Keys and values of a batch: per layer (B, KV, room, d), row b holding `lengths[b]` positions; and the states of
    layers that have none.

    A forward pass calls `begin` once, `append` and `attend` in every layer, and `advance` once.
    """

    def __init__(self, head_dims: dict[int, int], rows: int, kv_heads: int, room: int, dtype, device):
        """`head_dims` of the layers that have keys and values."""
        self.dtype, self.device, self.lengths, self.states = dtype, device, [0] * rows, {}
        self.keys, self.values = (
            {layer: torch.zeros(rows, kv_heads, room, d, dtype=dtype, device=device) for layer, d in head_dims.items()}
            for _ in range(2)
        )

    def recall(self, layer: int, count: int = 2) -> tuple[torch.Tensor | None, ...]:
        """What a layer without keys and values has remembered, `count` tensors (B, …); at first none."""
        return self.states.get(layer, (None,) * count)

    def remember(self, layer: int, *state: torch.Tensor) -> None:
        self.states[layer] = state

    def begin(self, new: list[int]) -> None:
        """`new[b]` positions of row b come next. Where it is one for every row, what layers share is made once."""
        self.new, self.room, self.masks = new, max(self.lengths) + 1, {}
        self.ends, self.where = None, (slice(None), slice(None), self.room - 1)  # all rows end in the same column
        if max(new) == 1 == min(new) and min(self.lengths) + 1 < self.room:
            self.ends = torch.tensor(self.lengths, device=self.device)  # (B,)
            self.where = (torch.arange(len(self.ends), device=self.device), slice(None), self.ends)

    def mask(self, window: int | None) -> torch.Tensor | None:
        """What is added to scores (B, KV, G, room) where some rows do not see all columns."""
        window = window if window and window < self.room else None
        if self.ends is None and window is None:
            return None
        if window not in self.masks:
            ends = torch.tensor(self.lengths, device=self.device) if self.ends is None else self.ends
            columns = torch.arange(self.room, device=self.device)
            unseen = columns > ends[:, None]  # (B, room)
            if window:
                unseen |= columns <= ends[:, None] - window
            zeros = torch.zeros(unseen.shape, dtype=self.dtype, device=self.device)
            self.masks[window] = zeros.masked_fill(unseen, float("-inf"))[:, None, None]
        return self.masks[window]

    @property
    def one_each(self) -> bool:
        """Is there one new position in every row?"""
        return max(self.new) == 1 == min(self.new)

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Keys and values (T, KV, d) of the new positions, end to end."""
        keys, values = self.keys[layer], self.values[layer]
        if self.one_each:
            keys[self.where], values[self.where] = k, v
            return
        for row, (k1, v1) in enumerate(zip(k.split(self.new), v.split(self.new), strict=True)):
            start, end = self.lengths[row], self.lengths[row] + self.new[row]
            keys[row, :, start:end], values[row, :, start:end] = k1.transpose(0, 1), v1.transpose(0, 1)

    def attend(self, layer: int, q: torch.Tensor, window: int | None = None, cap=None) -> torch.Tensor:
        """Let each of q (T, H, d), new positions end to end, see all up to its own, or as `ops.attend` says."""
        keys, values = self.keys[layer], self.values[layer]
        if self.one_each and not cap:
            return self._attend_one(keys, values, q, self.mask(window))
        outputs = []
        for row, q1 in enumerate(q.split(self.new)):
            k1, v1 = (x[row, :, : self.lengths[row] + self.new[row]].transpose(0, 1) for x in (keys, values))
            outputs.append(ops.attend(q1, k1, v1, window, cap))
        return torch.cat(outputs)

    def _attend_one(self, keys, values, q, mask):
        """One new position in every row, all rows at once. The queries of a group stand where positions would, (B, KV,
        G, d): PyTorch's kernel then reads each key once for all of them."""
        (B, H, d), KV = q.shape, keys.shape[1]
        q = q.reshape(B, KV, H // KV, d)
        out = F.scaled_dot_product_attention(q, keys[:, :, : self.room], values[:, :, : self.room], attn_mask=mask)
        return out.view(B, H, d)

    def advance(self) -> None:
        self.lengths = [length + n for length, n in zip(self.lengths, self.new, strict=True)]

    def keep(self, rows: list[int]) -> None:
        """Go on with these rows only."""
        self.keys, self.values = ({layer: x[rows] for layer, x in kept.items()} for kept in (self.keys, self.values))
        self.states = {layer: tuple(x[rows] for x in state) for layer, state in self.states.items()}
        self.lengths = [self.lengths[row] for row in rows]
