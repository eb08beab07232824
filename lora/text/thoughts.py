"""Thoughts in answers: some prompts end with the tag that opens one (`<think>`), or with one that is empty already."""

import re

OPEN = re.compile(r"[<\[](?P<name>[\w:]+)[>\]]\s*\Z")
EMPTY = re.compile(r"[<\[](?P<name>[\w:]+)[>\]]\s*[<\[]/(?P=name)[>\]]\s*\Z")
END = 200  # characters of a prompt that are looked at
KEY = "reasoning_content"  # of a message: its thought, beside the content
NAMED = re.compile(r"""(?:\.|\[['"]|\.get\(['"])(thinking|reasoning)\b""")  # a template reads it of a message
PART = re.compile(r"""==\s*['"]thinking['"]""")  # it asks whether a part of the content is one


def placed(message: dict, source: str) -> dict:
    """A copy of a message with its thought where this template reads it: under another name (as LFM2.5 does), or as a
    part of the content (as Ministral does). As it is where the template reads it so, or not at all."""
    rest = {key: value for key, value in message.items() if key != KEY}
    if KEY not in message or KEY in source:
        return dict(message)
    if PART.search(source):
        parts = [{"type": "thinking", "thinking": message[KEY]}, {"type": "text", "text": message["content"]}]
        return rest | {"content": parts}
    named = NAMED.search(source)
    return rest | {named[1]: message[KEY]} if named else dict(message)


def apart(message: dict) -> dict:
    """The message with the thought of its content beside it, as Qwen3's templates take one out by themselves."""
    thought, closed, rest = message["content"].rpartition("</think>")
    if not closed or KEY in message or message["role"] != "assistant":
        return message
    thought = thought.partition("</think>")[0].rpartition("<think>")[2]
    return message | {KEY: thought.strip("\n"), "content": rest.lstrip("\n")}


def opens(prompt: str) -> bool:
    return bool(OPEN.search(prompt[-END:]))


def behind(prompt: str, answer: str) -> str:
    """The answer without its thought, where the prompt ends with an empty one."""
    empty = EMPTY.search(prompt[-END:])
    return answer.rpartition(_closing(empty))[2].lstrip("\n") if empty else answer


def continued(prompt: str, answer: str) -> str | None:
    """How an answer that has a thought goes on from a prompt that has opened it; None for other prompts and answers."""
    opened, text = OPEN.search(prompt[-END:]), answer.lstrip()
    if not opened:
        return None
    tag = opened[0].rstrip()
    if text.startswith(tag):
        return text.removeprefix(opened[0] if text.startswith(opened[0]) else tag)
    return answer if _closing(opened) in answer else None


def stays_open(prompt: str, answer: str) -> bool:
    """Does the prompt open a thought, and the answer not close it?"""
    opened = OPEN.search(prompt[-END:])
    return bool(opened) and _closing(opened) not in answer


def _closing(tag: re.Match) -> str:
    """The tag that closes one that was found."""
    return f"{tag[0][0]}/{tag['name']}{tag[0].rstrip()[-1]}"
