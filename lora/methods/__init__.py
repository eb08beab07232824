"""What a model is trained for. A method is a module with three functions; the loop, checkpoints, evaluation and ranks
do not know which one runs.

    examples(args, chat, ...)         how rows become examples
    loss(model, batch)                a batch's loss as (sum, count): the sum is divided once, by the whole step's count
    measure(model, batches, total)    what is measured on examples that are held out, by name
"""

from collections.abc import Callable

import torch

from lora.train import memory


def objective(loss: Callable, model, args) -> Callable[..., torch.Tensor]:
    """A method's loss as the training loop calls it: batch -> sum. An example far longer than --micro-tokens cannot be
    cut, so its activations are computed again in the backward pass."""

    def summed(batch) -> torch.Tensor:
        model.checkpoint_activations = memory.recomputes(len(batch.tokens), args)
        return loss(model, batch)[0]

    return summed
