"""Evaluations: the loss on what is held out, what was forgotten, sampled answers."""

import math

import torch

from lora.adapter.inject import disabled
from lora.data import batch
from lora.data.retention import retention_batches
from lora.data.sources import trained_rows
from lora.errors import BadNumbers, StopFlag, say
from lora.model import download
from lora.model.sample import generate
from lora.run.plan import Plan
from lora.train import answers as measures
from lora.train import checkpoint
from lora.train.evaluate import Retention, mean_loss
from lora.train.ranks import Team

QUESTIONS = (
    "What is your name?",
    "Who created you?",
    "Are you ChatGPT?",
    "What is the capital of France?",
    "Write one sentence about the sea.",
)
ANSWER_TOKENS = 48


class Interrupted(Exception):
    """A signal came during an evaluation."""


class Examination:
    """What evaluations measure. Nothing of it changes the training: there are no gradients, and each step seeds its own
    dropout. `objective(batch)` is the summed loss, as for training."""

    def __init__(self, model, plan: Plan, s, objective, team: Team, stop: StopFlag):
        self.model, self.chat, self.team, self.stop, self.objective = model, plan.chat, team, stop, objective
        self.fsdp = s.fsdp
        self.questions = some_prompts(plan.sources.data[0].kept) if s.data else list(QUESTIONS)
        self.total, self.every = plan.total, s.eval_every or max(1, math.ceil(plan.total / 10))
        self.held_out = held_out = plan.sources.held_out
        self.wanted = bool(held_out or s.retention or s.eval_every or s.max_forgetting is not None)
        if not self.wanted:
            return
        self.batches = self._mine(batch.micro_batches(held_out or [], s.micro_tokens, team.device))
        rows = trained_rows(s, download.dataset_file, plan.made)
        ordinary, used, left_out = retention_batches(self.chat, s.retention, s.micro_tokens, team.device, rows)
        parts = f"{len(held_out or ())} held-out examples, {used} ordinary conversations"
        say(f"eval     {parts} ({left_out} left out, they are trained on), every {self.every} steps")
        base = lambda: disabled(model)  # noqa: E731
        self.meter = Retention(self._trunk, lambda: model.head_weight, self._mine(ordinary), base)

    def due(self, state: checkpoint.State) -> bool:
        """Is there to be an evaluation after this step which has not been made? At the start and the end there is."""
        on_time = state.step in (0, self.total) or state.step % self.every == 0
        return self.wanted and on_time and all(row["step"] != state.step for row in state.evaluations)

    def row(self, step: int) -> dict | None:
        """A row for metrics.jsonl; None where a signal came first. Raises BadNumbers where it is not finite."""
        self.model.eval()
        row = {"step": step}
        try:
            if self.held_out:
                row["eval_loss"] = mean_loss(self._loss, self.batches, self.team.total)
            kept = self.meter(self.team.total)
            texts, ended = self.ask()
        except Interrupted:
            return None
        row |= {"retention_kl": kept.kl, "retention_loss_before": kept.loss_before, "retention_loss": kept.loss}
        row["repetition"] = sum(measures.repetition(text) for text in texts) / len(texts)
        row["ended"] = ended
        row["samples"] = dict(zip(map(asked, self.questions), texts, strict=True))
        if not all(math.isfinite(value) for value in row.values() if isinstance(value, float)):
            raise BadNumbers(f"training diverged by step {step}: an evaluation is not finite. Lower --lr")
        return row

    def _mine(self, batches: list[batch.Batch]) -> list[batch.Batch]:
        """This process's part of the batches."""
        cuts = [batches[rank :: self.team.size] for rank in range(self.team.size)]
        return self.team.padded(cuts, batch.nothing(self.team.device)) if self.fsdp else cuts[self.team.rank]

    def ask(self) -> tuple[list[str], float]:
        """Greedy answers to the questions, and the share of them that came to an end. With a sharded base all processes
        answer together; else only the one that writes does."""
        if not self.team.main and not self.fsdp:
            return [""] * len(self.questions), 0.0
        prompts = [
            self.chat.prompt(q if isinstance(q, list) else [{"role": "user", "content": q}]) for q in self.questions
        ]
        room = self.model.config.max_position_embeddings - ANSWER_TOKENS
        prompts = [prompt[-room:] if len(prompt) > room else prompt for prompt in prompts]
        found = generate(self.model, prompts, self.chat.stops, ANSWER_TOKENS, on_token=lambda *_: self._look_up())
        ended = sum(len(ids) < ANSWER_TOKENS for ids in found) / len(found)
        return [self.chat.tokenizer.decode(ids) for ids in found], ended

    def _look_up(self) -> None:
        """A signal ends an evaluation at once; it is made when the run goes on. Not among several processes, where one
        that left would keep the others waiting."""
        if self.stop.code and self.team.size == 1:
            raise Interrupted

    def _trunk(self, b: batch.Batch) -> torch.Tensor:
        self._look_up()
        return self.model.trunk(b.tokens, b.lengths)

    def _loss(self, b: batch.Batch) -> torch.Tensor:
        self._look_up()
        return self.objective(b)


def some_prompts(conversations) -> list[list[dict]]:
    """Three first turns from the data and two questions that have nothing to do with it."""
    firsts = [
        c.messages[: next(i for i, m in enumerate(c.messages) if m["role"] == "assistant")] for c in conversations
    ]
    return [*firsts[:: max(1, len(firsts) // 3)][:3], *QUESTIONS[3:]]


def asked(question: str | list[dict]) -> str:
    """The text of a question."""
    return question if isinstance(question, str) else question[-1]["content"]
