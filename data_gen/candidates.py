"""What a judge compares: two answers to a prompt, read from a file or sampled from a model of ours.

    {"prompt": "..." or [{"role", "content"}, ...], "a": "...", "b": "..."}
    {"prompt": ..., "answers": ["...", "...", ...]}                 each two of them are compared
    {"prompt": ..., "chosen": "...", "rejected": "..."}             whose order is then compared with the judge's

An answer is a text, or a list of one message of the assistant.
"""

import hashlib
import json
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from data_gen.journal import Question
from data_gen.teacher import Local
from lora.data import foreign_fields
from lora.data.formats import OF_A_QUESTION, SYSTEM
from lora.data.jsonl import Problem, read_rows
from lora.errors import MOST_LINES, BadInput
from lora.inference.prompts import is_utf8

SHAPES = (("a", "b"), ("answers",), ("chosen", "rejected"))
MOST_ANSWERS = 64  # of one prompt: 2,016 pairs


LEFT_OUT = ("equal", "repeated", "cut or empty")  # why a pair is not compared


class Pair(NamedTuple):
    """Two answers to a prompt, which is a text or messages; `ordered`: the file says that `a` is the better one."""

    prompt: str | list[dict]
    a: str
    b: str
    ordered: bool = False

    @property
    def key(self) -> str:
        """A hash of the texts: equal for the same two answers in either order."""
        return hashlib.sha256(json.dumps([self.prompt, *sorted((self.a, self.b))]).encode()).hexdigest()[:16]

    def row(self, chosen: str) -> dict:
        """The preference row; a prompt of messages has answers of messages."""
        sides = {"chosen": chosen, "rejected": self.b if chosen == self.a else self.a}
        if not isinstance(self.prompt, str):
            sides = {side: [{"role": "assistant", "content": text}] for side, text in sides.items()}
        return {"prompt": self.prompt, **sides}


def different(pairs: Sequence[Pair], left_out: Counter) -> list[Pair]:
    """The pairs whose answers differ, each once; the others are counted."""
    found: dict[str, Pair] = {}
    for pair in pairs:
        if pair.a.strip() == pair.b.strip():
            left_out["equal"] += 1
        elif found.setdefault(pair.key, pair) is not pair:
            left_out["repeated"] += 1
    return list(found.values())


# ---- from a file -----------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Pair]:
    """The pairs of a file. Raises BadInput with every row that is something else."""
    pairs, problems = [], []
    for row in read_rows(path, lambda size: None):
        try:
            if isinstance(row, Problem):
                raise BadInput(str(row))
            pairs += _pairs(*row)
        except BadInput as error:
            problems += error.problems
            if len(problems) > 10 * MOST_LINES:  # the whole file is something else
                break
    if problems:
        raise BadInput(*problems)
    if not pairs:
        raise BadInput(f"no pairs in {path}: the file is empty. Give rows with a prompt and two answers")
    return pairs


def _pairs(where: str, row: object) -> list[Pair]:
    try:
        if not isinstance(row, dict):
            raise ValueError(f"expected an object, found {type(row).__name__}. Repair the line")
        shapes = [shape for shape in SHAPES if all(key in row for key in shape)]
        if "prompt" not in row or len(shapes) != 1:
            known = ", ".join("/".join(("prompt", *shape)) for shape in SHAPES)
            raise ValueError(f"its keys are {', '.join(list(row)[:8])[:200] or 'none'}. Known are {known}, one a row")
        if why := foreign_fields.refused_in_row(row, ("prompt", *shapes[0])):
            raise ValueError(why)
        for key in (*SYSTEM, *OF_A_QUESTION):
            if not foreign_fields.says_nothing(row.get(key)):
                raise ValueError(f"its {key} would be seen by nobody. Write the prompt as messages, with it")
        answers = row["answers"] if shapes[0] == ("answers",) else [row[key] for key in shapes[0]]
        if not isinstance(answers, list) or not 2 <= len(answers) <= MOST_ANSWERS:
            raise ValueError(f"its answers are no list of 2 to {MOST_ANSWERS}. Repair the line")
        prompt, texts = _prompt(row["prompt"]), [_answer(answer) for answer in answers]
        return [Pair(prompt, a, b, "chosen" in shapes[0]) for a, b in combinations(texts, 2)]
    except ValueError as wrong:
        raise BadInput(f"wrong row in {where}: {wrong}") from None


def _prompt(prompt: object) -> str | list[dict]:
    """A prompt as the row has it. Raises ValueError unless it is a text, or turns of which the last is a user's."""
    if not isinstance(prompt, list):
        return _text(prompt, "its prompt")
    for number, message in enumerate(prompt, 1):
        name = f"message {number} of its prompt"
        if not isinstance(message, dict):
            raise ValueError(f"{name} is no object. Repair the line")
        if why := foreign_fields.refused_in_message(message, name):
            raise ValueError(why)
        _text(message.get("content"), f"the content of {name}")
    roles = [message.get("role") for message in prompt]
    turns = roles[roles[:1] == ["system"] :]
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        told = ", ".join(map(str, roles))[:200] or "none"
        raise ValueError(f"the turns of its prompt are {told}. Let user and assistant alternate, a user's be the last")
    return prompt


def _answer(answer: object) -> str:
    if isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], dict):
        if answer[0].get("role") != "assistant":
            raise ValueError("an answer is not of the role assistant. Repair the line")
        if why := foreign_fields.refused_in_message(answer[0], "an answer"):
            raise ValueError(why)
        answer = answer[0].get("content")
    return _text(answer, "an answer")


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is no text or empty. Write it as text")
    if not is_utf8(value):
        raise ValueError(f"{name} has half a surrogate pair, which is no character. Remove it")
    return value


# ---- from a model ----------------------------------------------------------------------------------------------------


def model_of_ours(model: str, adapter: str | None, temperature: float, tokens: int, batch: int, seed: int) -> Local:
    """The model that answers each prompt twice, with seeds of its own for every answer."""
    how = Namespace(local=model, answer_tokens=tokens, temperature=temperature, concurrency=batch, seed=seed)
    how.local_adapter = adapter
    return Local(how)


def sample(model: Local, prompts: Sequence[tuple[list[dict], str]], journal: Path, left_out: Counter) -> list[Pair]:
    """Two answers of the model to each of the prompts, which are (messages, where). A pair with an answer that is empty
    or did not end by itself is counted: trained, it would end in the middle."""
    asked = [Question(f"{row}{side}", m) for row, (m, _) in enumerate(prompts, 1) for side in "ab"]
    answers = {reply.key: reply.text.strip() for reply in model.ask(asked, journal) if reply.finish == "stop"}
    pairs = []
    for row, (messages, _) in enumerate(prompts, 1):
        a, b = (answers.get(f"{row}{side}") for side in "ab")
        text = messages[0]["content"] if len(messages) == 1 else None
        pairs += [Pair(text or messages, a, b)] if a and b else []
    left_out["cut or empty"] += len(prompts) - len(pairs)
    return pairs
