"""More ways to ask the same: a teacher rewrites each question K times, and the answer stays as it is.

The teacher is asked for JSON, one object a line. What is well-formed is kept; every other line of a reply is named with
its number and the reason, so that nothing disappears unseen.
"""

import json
import random
import re
import sys
from argparse import SUPPRESS
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a script: Python looks beside this file, and `lora` lies one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    from lora.errors import before_imports

    before_imports(__name__)

from tqdm import tqdm

from data_gen import teacher
from data_gen.journal import beside
from lora import errors, files
from lora.data import formats

# The row and the three constraints on the reply.
PROMPTS = {
    "en": """Here is a question with its answer:
{row}
Rewrite the question {ways} times. Use other words each time, but mean the same, so that this very answer still fits.
Write each rewrite as {{"question": "..."}} and leave the answer out. The reply has three rules:
1. One JSON object per line.
2. No line breaks inside an object.
3. Exactly {ways} lines, with nothing before or after them.""",
    "zh": """下面是一个问题和它的回答：
{row}
请把其中的问题改写{ways}遍，每遍换一种说法，但意思不变，让原来的回答仍然合适。
每个改写写成 {{"question": "..."}}，不要写回答。回复须遵守三条规则：
1. 每行一个JSON对象。
2. 对象内部不能换行。
3. 恰好{ways}行，前后不加任何内容。""",
}
KEY = "question"
MOST_WAYS = 100
OUT_HELP = "the JSONL file; replaced if there. Replies so far are kept in OUT.journal"
FENCE = re.compile(r"\s*```\w*\s*")

# why a line of a reply is not kept
NOT_JSON, WRONG_KEYS, EMPTY = "not a JSON object", f'keys other than "{KEY}"', "no text"
BROKEN, ORIGINAL, REPEAT = "half a surrogate pair", "the original question", "a repeat"
SURPLUS, OTHER_ROW = "more than were asked for", "asks what another row asks"


class Turn(NamedTuple):
    """A question and its answer, the messages before them (none, or a system turn), and `file:line`."""

    before: list[dict]
    question: str
    answer: str
    where: str

    def row(self, question: str) -> dict:
        """The conversation with another question."""
        asked, answered = {"role": "user", "content": question}, {"role": "assistant", "content": self.answer}
        return {"messages": [*self.before, asked, answered]}

    def asks(self, question: str) -> tuple[str, str]:
        """What may be answered in one way only: two texts that ask the same under the same system turn are equal."""
        return (self.before[0]["content"] if self.before else "", plain(question))


# ---- reading and comparing -------------------------------------------------------------------------------------------

NARROW = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}  # full-width -> ASCII
SOFT = re.compile(r"(?<!\d)[\s.,:]+|[\s.,:]+(?!\d)|[!?;'\"…。、~·‘’“”「」]+")  # 3.5 is not 35


def plain(text: str) -> str:
    """Text without width, case, spaces and sentence punctuation: near-duplicates become equal."""
    narrow = text.translate(NARROW).casefold()
    return SOFT.sub("", narrow) or narrow


def read_turns(path: Path) -> list[Turn]:
    """Every row of a file once. Raises BadInput for rows of several turns, or with another answer to the same."""
    turns, problems = {}, []
    for row in formats.read([path]):
        roles = [message["role"] for message in row.messages]
        if roles[roles[0] == "system" :] != ["user", "assistant"]:
            why = "expected one question and one answer, perhaps after a system turn"
            problems.append(f"wrong row in {row.where}: {why}. Split or remove it")
            continue
        *before, asked, answered = row.messages
        turn = Turn(before, asked["content"], answered["content"], row.where)
        first = turns.setdefault((str(before), turn.question.strip()), turn)
        if first.answer != turn.answer:
            problems.append(f"conflict in {row.where}: {first.where} has another answer to its question. Keep one")
    if problems:
        raise errors.BadInput(*problems)
    return list(turns.values())


# ---- asking ----------------------------------------------------------------------------------------------------------


def prompt(question: str, answer: str, ways: int, lang: str = "en") -> str:
    """What the teacher is asked: the row, and the three constraints."""
    row = json.dumps({"question": question, "answer": answer}, ensure_ascii=False)
    return PROMPTS[lang].format(row=row, ways=ways)


def parse(text: str, ways: int, question: str = "") -> tuple[list[str], list[tuple[int, str, str]]]:
    """A reply's rewrites, at most `ways`; and every other line as (line number from 1, why, line).

    Blank lines and a code fence round the reply are no lines of it.
    """
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for end in (0, -1):
        if lines and FENCE.fullmatch(lines[end][1]):
            del lines[end]
    rewrites, rejected, seen = [], [], set()
    for number, line in lines:
        rewrite, why = _rewrite(line)
        if not why and plain(rewrite) == plain(question):
            why = ORIGINAL
        elif not why and plain(rewrite) in seen:
            why = REPEAT
        elif not why and len(rewrites) == ways:
            why = SURPLUS
        if why:
            rejected.append((number, why, line))
        else:
            rewrites.append(rewrite)
            seen.add(plain(rewrite))
    return rewrites, rejected


def _rewrite(line: str) -> tuple[str, str]:
    """The text of one line, or why there is none."""
    try:
        pairs = json.loads(line, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):  # ValueError: also an integer of too many digits
        return "", NOT_JSON
    if not isinstance(pairs, _Pairs):
        return "", NOT_JSON
    if [key for key, _ in pairs] != [KEY]:
        return "", WRONG_KEYS
    text = pairs[0][1]
    if not isinstance(text, str) or not text.strip():
        return "", EMPTY
    if any("\ud800" <= char <= "\udfff" for char in text):
        return "", BROKEN
    return text.strip(), ""


class _Pairs(list):
    """A JSON object with its keys as written: a dictionary would hide one that occurs twice."""


def rewrites(
    turns: Sequence[Turn], ways: int, lang: str, master: "teacher.Teacher", out: Path
) -> tuple[list[list[str]], Counter]:
    """For each turn its rewrites, and how often a line was not kept, by reason; stderr has every such line.

    No rewrite asks what another row asks: that could be a question with two answers. The replies are kept beside `out`.
    Raises BadEnvironment where there is no rewrite at all.
    """
    texts = [prompt(turn.question, turn.answer, ways, lang) for turn in turns]
    keys = [_key(turn, text) for turn, text in zip(turns, texts, strict=True)]
    asked = [teacher.Question(key, [{"role": "user", "content": text}]) for key, text in zip(keys, texts, strict=True)]
    places = {key: place for place, key in enumerate(keys)}
    taken, found, whys = {turn.asks(turn.question) for turn in turns}, [[] for _ in turns], Counter()
    journal = beside(out)
    try:
        for reply in master.ask(asked, journal):
            place = places.pop(reply.key)
            kept, lost = _kept(turns[place], reply, ways, taken)
            found[place] = kept
            whys.update(lost)
    except errors.Stopped as stop:
        stop.note = f"\nstopped; the same command goes on with the replies in {journal}"
        raise
    errors.say(master.account())
    if places:
        why = f"{len(places)} of {len(turns)} questions were not asked: {master.stopped}"
        errors.say(f"{why}. The same command, perhaps with more room, goes on")
    if not any(found):
        if master.problem and not whys:
            raise errors.BadEnvironment(
                f"no replies in {journal}: {master.problem}. Check the teacher and run it again"
            )
        why, fix = f"no reply has a usable line, {told(whys)}", f"Give another teacher and --out, or delete {journal}"
        raise errors.BadEnvironment(f"no rewrites in {journal}: {why}. {fix}")
    return found, whys


def _kept(turn: Turn, reply: "teacher.Reply", ways: int, taken: set) -> tuple[list[str], list[str]]:
    """The rewrites to keep, which become `taken`, and the reasons why others are not."""
    found, rejected = parse(reply.text, ways, turn.question)
    for number, why, line in rejected:
        _tell(turn, f"line {number} of the reply is not kept, {why}: {line}")
    kept, lost = [], [why for _, why, _ in rejected]
    for rewrite in found:
        if turn.asks(rewrite) in taken:
            _tell(turn, f"a rewrite is not kept, it {OTHER_ROW}: {rewrite}")
            lost.append(OTHER_ROW)
        else:
            kept.append(rewrite)
        taken.add(turn.asks(rewrite))
    if len(kept) < ways:
        _tell(turn, f"{len(kept)} of {ways} rewrites; the reply ended with {reply.finish!r}")
    return kept, lost


def told(whys: Counter) -> str:
    reasons = ", ".join(f"{why}: {count}" for why, count in whys.most_common())
    return f"{whys.total()} not kept" + (f" ({reasons})" if reasons else "")


def _key(turn: Turn, text: str) -> str:
    return blake2b(json.dumps([turn.before, text]).encode(), digest_size=12).hexdigest()


def _tell(turn: Turn, what: str) -> None:
    with tqdm.external_write_mode(file=sys.stderr):  # not into the middle of the progress bar
        errors.say(errors.one_line(f"{turn.where}: {what}"[:300]))


# ---- the command -----------------------------------------------------------------------------------------------------


def within(low: int, high: int):
    """An argparse type: an integer of that range."""

    def number(text: str) -> int:
        if not low <= int(text) <= high:
            raise ValueError
        return int(text)

    number.__name__ = f"number of {low}..{high}"  # argparse names the type in its message
    return number


def story(argv) -> None:
    about = "Let a teacher rewrite every question of a file K ways; the answers stay as they are."
    parser = errors.Parser(prog="data_gen/augment.py", description=about)
    parser.add_argument("--data", type=Path, required=True, default=SUPPRESS, help="conversations of one turn")
    parser.add_argument(
        "--ways", type=within(1, MOST_WAYS), required=True, default=SUPPRESS, help="rewrites a question"
    )
    parser.add_argument("--lang", choices=tuple(PROMPTS), default="en", help="language of the request to the teacher")
    parser.add_argument("--only-new", action="store_true", help="leave the original rows out")
    parser.add_argument("--seed", type=int, default=0, help="order of the rows")
    parser.add_argument("--out", type=Path, required=True, default=SUPPRESS, help=OUT_HELP)
    teacher.add_flags(parser)
    args = parser.parse_args(argv)
    if problems := files.unwritable("--out", args.out, args.data):
        raise errors.BadInput(*problems)
    master, turns = teacher.from_flags(args), read_turns(args.data)
    found, whys = rewrites(turns, args.ways, args.lang, master, args.out)
    rows = [turn.row(rewrite) for turn, kept in zip(turns, found, strict=True) for rewrite in kept]
    new = len(rows)
    rows += [] if args.only_new else [turn.row(turn.question) for turn in turns]
    random.Random(args.seed).shuffle(rows)
    files.write_rows(args.out, rows)
    asked = f"{new} of {args.ways * len(turns)} rewrites, {told(whys)}"
    errors.say(f"{len(rows)} rows ({len(rows) - new} originals; {asked}) in {args.out}")


def main(argv=None) -> int:
    return errors.run(story, argv)


if __name__ == "__main__":
    sys.exit(main())
