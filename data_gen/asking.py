"""What every teacher does: it answers questions within a budget, and a journal keeps every reply as it arrives.

A run that was killed asks only the questions without a reply there; those that were under way at the kill are asked
again.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from data_gen.journal import Journal, Question, Reply
from lora.errors import BadInput

MOST_FAILED = 20  # questions in a row; then the teacher, not the question, is at fault
END = object()


class Teacher:
    """Answers questions within a budget. After `ask`: `failed` (what went wrong -> how often), `problem` (the last
    one), and `stopped`, why it ended before all questions were asked, if it did."""

    def __init__(self, args):
        self.concurrency, self.answer_tokens = args.concurrency, args.answer_tokens
        self.temperature = getattr(args, "temperature", None)
        self.max_requests = getattr(args, "max_requests", math.inf)
        self.max_tokens = getattr(args, "max_tokens", math.inf)
        self.about = {"answer_tokens": args.answer_tokens, "temperature": self.temperature}
        self.failed: Counter[str] = Counter()
        self.stopped, self.problem = "", ""
        self.requests = self.tokens = self._in_a_row = 0
        self._before: int | None = None  # requests behind the replies that the journal had at first

    def ask(self, questions: Sequence[Question], journal: Path, about: dict | None = None) -> Iterator[Reply]:
        """Replies in the order of `questions`, which may be made as they are looked at: nothing of them is kept.

        A question that fails for good has a reply that says so, and is asked again by the next run; those that the
        budget did not reach have none. `about` (name -> value) is kept in the journal with the teacher's own settings.
        A second call goes on with the same journal and the same budget.
        Raises BadInput where the journal has replies to something else, or the endpoint refuses every question.
        """
        with closing(Journal(journal, {**self.about, **(about or {})})) as book:
            there = _compare(questions, book)
            self._book, self._lost = book, set()
            self._before = book.requests if self._before is None else self._before
            waiting = ((place, question) for place, question in enumerate(questions) if question.key not in book)
            self._bar = tqdm(total=len(questions), initial=there, unit="answer", disable=None)
            with self._bar, closing(self._changes(waiting)) as changes:
                for question in questions:
                    while question.key not in book and question.key not in self._lost:
                        if next(changes, END) is END:
                            break
                    self.tokens = book.tokens
                    if question.key in book:
                        yield book[question.key]
                    elif question.key in self._lost:
                        self._lost.remove(question.key)
                        yield Reply(question.key, "", "failed", 0)

    def account(self) -> str:
        """What it cost, and what went wrong, in words."""
        text = f"{self.requests:,} requests, {self.tokens:,} tokens with those of earlier answers"
        if self.failed:
            kinds = ", ".join(f"{kind}: {times:,}" for kind, times in self.failed.most_common())
            text += f", {self.failed.total():,} questions without answer ({kinds}; the last one: {self.problem})"
        return text

    def _changes(self, waiting: Iterator[tuple[int, Question]]) -> Iterator[None]:
        """Asks the questions, each with its place, and yields after some have been kept or lost."""
        raise NotImplementedError

    def _may_ask(self) -> bool:
        if not self.stopped:
            if self._before + self.requests >= self.max_requests:
                self.stopped = f"--max-requests {self.max_requests} is reached"
            elif self._book.cost >= self.max_tokens:
                self.stopped = f"--max-tokens {self.max_tokens} is reached"
        return not self.stopped

    def _keep(self, question: Question, reply: Reply, requests: int) -> None:
        asked = sum(len(message["content"].encode()) for message in question.messages)
        self._book.add(question, reply, requests, reply.tokens or asked + len(reply.text.encode()))
        self._in_a_row = 0
        self._bar.update()

    def _lose(self, question: Question, kind: str, problem: str) -> None:
        self._lost.add(question.key)
        self.failed[kind] += 1
        self.problem = problem
        self._bar.update()
        self._in_a_row += 1
        if self._in_a_row >= MOST_FAILED:
            self.stopped = self.stopped or f"{MOST_FAILED} questions in a row failed"


def _compare(questions: Iterable[Question], book: Journal) -> int:
    """How many of the questions are answered already. Raises BadInput where one of those was another question."""
    seen, there = set(), 0
    for question in questions:
        if question.key in seen:
            raise ValueError(f"two questions have the key {question.key}")
        seen.add(question.key)
        there += question.key in book
        if question.key in book and not book.fits(question):
            fix = "Give the same arguments, choose another --out, or delete the journal to start afresh"
            why = f"question {question.key} was another one"
            raise BadInput(f"journal of another run in {book.path}: {why}. {fix}")
    return there


def mend(text: str) -> str:
    """Half surrogate pairs, which JSON can spell and UTF-8 cannot, become question marks."""
    return text.encode(errors="replace").decode()
