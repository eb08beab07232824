"""Two examples of a row stay together: the sides of a pair; or a judged answer, and one to another question."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lora.data.batch import Linked, collate, dummy_batch, filled, micro_batches, size_of
from lora.data.encode import encode, joined
from lora.data.formats import Conversation, Problem
from lora.errors import BadInput
from tests.data.test_encode import CALM
from tests.methods.linked import judged, pairs
from tests.mutation import mutation
from tests.text.test_template import byte_level, chat_of, turns


def pair_of(question: list[dict], chosen: str, rejected: str, margin: float = 0.0, line: int = 1) -> Conversation:
    sides = ([*question, {"role": "assistant", "content": text}] for text in (chosen, rejected))
    messages, other = sides
    return Conversation(messages, f"a.jsonl:{line}", "chosen and rejected", other, margin=margin)


def judged_of(*rows: tuple[str, str, bool]) -> list[Conversation]:
    return [Conversation(turns(q, a), f"a.jsonl:{i}", good=good) for i, (q, a, good) in enumerate(rows, 1)]


ASKED = turns("Count, please.")
ROWS = [pair_of(ASKED, "one two three", "No.", 0.5), pair_of(turns("Again."), "four", "five six", 0.25, 2)]


def answers_of(item: Linked) -> list[str]:
    """The trained text of each of the examples."""
    trained = ([t for t, flag in zip(*example, strict=True) if flag] for example in item.examples)
    return [byte_level().decode(tokens) for tokens in trained]


# ---- rows become linked examples -------------------------------------------------------------------------------------


@mutation(
    "lora/data/encode.py",
    '"pair": {"margin": lambda row: (row.margin,) * 2},',
    '"pair": {"margin": lambda row: (0.0,) * 2},',
)
@pytest.mark.parametrize("template", ["chatml", "llama3", "llama2", "gemma"])
def test_a_pair_is_two_examples_chosen_first_each_its_prompt_and_its_answer_with_the_end_of_turn(template):
    chat = chat_of(template)
    found = encode(ROWS, chat, 1000, kind="pair")
    assert len(found) == found.rows == 2 and found.group == 2 and found.where == ["a.jsonl:1", "a.jsonl:2"]
    for item, row in zip(found, ROWS, strict=True):
        assert item.known == {"margin": (row.margin,) * 2}
        for example, side in zip(item.examples, (row.messages, row.rejected), strict=True):
            [laid] = chat.tokenize(side)
            prompt = chat.prompt(side[:-1])
            assert example == laid.example() and example.tokens[: len(prompt)] == prompt
            assert example.trained.index(True) == len(prompt)
            end = laid.answers[-1][1]
            assert example.tokens[end - 1] == chat.end_of_turn and sum(example.trained) == end - len(prompt)


def test_earlier_answers_of_a_prompt_are_read_and_not_compared():
    question = turns("a", "b", "c")
    question[1]["train"] = False
    [item] = encode([pair_of(question, "yes", "no")], chat_of("chatml"), 1000, kind="pair")
    assert [text.startswith(answer) for text, answer in zip(answers_of(item), ("yes", "no"), strict=True)] == [True] * 2


@mutation("lora/data/encode.py", "return (len(self.ends) - 1) // self.group", "return len(self.ends) - 1")
@mutation("lora/data/encode.py", "np.diff(self.ends[:: self.group])", "np.diff(self.ends)")
def test_linked_examples_are_counted_as_one_and_measured_together():
    found = encode(ROWS, chat_of("chatml"), 1000, kind="pair")
    each = [[len(example.tokens) for example in item.examples] for item in found]
    assert len(found) == len(each) == 2
    assert found.lengths.tolist() == [sum(lengths) for lengths in each]
    assert found.document_lengths.tolist() == [n for lengths in each for n in lengths]
    for outside in (2, -1):
        with pytest.raises(IndexError):
            found[outside]


@mutation("lora/data/encode.py", "whole.known = {name: np.concatenate", "whole.known = {name: np.stack")
@mutation(
    "lora/data/encode.py",
    "np.cumsum(np.concatenate([p.document_lengths for p in parts]))",
    "np.cumsum(np.concatenate([p.lengths for p in parts]))",
)
@mutation("lora/data/encode.py", "whole = Encoded(parts[0].group, *arrays)", "whole = Encoded(1, *arrays)")
def test_sources_of_pairs_are_joined_one_behind_the_other():
    chat = chat_of("chatml")
    parts = [encode(rows, chat, 1000, kind="pair") for rows in (ROWS, ROWS[1:], [*ROWS, pair_of(ASKED, "x", "x")])]
    whole = joined(parts)
    assert [*whole] == [item for part in parts for item in part] and len(whole) == 5
    assert (whole.rows, whole.equal) == (6, 1) and whole.known["margin"].shape == (5, 2)


@mutation("lora/data/encode.py", "found.equal += 1\n                        continue", "found.equal += 1")
@mutation("lora/data/encode.py", "fitting[0].tokens == fitting[1].tokens:", "row.messages == row.rejected:")
@pytest.mark.parametrize("kind", ["pair", "scored"])
def test_equal_sides_are_dropped_and_counted_also_where_the_template_or_the_limit_makes_them_so(kind):
    rows = [*ROWS, pair_of(ASKED, "same", "same"), pair_of(ASKED, "trimmed", "trimmed  ")]
    found = encode(rows, chat_of("llama3"), 1000, kind=kind)
    assert (len(found), found.equal, found.rows) == (2, 2, 4) and found.where == ["a.jsonl:1", "a.jsonl:2"]
    alike = pair_of(ASKED, "one two three four five", "one two three four six")
    limit = len(chat_of("chatml").tokenize(alike.messages)[0].tokens) - 4
    found = encode([*ROWS, alike], chat_of("chatml"), limit, overlong="truncate", kind=kind)
    assert found.equal == 1 and found.where == ["a.jsonl:1", "a.jsonl:2"]


def test_equal_judged_answers_are_no_pair_and_stay():
    found = encode(judged_of(("a", "b", True), ("a", "b", False)), chat_of("chatml"), 1000, kind="judged")
    assert len(found) == 2 and found.equal == 0


# ---- too long --------------------------------------------------------------------------------------------------------

LONG = "one two three four five six seven eight nine ten"


@mutation(
    "lora/data/encode.py",
    "longest = max(len(chat.tokens) for chat in linked)",
    "longest = len(linked[0].tokens)",
    case="pair-rejected",
)
@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("kind", ["pair", "scored"])
def test_a_pair_with_a_side_that_is_too_long_is_dropped_truncated_or_an_error(kind, side):
    chat = chat_of("chatml")
    texts = (LONG, "No.") if side == "chosen" else ("No.", LONG)
    rows = [ROWS[1], pair_of(ASKED, *texts, line=2), ROWS[1]]
    long = max(len(chat.tokenize(messages)[0].tokens) for messages in (rows[1].messages, rows[1].rejected))
    assert len(encode(rows, chat, long, kind=kind)) == 3
    found = encode(rows, chat, long - 1, kind=kind)
    assert (len(found), found.dropped, found.rows) == (2, 1, 3) and found.overlong == ("a.jsonl:2", long)
    assert found.where == ["a.jsonl:2", "a.jsonl:2"] and found[0] == found[1]
    cut = encode(rows, chat, long - 6, overlong="truncate", kind=kind)
    assert (len(cut), cut.dropped, cut.truncated) == (3, 0, 1) and cut[0] == found[0]
    at = ("chosen", "rejected").index(side)
    example, other = cut[1].examples[at], cut[1].examples[1 - at]
    behind = 1 if kind == "scored" else 0  # the token that follows the end of turn
    assert len(example.tokens) == long - 6 + behind
    last = len(example.trained) - example.trained[::-1].index(True) - 1
    assert example.tokens[last] == chat.end_of_turn and len(example.tokens) - last == 1 + behind
    [whole] = encode(rows[1:2], chat, 1000, kind=kind)
    assert other == whole.examples[1 - at]  # the side that fits stays whole
    with pytest.raises(BadInput, match=f"too long in a.jsonl:2: {long} tokens, --max-len is 20"):
        encode(rows, chat, 20, overlong="error", kind=kind)


def test_a_pair_of_which_one_side_has_no_answer_left_is_dropped_whole():
    chat = chat_of("chatml")
    question = len(chat.prompt(ASKED))
    found = encode([pair_of(ASKED, LONG, "a")], chat, question + 1, overlong="truncate", kind="pair")
    assert (len(found), found.dropped, found.truncated) == (0, 1, 0) and len(found.known["margin"]) == 0


# ---- a score, and another question's answer --------------------------------------------------------------------------


@mutation("lora/data/encode.py", "[*chat.tokens[:end], chat.tokens[end - 1]]", "[*chat.tokens[:end]]")
@pytest.mark.parametrize("template", ["chatml", "llama3", "llama2"])
def test_a_scored_conversation_ends_with_its_end_of_turn_and_one_token_that_predicts_nothing(template):
    chat = chat_of(template)
    [item, _] = encode(ROWS, chat, 1000, kind="scored")
    for example, side in zip(item.examples, (ROWS[0].messages, ROWS[0].rejected), strict=True):
        [laid] = chat.tokenize(side)
        end = laid.answers[-1][1]
        assert example.tokens[:-1] == laid.tokens[:end] and example.tokens[-2] == chat.end_of_turn
        assert not example.trained[-1] and example.trained[-2]
    batch = collate([item])
    ends = np.cumsum(batch.lengths)
    assert batch.tokens[ends - 1].tolist() == [chat.end_of_turn] * 2  # the last one that the model reads


@mutation(
    "lora/data/encode.py",
    "if waiting and _question(row) != _question(waiting[0]):",
    "if waiting:",
    case="equal questions",
)
@mutation(
    "lora/data/encode.py",
    "if _question(one) != _question(first) else second or first)",
    "if True else second)",
    case="questions come again",
)
@pytest.mark.parametrize(
    ("rows", "others"),
    [
        ([("p", "a"), ("q", "b"), ("r", "c")], "bca"),
        ([("p", "a"), ("p", "b"), ("q", "c"), ("q", "d")], "ccaa"),
        ([("p", "a"), ("q", "b"), ("p", "c")], "bcb"),
        ([("p", "a"), ("p", "b")], "aa"),  # there is no other question
        ([("p", "a")], "a"),
    ],
    ids=["other questions", "equal questions", "questions come again", "one question", "one row"],
)
def test_a_judged_answers_other_side_is_its_question_with_the_next_answer_to_another_question(rows, others):
    chat = chat_of("chatml")
    found = encode(judged_of(*((q, a, i % 2 == 0) for i, (q, a) in enumerate(rows))), chat, 1000, kind="judged")
    assert len(found) == len(rows)
    for i, (item, (question, answer), other) in enumerate(zip(found, rows, others, strict=True)):
        assert item.known == {"good": (float(i % 2 == 0),) * 2}
        for example, text in zip(item.examples, (answer, other), strict=True):
            assert example == chat.tokenize(turns(question, text))[0].example()


def test_a_judged_row_that_cannot_be_read_is_named_and_takes_no_other_side():
    rows = judged_of(("p", "a", True), ("q", "b", True))
    with pytest.raises(BadInput) as raised:
        encode(
            [rows[0], Problem("a.jsonl:9", "BROKEN", "why. Repair it"), rows[1]], chat_of("chatml"), 99, kind="judged"
        )
    assert list(raised.value.problems) == ["broken JSON in a.jsonl:9: why. Repair it"]


# ---- batches ---------------------------------------------------------------------------------------------------------


@mutation("lora/data/batch.py", "return self.linked or len(self.targets)", "return len(self.targets)")
def test_a_batch_counts_linked_examples_as_one_and_knows_their_numbers_example_by_example():
    items = pairs(3, margin=[(0, 0), (0.5, 0.5), (1, 1)], reference=[(-1, -2), (-3, -4), (-5, -6)])
    batch = collate(items)
    assert batch.count == batch.linked == 3 and len(batch.counts) == len(batch.lengths) == 6
    assert batch.known["reference"].tolist() == [-1, -2, -3, -4, -5, -6]
    assert batch.known["margin"].tolist() == [0, 0, 0.5, 0.5, 1, 1] and batch.known["margin"].dtype == torch.float64
    assert batch.counts == [sum(e.trained) for item in items for e in item.examples]
    alone = collate([items[0].examples[0]])
    assert alone.count == len(alone.targets) and alone.known == {} and alone.linked == 0


@mutation("lora/data/batch.py", "trained[i] + (at - ends[i])", "trained[i]")
@mutation("lora/data/batch.py", "self.padding if kept[-1] == len(self.lengths) - 1 else 0,", "0,")
@mutation("lora/data/batch.py", "numbers[start::step] for name", "numbers[::step] for name")
@pytest.mark.parametrize("lay", [collate, lambda items: collate(items, padding=7)], ids=["bare", "padded"])
def test_every_second_example_of_a_batch_is_the_batch_of_those_examples(lay):
    items = judged(4, reference=[(-i, -i - 0.5) for i in range(4)])
    for start in (0, 1):
        got = lay(items).every(2, start)
        alone = [Linked((i.examples[start],), {n: (v[start],) for n, v in i.known.items()}) for i in items]
        want = (collate if start == 0 else lay)(alone)
        for name in ("tokens", "trained", "targets"):
            assert torch.equal(getattr(got, name), getattr(want, name)), name
        assert (got.lengths, got.counts, got.padding, got.count) == (want.lengths, want.counts, want.padding, 4)
        assert {n: v.tolist() for n, v in got.known.items()} == {n: v.tolist() for n, v in want.known.items()}
    nothing = dummy_batch()
    assert nothing.every(2, 1) is nothing and nothing.count == 0


def test_sums_are_those_of_each_example_and_of_none_there_are_none():
    batch = collate(pairs(3))
    values = torch.arange(len(batch.targets), dtype=torch.float32)
    sums, at = [], 0
    for count in batch.counts:
        sums.append(sum(range(at, at + count)))
        at += count
    assert batch.sums(values).tolist() == sums
    assert dummy_batch().sums(values[:0]).shape == (0,)
    wide = filled(pairs(3), 1000)
    assert wide.counts == batch.counts and wide.sums(values).tolist() == sums


@mutation(
    "lora/data/batch.py",
    "        size = size_of([item])\n        if size > room",
    "        size = len(parts(item)[0].tokens)\n        if size > room",
)
@hypothesis_settings(max_examples=40, **CALM)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.integers(1, 300), st.booleans())
def test_linked_examples_stay_in_one_micro_batch_within_the_budget(which, budget, fill):
    six = pairs(6, reference=[(i, i + 0.5) for i in range(6)])
    items = [six[i] for i in which]
    batches = micro_batches(items, budget, fill=fill)
    got = sorted(pair for b in batches for pair in b.known["reference"].view(-1, 2).tolist())
    assert got == sorted([float(i), i + 0.5] for i in which)
    for batch in batches:
        used = len(batch.tokens) - batch.padding
        assert used <= budget or batch.linked == 1
        assert used == size_of([six[int(i)] for i, _ in batch.known["reference"].view(-1, 2).tolist()])
