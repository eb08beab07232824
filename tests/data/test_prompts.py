"""Rows that ask become prompts: each row's question, its columns for the rewards, and the ids of generation."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lora.data import formats, preview, prompts
from lora.data.encode import encode, joined
from lora.data.formats import Conversation
from lora.data.sources import group, key_problems, lint_report, read_sources
from lora.errors import BadInput
from lora.run.evaluator import prompts_from
from tests.data.test_data import ANSWER, CALM, PAIR, SYSTEM, USER, written
from tests.data.test_pairs import BAD, BEFORE, EARLIER, TEXTS, one, refused
from tests.mutation import mutation
from tests.text.test_template import byte_level
from tests.text.test_template import chat_of as shared_chat_of

chat_of = shared_chat_of.__wrapped__  # one of its own, whose counts begin at 0

SAID = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "Hi"}]

SHAPES = {  # a row, and the turns before its last question
    "a text": ({"prompt": "Hi", "a": 3, "b": [4], "c": {"d": None}}, []),
    "messages": ({"prompt": [SYSTEM, *EARLIER, USER]}, [SYSTEM, *EARLIER]),
    "a text and its completion": ({"prompt": "Hi", "completion": "Hello."}, []),
    "messages and their completion": ({"prompt": [USER], "completion": [ANSWER]}, []),
    "a text with a system text beside it": ({"prompt": "Hi", "system": "Be brief."}, [SYSTEM]),
    "a conversation": ({"messages": [SYSTEM, *EARLIER, *PAIR]}, [SYSTEM, *EARLIER]),
    "a conversation that ends with the question": ({"messages": [*EARLIER, USER]}, EARLIER),
    "a conversation whose answers are not learned": ({"messages": [EARLIER[0], {**EARLIER[1], "train": False}, USER]},
                                                     EARLIER),
    "ShareGPT's": ({"conversations": [*SAID, {"from": "gpt", "value": "Hello."}]}, EARLIER),
    "ShareGPT's that ends with the question": ({"conversations": SAID, "system": "Be brief."}, [SYSTEM, *EARLIER]),
    "GSM8K": ({"question": "Hi", "answer": "It is 3.\n#### 3"}, []),
    "a question alone": ({"question": "Hi"}, []),
    "q and a": ({"q": "Hi", "a": 3}, []),
    "Alpaca": ({"instruction": "Hi", "input": "", "output": "Hello."}, []),
    "Alpaca with everything": ({"instruction": "", "input": "Hi", "output": "Hello.", "system": "Be brief.",
                                "history": [["a", "b"]]}, [SYSTEM, *EARLIER]),
    "a prompt that is null beside messages": ({"prompt": None, "messages": PAIR}, []),
    "a prompt beside messages": ({"prompt": "Hi", "messages": [{**USER, "content": "another"}, ANSWER]}, []),
    "a judged answer": ({"prompt": "Hi", "completion": "Hello.", "label": False}, []),
    "a pair": ({"prompt": "Hi", **TEXTS, "margin": "by a lot", "chosen_reasoning": "x"}, []),
    "a pair without a prompt": ({"chosen": [*EARLIER, *PAIR], "rejected": [*EARLIER, *BAD]}, EARLIER),
    "a pair with equal sides": ({"chosen": [*EARLIER, *PAIR], "rejected": [*EARLIER, *PAIR]}, EARLIER),
    "a pair of which one side is judged by turns": (
        {"chosen": [EARLIER[0], {**EARLIER[1], "train": False}, *PAIR], "rejected": [*EARLIER, *BAD]}, EARLIER),
    "a pair whose sides have the system turn": ({"prompt": "Hi", "chosen": [SYSTEM, *PAIR], "rejected": [SYSTEM, *BAD]},
                                                [SYSTEM]),
    "HH-RLHF": ({"chosen": BEFORE + " Hello.", "rejected": BEFORE + " Go away."}, EARLIER),
    "OpenAI's pair": ({"input": {"messages": [SYSTEM, USER]}, "preferred_output": [ANSWER],
                       "non_preferred_output": [BAD[1]]}, [SYSTEM]),
    "SHP": ({"history": "Hi", "human_ref_A": "Hello.", "human_ref_B": "Go away.", "labels": 7}, []),
    "ms-swift's pair": ({"messages": [*EARLIER, *PAIR], "rejected_response": "Go away."}, EARLIER),
}  # fmt: skip


@mutation("lora/data/formats.py", "shape, row=value)", "shape, row={})")
@mutation("lora/data/prompts.py", "turns = turns[:-1]", "pass", case="a conversation")
@mutation("lora/data/prompts.py", 'if name != "train"}', "}", case="a conversation whose answers are not learned")
@mutation("lora/data/prompts.py", "zip(turns[:-1], *other, strict=False)", "zip(turns, *other, strict=False)",
          case="a pair with equal sides")  # fmt: skip
@mutation("lora/data/prompts.py", "if not says_nothing(row[name])", "", case="a prompt that is null beside messages")
@mutation("lora/data/prompts.py", 'ASKING = ("prompt", *WHOLE,', 'ASKING = (*WHOLE, "prompt",',
          case="a prompt beside messages")  # fmt: skip
@mutation("lora/data/prompts.py", 'rest.pop("margin", None)', "pass", case="a pair")
@mutation("lora/data/prompts.py", 'f.startswith(("chosen_", "rejected_"))', "False", case="a pair")
@mutation("lora/data/prompts.py", '{**rest, "chosen": row[both[0]], "rejected": row[both[1]]}', "row", case="SHP")
@mutation("lora/data/prompts.py", "both and both[0] not in WHOLE", "both", case="ms-swift's pair")
@pytest.mark.parametrize("name", SHAPES)
def test_a_rows_question_is_the_prompt_and_the_whole_row_is_for_the_rewards(name, tmp_path):
    row, before = SHAPES[name]
    found = one(tmp_path, row, "prompt")
    assert found.messages == [*before, USER] and found.row == row
    assert found.rejected is None and found.good is None and found.where == f"{tmp_path / 'a.jsonl'}:1"


def test_the_shape_of_a_prompt_names_its_key(tmp_path):
    shapes = [one(tmp_path, row, "prompt").shape for row, _ in SHAPES.values()]
    of = [shapes[list(SHAPES).index(name)] for name in ("a text", "messages", "a conversation", "GSM8K", "Alpaca")]
    assert of == ["prompt", "prompt", "messages", "question", "instruction"]
    assert one(tmp_path, SHAPES["a pair"][0], "prompt").shape == "prompt/chosen/rejected"


@mutation("lora/data/prompts.py", "key = next(iter(used), None)", "key = None")
@mutation("lora/data/prompts.py", "if key not in WHOLE:", "if True:")
@mutation("lora/data/prompts.py", "if field == key or field not in WHOLE", "")
@mutation("lora/data/formats.py", 'if not answered and "text" in roles:', 'if not answered and shape == "text":')
def test_the_questions_key_can_be_named(tmp_path):
    row = {"prompt": "another", "frage": "Hi", "thoughts": "", "conversations": SAID, "messages": [*EARLIER, *EARLIER]}
    assert one(tmp_path, row, "prompt", keys=("frage", None)).messages == [USER]
    assert one(tmp_path, {**row, "frage": [SYSTEM, USER]}, "prompt", keys=("frage", None)).messages == [SYSTEM, USER]
    assert one(tmp_path, row, "prompt", keys=("conversations", None)).messages == [*EARLIER, USER]
    assert one(tmp_path, {"thoughts": "Hi"}, "prompt", keys=("thoughts", None)).messages == [USER]
    assert one(tmp_path, {"text": "Hi"}, "prompt", keys=("text", None)).messages == [USER]
    assert one(tmp_path, {"a": "Hi", **TEXTS}, "prompt", keys=("a", None)).messages == [USER]
    assert one(tmp_path, {"prompt": "Hi"}, "prompt", keys=("frage", None)).messages == [USER]


COLUMNS = {"answer": "3", "output": 3, "label": False, "weight": 0.5, "score": 2, "is_correct": False, "solution": None,
           "reasoning": "3 · 1 = 3", "cot": ["3"], "labels": [1], "input_ids": [1, 2], "margin": [],
           "refusal": "no", "completion_mask": [], "level": {"of": [1, {"x": None}]}, "数": 1.5,
           "train": "perhaps", "tools": []}  # fmt: skip


@mutation("lora/data/prompts.py", "or field not in OF_AN_ANSWER}", "or True}", case="question")
@pytest.mark.parametrize("key", [*prompts.ASKING])
def test_a_prompts_row_may_have_any_column_and_none_is_a_finding(key, tmp_path):
    heard, asking = [], [USER] if key == "messages" else SAID[2:] if key == "conversations" else "Hi"
    path = written(tmp_path / "a.jsonl", {key: asking, **COLUMNS})
    [found] = formats.scan([path], kind="prompt", unused=lambda *more: heard.append(more))
    assert found.messages == [USER] and found.row == {key: asking, **COLUMNS} and heard == []


WRONG = {  # a row, and what the line about it must say
    "a document": ({"text": "Once."}, "a document asks nothing. Give --method sft"),
    "no question": ({"frage": "Hi", "x": 1}, "its keys are frage, x, and none asks. Known are prompt, messages, conv"),
    "an empty object": ({}, "its keys are none, and none asks"),
    "an empty prompt": ({"prompt": " "}, "message 1 of user is empty"),
    "null": ({"prompt": None}, "its prompt is null, expected text"),
    "a number": ({"question": 3}, "its question is a number, expected text"),
    "an object": ({"prompt": USER}, "its prompt is an object, expected text"),
    "no messages": ({"messages": []}, "messages is not a list of messages"),
    "an empty prompt of messages": ({"prompt": []}, "messages is not a list of messages"),
    "a prompt that ends with an answer": ({"prompt": PAIR}, "message 2 of assistant is its last, expected a question"),
    "a prompt of a system turn": ({"prompt": [SYSTEM]}, "message 1 of system is its last, expected a question"),
    "a conversation of a system turn": ({"messages": [SYSTEM]}, "message 1 of system is its last"),
    "a conversation of an answer": ({"messages": [ANSWER]}, "message 1 is a turn of assistant, expected user"),
    "another's role": ({"prompt": [{"role": "tool", "content": "3"}]}, "message 1 has role 'tool'; expected system"),
    "two answers": ({"messages": [*PAIR, ANSWER]}, "message 3 is a turn of assistant, expected user"),
    "no turn in common": ({"chosen": PAIR, "rejected": EARLIER}, "it has no turn before its answer"),
    "tools": ({"prompt": "Hi", "tools": [{"name": "search"}]}, "it has tools, and calls of tools are not trained here"),
    "an image": ({"prompt": "Hi", "image": "a.png"}, "it has image, which a model of text does not see"),
    "its own template": ({"prompt": "Hi", "chat_template_kwargs": {"x": 1}}, "it has chat_template_kwargs, which is"),
    "documents": ({"prompt": "Hi", "documents": ["x"]}, "it has documents"),
    "a context": ({"question": "Hi", "context": "x"}, "its context would not be learned. Put it into the question"),
    "two systems": ({"prompt": [SYSTEM, USER], "system": "Be long."}, "only the first may be one"),
    "thoughts of the user": ({"prompt": [{**USER, "reasoning": "x"}]}, "message 1 of user has thoughts"),
}  # fmt: skip


@mutation("lora/data/formats.py", "if why := prompts.refused(value, used):", "if why := None:", case="a document")
@mutation("lora/data/prompts.py", 'turns[-1]["role"] != "user"', "False", case="a prompt that ends with an answer")
@mutation("lora/data/prompts.py", "if not turns or", "if", case="no turn in common")
@mutation("lora/data/foreign_fields.py", "if why in (_TOKENS, _PART, _BESIDE))}", ")}", case="tools")
@pytest.mark.parametrize("name", WRONG)
def test_what_asks_nothing_that_can_be_answered_is_refused_with_its_line(name, tmp_path):
    row, expected = WRONG[name]
    assert expected in refused(tmp_path, row, "prompt")


def test_leading_answers_of_prompts_are_dropped_or_kept_as_asked(tmp_path):
    row = {"messages": [ANSWER, *EARLIER[:1], EARLIER[1]]}
    dropped, kept = (one(tmp_path, row, "prompt", leading=how) for how in ("drop", "keep"))
    assert dropped.messages == EARLIER[:1] and kept.messages == [ANSWER, EARLIER[0]]
    for how in ("drop", "keep"):
        assert "it has no turn before its answer" in refused(tmp_path, {"messages": [ANSWER]}, "prompt", leading=how)


texts = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1).filter(str.strip)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts, lambda more: st.lists(more, max_size=2), max_leaves=3
)
names = st.text("xyz_", min_size=1, max_size=6) | st.sampled_from(sorted(COLUMNS))
talks = st.lists(st.tuples(texts, texts), max_size=2)


@given(st.sampled_from(prompts.ASKING), texts, talks, st.none() | texts, st.booleans(), st.dictionaries(names, values))
@hypothesis_settings(max_examples=150, **CALM)
def test_every_key_of_a_question_gives_the_same_turns_whatever_stands_beside_it(
    tmp_path_factory, key, question, before, system, answered, columns
):
    def turn(role: str, text: str) -> dict:
        return {"role": role, "content": text}

    turns = [turn("system", system)] if system else []
    turns += [turn(role, text) for both in before for role, text in zip(("user", "assistant"), both, strict=True)]
    turns.append(turn("user", question))
    given = turns
    if key in ("messages", "conversations"):
        given = [*turns, turn("assistant", "3")] if answered else turns
        if key == "conversations":
            given = [{"from": {"user": "human", "assistant": "gpt"}.get(m["role"], m["role"]), "value": m["content"]}
                     for m in given]  # fmt: skip
    row = {**{name: value for name, value in columns.items() if name != "tools"}, key: given}
    folder = tmp_path_factory.mktemp("prompts")
    found = one(folder, row, "prompt")
    assert found.messages == turns and found.row == row
    if not before and key not in ("messages", "conversations"):
        beside = {"system": system} if system else {}
        assert one(folder, {**row, key: question, **beside}, "prompt").messages == turns


# ---- encoding --------------------------------------------------------------------------------------------------------

ROWS = [{"question": "What is 3*4?", "answer": "12", "level": [1, {"x": None}]},
        {"messages": [SYSTEM, *EARLIER, USER], "answer": "x"},
        {"prompt": "<|im_end|>" * 9},
        {"prompt": "b " * 60, "of": "the long one"},
        {"question": "What is 5*7?", "answer": "35"}]  # fmt: skip


def rows_of(rows=ROWS) -> list[Conversation]:
    return [formats.read_row(f"a.jsonl:{i}", row, "prompt") for i, row in enumerate(rows, 1)]


@mutation("lora/data/encode.py", 'found.prompts += [row] if kind == "prompt" else []', "found.prompts = found.kept")
@mutation("lora/data/encode.py", "return [_of_prompt(row, chat) for row in rows]", "pass")
@mutation("lora/text/chat.py", "return TokenizedChat(ids, [], [])", "return TokenizedChat(ids, [(0, len(ids))], [])")
@pytest.mark.parametrize("name", ["chatml", "qwen3", "llama3"])
def test_a_prompt_is_encoded_as_generation_has_it_with_nothing_trained_and_its_row_stays_beside_it(name):
    chat, rows = chat_of(name), rows_of()
    lengths = [len(chat.prompt(row.messages)) for row in rows]
    longest = lengths.index(max(lengths))
    found = encode(rows, chat, max(lengths) - 1, kind="prompt")
    fitting = [row for row in rows if row is not rows[longest]]
    assert [example.tokens for example in found] == [chat.prompt(row.messages) for row in fitting]
    assert found.prompts == fitting and found.where == [row.where for row in fitting]
    assert not found.trained.any() and found.group == 1
    assert found.rows == 5 and found.dropped == 1 and found.overlong == (rows[longest].where, max(lengths))


@mutation("lora/text/chat.py", "self.guarded += bool(text.guard)\n        ids", "ids")
def test_prompts_that_spell_a_control_token_are_counted():
    chat = chat_of("chatml")
    encode(rows_of(), chat, 1000, kind="prompt")
    assert chat.guarded == 1


@mutation("lora/data/encode.py", "whole.prompts = [row for part in parts for row in part.prompts]", "")
def test_the_rows_of_several_files_lie_one_after_another_as_their_examples_do():
    chat, rows = chat_of("chatml"), rows_of()
    parts = [encode(some, chat, 1000, kind="prompt") for some in (rows[2:], rows[:2])]
    assert joined(parts).prompts == [*rows[2:], *rows[:2]]
    assert [example.tokens for example in joined(parts)] == [chat.prompt(row.messages) for row in joined(parts).prompts]


def test_other_kinds_keep_no_rows():
    assert encode([Conversation(PAIR, "a.jsonl:1")], chat_of("chatml"), 1000).prompts == []


@mutation("lora/data/encode.py", "if row.row is not None:\n        why", "if False:\n        why")
def test_a_prompt_that_leaves_no_room_for_its_completion_is_an_error_where_that_is_asked():
    chat, row = chat_of("chatml"), rows_of()[3]
    with pytest.raises(BadInput) as raised:
        encode([row], chat, 50, overlong="error", most=512, kind="prompt")
    length = len(chat.prompt(row.messages))
    assert str(raised.value) == (
        f"too long in a.jsonl:4: {length} tokens, 50 are left beside --max-new-tokens. "
        "Raise --max-len, or lower --max-new-tokens, or give --overlong drop"
    )


def test_a_prompt_that_the_template_refuses_is_named_with_the_others(tmp_path):
    rows = [formats.read_row(f"a.jsonl:{i}", {"prompt": text}, "prompt") for i, text in enumerate("abc", 1)]
    chat = chat_of("chatml")
    chat.template.source, render = "", chat._renderer.prompt

    def refuse(messages):
        if messages[0]["content"] != "b":
            raise BadInput(f"{messages[0]['content']} cannot be asked. Leave it out")
        return render(messages)

    chat._renderer.prompt = refuse
    with pytest.raises(BadInput) as raised:
        encode(rows, chat, 100, kind="prompt")
    assert raised.value.problems == tuple(
        f"wrong row in a.jsonl:{i}: {text} cannot be asked. Leave it out" for i, text in ((1, "a"), (3, "c"))
    )


# ---- files of prompts ------------------------------------------------------------------------------------------------


def settings(*data: Path, **changed) -> SimpleNamespace:
    args = {"data": [str(path) for path in data], "replay": None, "eval_data": None, "eval_fraction": None, "seed": 0,
            "prompt_key": None, "response_key": None, "leading_answers": "error", "method": "grpo", "max_len": 200,
            "max_new_tokens": 60, "train_on": "assistant", "overlong": "drop", "batch_size": 2, "system": None,
            "no_system": False}  # fmt: skip
    return SimpleNamespace(**args | changed)


def sources(args, chat=None, most=512):
    return read_sources(args, chat or chat_of("chatml"), Path, None, most, "prompt")


@mutation("lora/data/sources.py", "max(1, longest - args.max_new_tokens)", "longest")
@mutation("lora/data/sources.py", "max(1, longest - args.max_new_tokens)", "longest - args.max_new_tokens")
def test_prompts_have_the_tokens_that_their_completions_leave(tmp_path, capsys):
    path = written(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": "b" * 20})
    chat = chat_of("chatml")
    long = len(chat.prompt([{"role": "user", "content": "b" * 20}]))
    assert [len(sources(settings(path, max_len=60 + n)).examples) for n in (long, long - 1)] == [2, 1]
    err = capsys.readouterr().err
    assert f"over {long - 1} tokens (--max-len less --max-new-tokens), the first is {path}:2 with {long}" in err
    for max_len in (61, 20):
        with pytest.raises(BadInput) as raised:
            sources(settings(path, max_len=max_len))
        why = "no prompt fits the 1 tokens that are left beside --max-new-tokens"
        assert str(raised.value) == (f"nothing to train in {path}: {why}. Raise --max-len, or lower --max-new-tokens")


@mutation("lora/data/sources.py", 'digest.update(f"{json.dumps(prompt.row, sort_keys=True)}\\n".encode())', "pass")
@mutation("lora/data/sources.py", "json.dumps(prompt.row, sort_keys=True)", "json.dumps(prompt.row)")
def test_the_fingerprint_of_prompts_covers_their_columns_in_any_order(tmp_path):
    def fingerprint(*rows: dict) -> str:
        return sources(settings(written(tmp_path / "a.jsonl", *rows))).fingerprint()

    row = {"question": "What is 3*4?", "answer": "12", "level": {"a": 1, "b": "ü"}}
    whole = fingerprint(row, {"question": "Hi"})
    assert whole == fingerprint(
        {"level": {"b": "ü", "a": 1}, "answer": "12", "question": row["question"]}, {"question": "Hi"}
    )
    others = [{**row, "answer": "13"}, {**row, "answer": 12}, {**row, "more": None}, {"question": row["question"]},
              {**row, "level": {"a": 1, "b": "u"}}]  # fmt: skip
    assert len({whole, *(fingerprint(other, {"question": "Hi"}) for other in others)}) == 1 + len(others)
    assert fingerprint({"question": "Hi"}, row) != whole


def test_the_notes_about_prompts_speak_of_no_answer(tmp_path, capsys):
    sources(settings(written(tmp_path / "a.jsonl", *ROWS)))
    err = capsys.readouterr().err
    assert "2 question, 1 messages and 1 prompt" not in err and "1 rows spell a control token in their text" in err
    assert not re.search("answer|trained|cut into", err)


@mutation("lora/data/sources.py", '(kind != "prompt" and chat.cuts,', "(chat.cuts,")
def test_a_cut_within_a_prompts_context_is_no_note(tmp_path, capsys):
    chat = chat_of("chatml")
    place = chat._place_answers

    def cutting(text, encoded):
        return place(text, encoded._replace(cut=True))

    chat._place_answers = cutting
    sources(settings(written(tmp_path / "a.jsonl", *ROWS[:2])), chat)
    assert chat.cuts == 2 and "cut into tokens" not in capsys.readouterr().err


@mutation("lora/data/sources.py", 'if kind == "prompt" and args.response_key:', "if False:")
def test_the_questions_key_is_enough_and_a_response_key_is_refused(tmp_path):
    path = written(tmp_path / "a.jsonl", {"frage": "Hi", "antwort": "x"})
    assert sources(settings(path, prompt_key="frage")).examples.prompts[0].messages == [USER]
    with pytest.raises(BadInput, match=r"no row has nichts\. Check --prompt-key"):
        sources(settings(written(tmp_path / "b.jsonl", {"prompt": "Hi"}), prompt_key="nichts"))
    for prompt_key in (None, "frage"):
        [line] = key_problems(settings(path, prompt_key=prompt_key, response_key="antwort"), "prompt")
        assert line.startswith("contradiction in the command line: --method grpo and --response-key: ")


@mutation("lora/data/lint.py", "frozenset(learned if row.row is None else ())", "frozenset(learned)")
def test_rows_with_the_same_question_are_held_out_together_and_context_is_part_of_it(tmp_path):
    rows = [{"question": f"What is {i}*7?", "answer": str(j)} for i in range(10) for j in range(2)]
    talks = [{"messages": [*EARLIER, {"role": "user", "content": text}]} for text in ("c", "d")]
    path = written(tmp_path / "a.jsonl", *rows)
    found = sources(settings(path, eval_fraction=0.3))
    train, held = ({row.messages[0]["content"] for row in part.prompts} for part in (found.examples, found.held_out))
    assert len(held) == 3 and len(found.held_out) == 6 and not train & held and len(train) == 7
    first, second = (group(formats.read_row("a.jsonl:1", row, "prompt")) for row in talks)
    assert first != second


def checked(args, capsys, most=512) -> list[str]:
    lint_report(args, Path, "prompt", lambda: (chat_of("chatml"), most))
    return [re.sub(r"^[^:]*/", "", line) for line in capsys.readouterr().out.splitlines()]


@mutation("lora/data/lint.py", 'message.get("train", row.row is None)', "True")
def test_check_finds_prompts_twice_in_two_files_or_too_long_and_says_nothing_about_answers(tmp_path, capsys):
    network_error = {"role": "assistant", "content": "network error"}
    rows = [{"question": "What is 3*4?", "answer": "12", "score": 1},
            {"question": "what is 3*4", "answer": "11"},
            {"question": "Who?", "answer": "network error"},
            {"prompt": [EARLIER[0], network_error, USER]},
            {"prompt": [EARLIER[0], {**network_error, "content": "A: yes"}, {**USER, "content": "[NAME]?"}]},
            {"question": "c" * 150},
            {"text": "Once."}]  # fmt: skip
    train = written(tmp_path / "a.jsonl", *rows)
    held_out = written(tmp_path / "b.jsonl", {"question": "What is 4*3?", "answer": "12"}, {"question": "Whom?"})
    args = settings(train, eval_data=[str(held_out)])
    found = [" ".join(line.split(": ")[:2]) for line in checked(args, capsys)]
    assert found == ["a.jsonl:2 DUPLICATE", "a.jsonl:4 SCHEMA", "a.jsonl:5 PLACEHOLDER", "a.jsonl:5 PREFIX",
                     "a.jsonl:6 OVERLONG", "a.jsonl:7 UNKNOWN", "b.jsonl:1 OVERLAP"]  # fmt: skip


@mutation("lora/data/sources.py", "limit(args, kind, most))", "most)")
@mutation("lora/data/sources.py", '"prompt" if row.row else "side"', '"side"')
def test_check_measures_prompts_against_what_completions_leave(tmp_path, capsys):
    path, chat = written(tmp_path / "a.jsonl", {"prompt": "a" * 20}), chat_of("chatml")
    length = len(chat.prompt([{"role": "user", "content": "a" * 20}]))
    for max_len, most in ((None, length + 60), (length + 60, 512)):
        assert checked(settings(path, max_len=max_len), capsys, most) == []
    for max_len, most in ((None, length + 59), (length + 59, 512)):
        expected = (
            f"a.jsonl:1: OVERLONG: its prompt has {length} tokens, over {length - 1}. Shorten it, or raise --max-len"
        )
        assert checked(settings(path, max_len=max_len), capsys, most) == [expected]


# ---- what is shown ---------------------------------------------------------------------------------------------------


@mutation("lora/data/preview.py", "tokenizer, colour), *columns(examples.prompts[i : i + 1])", "tokenizer, colour)")
@mutation("lora/data/preview.py", "others[:COLUMNS]", "others")
@mutation("lora/data/preview.py", 'not in prompt.shape.split("/")', "not in ()")
@mutation("lora/data/preview.py", '("prompt", "") if examples.prompts', '("prompt", "") if False')
def test_a_preview_shows_prompts_and_their_first_columns(capsys):
    row = {"answer": "1\n2", "question": "Q", "level": [1, {"ü": None}], "long": "x" * 200, "more": 1}
    preview.show(encode(rows_of([row, {"prompt": "R"}]), chat_of("chatml"), 1000, kind="prompt"), 2, byte_level())
    first, second = capsys.readouterr().out.rstrip("\n").split("\n\n")
    assert first.splitlines()[0] == "prompt 1 of 2, a.jsonl:1: 9 tokens"
    assert first.splitlines()[-3:] == [r"answer: 1\n2", 'level: [1, {"ü": null}]', f"long: {'x' * 93}…"]
    assert second.splitlines()[-1] == "  <|im_start|>│assistant│⏎" and "+" not in first + second


@mutation(
    "lora/data/preview.py", '{} if examples.prompts else {"trained tokens": trained}', '{"trained tokens": trained}'
)
def test_the_numbers_of_prompts_are_not_of_what_is_trained():
    found = preview.numbers(encode(rows_of(), chat_of("chatml"), 1000, kind="prompt"), 1, 1.0)
    assert "trained tokens" not in found and "trained share" not in found and found["rows"] == "5"


@mutation("lora/run/evaluator.py", 'if m["role"] == "assistant"), None)]', 'if m["role"] == "assistant"), 0)]')
def test_sampled_answers_are_to_the_first_questions_of_prompts_too():
    rows = rows_of([{"prompt": "a"}, {"prompt": [*EARLIER, USER]}])
    assert [messages[-1]["content"] for messages in prompts_from(rows)][:2] == ["a", "a"]


def test_prompts_are_written_as_they_are_read(tmp_path):
    path = written(tmp_path / "a.jsonl", *ROWS)
    assert [row.row for row in formats.read([path], kind="prompt")] == [json.loads(json.dumps(row)) for row in ROWS]
