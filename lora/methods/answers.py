"""How likely a model finds whole answers."""

from torch import Tensor

from lora import ops
from lora.data.batch import Batch
from lora.network.decoder import Model


def log_probs(model: Model, batch: Batch) -> Tensor:
    """Σ log p(token) over the trained tokens of every example, (examples,), in nats."""
    hidden = model.trunk(batch.tokens, batch.lengths)[batch.trained]  # (N, D)
    cap = model.config.final_logit_softcapping
    return batch.sums(ops.log_probs(hidden, model.head_weight, batch.targets, cap))
