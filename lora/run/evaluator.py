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
from lora.inference import answers as measures
from lora.inference.generate import generate
from lora.methods.objective import measure
from lora.run.plan import Plan
from lora.run.rollouts import Interrupted, Rollouts
from lora.run.settings import TrainSettings
from lora.train import run_state, stopping
from lora.train.distributed import DistContext
from lora.train.evaluate import Retention, evaluating
from lora.train.record import Record

QUESTIONS = (
    "What is your name?",
    "Who created you?",
    "Are you ChatGPT?",
    "What is the capital of France?",
    "Write one sentence about the sea.",
)
ANSWER_TOKENS = 48


class Answers(NamedTuple):
    """Texts; the share of them that came to an end; the mean share of their 4-grams that are repetitions."""

    texts: list[str]
    ended: float
    repetition: float


class Evaluator:
    """What evaluations measure. Nothing of it changes the training: there are no gradients, and each step seeds its own
    dropout."""

    def __init__(
        self,
        model: torch.nn.Module,
        plan: Plan,
        args: TrainSettings,
        out: Path,
        processes: DistContext,
        stop: StopFlag,
        rollouts: Rollouts | None = None,
    ):
        self.model, self.args, self.chat, self.processes, self.stop = model, args, plan.chat, processes, stop
        self.method, self.rollouts = plan.method, rollouts
        self.sharded, self.out = args.fsdp, out
        self.prompts = prompts_from(plan.sources.data[0].kept) if args.data else [*map(_asked, QUESTIONS)]
        self.total, self.every = plan.total, args.eval_every or max(1, math.ceil(plan.total / 10))
        self.wanted, self.has_loss = plan.retention_batches is not None, bool(plan.sources.held_out)
        held_out = batch.micro_batches(plan.sources.held_out or [], args.micro_tokens, processes.device)
        remembered = plan.retention_batches or []
        self.fingerprint, self.batches = fingerprint([*held_out, *remembered]), self._share(held_out)
        if self.wanted:
            say(f"eval     every {self.every} steps")
            with evaluating(model):
                base, cap = lambda: disabled(model), model.config.final_logit_softcapping
                self.meter = Retention(self._trunk, lambda: model.head_weight, self._share(remembered), base, cap)

    @property
    def questions(self) -> list[str]:
        return [messages[-1]["content"] for messages in self.prompts]

    def begin(self, state: run_state.State) -> None:
        """Earlier evaluations of a resumed run count only if they were made on the same rows."""
        if state.evaluations and state.examined != self.fingerprint:
            say("note     evaluations are made on other rows than before: earlier ones do not count any more")
            state.evaluations = []
        state.examined = self.fingerprint

    def evaluate_if_due(self, state: run_state.State, record: Record) -> None:
        if self.due(state) and (row := self.row(state.step)):
            state.evaluations.append(stopping.brief(row))
            record.evaluated(row)

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
                    found = self.rollouts.evaluate() if self.rollouts else self._measured()
                    row |= {f"eval_{name}": value for name, value in found.items()}
                kept, answers = self.meter(self.processes.all_reduce), self.sample_answers()
        except Interrupted:
            return None
        row |= {"retention_kl": kept.kl, "retention_loss_before": kept.loss_before, "retention_loss": kept.loss}
        row |= {"repetition": answers.repetition, "ended": answers.ended}
        if not all(map(math.isfinite, row.values())):
            fix = "Lower --lr" if step else "Look at --eval-data and --retention, or use --dtype float32"
            raise BadNumbers(f"not finite in the evaluation after step {step}: {run_state.last_good(self.out)}. {fix}")
        return {**row, "samples": dict(zip(self.questions, answers.texts, strict=True))}

    def sample_answers(self) -> Answers:
        """Greedy answers to the questions. With a sharded base all processes answer together; else only the one that
        writes does."""
        if not self.processes.main and not self.sharded:
            return Answers([""] * len(self.prompts), 0.0, 0.0)
        room = max(1, self.model.config.max_position_embeddings - ANSWER_TOKENS)
        prompts = [self.chat.prompt(messages)[-room:] for messages in self.prompts]
        with evaluating(self.model):
            found = generate(
                self.model, prompts, self.chat.stops, ANSWER_TOKENS, on_token=lambda *_: self._raise_if_stopped()
            )
        ended = sum(len(ids) < ANSWER_TOKENS for ids in found) / len(found)
        repeated = sum(measures.repetition(ids) for ids in found) / len(found)
        return Answers([self.chat.tokenizer.decode(ids) for ids in found], ended, repeated)

    def _share(self, batches: list[batch.Batch]) -> list[batch.Batch]:
        """This process's part of the batches."""
        cuts = [batches[rank :: self.processes.size] for rank in range(self.processes.size)]
        if self.sharded:
            return self.processes.padded(cuts, batch.dummy_batch(self.processes.device))
        return cuts[self.processes.rank]

    def _raise_if_stopped(self) -> None:
        """A signal ends an evaluation at once; the resumed run makes it. Not among several processes, where one that
        left would keep the others waiting."""
        if self.stop.code and self.processes.size == 1:
            raise Interrupted

    def _measured(self) -> dict[str, float]:
        return measure(self.method, self.model, self._until_stopped(), self.args, self.processes.all_reduce)

    def _until_stopped(self) -> Iterable[batch.Batch]:
        for b in self.batches:
            self._raise_if_stopped()
            yield b

    def _trunk(self, b: batch.Batch) -> torch.Tensor:
        self._raise_if_stopped()
        return self.model.trunk(b.tokens, b.lengths)[b.trained]


def fingerprint(batches: Iterable[batch.Batch]) -> str:
    """sha256 over what is measured."""
    digest = hashlib.sha256()
    for b in batches:
        digest.update(f"{b.lengths} {b.tokens.tolist()} {b.trained.tolist()} {b.targets.tolist()}".encode())
        for name in sorted(b.known.keys() - {"reference"}):  # verdicts and margins
            digest.update(f"{name} {b.known[name].tolist()}".encode())
    return digest.hexdigest()


def _asked(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


def prompts_from(conversations) -> list[list[dict]]:
    """Three first turns from the data and two questions that have nothing to do with it."""
    firsts = [
        c.messages[: next((i for i, m in enumerate(c.messages) if m["role"] == "assistant"), None)]
        for c in conversations
    ]
    return [*firsts[:: max(1, len(firsts) // 3)][:3], *map(_asked, QUESTIONS[3:])]
