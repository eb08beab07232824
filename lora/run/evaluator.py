"""Evaluations: the loss on what is held out, what was forgotten, sampled answers."""

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from lora.adapter.inject import disabled
from lora.data import batch
from lora.errors import BadNumbers, StopFlag, say
from lora.inference.generate import generate
from lora.run import answers as measures
from lora.run.plan import Plan
from lora.train import run_state
from lora.train.distributed import DistContext
from lora.train.evaluate import Retention, evaluating, mean_loss

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


class Answers(NamedTuple):
    """Texts; the share of them that came to an end; the mean share of their 4-grams that are repetitions."""

    texts: list[str]
    ended: float
    repetition: float


class Evaluator:
    """What evaluations measure. Nothing of it changes the training: there are no gradients, and each step seeds its own
    dropout. `objective(batch)` is the summed loss, as for training."""

    def __init__(self, model, plan: Plan, s, run: Path, objective, team: DistContext, stop: StopFlag):
        self.model, self.chat, self.team, self.stop, self.objective = model, plan.chat, team, stop, objective
        self.sharded, self.run = s.fsdp, run
        self.questions = some_prompts(plan.sources.data[0].kept) if s.data else list(QUESTIONS)
        self.total, self.every = plan.total, s.eval_every or max(1, math.ceil(plan.total / 10))
        self.wanted, self.has_loss = plan.ordinary is not None, bool(plan.sources.held_out)
        held_out = batch.micro_batches(plan.sources.held_out or [], s.micro_tokens, team.device)
        ordinary = plan.ordinary or []
        self.fingerprint, self.batches = fingerprint([*held_out, *ordinary]), self._mine(held_out)
        if self.wanted:
            say(f"eval     every {self.every} steps")
            with evaluating(model):
                base, cap = lambda: disabled(model), model.config.final_logit_softcapping
                self.meter = Retention(self._trunk, lambda: model.head_weight, self._mine(ordinary), base, cap)

    def begin(self, state: run_state.State) -> None:
        """Earlier evaluations of a run that is gone on with count only if they were made on the same rows."""
        if state.evaluations and state.examined != self.fingerprint:
            say("note     evaluations are made on other rows than before: earlier ones do not count any more")
            state.evaluations = []
        state.examined = self.fingerprint

    def due(self, state: run_state.State) -> bool:
        """Is there to be an evaluation after this step which has not been made? At the start and the end there is."""
        on_time = state.step in (0, self.total) or state.step % self.every == 0
        return self.wanted and on_time and all(row["step"] != state.step for row in state.evaluations)

    def row(self, step: int) -> dict | None:
        """A row for metrics.jsonl; None where a signal came first. Raises BadNumbers where it is not finite."""
        row = {"step": step}
        try:
            with evaluating(self.model):
                if self.has_loss:
                    row["eval_loss"] = mean_loss(self._loss, self.batches, self.team.all_reduce)
                kept, answers = self.meter(self.team.all_reduce), self.ask()
        except Interrupted:
            return None
        row |= {"retention_kl": kept.kl, "retention_loss_before": kept.loss_before, "retention_loss": kept.loss}
        row |= {"repetition": answers.repetition, "ended": answers.ended}
        if not all(map(math.isfinite, row.values())):
            fix = "Lower --lr" if step else "Look at --eval-data and --retention, or use --dtype float32"
            raise BadNumbers(f"not finite in the evaluation after step {step}: {run_state.last_good(self.run)}. {fix}")
        return {**row, "samples": dict(zip(map(question_text, self.questions), answers.texts, strict=True))}

    def ask(self) -> Answers:
        """Greedy answers to the questions. With a sharded base all processes answer together; else only the one that
        writes does."""
        if not self.team.main and not self.sharded:
            return Answers([""] * len(self.questions), 0.0, 0.0)
        turns = ([{"role": "user", "content": q}] if isinstance(q, str) else q for q in self.questions)
        room = self.model.config.max_position_embeddings - ANSWER_TOKENS
        prompts = [self.chat.prompt(messages)[-max(1, room) :] for messages in turns]
        with evaluating(self.model):
            found = generate(
                self.model, prompts, self.chat.stops, ANSWER_TOKENS, on_token=lambda *_: self._raise_if_stopped()
            )
        ended = sum(len(ids) < ANSWER_TOKENS for ids in found) / len(found)
        repeated = sum(measures.repetition(ids) for ids in found) / len(found)
        return Answers([self.chat.tokenizer.decode(ids) for ids in found], ended, repeated)

    def _mine(self, batches: list[batch.Batch]) -> list[batch.Batch]:
        """This process's part of the batches."""
        cuts = [batches[rank :: self.team.size] for rank in range(self.team.size)]
        return self.team.padded(cuts, batch.dummy_batch(self.team.device)) if self.sharded else cuts[self.team.rank]

    def _raise_if_stopped(self) -> None:
        """A signal ends an evaluation at once; it is made when the run goes on. Not among several processes, where one
        that left would keep the others waiting."""
        if self.stop.code and self.team.size == 1:
            raise Interrupted

    def _trunk(self, b: batch.Batch) -> torch.Tensor:
        self._raise_if_stopped()
        return self.model.trunk(b.tokens, b.lengths)[b.trained]

    def _loss(self, b: batch.Batch) -> torch.Tensor:
        self._raise_if_stopped()
        return self.objective(b)


def fingerprint(batches: Iterable[batch.Batch]) -> str:
    """sha256 over what is measured."""
    digest = hashlib.sha256()
    for b in batches:
        digest.update(f"{b.lengths} {b.tokens.tolist()} {b.trained.tolist()} {b.targets.tolist()}".encode())
    return digest.hexdigest()


def some_prompts(conversations) -> list[list[dict]]:
    """Three first turns from the data and two questions that have nothing to do with it."""
    firsts = [
        c.messages[: next(i for i, m in enumerate(c.messages) if m["role"] == "assistant")] for c in conversations
    ]
    return [*firsts[:: max(1, len(firsts) // 3)][:3], *QUESTIONS[3:]]


def question_text(question: str | list[dict]) -> str:
    """The text of a question."""
    return question if isinstance(question, str) else question[-1]["content"]
