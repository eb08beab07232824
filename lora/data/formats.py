"""Any accepted row becomes one internal form: messages.

    {"messages": [{"role": "system" | "user" | "assistant", "content": "..."}, ...]}        OpenAI's chat form
    {"conversations": [{"from": "human" | "gpt", "value": "..."}, ...]}                     ShareGPT's
    {"instruction", "output"}, also with "input", "history": [[question, answer], ...], "system"
    {"prompt", "completion"}, {"question", "answer"}, {"q", "a"}, or any two keys that are named
    {"text": "..."}                                            a document: one message of the role "text"

A pair of answers (`pairs.py` has their shapes) is two such rows, an answer that is judged one of them, and a prompt
(`prompts.py`) what one of them asks.

Nothing is repaired silently, and no field that changes what is learned is passed over: what is wrong is collected with
its line and raised. `jsonl.py` reads the files.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lora.data import foreign_fields, pairs, prompts
from lora.data.foreign_fields import ROLES, SHAREGPT_ROLES
from lora.data.jsonl import LIMIT, Problem, read_rows
from lora.errors import MOST_LINES, BadInput

__all__ = ["LIMIT", "Conversation", "Problem", "read", "read_row", "scan"]

PAIRS = (("prompt", "completion"), ("question", "answer"), ("q", "a"), ("instruction", "output"))
OF_A_QUESTION = ("history", "input", "context", "query")  # of a row whose turns are not written out as messages
SYSTEM = ("system", "system_prompt", "system_message")  # beside the turns of a row
KINDS = {type(None): "null", bool: "true or false", int: "a number", float: "a number", list: "a list",
         dict: "an object"}  # fmt: skip
LEADING = {"drop": ", leading answers dropped", "keep": ", leading answers not trained"}  # added to a row's shape


Keys = tuple[str, str | None]  # of question and answer


class Conversation(NamedTuple):
    """Messages {"role", "content"}, also "train": False and "reasoning_content"; `file:line` to name them by; the shape
    of their row.

    The messages of a pair are those of the chosen side, `rejected` those of the other, `margin` by how much the chosen
    answer shall be better. `good` says of an answer that is judged whether it is. Only answers that are compared or
    judged are trained. A prompt ends with a turn of the user; `row` is its row as it was read, for the rewards.
    """

    messages: list[dict]
    where: str
    shape: str = "messages"
    rejected: list[dict] | None = None
    good: bool | None = None
    margin: float = 0.0
    row: dict | None = None


class _Wrong(Exception):
    def __init__(self, text: str, code: str = "ROW"):
        self.text, self.code = text, code


def read(
    paths: Sequence[Path], answered: bool = True, keys: Keys | None = None, leading="error", kind="conversation"
) -> list[Conversation]:
    """All conversations of some files, in order; with `answered`, each needs an answer to train.

    Raises BadInput with every bad line (the first 20 and a count).
    """
    found, problems = [], []
    for row in scan(paths, answered, keys, leading=leading, kind=kind):
        (problems if isinstance(row, Problem) else found).append(row)
        if len(problems) > 10 * MOST_LINES:  # the whole file is something else
            break
    if problems:
        raise BadInput(*map(str, problems))
    return found


def scan(
    paths: Sequence[Path],
    answered: bool = True,
    keys: Keys | None = None,
    progress: Callable[[int], object] = lambda size: None,
    leading: str = "error",
    unused: Callable[..., object] | None = None,
    kind: str = "conversation",
) -> Iterator[Conversation | Problem]:
    """Every row of some files, in order, as it is read: a conversation, or what is wrong with it.

    All rows are of one `kind`: "conversation", "pair", "judged", "prompt". `keys` are those of question and answer in
    rows that have both (of a prompt or a pair, the answer's is None). An answer that `leading` finds before the first
    question is an error, dropped, or kept as context. `progress` hears how many bytes have been read, `unused` of
    fields that nothing reads (place, field) and of what else --check finds in them (place, what, code). Raises BadInput
    for a file that cannot be opened.
    """
    for path in paths:
        row = None
        for row in read_rows(Path(path), progress):
            yield row if isinstance(row, Problem) else read_row(*row, kind, unused, keys, answered, leading)
        if row is None:
            yield Problem(str(path), "FILE", "no examples, the file is empty. Give JSON objects in lines, or a list")


def plain_shape(shape: str) -> str:
    """A shape without what became of leading answers."""
    return shape.partition(", ")[0]


def read_row(where: str, value: object, kind: str, unused: Callable | None = None, *how) -> Conversation | Problem:
    """One row, as `scan` reads it; `how` are its keys, answered and leading."""
    try:
        if not isinstance(value, dict):
            raise _Wrong(f"expected an object, found {type(value).__name__}. Repair the line")
        return READERS[kind](where, value, unused and partial(unused, where), *(how or (None, True, "error")))
    except _Wrong as wrong:
        return Problem(where, wrong.code, wrong.text)
    except ValueError as wrong:  # of a foreign field
        return Problem(where, "ROW", str(wrong))


def _conversation(where: str, value: dict, hear: Callable | None, keys: Keys | None, *how) -> Conversation:
    used = _used(value, keys)
    if why := not used and pairs.refused_as("conversation", value):
        raise _Wrong(why, "UNKNOWN")
    return Conversation(*_messages(where, value, hear, used and keys, *how))


def _judged(where: str, value: dict, hear: Callable | None, keys: Keys | None, *how) -> Conversation:
    """The answer that is judged is the last one; those before it are context."""
    used = _used(value, keys)
    if why := pairs.refused_as("judged", value, used):
        raise _Wrong(why, "UNKNOWN")
    row, good = pairs.judged(value, used)
    messages, *more = _messages(where, row, hear, used and keys, *how)
    _ends_with_answer(messages)
    earlier = [{**turn, "train": False} if turn["role"] == "assistant" else turn for turn in messages[:-1]]
    return Conversation([*earlier, messages[-1]], *more, good=good)


def _both_sides(where: str, value: dict, hear: Callable | None, keys: Keys | None, *how) -> Conversation:
    if why := pairs.refused_as("pair", value, keys):
        raise _Wrong(why, "UNKNOWN")
    row, both = pairs.sides(value, keys), []
    for name, (side, names) in (("chosen ", row.chosen), ("rejected ", row.rejected)):
        both.append(_messages(where, side, hear, names, *how, name)[0])
        _ends_with_answer(both[-1], name)
    for code, what in row.findings if hear else ():
        hear(what, code)
    chosen, rejected = pairs.cut(*both)
    return Conversation(chosen, where, row.shape, rejected, margin=row.margin)


def _asked(where: str, value: dict, hear: Callable | None, keys: Keys | None, _, leading: str) -> Conversation:
    used = _used(value, keys)
    if why := prompts.refused(value, used):
        raise _Wrong(why, "UNKNOWN")
    sides, shape = prompts.sides(value, used)
    found = [_messages(where, side, hear, names, False, leading) for side, names in sides]
    shape = shape or found[0][2]
    return Conversation(prompts.question([turns for turns, *_ in found], shape), where, shape, row=value)


READERS = {"conversation": _conversation, "judged": _judged, "pair": _both_sides, "prompt": _asked}


def _used(row: dict, keys: Keys | None) -> tuple:
    """The keys that were named, if a row has them."""
    return tuple(filter(None, keys)) if keys and all(key in row for key in keys if key) else ()


def _messages(
    where: str, value: dict, hear: Callable | None, keys: Keys | None, answered: bool, leading: str, side: str = ""
) -> tuple[list[dict], str, str]:
    """The messages of a row, its place, and the name of its shape; of which `side` of a pair they are."""
    used = tuple(filter(None, keys or ()))
    if why := foreign_fields.refused_in_row(value, used):
        raise _Wrong(why, "UNKNOWN")
    turns, roles, shape = _turns(value, keys, answered)
    messages, led = _checked(turns, roles, leading, side)
    if not answered and "text" in roles:
        raise _Wrong("a document asks nothing. Give prompts")
    if answered:
        trained, field = foreign_fields.is_trained(value, "it", used)
        if trained is False:
            raise _Wrong(f"its {field} leaves nothing to train. Remove the row, or {field}")
        if not any(m["role"] in ("assistant", "text") and "train" not in m for m in messages):
            raise _Wrong("nothing to train, there is no assistant turn to learn. Add an answer")
    for field in foreign_fields.unread(value, turns, used) if hear else ():
        hear(field)
    return messages, where, shape + LEADING[leading] if led else shape


def _ends_with_answer(messages: list[dict], side: str = "") -> None:
    if messages[-1]["role"] != "assistant" or "train" in messages[-1]:
        raise _Wrong(f"{side}message {len(messages)} should be the answer that is learned from. Add it")


def _turns(value: dict, keys: Keys | None, answered: bool) -> tuple[object, dict[str, str], str]:
    """The turns of a row as they stand there, how its roles are called, and the name of its shape."""
    if keys:
        return _pair(value, *keys), ROLES, "/".join(filter(None, keys))
    if "messages" in value:
        return _with_system(value, value["messages"]), ROLES, "messages"
    if "conversations" in value:
        return _with_system(value, foreign_fields.sharegpt(value["conversations"])), SHAREGPT_ROLES, "conversations"
    for prompt, answer in PAIRS:
        if prompt in value and answer in value:
            return _pair(value, prompt, answer), ROLES, f"{prompt}/{answer}"
    if "text" in value:
        return [{"role": "text", "content": _text(value, "text")}], {"text": "text"}, "text"
    for prompt, _ in PAIRS:
        if not answered and prompt in value:
            return _pair(value, prompt, None), ROLES, prompt
    found = ", ".join(list(value)[:8])[:200] or "none"
    known = ", ".join(("messages", "conversations", *("/".join(pair) for pair in PAIRS), "text"))
    others = "train.py has --prompt-key and --response-key" if answered else "generate.py has --prompt-key"
    raise _Wrong(f"its keys are {found}. Known are {known}; {others} for others", "UNKNOWN")


def _text(value: dict, key: str) -> str:
    """The text that a field of a row must be."""
    if not isinstance(value[key], str):
        raise _Wrong(f"its {key} is {KINDS[type(value[key])]}, expected text. Write it as text, or the row as messages")
    return value[key]


def _pair(value: dict, prompt: str, answer: str | None) -> object:
    """A pair of question and answer, what comes before it, and what belongs to the question.

    An input without an instruction (null, or blank) is the question: so other readers of Alpaca's form have it.
    """
    sides = [value[key] for key in (prompt, answer) if key]
    if all(isinstance(side, list) and all(isinstance(m, dict) and "role" in m for m in side) for side in sides):
        return _with_system(value, [message for side in sides for message in side], prompt, answer)
    more, history = [], value.get("history") if prompt != "history" else None
    for key in ("input", "context", "query"):
        if key in (prompt, answer) or key not in value or value[key] is None:
            continue
        if prompt != "instruction":
            if not foreign_fields.says_nothing(value[key]):
                raise _Wrong(f"its {key} would not be learned. Put it into the {prompt}")
        elif _text(value, key).strip():
            more.append(value[key])
    first = [] if more and foreign_fields.is_blank(value[prompt]) else [_text(value, prompt)]
    texts = ["\n".join([*first, *more]), *([_text(value, answer)] if answer else [])]
    if history not in (None, "", []):
        if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
            raise _Wrong("history is not a list of [question, answer] pairs. Repair the line")
        texts[:0] = [_text({"history": text}, "history") for pair in history for text in pair]
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return _with_system(value, turns, *OF_A_QUESTION)


def _with_system(value: dict, turns: object, *used: str | None) -> object:
    """The turns, after the system text that stands beside them (two system turns are refused later).

    Raises _Wrong where the row has what belongs to a single question and is not used for it.
    """
    for key in OF_A_QUESTION:
        if key not in used and not foreign_fields.says_nothing(value.get(key)):
            raise _Wrong(f"its {key} would not be learned beside messages. Put it into them")
    texts = {_text(value, key) for key in SYSTEM if key not in used and value.get(key) not in (None, "")}
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    if not isinstance(turns, list) or (first.get("role") == "system" and [*texts] == [first.get("content")]):
        return turns
    return [*({"role": "system", "content": text} for text in sorted(texts)), *turns]


def _checked(messages: object, roles: dict[str, str], leading: str, side: str = "") -> tuple[list[dict], bool]:
    """What is used of every message: an optional system turn, then user and assistant in turn; and whether an answer
    led, which `leading` says what to do with."""
    if not isinstance(messages, list) or not messages:
        raise _Wrong("messages is not a list of messages. Repair the line")
    clean: list[dict] = []
    led = False
    for number, message in enumerate(messages, 1):
        name = f"{side}message {number}"
        if not isinstance(message, dict):
            raise _Wrong(f"{name} is no object. Repair the line")
        given = message.get("role")
        role = roles.get(given) if isinstance(given, str) else None
        if role is None:
            known = "system, user, assistant"
            raise _Wrong(f"{name} has role {repr(given)[:40]}; expected {known}. Repair the line", "ROLES")
        content = _content(message, role, name)
        if role == "system" and number > 1:
            raise _Wrong(f"{name} is a system turn; only the first may be one. Repair the line", "ROLES")
        leads = role == "assistant" and all(m["role"] == "system" for m in clean)
        expected = "user" if not clean or clean[-1]["role"] != "user" else "assistant"
        if role in ("user", "assistant") and role != expected and not (leads and leading in LEADING):
            fix = (
                "train.py and evaluate.py have --leading-answers drop or keep"
                if leads
                else "Let user and assistant alternate"
            )
            raise _Wrong(f"{name} is a turn of {role}, expected {expected}. {fix}", "ROLES")
        if role != "system" and not content.strip():
            raise _Wrong(f"{name} of {role} is empty. Remove it or write it", "EMPTY")
        led = led or leads
        if not (leads and leading == "drop"):
            extra = _train(message, role, name) | ({"train": False} if leads else {})
            clean.append({"role": role, "content": content, **_thoughts(message, role, name), **extra})
    return clean, led


def _content(message: dict, role: str, name: str) -> str:
    """The text of a message, which OpenAI's form may give in parts."""
    content = message.get("content")
    if isinstance(content, list) and content:
        if others := [part for part in content if not _is_text(part)]:
            kind = others[0].get("type") if isinstance(others[0], dict) else None
            why = f", with a part of type {repr(kind)[:40]}" if kind != "text" and kind else ""
            raise _Wrong(f"{name} has list as content{why}, expected text. Repair the line")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        tools = "; calls of tools are not trained here" if message.get("tool_calls") else ""
        raise _Wrong(f"{name} has {type(content).__name__} as content, expected text{tools}. Repair the line")
    if why := foreign_fields.refused_in_message(message, name):
        raise _Wrong(why)
    _refuse_half_pairs(content, name)
    return content


def _refuse_half_pairs(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Wrong(f"{name} has half a surrogate pair, which is no character. Remove it", "SURROGATE") from None


def _is_text(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _thoughts(message: dict, role: str, name: str) -> dict:
    """{"reasoning_content": text} for an answer with thoughts beside it, which the template must have a place for."""
    text = foreign_fields.thoughts(message, name)
    if text and role != "assistant":
        raise _Wrong(f"{name} of {role} has thoughts, but only answers are learned. Remove them")
    _refuse_half_pairs(text, name)
    return {"reasoning_content": text} if text else {}


def _train(message: dict, role: str, name: str) -> dict:
    """{"train": False} for an answer that shall not be learned: "train": false, OpenAI's "weight": 0, or their like."""
    trained, field = foreign_fields.is_trained(message, name)
    if trained and role != "assistant":
        what = "true" if message[field] is True else message[field]
        raise _Wrong(f'{name} of {role} has "{field}": {what}, but only answers are learned. Remove it')
    return {"train": False} if role == "assistant" and trained is False else {}
