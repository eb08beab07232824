"""A reward model: a number for a conversation, higher for the chosen answer of a pair than for the rejected one.

    -log σ(s_c - s_r - m) + center · (s_c + s_r)²

Bradley and Terry 1952; Stiennon et al. 2020, https://arxiv.org/abs/2009.01325; the second term, which keeps scores
around 0, is Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244. s is read by a value head at the end of turn.
"""

from torch import Tensor
from torch.nn.functional import logsigmoid

from lora.data.batch import Batch
from lora.network.decoder import Model

KIND, VALUE_HEAD = "scored", True
SETTINGS = ("margin", "center")
LABEL, RATE, EPOCHS = "loss a pair", 0.25, 1
FIGURES = {
    "accuracy": "pairs whose chosen answer has the higher score",
    "score_chosen": "score of the chosen answer",
    "score_rejected": "score of the rejected answer",
    "score_margin": "their difference",
}


def defaults(args) -> dict:
    return {"margin": 0.0}


def scores(model: Model, batch: Batch) -> Tensor:
    """The value at the end of turn of every example, (examples,): the last trained token, one behind the position that
    predicts it."""
    counts = batch.trained.new_tensor(batch.counts)
    ends = batch.trained[counts.cumsum(0) - 1] + 1
    return model.v_head(model.trunk(batch.tokens, batch.lengths)[ends])


def losses(pairs: Tensor, margin: Tensor | float = 0.0, center: float = 0.0) -> Tensor:
    """Scores (P, 2) -> (P,)"""
    chosen, rejected = pairs.unbind(1)
    return -logsigmoid(chosen - rejected - margin) + center * (chosen + rejected).square()


def loss(model: Model, batch: Batch, args) -> tuple[Tensor, int, dict]:
    """The loss summed over the batch's P pairs, and P."""
    pairs = scores(model, batch).unflatten(0, (-1, 2))  # (P, 2)
    margin = batch.known["margin"].unflatten(0, (-1, 2))[:, 0] if batch.linked else 0.0
    found = losses(pairs, args.margin + margin, args.center)
    chosen, rejected = pairs.detach().sum(0).tolist()
    right = int((pairs[:, 0] > pairs[:, 1]).sum())
    values = (right, chosen, rejected, chosen - rejected)
    return found.sum(), len(pairs), {name: (v, len(pairs)) for name, v in zip(FIGURES, values, strict=True)}
