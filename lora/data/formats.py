"""Any accepted row becomes one internal form: messages.

    {"messages": [{"role": "system" | "user" | "assistant", "content": "..."}, ...]}        OpenAI's chat form
    {"conversations": [{"from": "human" | "gpt", "value": "..."}, ...]}                     ShareGPT's
    {"instruction", "output"}, also with "input", "history": [[question, answer], ...], "system"
    {"prompt", "completion"}, {"question", "answer"}, {"q", "a"}, or any two keys that are named
    {"text": "..."}                                            a document: one message of the role "text"

Nothing is repaired silently, and no field that changes what is learned is passed over: what is wrong is collected with
its line and raised. `jsonl.py` reads the files.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lora.data.jsonl import LIMIT, Problem, read_rows
from lora.errors import MOST_LINES, BadInput

__all__ = ["LIMIT", "Conversation", "Problem", "read", "scan"]

PAIRS = (("prompt", "completion"), ("question", "answer"), ("q", "a"), ("instruction", "output"))
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = {**ROLES, "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}

# Fields of other tools, which would change what is learned: refused where they have a value.
TOOLS = ("tools", "functions")  # of a row
OF_A_QUESTION = ("history", "input", "context")  # of a row whose turns are not written out as messages
OF_AN_ANSWER = ("tool_calls", "function_call", "reasoning_content")  # of a message


class Conversation(NamedTuple):
    """Messages {"role", "content"}, also "train": False; `file:line` to name them by; the shape of their row."""

    messages: list[dict]
    where: str
    shape: str = "messages"


class _Wrong(Exception):
    def __init__(self, text: str, code: str = "ROW"):
        self.text, self.code = text, code


def read(paths: Sequence[Path], answered: bool = True, keys: tuple[str, str] | None = None) -> list[Conversation]:
    """All conversations of some files, in order; with `answered`, each needs an answer to train.

    Raises BadInput with every bad line (the first 20 and a count).
    """
    found, problems = [], []
    for row in scan(paths, answered, keys):
        (problems if isinstance(row, Problem) else found).append(row)
        if len(problems) > 10 * MOST_LINES:  # the whole file is something else
            break
    if problems:
        raise BadInput(*map(str, problems))
    return found


def scan(
    paths: Sequence[Path],
    answered: bool = True,
    keys: tuple[str, str] | None = None,
    progress: Callable[[int], object] = lambda size: None,
) -> Iterator[Conversation | Problem]:
    """Every row of some files, in order, as it is read: a conversation, or what is wrong with it.

    `keys` are those of question and answer in rows that have both; `progress` hears how many bytes have been read.
    Raises BadInput for a file that cannot be opened.
    """
    for path in paths:
        row = None
        for row in read_rows(Path(path), progress):
            yield row if isinstance(row, Problem) else _conversation(*row, answered, keys)
        if row is None:
            yield Problem(str(path), "FILE", "no examples, the file is empty. Give JSON objects in lines, or a list")


def _conversation(where: str, value: object, answered: bool, keys: tuple[str, str] | None) -> Conversation | Problem:
    try:
        turns, roles, shape = _turns(value, keys, answered)
        messages = _checked(turns, roles)
        if not answered and shape == "text":
            raise _Wrong("a document asks nothing. Give prompts")
        if answered and not any(m["role"] in ("assistant", "text") and "train" not in m for m in messages):
            raise _Wrong("nothing to train, there is no assistant turn to learn. Add an answer")
        return Conversation(messages, where, shape)
    except _Wrong as wrong:
        return Problem(where, wrong.code, wrong.text)


def _turns(value: object, keys: tuple[str, str] | None, answered: bool) -> tuple[object, dict[str, str], str]:
    """The turns of a row as they stand there, how its roles are called, and the name of its shape."""
    if not isinstance(value, dict):
        raise _Wrong(f"expected an object, found {type(value).__name__}. Repair the line")
    if keys and keys[0] in value and keys[1] in value:
        return _pair(value, *keys), ROLES, "/".join(keys)
    if "chosen" in value and "rejected" in value:
        fix = "Give --prompt-key prompt --response-key chosen to train the chosen ones"
        raise _Wrong(f"a preference row (chosen, rejected), which is not trained here. {fix}", "UNKNOWN")
    if any(value.get(key) for key in TOOLS):
        raise _Wrong("it has tools, whose calls are not trained here. Remove them", "UNKNOWN")
    if "messages" in value:
        return _with_system(value, value["messages"]), ROLES, "messages"
    if "conversations" in value:
        return _with_system(value, _sharegpt(value["conversations"])), SHAREGPT_ROLES, "conversations"
    for prompt, answer in PAIRS:
        if prompt in value and answer in value:
            return _pair(value, prompt, answer), ROLES, f"{prompt}/{answer}"
    if "text" in value:
        return [{"role": "text", "content": value["text"]}], {"text": "text"}, "text"
    for prompt, _ in PAIRS:
        if not answered and prompt in value:
            return [{"role": "user", "content": value[prompt]}], ROLES, prompt
    found = ", ".join(list(value)[:8])[:200] or "none"
    known = ", ".join(("messages", "conversations", *("/".join(pair) for pair in PAIRS), "text"))
    raise _Wrong(f"its keys are {found}. Known are {known}; others by --prompt-key and --response-key", "UNKNOWN")


def _pair(value: dict, prompt: str, answer: str) -> list[dict]:
    """A pair of question and answer, what comes before it, and what belongs to the question."""
    question, history = value[prompt], value.get("history") or []
    if isinstance(question, list) and isinstance(value[answer], list):  # both are messages already
        return _with_system(value, [*question, *value[answer]], prompt, answer)
    for key in ("input", "context"):
        if value.get(key) and key not in (prompt, answer):
            if prompt != "instruction":
                raise _Wrong(f"its {key} would not be learned. Put it into the {prompt}")
            question = f"{question}\n{value[key]}" if isinstance(value[key], str) else value[key]
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        raise _Wrong("history is not a list of [question, answer] pairs. Repair the line")
    texts = [text for pair in [*history, [question, value[answer]]] for text in pair]
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return _with_system(value, turns, *OF_A_QUESTION)


def _with_system(value: dict, turns: object, *used: str) -> object:
    """The turns, after the system text that stands beside them (two system turns are refused later).

    Raises _Wrong where the row has what belongs to a single question and is not used for it.
    """
    for key in OF_A_QUESTION:
        if value.get(key) and key not in used:
            raise _Wrong(f"its {key} would not be learned beside messages. Put it into them")
    system = value.get("system")
    return [{"role": "system", "content": system}, *turns] if system and isinstance(turns, list) else turns


def _sharegpt(turns: object) -> object:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return turns
    return [{**turn, "role": turn.get("from", turn.get("role")), "content": turn.get("value", turn.get("content"))}
            for turn in turns]  # fmt: skip


def _checked(messages: object, roles: dict[str, str]) -> list[dict]:
    """Role, content and train flag of every message: an optional system turn, then user and assistant in turn."""
    if not isinstance(messages, list) or not messages:
        raise _Wrong("messages is not a list of messages. Repair the line")
    clean: list[dict] = []
    for number, message in enumerate(messages, 1):
        name = f"message {number}"
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
        expected = "user" if not clean or clean[-1]["role"] != "user" else "assistant"
        if role in ("user", "assistant") and role != expected:
            raise _Wrong(f"{name} is a turn of {role}, expected {expected}. Let user and assistant alternate", "ROLES")
        if role != "system" and not content.strip():
            raise _Wrong(f"{name} of {role} is empty. Remove it or write it", "EMPTY")
        clean.append({"role": role, "content": content, **_train(message, role, name)})
    return clean


def _content(message: dict, role: str, name: str) -> str:
    """The text of a message, which OpenAI's form may give in parts."""
    content = message.get("content")
    if isinstance(content, list) and content and all(map(_is_text, content)):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        tools = "; calls of tools are not trained here" if message.get("tool_calls") else ""
        raise _Wrong(f"{name} has {type(content).__name__} as content, expected text{tools}. Repair the line")
    for key in OF_AN_ANSWER:
        if message.get(key):
            raise _Wrong(f"{name} has {key}, which is not trained here. Put it into the content, or remove it")
    try:
        content.encode()
    except UnicodeEncodeError:
        raise _Wrong(f"{name} has half a surrogate pair, which is no character. Remove it", "SURROGATE") from None
    return content


def _is_text(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _train(message: dict, role: str, name: str) -> dict:
    """{"train": False} for an answer that shall not be learned: "train": false, or OpenAI's "weight": 0."""
    train, weight = message.get("train"), message.get("weight")
    if train is not None and not isinstance(train, bool):
        raise _Wrong(f"{name} has {repr(train)[:40]} as train. Write true or false")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise _Wrong(f"{name} has {repr(weight)[:40]} as weight. Write 0 or 1")
    if train and role != "assistant":
        raise _Wrong(f'{name} of {role} has "train": true, but only answers are learned. Remove it, or --train-on all')
    return {"train": False} if role == "assistant" and (train is False or weight == 0) else {}
