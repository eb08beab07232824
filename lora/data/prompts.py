"""A row that asks, for methods that sample the answers themselves: which of its fields are the question. The whole row
goes to the rewards, so an answer that stands in it, a judgement or a solution are columns like others.

    {"prompt"} or {"question"}, {"q"}, {"instruction"}      a text, or messages that end with a turn of the user
    {"messages"} or {"conversations"}                       without their last answer, where they end with one
    any row of `pairs.py`                                   the turns that both sides begin with
"""

from itertools import takewhile

from lora.data import pairs
from lora.data.foreign_fields import OF_AN_ANSWER, says_nothing
from lora.data.pairs import WHOLE, Side

ASKING = ("prompt", *WHOLE, "question", "q", "instruction")
ANSWERS = {name for both in pairs.ANSWERS for name in both} - {*WHOLE}  # of pairs


def refused(row: dict, used: tuple) -> str | None:
    """Why a row asks nothing; `used` has the key that was named for its question, if the row has it."""
    if used or any(key in row for key in ASKING) or pairs.answers_in(row):
        return None
    if "text" in row:
        return "a document asks nothing. Give --method sft to learn it, or --prompt-key text where the text asks"
    found = ", ".join(list(row)[:8])[:200] or "none"
    return f"its keys are {found}, and none asks. Known are {', '.join(ASKING)}; --prompt-key names another"


def sides(row: dict, used: tuple) -> tuple[list[Side], str | None]:
    """The rows that `formats` reads to find the question, with their keys: one, or both sides of a pair, whose shape
    comes with them. Raises ValueError."""
    key = next(iter(used), None)
    rest = {field: value for field, value in row.items() if field == key or field not in OF_AN_ANSWER}
    both = pairs.answers_in(row, (key, None) if key else None)
    if both and both[0] not in WHOLE:
        rest = {
            f: v for f, v in rest.items() if f == key or not (f in ANSWERS or f.startswith(("chosen_", "rejected_")))
        }
        rest.pop("margin", None)
        pair = pairs.sides({**rest, "chosen": row[both[0]], "rejected": row[both[1]]}, (key, None) if key else None)
        return [pair.chosen, pair.rejected], pair.shape
    present = [name for name in ASKING if name in row]
    key = key or next((name for name in present if not says_nothing(row[name])), present[0])
    if key not in WHOLE:
        return [(rest, (key, None))], None
    return [({field: value for field, value in rest.items() if field == key or field not in WHOLE}, None)], None


def question(sides: list[list[dict]], shape: str) -> list[dict]:
    """The turns of the question, which ends with one of the user. Raises ValueError."""
    turns, *other = ([{name: turn[name] for name in turn if name != "train"} for turn in side] for side in sides)
    if other:
        both = zip(turns[:-1], *other, strict=False)
        turns = [turn for turn, _ in takewhile(lambda pair: pair[0] == pair[1], both)]
    elif shape.split(",")[0] in WHOLE and turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not turns or turns[-1]["role"] != "user":
        last = (
            f"message {len(turns)} of {turns[-1]['role']} is its last" if turns else "it has no turn before its answer"
        )
        raise ValueError(f"{last}, expected a question of the user, which a completion answers. End the prompt with it")
    return turns
