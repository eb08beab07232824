"""A row that prefers one answer to another becomes two rows that `formats` reads: with the chosen answer, and with the
rejected one. A row that judges one answer becomes that row, and whether the answer is good.

A shape is two names of answers and a name of the prompt: any of ANSWERS with any of PROMPTS, or with no prompt, which
is then what both sides have in common. Prompts and answers may be texts, messages, or whole conversations.
"""

import re
from itertools import takewhile
from typing import NamedTuple

from lora.data.foreign_fields import GOOD, MEDIA, REFUSED, SHAREGPT_ROLES, THOUGHTS, is_blank, says_nothing

ANSWERS = (  # of the chosen and of the rejected answer
    ("chosen", "rejected"),  # TRL, HH-RLHF, UltraFeedback, LLaMA-Factory, axolotl, Argilla, Orca
    ("preferred_output", "non_preferred_output"),  # OpenAI, the prompt in {"input": {"messages"}}
    ("accepted", "rejected"),  # Vezora's code
    ("response_j", "response_k"),  # stack-exchange
    ("human_ref_A", "human_ref_B"),  # SHP, the prompt in "history"
    ("response_0", "response_1"),  # PKU
    ("messages", "rejected_messages"), ("messages", "rejected_response"),  # ms-swift: messages end with the good answer
    ("conversations", "rejected_messages"), ("conversations", "rejected_response"),
    *((answer, rejected) for answer in ("response", "completion", "output", "answer", "a")
      for rejected in ("rejected", "rejected_response")),
)  # fmt: skip
READ_ALONE = {
    "messages",
    "conversations",
    "completion",
    "output",
    "answer",
    "a",
}  # of a row without the rejected answer
# Which of two answers is chosen, a field says
BETTER = {"human_ref_A": ("labels", (1, 0)), "response_0": ("better_response_id", (0, 1))}
WHOLE = ("messages", "conversations")
PROMPTS = ("prompt", "question", "instruction", "q", "query", "input", "history", *WHOLE)

SECOND = {field for _, field in ANSWERS}
PREFERENCE = {
    "chosen",
    "rejected",
    "preference",
    "preferred_output",
    "non_preferred_output",
}  # never a row's of one answer
SCORE = re.compile("score|rating|reward")
METHODS = "--method dpo, or --method reward to train a reward model"

SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")  # of HH-RLHF: "\n\nHuman: ...\n\nAssistant: ..."
BORDERS = (re.compile("\n"), re.compile(r"\s|(?<=[。？！：])"))  # a text's prompt ends at one, lines before words

Keys = tuple[str, str | None]
Side = tuple[dict, Keys | None]  # a row that `formats` reads, by the keys of its question and answer where it has some


class Sides(NamedTuple):
    """Both sides of a pair, its shape, how much better the chosen answer shall be, and findings (code, what)."""

    chosen: Side
    rejected: Side
    shape: str
    margin: float
    findings: list[tuple[str, str]]


# ---- which kind of row it is -----------------------------------------------------------------------------------------


def answers_in(row: dict, keys: Keys | None = None) -> tuple[str, str] | None:
    """The names of a row's chosen and rejected answer, if it has both."""
    named = ((keys[1], "rejected"), (keys[1], "rejected_response")) if keys and keys[1] else ()
    found = (pair for pair in (*named, *ANSWERS) if pair[0] in row and not says_nothing(row.get(pair[1])))
    return next(found, None)


def refused_as(kind: str, row: dict, keys: Keys | None = None) -> str | None:
    """Why a row is not of this kind, and the flag that reads it."""
    pair = answers_in(row, keys)
    judged = next((field for field in GOOD if row.get(field) is not None and field not in (keys or ())), None)
    if kind == "conversation":
        return _preference(row, pair)
    if pair and kind == "judged":
        return f"a preference row ({', '.join(pair)}). Give {METHODS}"
    if kind == "judged" and not judged:
        add = 'add "label": true for a good answer, false for a bad one'
        return f"nothing says whether its answer is good. Give --method sft to learn it, or {add}"
    if kind == "pair" and judged and not pair:
        return f"it judges one answer ({judged}) and has no rejected answer. Give --method kto"
    if kind == "pair" and not pair:
        found = ", ".join(list(row)[:8])[:200] or "none"
        return (
            f"it has no rejected answer, its keys are {found}. Give --method sft to train its answers, or add rejected"
        )
    return None


def _preference(row: dict, pair: tuple[str, str] | None) -> str | None:
    fields = [f for f in row if not says_nothing(row[f]) and (f in PREFERENCE or f.startswith("rejected_"))]
    if not (fields or pair):
        return None
    asked = next((key for key in PROMPTS if isinstance(row.get(key), str)), None)
    good = pair[0] if pair else "chosen"
    fix = 'write the good answers as {"messages": [...]}'
    if good in READ_ALONE or not (pair or "chosen" in row or "preferred_output" in row):
        fix = f"remove {fields[0]} to train the answer beside it"
    elif asked and isinstance(row.get(good), str) and good not in BETTER:
        fix = f"--prompt-key {asked} --response-key {good} to train the chosen ones"
    what = f"a preference row ({', '.join(dict.fromkeys([*(pair or ()), *fields]))}), which --method sft does not learn"
    if pair:
        return f"{what}. Give {METHODS}; or {fix}"
    return f"{what}. " + (f"Give {fix}" if fix.startswith("--") else fix[0].upper() + fix[1:])


# ---- one answer that is judged ---------------------------------------------------------------------------------------


def judged(row: dict, keys: Keys | None = None) -> tuple[dict, bool]:
    """The row without its judgement, and whether its answer is good. Raises ValueError for what is neither."""
    said = {field: row[field] for field in GOOD if row.get(field) is not None and field not in (keys or ())}
    for field, value in said.items():
        if not isinstance(value, bool):
            fix = "Write true for a good answer, false for a bad one"
            raise ValueError(f"it has {repr(value)[:40]} as {field}. {fix}")
    if len(set(said.values())) > 1:
        raise ValueError(f"it has {' and '.join(said)}, which contradict each other. Remove one of them")
    return {field: value for field, value in row.items() if field not in said}, next(iter(said.values()))


# ---- two answers -----------------------------------------------------------------------------------------------------


def sides(row: dict, keys: Keys | None = None) -> Sides:
    """Both sides of a row that `answers_in` knows; `keys` name its question. Raises ValueError."""
    names = shape = answers_in(row, keys)
    answers = [row[name] for name in names]
    rest = {field: value for field, value in row.items() if field not in (*names, "margin")}
    if isinstance(rest.get("input"), dict):
        rest |= rest.pop("input")
    if names[0] in BETTER:
        field, values = BETTER[names[0]]
        if rest.get(field) not in values or isinstance(rest[field], bool):
            raise ValueError(f"its {field} is {repr(rest.get(field))[:40]}, expected 0 or 1. Repair the line")
        first = values.index(rest.pop(field))
        names, answers = (names[first], names[1 - first]), [answers[first], answers[1 - first]]
    elif names[0] in WHOLE:
        turns = answers[0]
        if not isinstance(turns, list) or not turns or not _is(turns[-1], "assistant"):
            raise ValueError(f"its {names[0]} do not end with the good answer. Add it")
        answers[0], rest["messages"] = turns[-1:], turns[:-1]
    _refuse_beside(rest, names)
    asking = WHOLE if names[0] in WHOLE else (*(keys or ())[:1], *PROMPTS)
    key = next((key for key in asking if not says_nothing(rest.get(key))), None)
    prompt, findings = rest.pop(key, None), _scores(rest)
    shape = "/".join(dict.fromkeys([key, *shape] if key else shape))
    texts = all(isinstance(answer, str) for answer in answers)
    if texts and key is None:
        prompt, answers = _texts(*answers)
    elif texts and isinstance(prompt, str) and _is_dialogue(prompt) and prompt.rstrip().endswith("\n\nAssistant:"):
        prompt, answers = None, [_dialogue(a if a.startswith(prompt) else prompt + a) for a in answers]
    elif key and not any(isinstance(text, (list, dict)) for text in (prompt, *answers)):
        both = [({**rest, key: prompt, name: a}, (key, name)) for name, a in zip(names, answers, strict=True)]
        return Sides(*both, shape, _margin(row), findings)
    found = [_joined(prompt, answer) for answer in answers]
    if any(_last_question(prompt) not in (None, *map(_text_of, turns)) for turns in found):
        findings.append(("PROMPTS", f"its {key} is not in the conversations of both sides, which count"))
    rest = {field: value for field, value in rest.items() if field not in WHOLE}
    return Sides(*(({**rest, _name(turns): turns}, None) for turns in found), shape, _margin(row), findings)


def _refuse_beside(rest: dict, names: tuple[str, str]) -> None:
    """Raises ValueError for another answer, or for what a side has and would not be learned."""
    for field, value in rest.items():
        side, _, what = field.partition("_")
        if says_nothing(value):
            continue
        if field in SECOND | PREFERENCE - {"preference"}:
            raise ValueError(f"its {field} would not be learned beside {' and '.join(names)}. Remove one of them")
        if side in ("chosen", "rejected") and (what in REFUSED or what in THOUGHTS or MEDIA.fullmatch(what)):
            raise ValueError(f"it has {field}, which would not be learned. Remove the row, or {field}")


def _margin(row: dict) -> float:
    margin = row.get("margin")
    if margin is None:
        return 0.0
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not abs(margin) < 1e6:
        raise ValueError(f"its margin is {repr(margin)[:40]}, expected a number. Repair the line")
    return float(margin)


def _scores(rest: dict) -> list[tuple[str, str]]:
    """A finding for every score by which the rejected answer is the better one."""
    found = []
    for field in rest:
        other = field.replace("chosen", "rejected")
        both = rest[field], rest.get(other)
        if (
            other != field
            and SCORE.search(field)
            and all(isinstance(s, (int, float)) for s in both)
            and both[0] < both[1]
        ):
            found.append(("SCORES", f"{field} is less than {other}"))
    return found


def _is(turn: object, role: str) -> bool:
    given = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
    return isinstance(given, str) and SHAREGPT_ROLES.get(given) == role


def _text_of(turn: object) -> object:
    text = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
    return text.strip() if isinstance(text, str) else None


def _turns(value: object, role: str) -> list:
    return (
        value if isinstance(value, list) else [value if isinstance(value, dict) else {"role": role, "content": value}]
    )


def _last_question(prompt: object) -> object:
    questions = [_text_of(turn) for turn in _turns(prompt, "user") if _is(turn, "user")]
    return questions[-1] if questions else None


def _joined(prompt: object, answer: object) -> list:
    """The turns of a side: the answer alone where it is the whole conversation already (UltraFeedback)."""
    if prompt is None:
        return _turns(answer, "assistant")
    before, after = _turns(prompt, "user"), _turns(answer, "assistant")
    asked, again = ([turn for turn in turns if _is(turn, "user")] for turns in (before, after))
    begins = bool(after) and not _is(after[0], "assistant")
    repeats = bool(asked and again) and (_is(before[-1], "user") or _text_of(asked[0]) == _text_of(again[0]))
    if not begins or not (repeats or _is(after[0], "system")):
        return [*before, *after]
    system = before[:1] if _is(before[0], "system") and not _is(after[0], "system") else []
    return [*system, *after]


def cut(chosen: list[dict], rejected: list[dict]) -> list[list[dict]]:
    """Both sides as they are compared: answers in the turns that they begin with in common are context."""
    same, last = 0, min(len(chosen), len(rejected)) - 1
    while same < last and {**chosen[same], "train": True} == {**rejected[same], "train": True}:
        same += 1
    return [
        [{**turn, "train": False} if place < same and turn["role"] == "assistant" else turn
         for place, turn in enumerate(side)]
        for side in (chosen, rejected)
    ]  # fmt: skip


def _name(turns: list) -> str:
    return WHOLE[any(isinstance(turn, dict) and "from" in turn for turn in turns)]


# ---- texts without a prompt ------------------------------------------------------------------------------------------


def _texts(chosen: str, rejected: str) -> tuple[str | None, list]:
    """The prompt that two texts begin with, and what follows it.

    Answers may begin alike, so it ends at the last line end that they share, or at white space where there is no line
    end; that character belongs to neither. In HH-RLHF's form the turns say where answers begin.
    """
    if _is_dialogue(chosen) and _is_dialogue(rejected):
        return None, [_dialogue(chosen), _dialogue(rejected)]
    same = takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False))
    common = chosen[: sum(1 for _ in same)]
    for border in BORDERS:
        cuts = [cut for cut in border.finditer(common) if not is_blank(common[: cut.start()])]
        if cuts:
            return common[: cuts[-1].start()].rstrip(), [text[cuts[-1].end() :] for text in (chosen, rejected)]
    raise ValueError("chosen and rejected share no beginning that could be the prompt. Add a prompt")


def _is_dialogue(text: str) -> bool:
    return [who for who, _ in zip(SPEAKER.findall(text), range(2), strict=False)] == ["Human", "Assistant"]


def _dialogue(text: str) -> list[dict]:
    """The turns of HH-RLHF's form; what stands before the first is a system turn."""
    system, *parts = SPEAKER.split(text)
    turns = [{"role": "system", "content": system.strip()}] if system.strip() else []
    for who, said in zip(parts[::2], parts[1::2], strict=True):
        turns.append({"role": "user" if who == "Human" else "assistant", "content": said.strip()})
    return turns
