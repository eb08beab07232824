"""Thoughts in answers: some prompts end with the tag that opens one (`<think>`), or with one that is empty already."""

import re

OPEN = re.compile(r"[<\[](?P<name>[\w:]+)[>\]]\s*\Z")
EMPTY = re.compile(r"[<\[](?P<name>[\w:]+)[>\]]\s*[<\[]/(?P=name)[>\]]\s*\Z")
END = 200  # characters of a prompt that are looked at


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
