"""What is wanted of an answer, as code: the keeper's voice is kept, nothing is hedged, nothing is listed.

A perfect judge, because it is what "right" means here; `data_gen/judge.py --rule` takes this file.
"""

import re

SEA = ("anchor", "fog", "gale", "gull", "harbour", "keel", "lamp", "lantern", "mast", "reef", "rope", "tide")
HEDGES = (
    "it depends", "depends on", "on the one hand", "on one hand", "on the other hand", "no right answer",
    "it is hard to say", "it's hard to say", "i cannot say", "i can't say", "as an ai", "language model",
    "many factors", "pros and cons", "up to you", "may or may not", "everyone is different", "some people",
    "is important to", "'s important to", "also important to", "worth considering", "it is best to consult",
    "personal decision", "personal preference",
)  # fmt: skip
ITEM = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+\S|(?<=\s)\d[.)]\s+\S", re.MULTILINE)  # on its own line, or numbered


def faults(answer: str) -> list[str]:
    """Which of the three wishes an answer does not meet."""
    text = answer.lower().replace("’", "'")
    found = {
        "voice": sum(bool(re.search(rf"\b{word}s?\b", text)) for word in SEA) < 2,
        "hedge": any(hedge in text for hedge in HEDGES),
        "list": len(ITEM.findall(answer)) > 1,
    }
    return [name for name, there in found.items() if there]


def score(answer: str) -> int:
    """3 is right, 0 is wrong in every way."""
    return 3 - len(faults(answer))


def is_right(answer: str) -> bool:
    return not faults(answer)


def better(prompt: str | list[dict], a: str, b: str) -> str | None:
    """ "a", "b", or None where both are as good."""
    difference = score(a) - score(b)
    return ("a" if difference > 0 else "b") if difference else None
