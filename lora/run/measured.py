"""What a method measures of a finished model, for evaluate.py."""

from collections.abc import Iterable, Iterator

import torch

from lora.adapter import value_head
from lora.adapter.inject import disabled
from lora.data.batch import Batch, micro_batches, size_of
from lora.errors import say
from lora.inference import score
from lora.methods import METHODS, compares, reward
from lora.methods.answers import log_probs
from lora.methods.objective import measure
from lora.run.settings import TrainMethod


class Measured:
    """Batches -> figures of a method. Scores are those of a value head; rewards count from the base: what has no head,
    or is the base, has no such figures."""

    def __init__(self, model, column: score.Column, how: TrainMethod):
        self.model, self.column, self.how, self.method = model, column, how, METHODS[how.method]

    def __call__(self, batches: Iterable[Batch]) -> dict[str, float]:
        if self.method is reward and not value_head.of(self.model):
            say(f"note     {self.column.name} has no value head, so it has no scores")
            return {}
        if not compares(self.method, self.how):
            return measure(self.method, self.model, batches, self.how)
        found = measure(self.method, self.model, self.with_reference(batches), self.how)
        own = {name: value for name, value in found.items() if name.startswith(("log_prob", "length"))}
        return found if self.column.adapter else own

    def with_reference(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            with disabled(self.model):
                batch.known["reference"] = log_probs(self.model, batch)
            yield batch


@torch.no_grad()
def pair_scores(model, column: score.Column, micro_tokens: int) -> list[dict]:
    """Both scores of every pair, in the order of the rows, under LLaMA-Factory's names."""
    examples = column.examples
    order = sorted(range(len(examples)), key=lambda i: size_of([examples[i]]))  # as batches are laid out
    batches = micro_batches(examples, micro_tokens, model.device)
    both = torch.cat([reward.scores(model, batch) for batch in batches]).unflatten(0, (-1, 2)).tolist()
    rows = {i: {"chosen": chosen, "rejected": rejected} for i, (chosen, rejected) in zip(order, both, strict=True)}
    return [rows[i] for i in range(len(examples))]


def labels(method: str) -> dict[str, tuple[str, str]]:
    """The lines of the table: a method's figures after its loss."""

    def form(name: str) -> str:
        return "{:.1%}" if name == "accuracy" else "{:.1f}" if name.startswith("length") else "{:.4f}"

    its = {name: (words, form(name)) for name, words in METHODS[method].FIGURES.items()}
    loss = score.FIGURES["loss"] if method == "sft" else (METHODS[method].LABEL, "{:.4f}")
    return {"loss": loss} | its | {name: label for name, label in score.FIGURES.items() if name not in ("loss", *its)}
