"""Every shape of preference pairs and of judged answers becomes one form, cut where the answers begin."""

import json

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lora.data import foreign_fields, pairs
from lora.data.formats import Conversation, read, scan
from lora.errors import BadInput
from tests.data.test_data import ANSWER, CALM, PAIR, SYSTEM, USER, written
from tests.mutation import mutation

WORSE = {"role": "assistant", "content": "Go away."}
BAD = [USER, WORSE]
EARLIER = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
CONTEXT = [EARLIER[0], {**EARLIER[1], "train": False}]
SAID = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "Hi"}]
GPT, GPT_WORSE = {"from": "gpt", "value": "Hello."}, {"from": "gpt", "value": "Go away."}
BEFORE = "\n\nHuman: a\n\nAssistant: b\n\nHuman: Hi\n\nAssistant:"
TEXTS = {"chosen": "Hello.", "rejected": "Go away."}
LISTS = {"chosen": [ANSWER], "rejected": [WORSE]}
WHOLE = {"chosen": PAIR, "rejected": BAD}


def one(path, row, kind="pair", **how) -> Conversation:
    [found] = read([written(path / "a.jsonl", row)], kind=kind, **how)
    return found


def refused(path, row, kind="pair", **how) -> str:
    with pytest.raises(BadInput) as raised:
        read([written(path / "a.jsonl", {"irrelevant": 1}, row)], kind=kind, **how)
    _, problem = raised.value.problems
    assert f" in {path / 'a.jsonl'}:2: " in problem and problem.count(". ") >= 1 and "\n" not in problem
    return problem


# ---- pairs -----------------------------------------------------------------------------------------------------------

SHAPES = {
    "strings": ({"prompt": "Hi", **TEXTS}, []),
    "message lists": ({"prompt": [USER], **LISTS}, []),
    "message lists of several turns": ({"prompt": [*EARLIER, USER], **LISTS}, CONTEXT),
    "messages as prompt, texts as answers": ({"prompt": [SYSTEM, USER], **TEXTS}, [SYSTEM]),
    "a text as prompt, messages as answers": ({"prompt": "Hi", **LISTS}, []),
    "single messages": ({"prompt": "Hi", "chosen": ANSWER, "rejected": WORSE}, []),
    "axolotl": ({"messages": [*EARLIER, USER], "chosen": ANSWER, "rejected": WORSE}, CONTEXT),
    "implicit messages": ({"chosen": PAIR, "rejected": BAD}, []),
    "implicit messages of several turns": ({"chosen": [*EARLIER, *PAIR], "rejected": [*EARLIER, *BAD]}, CONTEXT),
    "implicit texts": ({"chosen": "Hi\nHello.", "rejected": "Hi\nGo away."}, []),
    "HH-RLHF": ({"chosen": BEFORE + " Hello.", "rejected": BEFORE + " Go away."}, CONTEXT),
    "HH-RLHF with a system text": ({"chosen": "Be brief." + BEFORE + " Hello.",
                                    "rejected": "Be brief." + BEFORE + " Go away."}, [SYSTEM, *CONTEXT]),
    "HH-RLHF with its prompt apart": ({"prompt": BEFORE, "chosen": " Hello.", "rejected": " Go away."}, CONTEXT),
    "HH-RLHF with its prompt apart and in the texts": (
        {"prompt": BEFORE, "chosen": BEFORE + " Hello.", "rejected": BEFORE + " Go away."}, CONTEXT),
    "UltraFeedback binarized": ({"prompt": "Hi", "prompt_id": "x", **WHOLE, "messages": PAIR, "score_chosen": 9.0,
                                 "score_rejected": 2.0}, []),
    "UltraFeedback with a system turn": ({"prompt": "Hi", "chosen": [SYSTEM, *PAIR], "rejected": [SYSTEM, *BAD]},
                                         [SYSTEM]),
    "beside the good messages": ({"messages": PAIR, **WHOLE}, []),
    "lists that hold the prompt's turns": ({"prompt": [*EARLIER, USER], "chosen": [*EARLIER, *PAIR],
                                            "rejected": [*EARLIER, *BAD]}, CONTEXT),
    "without the prompt's system turn": ({"prompt": [SYSTEM, USER], **WHOLE}, [SYSTEM]),
    "a prompt that ends with an answer": ({"prompt": EARLIER, **WHOLE}, CONTEXT),
    "a prompt of a system turn": ({"prompt": [SYSTEM], **WHOLE}, [SYSTEM]),
    "LLaMA-Factory, alpaca": ({"instruction": "Hi", "input": "", **TEXTS}, []),
    "LLaMA-Factory, alpaca with everything": ({"instruction": "Hi", "input": "", "system": "Be brief.",
                                               "history": [["a", "b"]], **TEXTS}, [SYSTEM, *CONTEXT]),
    "LLaMA-Factory, alpaca without an instruction": ({"instruction": "", "input": "Hi", **TEXTS}, []),
    "LLaMA-Factory, sharegpt": ({"conversations": SAID, "chosen": GPT, "rejected": GPT_WORSE}, CONTEXT),
    "LLaMA-Factory, sharegpt with a system": ({"conversations": SAID[2:], "system": "Be brief.", "chosen": GPT,
                                               "rejected": GPT_WORSE}, [SYSTEM]),
    "OpenAI": ({"input": {"messages": [SYSTEM, USER], "tools": [], "parallel_tool_calls": True},
                "preferred_output": [ANSWER], "non_preferred_output": [WORSE]}, [SYSTEM]),
    "Argilla": ({"system": "Be brief.", "question": "Hi", **TEXTS}, [SYSTEM]),
    "Orca": ({"system": "Be brief.", "input": "Hi", **TEXTS, "rating": None}, [SYSTEM]),
    "stack-exchange": ({"question": "Hi", "response_j": "Hello.", "response_k": "Go away.", "qid": 1}, []),
    "Vezora": ({"input": "Hi", "accepted": "Hello.", "rejected": "Go away."}, []),
    "SHP, A": ({"history": "Hi", "human_ref_A": "Hello.", "human_ref_B": "Go away.", "labels": 1, "score_A": 3}, []),
    "SHP, B": ({"history": "Hi", "human_ref_A": "Go away.", "human_ref_B": "Hello.", "labels": 0}, []),
    "PKU, 0": ({"prompt": "Hi", "response_0": "Hello.", "response_1": "Go away.", "better_response_id": 0,
                "safer_response_id": 1}, []),
    "PKU, 1": ({"prompt": "Hi", "response_0": "Go away.", "response_1": "Hello.", "better_response_id": 1}, []),
    "ms-swift, text": ({"messages": [*EARLIER, *PAIR], "rejected_response": "Go away."}, CONTEXT),
    "ms-swift, messages": ({"messages": [*EARLIER, *PAIR], "rejected_messages": [*EARLIER, *BAD]}, CONTEXT),
    "ms-swift, older": ({"query": "Hi", "response": "Hello.", "rejected_response": "Go away.",
                         "history": [["a", "b"]]}, CONTEXT),
    "a plain row with a rejected answer": ({"prompt": "Hi", "completion": "Hello.", "rejected": "Go away."}, []),
}  # fmt: skip


SHP = "history/human_ref_A/human_ref_B"


@mutation("lora/data/pairs.py", '("labels", (1, 0))', '("labels", (0, 1))', case="SHP, A")
@mutation("lora/data/pairs.py", '("better_response_id", (0, 1))}', '("better_response_id", (1, 0))}', case="PKU, 1")
@mutation("lora/data/pairs.py", "return [*system, *after]", "return after", case="without the prompt's system turn")
@mutation("lora/data/pairs.py", 'if place < same and turn["role"]', 'if False and turn["role"]', case="HH-RLHF")
@mutation(
    "lora/data/pairs.py",
    "_text_of(asked[0]) == _text_of(again[0])",
    "False",
    case="beside the good messages",
)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_pairs_becomes_two_conversations_cut_where_the_answers_begin(tmp_path, shape):
    row, before = SHAPES[shape]
    found = one(tmp_path, row)
    assert found.messages == [*before, USER, ANSWER] and found.rejected == [*before, USER, WORSE]
    assert (found.where, found.good, found.margin) == (f"{tmp_path}/a.jsonl:1", None, 0.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_sft_refuses_every_shape_of_pairs_with_the_flags_that_read_it(tmp_path, shape):
    problem = refused(tmp_path, SHAPES[shape][0], "conversation")
    assert "a preference row (" in problem and "Give --method dpo, or --method reward" in problem


@pytest.mark.parametrize("shape", SHAPES)
def test_kto_refuses_every_shape_of_pairs_with_the_flags_that_read_it(tmp_path, shape):
    assert "Give --method dpo, or --method reward" in refused(tmp_path, SHAPES[shape][0], "judged")


@mutation("lora/data/pairs.py", "shape = answers_in(row, keys)", "shape = answers_in(row, keys)[::-1]")
@pytest.mark.parametrize(
    ("shape", "name"),
    [("strings", "prompt/chosen/rejected"), ("HH-RLHF", "chosen/rejected"), ("SHP, A", SHP), ("SHP, B", SHP),
     ("OpenAI", "messages/preferred_output/non_preferred_output"), ("ms-swift, text", "messages/rejected_response")],
)  # fmt: skip
def test_a_shape_is_named_by_its_keys(tmp_path, shape, name):
    assert one(tmp_path, SHAPES[shape][0]).shape == name


@mutation("lora/data/pairs.py", "(*(keys or ())[:1], *PROMPTS)", "PROMPTS")
@mutation("lora/data/pairs.py", '(keys[1], "rejected"), (', '(keys[1], "x"), (')
def test_a_prompt_key_names_the_question_beside_the_answers_own_names(tmp_path):
    for row, keys in (({"frage": "Hi", **TEXTS}, ("frage", None)),
                      ({"frage": "Hi", "prompt": "no", **TEXTS}, ("frage", None)),
                      ({"frage": "Hi", "gut": "Hello.", "rejected": "Go away."}, ("frage", "gut")),
                      ({"prompt": "Hi", **TEXTS}, ("frage", "gut"))):  # fmt: skip
        found = one(tmp_path, row, keys=keys)
        assert (found.messages, found.rejected) == (PAIR, BAD)


# ---- where the answers begin -----------------------------------------------------------------------------------------

LINE = st.text("abc .:,é好。", min_size=1, max_size=20).filter(str.strip)


@mutation("lora/data/pairs.py", 'BORDERS = (re.compile("\\n"), ', "BORDERS = (")
@given(st.lists(LINE, min_size=1, max_size=4), LINE, LINE, LINE)
@hypothesis_settings(max_examples=200, **CALM)
def test_answers_of_one_line_that_begin_alike_keep_their_beginning(lines, start, chosen, rejected):
    prompt = "\n".join(lines)
    found = pairs.sides({"chosen": f"{prompt}\n{start}{chosen}", "rejected": f"{prompt}\n{start}{rejected}"})
    asked = {"role": "user", "content": prompt.rstrip()}
    for side, text in ((found.chosen, chosen), (found.rejected, rejected)):
        assert side[0]["messages"] == [asked, {"role": "assistant", "content": start + text}]


@mutation("lora/data/pairs.py", r're.compile(r"\s|(?<=[。？！：])")', 're.compile("(?<=[。？！：])")', case="sky")
@mutation("lora/data/pairs.py", "|(?<=[。？！：])", "", case="no white space")
@pytest.mark.parametrize(
    ("chosen", "rejected", "cut"),
    [
        pytest.param("The sky is blue.", "The sky is green.", ("The sky is", "blue.", "green."), id="sky"),
        pytest.param("The sky is blue.", "The sky is black.", ("The sky is", "blue.", "black."), id="in a word"),
        pytest.param("你好吗？答：好", "你好吗？答：坏", ("你好吗？答：", "好", "坏"), id="no white space"),
        pytest.param("def f():\n    a = 1", "def f():\n    a = 2", ("def f():", "    a = 1", "    a = 2"), id="code"),
        pytest.param("Q\n\nYes", "Q\n\nYes, it is", ("Q", "Yes", "Yes, it is"), id="one in the other"),
    ],
)
def test_texts_without_a_prompt_are_cut_at_a_line_end_or_else_between_words(chosen, rejected, cut):
    found = pairs.sides({"chosen": chosen, "rejected": rejected})
    assert [m["content"] for m in found.chosen[0]["messages"]] == [cut[0], cut[1]]
    assert [m["content"] for m in found.rejected[0]["messages"]] == [cut[0], cut[2]]


@mutation("lora/data/pairs.py", "if _is_dialogue(chosen) and _is_dialogue(rejected):", "if False:")
def test_answers_of_hh_rlhf_that_begin_alike_keep_their_beginning(tmp_path):
    start = " Yes.\nIt is so.\n"
    found = one(tmp_path, {"chosen": BEFORE + start + "One", "rejected": BEFORE + start + "Two"})
    ends = [side[-1]["content"] for side in (found.messages, found.rejected)]
    assert ends == ["Yes.\nIt is so.\nOne", "Yes.\nIt is so.\nTwo"]
    earlier = one(tmp_path, {"chosen": BEFORE + " c", "rejected": "\n\nHuman: a\n\nAssistant: other"})
    assert [m.get("train", True) for m in earlier.messages] == [True] * 4 and len(earlier.rejected) == 2


@mutation("lora/data/pairs.py", "min(len(chosen), len(rejected)) - 1", "min(len(chosen), len(rejected))")
def test_equal_sides_keep_their_answers(tmp_path):
    found = one(tmp_path, {"chosen": [*EARLIER, *PAIR], "rejected": [*EARLIER, *PAIR]})
    assert found.messages == found.rejected == [*CONTEXT, *PAIR]


def test_answers_differ_from_the_turn_on_where_the_sides_do(tmp_path):
    found = one(tmp_path, {"chosen": [*EARLIER, *PAIR], "rejected": [EARLIER[0], WORSE, *PAIR]})
    assert found.messages == [*EARLIER, *PAIR] and found.rejected == [EARLIER[0], WORSE, *PAIR]


# ---- what else a pair says -------------------------------------------------------------------------------------------


@mutation("lora/data/formats.py", "row.shape, rejected, margin=row.margin)", "row.shape, rejected)", case="0.5")
@pytest.mark.parametrize("margin", [0.5, 2, 0, None])
def test_the_margin_of_a_pair_is_kept(tmp_path, margin):
    assert one(tmp_path, {"prompt": "Hi", **TEXTS, "margin": margin}).margin == float(margin or 0)


@mutation("lora/data/pairs.py", "or not abs(margin) < 1e6:", "or False:", case="nan")
@pytest.mark.parametrize("margin", [True, "big", [1], float("nan"), float("inf"), 10**400], ids=lambda m: str(m)[:8])
def test_a_margin_is_a_number(tmp_path, margin):
    with pytest.raises(ValueError, match=r"its margin is .*, expected a number"):
        pairs.sides({"prompt": "Hi", **TEXTS, "margin": margin})
    refused(tmp_path, {"prompt": "Hi", **TEXTS, "margin": margin})


def heard(path, row) -> list[tuple]:
    """What was noticed while a row was read."""
    found = []
    list(scan([written(path / "a.jsonl", row)], kind="pair", unused=lambda *more: found.append(more[1:])))
    return found


@mutation("lora/data/pairs.py", "and both[0] < both[1]", "and both[0] > both[1]", case="score_chosen")
@mutation("lora/data/pairs.py", '"score|rating|reward"', '"score"', case="chosen-rating")
@pytest.mark.parametrize("name", ["score_chosen", "chosen-rating", "chosen_reward", "chosen_score"])
def test_a_rejected_answer_with_the_better_score_is_a_finding(tmp_path, name):
    other, row = name.replace("chosen", "rejected"), {"prompt": "Hi", **TEXTS}
    assert heard(tmp_path, row | {name: 1, other: 2.5}) == [(f"{name} is less than {other}", "SCORES")]
    for one_, two in ((2.5, 1), (1, 1), (1, None), ("1", "2")):
        assert heard(tmp_path, row | {name: one_, other: two}) == []
    assert heard(tmp_path, row | {"chosen_length": 1, "rejected_length": 2}) == []


@mutation("lora/data/pairs.py", "not in (None, *map(_text_of, turns))", "in ()")
def test_a_prompt_that_is_not_in_the_lists_is_a_finding(tmp_path):
    for prompt in ("Other?", [{"role": "user", "content": "Other?"}]):
        [(what, code)] = heard(tmp_path, {"prompt": prompt, **WHOLE})
        assert code == "PROMPTS" and "its prompt is not in" in what
    for prompt in ("Hi", " Hi\n", [USER], [SYSTEM, USER], None):
        assert heard(tmp_path, {"prompt": prompt, **WHOLE}) == []


@mutation(
    "lora/data/formats.py", "for field in foreign_fields.unread(value, turns, used) if hear", "for field in () if hear"
)
def test_fields_of_either_side_that_nothing_reads_are_named(tmp_path):
    row = {"prompt": [USER], "chosen": [ANSWER], "rejected": [{**WORSE, "mood": "bad"}]}
    assert heard(tmp_path, row) == [("mood",)]


# ---- refused ---------------------------------------------------------------------------------------------------------

Q = {"prompt": "Hi"}
REFUSED = [
    ("its chosen is null, expected text", {**Q, "chosen": None, "rejected": "x"}),
    ("its rejected is a number, expected text", {**Q, "chosen": "x", "rejected": 3}),
    ("its prompt is a number, expected text", {"prompt": 3, **TEXTS}),
    ("its system is a number, expected text", {**Q, **TEXTS, "system": 3}),
    ("it has no rejected answer", {**Q, "chosen": "x", "rejected": " "}),
    ("chosen message 2 of assistant is empty", {**Q, "chosen": " ", "rejected": "x"}),
    ("rejected message 2 of assistant is empty", {"chosen": BEFORE + " c", "rejected": "\n\nHuman: a\n\nAssistant:"}),
    ("chosen message 1 is a turn of assistant, expected user", LISTS),
    ("chosen message 1 is a turn of assistant", {"messages": [ANSWER], "rejected_response": "x"}),
    ("chosen message 2 is a turn of user, expected", {**Q, "chosen": [USER, USER], "rejected": [WORSE]}),
    ("rejected message 3 should be the answer", {"chosen": PAIR, "rejected": [*PAIR, USER]}),
    ("chosen message 4 should be the answer", {"prompt": [*PAIR, USER], "chosen": {**ANSWER, "train": False},
                                               "rejected": "x"}),
    ("its messages do not end with the good answer", {"messages": [USER], "rejected_response": "x"}),
    ("its messages do not end with the good answer. ", {"messages": "x", "rejected_response": "x"}),
    ("its labels is None, expected 0 or 1", {"history": "Hi", "human_ref_A": "x", "human_ref_B": "y"}),
    ("its labels is True, expected", {"history": "Hi", "human_ref_A": "x", "human_ref_B": "y", "labels": True}),
    ("its better_response_id is 2", {**Q, "response_0": "x", "response_1": "y", "better_response_id": 2}),
    ("share no beginning that could be the prompt", TEXTS),
    ("it has tools", {"input": {"messages": [USER], "tools": [{"type": "function"}]}, "preferred_output": [ANSWER],
                      "non_preferred_output": [WORSE]}),
    ("it has images", {**Q, **TEXTS, "images": ["a.png"]}),
    ("it has rejected_images", {"messages": PAIR, "rejected_response": "x", "rejected_images": ["a.png"]}),
    ("it has thinking", {**Q, **TEXTS, "thinking": "Hm."}),
    ("its rejected_response would not be learned beside chosen", {**Q, **TEXTS, "rejected_response": "x"}),
    ("rejected message 2 has tool_calls", {**Q, "chosen": ANSWER, "rejected": {**WORSE, "tool_calls": [{}]}}),
    ("chosen message 2 has list as content, with a part of type 'image_url'",
     {**Q, "chosen": {"role": "assistant", "content": [{"type": "image_url"}]}, "rejected": "x"}),
    ("rejected message 2 has half a surrogate pair", {**Q, "chosen": "x", "rejected": "\ud800"}),
    ("rejected message 2 has role 'tool'", {**Q, "chosen": ANSWER, "rejected": {"role": "tool", "content": "x"}}),
    ("its input would not be learned", {**Q, "input": "x", **TEXTS}),
    ("its weight leaves nothing to train", {**Q, **TEXTS, "weight": 0}),
    ("it has False as label", {**Q, **TEXTS, "label": False}),
]  # fmt: skip


@mutation("lora/data/formats.py", "_ends_with_answer(both[-1], name)", "pass", case="10")
@mutation("lora/data/pairs.py", "    _refuse_beside(rest, names)", "    pass", case="20")
@mutation(
    "lora/data/pairs.py", 'rest |= rest.pop("input")', 'rest["messages"] = rest.pop("input")["messages"]', case="18"
)
@mutation("lora/data/formats.py", 'name = f"{side}message {number}"', 'name = f"message {number}"', case="23")
@pytest.mark.parametrize(("why", "row"), REFUSED, ids=map(str, range(len(REFUSED))))
def test_what_sft_refuses_is_refused_of_either_side_by_its_name(tmp_path, why, row):
    path = written(tmp_path / "a.jsonl", raw=json.dumps(row).encode())  # half a surrogate pair as JSON has it
    with pytest.raises(BadInput) as raised:
        read([path], kind="pair")
    [problem] = raised.value.problems
    assert f" in {path}:1: " in problem and why in problem


# ---- rows of another method ------------------------------------------------------------------------------------------

PLAIN = [{"messages": PAIR}, {"prompt": "Hi", "completion": "Hello."}, {"conversations": [SAID[2], GPT]},
         {"text": "Hi"}, {"question": "Hi", "answer": "Hello.", "rejected": None}]  # fmt: skip


@mutation("lora/data/pairs.py", "and not says_nothing(row.get(pair[1])))", "and pair[1] in row)", case="row4")
@pytest.mark.parametrize("row", PLAIN)
def test_a_plain_row_in_dpo_and_kto_is_refused_with_method_sft(tmp_path, row):
    assert "it has no rejected answer" in refused(tmp_path, row) and "Give --method sft" in refused(tmp_path, row)
    assert "nothing says whether its answer is good. Give --method sft" in refused(tmp_path, row, "judged")
    assert one(tmp_path, row, "conversation")


@mutation("lora/data/pairs.py", 'if kind == "pair" and judged and not pair:', "if False:", case="label")
@mutation("lora/data/foreign_fields.py", 'if name == "it" else "")', 'if False else "")', case="label")
@pytest.mark.parametrize("field", foreign_fields.GOOD)
def test_a_judged_row_in_dpo_and_sft_is_refused_with_method_kto(tmp_path, field):
    assert "Give --method kto" in refused(tmp_path, {"messages": PAIR, field: True})
    assert "--method kto" in refused(tmp_path, {"messages": PAIR, field: False}, "conversation")
    assert one(tmp_path, {"messages": PAIR, field: True}, "conversation").messages == PAIR


# ---- judged answers --------------------------------------------------------------------------------------------------

JUDGED = [
    ({"messages": PAIR}, []), ({"messages": [SYSTEM, *EARLIER, *PAIR]}, [SYSTEM, *CONTEXT]),
    ({"conversations": [*SAID, GPT]}, CONTEXT), ({"prompt": "Hi", "completion": "Hello."}, []),
    ({"prompt": [*EARLIER, USER], "completion": [ANSWER]}, CONTEXT), ({"question": "Hi", "answer": "Hello."}, []),
    ({"q": "Hi", "a": "Hello."}, []), ({"instruction": "Hi", "input": "", "output": "Hello."}, []),
    ({"instruction": "", "input": "Hi", "output": "Hello.", "history": [["a", "b"]], "system": "Be brief."},
     [SYSTEM, *CONTEXT]),
]  # fmt: skip


@mutation(
    "lora/data/formats.py",
    'earlier = [{**turn, "train": False} if',
    "earlier = [turn if",
    case="row2-before2-True-label",
)
@mutation("lora/data/formats.py", "*more, good=good)", "*more, good=True)", case="row0-before0-False-label")
@pytest.mark.parametrize("field", foreign_fields.GOOD)
@pytest.mark.parametrize("good", [True, False])
@pytest.mark.parametrize(("row", "before"), JUDGED)
def test_every_shape_of_one_answer_can_be_judged_under_every_name(tmp_path, row, before, good, field):
    found = one(tmp_path, row | {field: good}, "judged")
    assert (found.messages, found.good, found.rejected) == ([*before, *PAIR], good, None)
    assert found.shape == one(tmp_path, row, "conversation").shape
    named = {"frage": "Hi", "antwort": "Hello.", field: good}
    assert one(tmp_path, named, "judged", keys=("frage", "antwort")).messages == PAIR


@mutation("lora/data/pairs.py", "if not isinstance(value, bool):", "if value not in (True, False):", case="0-label")
@pytest.mark.parametrize("field", foreign_fields.GOOD)
@pytest.mark.parametrize("value", [0, 1, "true", "good", [True]], ids=str)
def test_a_judgement_is_true_or_false(tmp_path, value, field):
    assert f"it has {value!r} as {field}. Write true" in refused(tmp_path, {"messages": PAIR, field: value}, "judged")


@mutation("lora/data/pairs.py", "if len(set(said.values())) > 1:", "if False:")
def test_two_judgements_that_differ_are_refused(tmp_path):
    row = {"messages": PAIR, "label": True, "kto_tag": True}
    assert one(tmp_path, row, "judged").good is True
    assert "label and kto_tag, which contradict" in refused(tmp_path, row | {"kto_tag": False}, "judged")


@mutation("lora/data/formats.py", "    _ends_with_answer(messages)\n", "\n")
def test_a_judged_row_ends_with_its_answer(tmp_path):
    row = {"messages": [*PAIR, USER], "label": True}
    assert "message 3 should be the answer that is learned from" in refused(tmp_path, row, "judged")
    assert "message 1 of user is empty" in refused(tmp_path, {"prompt": "", "completion": "x", "label": True}, "judged")


# ---- anything --------------------------------------------------------------------------------------------------------

NAMES = {name for pair in pairs.ANSWERS for name in pair} | {*pairs.PROMPTS, "labels", "label", "margin", "system"}
TURN = st.fixed_dictionaries({}, optional={
    "role": st.sampled_from(["user", "assistant", "system", 3, None]), "from": st.sampled_from(["human", "gpt"]),
    "content": st.sampled_from(["a", "", None]), "value": st.just("b")})  # fmt: skip
TEXT = st.sampled_from(["", "a", "a b", BEFORE, BEFORE + " a", "a\nb"])
VALUE = st.one_of(st.none(), st.booleans(), st.integers(0, 2), TEXT, TURN, st.lists(TURN | st.just("a"), max_size=3))
ROW = st.dictionaries(st.sampled_from(sorted(NAMES)), VALUE, max_size=4)


@given(ROW, st.sampled_from(pairs.ANSWERS), VALUE, VALUE, st.sampled_from(["pair", "judged", "conversation"]))
@hypothesis_settings(max_examples=1000, **CALM)
def test_any_row_is_read_or_a_problem_with_its_line(tmp_path_factory, row, names, one_, two, kind):
    path = written(tmp_path_factory.getbasetemp() / "any.jsonl", row | dict(zip(names, (one_, two), strict=True)))
    [found] = scan([path], kind=kind)
    assert found.where == f"{path}:1"
    if isinstance(found, Conversation) and kind == "pair":
        for side in (found.messages, found.rejected):
            assert side[-1]["role"] == "assistant" and "train" not in side[-1]
            assert next(m["role"] for m in side if m["role"] != "system") == "user"
