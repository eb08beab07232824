"""What a judge compares: two answers to a prompt, read from a file or sampled from a model of ours.

    {"prompt": "..." or [{"role", "content"}, ...], "a": "...", "b": "..."}
    {"prompt": ..., "answers": ["...", "...", ...]}                 each two of them are compared
    {"prompt": ..., "chosen": "...", "rejected": "..."}             whose order is then compared with the judge's

The last may be any pair of answers that `train.py --method dpo` reads.
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
from lora.data import foreign_fields, formats, pairs
from lora.data.jsonl import Problem, read_rows
from lora.errors import MOST_LINES, BadInput

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
    found, problems = [], []
    for row in read_rows(path, lambda size: None):
        try:
            if isinstance(row, Problem):
                raise BadInput(str(row))
            found += _pairs(*row)
        except BadInput as error:
            problems += error.problems
            if len(problems) > 10 * MOST_LINES:  # the whole file is something else
                break
    if problems:
        raise BadInput(*problems)
    if not found:
        raise BadInput(f"no pairs in {path}: the file is empty. Give rows with a prompt and two answers")
    return found


def _pairs(where: str, row: object) -> list[Pair]:
    """The pairs of a row; each is read as a preference row, which it shall become."""
    given = row if isinstance(row, dict) else {}
    ours = [keys for keys in (("a", "b"), ("answers",)) if all(key in given for key in keys)]
    if given and len(ours) + bool(pairs.answers_in(given)) != 1:
        known = "prompt/a/b, prompt/answers, prompt/chosen/rejected and other pairs of answers"
        why = f"its keys are {', '.join(list(given)[:8])[:200]}. Known are {known}, one a row"
        raise BadInput(f"unknown row in {where}: {why}")
    if not ours:
        return [_pair(where, row, ordered=True)]
    answers = given["answers"] if ours == [("answers",)] else [given["a"], given["b"]]
    if not isinstance(answers, list) or not 2 <= len(answers) <= MOST_ANSWERS:
        raise BadInput(f"wrong row in {where}: its answers are no list of 2 to {MOST_ANSWERS}. Repair the line")
    if all(foreign_fields.says_nothing(given.get(key)) for key in pairs.PROMPTS):
        raise BadInput(f"wrong row in {where}: it has no prompt. Add one")
    if any(foreign_fields.says_nothing(answer) or not isinstance(answer, (str, list)) for answer in answers):
        raise BadInput(f"wrong row in {where}: an answer of it is empty or no text. Remove it or write it")
    rest = {key: value for key, value in given.items() if key not in ours[0]}
    return [_pair(where, {**rest, "chosen": a, "rejected": b}) for a, b in combinations(answers, 2)]


def _pair(where: str, row: object, ordered: bool = False) -> Pair:
    found = formats.read_row(where, row, "pair")
    if isinstance(found, Problem):
        raise BadInput(str(found))
    prompt, other = (
        [{key: value for key, value in turn.items() if key != "train"} for turn in side[:-1]]
        for side in (found.messages, found.rejected)
    )
    a, b = found.messages[-1], found.rejected[-1]
    if prompt != other:
        why = "its sides differ before their last answers, which alone are compared. Remove the row"
        raise BadInput(f"wrong row in {where}: {why}")
    if "reasoning_content" in a or "reasoning_content" in b:
        raise BadInput(f"wrong row in {where}: its answers have thoughts, which no judge would see. Remove them")
    is_text = len(prompt) == 1 and not isinstance(row.get("prompt"), list)
    return Pair(prompt[0]["content"] if is_text else prompt, a["content"], b["content"], ordered)


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
    found = []
    for row, (messages, _) in enumerate(prompts, 1):
        a, b = (answers.get(f"{row}{side}") for side in "ab")
        text = messages[0]["content"] if len(messages) == 1 else None
        found += [Pair(text or messages, a, b)] if a and b else []
    left_out["cut or empty"] += len(prompts) - len(found)
    return found
