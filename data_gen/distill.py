"""Answers in a person's style from a teacher that is shown a few of that person's answers.

A small model learns them more easily than the person's own. Each prompt shows some question/answer pairs and asks
another question of the same data. It never shows that question's own answer, which the teacher would copy. The question
with the teacher's answer is a new row.
"""

import hashlib
import json
import random
import re
import sys
from argparse import SUPPRESS
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import combinations
from math import comb
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a script: Python looks beside this file, and `lora` lies one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    from lora.errors import before_imports

    before_imports(__name__)

from data_gen import teacher
from data_gen.journal import beside
from data_gen.teacher import Question, Reply
from lora import errors, files
from lora.data import formats
from lora.data.leftovers import is_leftover
from lora.errors import BadEnvironment, BadInput

# language -> the prompt, and one example in it
FRAMES = {
    "en": (
        "Below are {n} questions with the answers that one person gave.\n\n{examples}\n\nStudy the wording, tone and "
        "length of these answers. Then answer the next question as that person would. Write only the answer.\n\n"
        "Question: {question}\nAnswer:",
        "Question: {question}\nAnswer: {answer}",
    ),
    "zh": (
        "以下是同一个人的{n}个问答示例：\n\n{examples}\n\n请学习上述回答的文字风格、语气和篇幅，然后以同样的风格回答下面的问题。"
        "只写出回答本身。\n\n问：{question}\n答：",
        "问：{question}\n答：{answer}",
    ),
}
SLOT = re.compile(r"\{(n|examples|question|answer)\}")
# What is before an answer: a teacher thinks aloud, or goes on with the form.
BEFORE = re.compile(r"\A\s*(<think>.*?</think>\s*)?((Answer|答)\s*[:：])?", re.IGNORECASE | re.DOTALL)

# A teacher that speaks of itself has left the style, whatever follows.
ITSELF = re.compile(
    r"(?:as|i(?:'m| am) (?:just |only )?)\W*an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|(?:我?作为|我只?是)(?:一个|一名|一款)?(?:大型?)?(?:ai|人工智能|语言模型)",
    re.IGNORECASE,
)
FINISHES = {  # of several endpoints, in lower case; any other is a whole answer
    **dict.fromkeys(("length", "max_tokens", "max_output_tokens"), "truncated"),
    **dict.fromkeys(("content_filter", "refusal", "safety", "sensitive", "recitation"), "filtered"),
    "failed": "failed",
}
KEPT_OUT = ("failed", "truncated", "filtered", "empty", "refused", "duplicate")
SHORT = 8  # characters: a shorter answer ("Yes.", "不知道") may be part of another text by chance
TRIES = 50  # draws before the possible examples of a question are listed


def fold(text: str) -> str:
    """White space as single spaces, and no upper case."""
    return " ".join(text.split()).casefold()


# ---- which questions with which examples -----------------------------------------------------------------------------


class Pair(NamedTuple):
    question: str
    answer: str


def read_pairs(path: Path) -> list[Pair]:
    """One question and one answer a row. Raises BadInput naming the rows that are something else."""
    pairs, problems = [], []
    for row in formats.read([path]):
        messages = row.messages
        if [message["role"] for message in messages] == ["user", "assistant"]:
            pairs.append(Pair(messages[0]["content"].strip(), messages[1]["content"].strip()))
        else:
            turns = ", ".join(message["role"] for message in messages[:6])
            fix = "Give one question and one answer a row"
            problems.append(f"wrong row in {row.where}: its turns are {turns}. {fix}")
    if problems:
        raise BadInput(*problems)
    return pairs


class Prompts(Sequence):
    """`rows` questions to a teacher, a pure function of pairs, frame and seed; the first ones stay if `rows` grows.

    Every question is used equally often (up to one), in a seeded order; examples are other questions, all different.
    No two prompts have the same question and the same set of examples. No answer that the data gives to a prompt's
    question is part of the prompt, in any case or spacing; except one of under SHORT characters or one that the
    question and the frame hold themselves: such an answer is only never the whole answer of an example.
    Raises BadInput where the data have not so many different prompts.
    """

    def __init__(self, pairs: Sequence[Pair], rows: int, seed: int, examples: int, frame: str, example: str):
        self._frame, self._example, self._count = frame, example, examples
        by_question: dict[str, list[Pair]] = {}
        for pair in pairs:
            by_question.setdefault(fold(pair.question), []).append(pair)
        self._groups = list(by_question.values())  # all answers to the same question
        self._folded = [[(fold(q), fold(a)) for q, a in group] for group in self._groups]
        self._drawn = array("q")  # of each row: group of the question, then group and place in it of each example
        self._allowed = lru_cache(maxsize=64)(self._allowed)
        self.unusable = 0  # questions whose answers every prompt would show
        self._draw(rows, seed)

    def __len__(self) -> int:
        return len(self._drawn) // (1 + 2 * self._count)

    def __getitem__(self, row: int) -> Question:
        if not 0 <= row < len(self):
            raise IndexError(row)
        width = 1 + 2 * self._count
        asked, *shown = self._drawn[row * width : (row + 1) * width]
        text = self._render(asked, list(zip(shown[::2], shown[1::2], strict=True)))
        return Question(str(row + 1), [{"role": "user", "content": text}])

    def question(self, row: int) -> str:
        """The question of a row, as the data have it."""
        return self._groups[self._drawn[row * (1 + 2 * self._count)]][0].question

    def _render(self, asked: int, shown: Sequence[tuple[int, int]]) -> str:
        blocks = [fill(self._example, **self._groups[group][place]._asdict()) for group, place in shown]
        return fill(
            self._frame, n=str(self._count), examples="\n\n".join(blocks), question=self._groups[asked][0].question
        )

    def _hidden(self, asked: int) -> tuple[frozenset[str], tuple[str, ...]]:
        """Answers of a question, folded: all, and those that must not be part of the prompt."""
        answers = frozenset(answer for _, answer in self._folded[asked])
        bare = fold(self._render(asked, ()))
        return answers, tuple(sorted(a for a in answers if len(a) >= SHORT and a not in bare))

    def _shows(self, group: int, answers: frozenset[str], hidden: tuple[str, ...]) -> bool:
        """Would an example of this group show one of the answers? That of the asked question would, too."""
        return any(a in answers or any(h in a or h in q for h in hidden) for q, a in self._folded[group])

    def _allowed(self, answers: frozenset[str], hidden: tuple[str, ...]) -> list[int]:
        return [group for group in range(len(self._groups)) if not self._shows(group, answers, hidden)]

    def _draw(self, rows: int, seed: int) -> None:
        draw, used = random.Random(seed), {}
        order = list(range(len(self._groups)))
        draw.shuffle(order)
        while len(self) < rows and order:
            spent = set()
            for asked in order:
                if len(self) == rows:
                    break
                shown = self._examples(asked, draw, used.setdefault(asked, set()))
                if shown is None:
                    spent.add(asked)
                    self.unusable += not used[asked]
                else:
                    self._drawn.extend([asked, *(number for place in shown for number in place)])
            order = [asked for asked in order if asked not in spent]
        if len(self) < rows:
            why = f"{len(self._groups)} different questions give {len(self)} different prompts"
            raise BadInput(f"wrong --rows in the command line: {why}, not {rows}. Give fewer rows or more data")

    def _examples(self, asked: int, draw: random.Random, used: set[int]) -> list[tuple[int, int]] | None:
        """Examples for a question that were not used with it; None where there are no others."""
        answers, hidden = self._hidden(asked)

        def fine(groups: Sequence[int]) -> list[tuple[int, int]] | None:
            """Marks these groups as used; gives one answer of each if together they hide the question's own."""
            used.add(hash(frozenset(groups)))
            shown = [(group, draw.randrange(len(self._groups[group]))) for group in groups]
            text = fold(self._render(asked, shown)) if hidden else ""
            return None if any(answer in text for answer in hidden) else shown

        everything = range(len(self._groups))
        if len(everything) > self._count:
            for _ in range(TRIES):
                groups = draw.sample(everything, self._count)
                if hash(frozenset(groups)) in used or any(self._shows(group, answers, hidden) for group in groups):
                    continue
                if shown := fine(groups):
                    return shown
        others = self._allowed(answers, hidden)
        while len(used) < (total := comb(len(others), self._count)):
            if total <= 4096:
                left = [c for c in combinations(others, self._count) if hash(frozenset(c)) not in used]
                if not left:  # two sets have the same hash
                    break
                groups = draw.sample(draw.choice(left), self._count)
            else:
                groups = draw.sample(others, self._count)
            if hash(frozenset(groups)) not in used and (shown := fine(groups)):
                return shown
        return None


def fill(text: str, **values: str) -> str:
    """The text with its slots filled in one pass and literally; a slot without a value becomes nothing."""
    return SLOT.sub(lambda slot: values.get(slot[1], ""), text)


def read_frame(path: Path) -> str:
    """A prompt of one's own: {examples} and {question} once each, and {n} if wanted."""
    try:
        text = files.read_bytes(path, 2**20).decode("utf-8-sig").replace("\r\n", "\n").strip()
    except UnicodeDecodeError as error:
        raise BadInput(f"wrong encoding in {path}: not UTF-8 at byte {error.start}. Convert it to UTF-8") from None
    missing = [slot for slot in ("{examples}", "{question}") if text.count(slot) != 1]
    if missing:
        why = f"{' and '.join(missing)} must be in it once"
        raise BadInput(f"wrong --prompt-file in {path}: {why}. Write a prompt with {{examples}} and {{question}}")
    return text


# ---- which answers are rows ------------------------------------------------------------------------------------------


def answer_of(reply: Reply) -> str:
    return BEFORE.sub("", reply.text, count=1).strip()


def why_not(reply: Reply) -> str | None:
    """Why a reply is no row: one of KEPT_OUT but "duplicate", or None."""
    if reason := FINISHES.get(reply.finish.lower()):
        return reason
    answer = answer_of(reply)
    if not answer:
        return "empty"
    return "refused" if is_leftover(answer) or ITSELF.match(answer.replace("’", "'")) else None


def rows_of(prompts: Prompts, replies: Iterator[Reply], counts: Counter) -> Iterator[dict]:
    """Rows {"messages": [user, assistant]} in the order of the prompts; what is kept out is counted."""
    seen = set()
    for reply in replies:
        question = prompts.question(int(reply.key) - 1)
        answer = answer_of(reply)
        reason = why_not(reply)
        if reason is None:
            mark = hashlib.sha256(f"{fold(question)}\n{fold(answer)}".encode()).digest()[:16]
            reason = "duplicate" if mark in seen else None
            seen.add(mark)
        counts[reason or "written"] += 1
        if reason is None:
            yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


# ---- the command -----------------------------------------------------------------------------------------------------


def run(argv) -> None:
    about = "Questions of a file answered by a teacher in the style of that file's answers."
    parser = errors.Parser(prog="data_gen/distill.py", description=about)
    add = parser.add_argument
    add("--data", type=Path, required=True, default=SUPPRESS, help="question/answer pairs in the style to learn")
    add("--rows", type=int, required=True, default=SUPPRESS, help="how many questions to ask")
    add("--lang", choices=tuple(FRAMES), default="en", help="language of the prompt")
    add("--examples", type=int, default=3, help="pairs that a prompt shows")
    add("--prompt-file", type=Path, default=SUPPRESS, help="a prompt of your own, with {examples} and {question}")
    add("--seed", type=int, default=0, help="which questions with which examples")
    out_help = "the JSONL file; replaced if there. Answers so far are kept in OUT.journal"
    add("--out", type=Path, required=True, default=SUPPRESS, help=out_help)
    teacher.add_flags(parser)
    args = parser.parse_args(argv)

    problems = files.unwritable("--out", args.out, args.data, *([args.prompt_file] if "prompt_file" in args else []))
    for name, value, most in (("rows", args.rows, 10**7), ("examples", args.examples, 20)):
        if not 1 <= value <= most:
            problems.append(f"wrong --{name} in the command line: {value} is not in 1..{most}. Give another number")
    if problems:
        raise BadInput(*problems)
    master = teacher.from_flags(args)
    frame, example = FRAMES[args.lang]
    if "prompt_file" in args:
        frame = read_frame(args.prompt_file)
    with files.open_regular(args.data, formats.LIMIT) as file:
        data = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    prompts = Prompts(read_pairs(args.data), args.rows, args.seed, args.examples, frame, example)

    told = {"data": data, "seed": args.seed, "examples": args.examples}
    told["prompt"] = hashlib.sha256((frame + example).encode()).hexdigest()[:16]
    journal, counts = beside(args.out), Counter()
    try:
        with files.writing(args.out) as file:
            for row in rows_of(prompts, master.ask(prompts, journal, told), counts):
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            if not counts["written"]:
                why = "; ".join(filter(None, (master.stopped, master.problem))) or "no answer is usable"
                fix = f"Mend that; other settings need another --out, or delete {journal}"
                raise BadEnvironment(f"no rows in {args.out}: {why}, {kept_out(counts)}. {fix}")
    except errors.Stopped as stop:
        stop.note = f"\nstopped; the same command goes on with the answers in {journal}"
        raise
    errors.say(f"{counts['written']:,} rows in {args.out}; {kept_out(counts)}")
    errors.say(master.account())
    if prompts.unusable:
        errors.say(f"{prompts.unusable:,} questions were never asked: the other rows give their answers away")
    if missing := len(prompts) - counts.total():
        fix = "The same command with more room goes on" if "--max" in master.stopped else "The same command goes on"
        errors.say(f"{missing:,} of {len(prompts):,} questions were not asked: {master.stopped}. {fix}")


def kept_out(counts: Counter) -> str:
    """What was kept out, in words."""
    parts = [f"{counts[reason]:,} {reason}" for reason in KEPT_OUT if counts[reason]]
    return "kept out: " + (", ".join(parts) or "none")


def main(argv=None) -> int:
    return errors.run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
