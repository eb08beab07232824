"""What the linter finds in rows with two answers, or with one that is judged: (place, code, message)."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import sqrt
from statistics import mean

from lora.data.formats import Conversation

# From this share of pairs on, a longer (or shorter) chosen answer is a finding: the length alone then says which one is
# chosen about as often as two people agree on a pair (73 %: Ouyang et al. 2022, section 3.4), and a model need learn no
# more than that. Nor may the share be chance: it is 3 standard deviations or more away from a half.
BIASED, DEVIATIONS = 2 / 3, 3

Found = Iterator[tuple[str, str, str]]


def common(row: Conversation) -> int:
    """How many turns both sides of a pair begin with."""
    both = zip(row.messages, row.rejected, strict=False)
    return next((place for place, (one, other) in enumerate(both) if one != other), len(row.messages) - 1)


def find(rows: Sequence[Conversation]) -> Found:
    files = defaultdict(list)
    for row in rows:
        if row.rejected:
            files[row.where.rpartition(":")[0]].append(row)
            yield from _of_a_pair(row)
    for pairs in files.values():
        yield from _lengths(pairs)
    judged = [row for row in rows if row.good is not None]
    if len(judged) > 1 and len({row.good for row in judged}) == 1:
        only = "good" if judged[0].good else "bad"
        text = f"all {len(judged)} answers are {only}. Add some of the other kind, or give --method sft"
        yield judged[0].where, "LABELS", text


def _of_a_pair(row: Conversation) -> Found:
    turn = common(row)
    if _answer(row.messages[turn:]) == _answer(row.rejected[turn:]):
        yield row.where, "EQUAL", "both sides are the same, so it teaches nothing. Remove the pair"
    elif row.messages[turn]["role"] != "assistant" or row.rejected[turn]["role"] != "assistant":
        text = f"the sides differ in message {turn + 1}, which is no answer. Compare answers to one question"
        yield row.where, "PROMPTS", text


def _answer(turns: list[dict]) -> str:
    return "\n".join(turn.get("reasoning_content", "") + turn["content"].strip() for turn in turns)


def _lengths(pairs: list[Conversation]) -> Found:
    """LENGTH: one finding a file, at its first pair."""
    texts = [[_answer(side[common(row) :]) for side in (row.messages, row.rejected)] for row in pairs]
    differing = [(len(chosen), len(rejected)) for chosen, rejected in texts if len(chosen) != len(rejected)]
    longer, n = sum(chosen > rejected for chosen, rejected in differing), len(differing)
    many = max(longer, n - longer)
    if not n or many < BIASED * n or many - n / 2 < DEVIATIONS * sqrt(n) / 2:
        return
    chosen, rejected = (
        f"{mean(map(len, side)):.0f} characters or {mean(len(text.split()) for text in side):.0f} words"
        for side in zip(*texts, strict=True)
    )
    which, fix = "longer" if many == longer else "shorter", "Balance the lengths, or watch those of the answers"
    text = f"in {many} of {n} pairs ({many / n:.0%}) the {which} answer is chosen; on average chosen ones have {chosen}"
    yield pairs[0].where, "LENGTH", f"{text}, rejected ones {rejected}. {fix}"
