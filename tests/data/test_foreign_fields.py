"""Fields that other trainers know are honoured or refused by name, and what stands for a text must be one."""

import json

import pytest

from lora.data import foreign_fields
from lora.data.encode import encode
from lora.data.formats import read
from lora.data.sources import lint_report
from lora.errors import BadInput
from lora.run.settings import TrainSettings
from lora.text.chat import Chat
from lora.text.template import ChatTemplate
from tests.data.test_data import ANSWER, PAIR, SYSTEM, USER, problems_of, written
from tests.mutation import mutation
from tests.text.test_template import BEGIN, byte_level, chat_of

ROW = {"instruction": "Q", "output": "A"}
NO_TEXT = {
    "null": None,
    "a list": ["a"],
    "an empty list": [],
    "a number": 12,
    "zero": 0,
    "a fraction": 0.5,
    "an object": {"a": 1},
    "true": True,
    "parts": [{"type": "text", "text": "a"}],
}


def texts_of(tmp_path, row, **how) -> list[str]:
    [found] = read([written(tmp_path / "a.jsonl", row)], **how)
    return [message["content"] for message in found.messages]


def refused(tmp_path, row, **how) -> str:
    path = written(tmp_path / "a.jsonl", {"messages": PAIR}, row)
    with pytest.raises(BadInput) as raised:
        read([path], **how)
    [problem] = raised.value.problems
    assert f" in {path}:2: " in problem and problem.count(". ") >= 1 and len(problem) < 400
    return problem


# ---- what must be text -----------------------------------------------------------------------------------------------


@mutation("lora/data/formats.py", "if not isinstance(value[key], str):", "if False:", case="instruction-a list")
@pytest.mark.parametrize("kind", NO_TEXT)
@pytest.mark.parametrize("key", ["instruction", "output", "prompt", "completion", "q", "a", "问", "答", "text"])
def test_what_is_no_text_is_refused_by_the_name_of_its_field(tmp_path, key, kind):
    pairs = [("instruction", "output"), ("prompt", "completion"), ("q", "a"), ("问", "答")]
    pair = next((pair for pair in pairs if key in pair), ("text",))
    row = dict.fromkeys(pair, "x") | {key: NO_TEXT[kind]}
    assert f"its {key} is " in refused(tmp_path, row, keys=("问", "答"))


@mutation("lora/data/formats.py", 'if key not in used and value.get(key) not in (None, "")}', "if value.get(key)}")
@pytest.mark.parametrize("kind", [kind for kind in NO_TEXT if kind != "null"])
@pytest.mark.parametrize("key", ["input", "context", "system", "history"])
def test_what_belongs_to_a_question_is_refused_by_name_unless_it_is_text(tmp_path, key, kind):
    given = [[NO_TEXT[kind], "x"]] if key == "history" else NO_TEXT[kind]
    assert f"its {key} is " in refused(tmp_path, ROW | {key: given})


@pytest.mark.parametrize("history", [12, {}, "x", [["a"]], [["a", "b", "c"]], [{"role": "user", "content": "x"}], 0])
def test_a_history_is_a_list_of_pairs(tmp_path, history):
    assert "history is not a list of [question, answer] pairs" in refused(tmp_path, ROW | {"history": history})


def test_null_and_blank_beside_a_question_are_as_good_as_left_out(tmp_path):
    for nothing in (None, ""):
        more = dict.fromkeys(("input", "context", "system", "history", "tools", "images", "label", "weight"), nothing)
        more["weight"] = more["label"] = None
        assert texts_of(tmp_path, ROW | more) == ["Q", "A"]
    assert texts_of(tmp_path, ROW | {"input": " \n", "history": []}) == ["Q", "A"]


@mutation("lora/data/formats.py", "if more and foreign_fields.is_blank(value[prompt])", "if False")
@pytest.mark.parametrize("nothing", [None, "", " \n"])
def test_an_input_without_an_instruction_is_the_question(tmp_path, nothing):
    """So LLaMA-Factory and others join them: what is there, with a newline between."""
    row = {"instruction": nothing, "input": "Question?", "output": "A"}
    assert texts_of(tmp_path, row) == ["Question?", "A"]
    assert texts_of(tmp_path, row | {"instruction": " I "}) == [" I \nQuestion?", "A"]
    refused(tmp_path, row | {"input": nothing})
    assert "its instruction is null" in refused(tmp_path, {"instruction": None, "output": "A"})


def test_text_in_parts_is_for_messages_only(tmp_path):
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert texts_of(tmp_path, {"messages": [{**USER, "content": parts}, ANSWER]}) == ["Hi", "Hello."]
    seen = [*parts, {"type": "image_url", "image_url": {"url": "a.png"}}]
    row = {"messages": [{**USER, "content": seen}, ANSWER]}
    assert "with a part of type 'image_url'" in refused(tmp_path, row)


def test_a_prompt_alone_keeps_what_belongs_to_it(tmp_path):
    row = {"instruction": "Add", "input": "1 2", "system": "Be brief.", "history": [["a", "b"]]}
    assert texts_of(tmp_path, row, answered=False) == ["Be brief.", "a", "b", "Add\n1 2"]
    assert texts_of(tmp_path, {"prompt": [SYSTEM, USER]}, answered=False) == ["Be brief.", "Hi"]
    assert texts_of(tmp_path, {"frage": "Hi"}, answered=False, keys=("frage", None)) == ["Hi"]


@mutation("lora/data/formats.py", 'SYSTEM = ("system", "system_prompt", "system_message")', 'SYSTEM = ("system",)')
@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message"])
def test_a_system_text_is_learned_under_each_of_its_names(tmp_path, key):
    pair = {"question": "Q", "response": "A"}
    assert texts_of(tmp_path, pair | {key: "S"}, keys=("question", "response")) == ["S", "Q", "A"]
    assert texts_of(tmp_path, {"messages": [{**SYSTEM, "content": "S"}, *PAIR], key: "S"}) == ["S", "Hi", "Hello."]
    assert "is a system turn" in refused(tmp_path, {"messages": [SYSTEM, *PAIR], key: "S"})


# ---- masks -----------------------------------------------------------------------------------------------------------

LEFT_OUT = [(field, value) for field in foreign_fields.TRAINED for value in (False, 0, 0.0)]
LEFT_OUT += [(field, value) for field in foreign_fields.NOT_TRAINED for value in (True, 1)]
LEARNED = [(field, value) for field in foreign_fields.TRAINED for value in (True, 1, 1.0, None)]
LEARNED += [(field, value) for field in foreign_fields.NOT_TRAINED for value in (False, 0, None)]


@mutation("lora/data/foreign_fields.py", "bool(value) != (field in NOT_TRAINED)", "bool(value)", case="masked-True")
@mutation("lora/data/formats.py", "if trained is False:", "if False:", case="loss-False")
@pytest.mark.parametrize(("field", "value"), LEFT_OUT)
def test_an_answer_that_is_masked_is_context_and_a_row_that_is_masked_is_refused(tmp_path, field, value):
    path = written(tmp_path / "a.jsonl", {"messages": [USER, {**ANSWER, field: value}, USER, ANSWER]})
    assert read([path])[0].messages == [USER, {**ANSWER, "train": False}, USER, ANSWER]
    assert f"its {field} leaves nothing to train" in refused(tmp_path, {"messages": PAIR, field: value})
    assert "nothing to train" in refused(tmp_path, {"messages": [USER, {**ANSWER, field: value}]})
    assert "contradict each other" in refused(
        tmp_path, {"messages": PAIR, field: value, "train": field != "train"}
    ) or (field == "train")


@pytest.mark.parametrize(("field", "value"), LEARNED)
def test_a_mask_that_says_yes_changes_nothing_on_an_answer_and_is_refused_on_a_question(tmp_path, field, value):
    for row in ({"messages": PAIR, field: value}, {"messages": [USER, {**ANSWER, field: value}]}):
        assert read([written(tmp_path / "a.jsonl", row)])[0].messages == PAIR
    if value is not None:
        assert "but only answers are learned" in refused(tmp_path, {"messages": [{**USER, field: value}, ANSWER]})


@mutation("lora/data/foreign_fields.py", "or value not in (0, 1):", "or False:")
@pytest.mark.parametrize("field", [*foreign_fields.TRAINED, *foreign_fields.NOT_TRAINED])
@pytest.mark.parametrize("value", [0.5, 2, -1, "false", "0", [0, 1], {}], ids=str)
def test_a_mask_that_is_neither_yes_nor_no_is_refused_by_name(tmp_path, field, value):
    assert f"it has {value!r} as {field}. Write" in refused(tmp_path, {"messages": PAIR, field: value})
    row = {"messages": [USER, {**ANSWER, field: value}]}
    assert f"message 2 has {value!r} as {field}. Write" in refused(tmp_path, row)


def test_two_masks_that_differ_are_refused(tmp_path):
    row = {"messages": [USER, {**ANSWER, "train": True, "weight": 0}]}
    assert "message 2 has train and weight, which contradict each other" in refused(tmp_path, row)
    row = {"messages": [USER, {**ANSWER, "train": False, "weight": 0, "masked": True}, USER, ANSWER]}
    assert read([written(tmp_path / "a.jsonl", row)])[0].messages[1] == {**ANSWER, "train": False}


# ---- good and bad answers --------------------------------------------------------------------------------------------


@mutation("lora/data/foreign_fields.py", "if value is not True:", "if False:")
@pytest.mark.parametrize("field", ["label", "kto_tag", "is_desirable", "desirable"])
@pytest.mark.parametrize(
    "row", [{"prompt": "Hi", "completion": "Hello."}, {"messages": PAIR}, {"q": "Hi", "a": "Hello."}]
)
def test_bad_answers_are_refused_and_good_ones_trained(tmp_path, field, row):
    assert f"it has False as {field}, which marks an answer" in refused(tmp_path, row | {field: False})
    for value in (0, 1, "false", "bad"):
        assert f"as {field}, which is not learned" in refused(tmp_path, row | {field: value})
    assert read([written(tmp_path / "a.jsonl", row | {field: True})])[0].messages == PAIR


PREFERENCES = [
    ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "; or --prompt-key prompt --response-key chosen to"),
    ({"question": "Q", "chosen": "A", "rejected": "B"}, "; or --prompt-key question --response-key chosen to"),
    ({"instruction": "Q", "chosen": "A", "rejected": "B"}, "; or --prompt-key instruction --response-key chosen to"),
    ({"chosen": PAIR, "rejected": PAIR}, "; or write the good answers as"),
    ({"prompt": "Q", "chosen": PAIR, "rejected": PAIR}, "; or write the good answers as"),
    ({"conversations": [USER], "chosen": ANSWER, "rejected": ANSWER}, "; or write the good answers as"),
    ({"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [ANSWER]}, "; or write the"),
    ({"messages": PAIR, "rejected_response": "B"}, "; or remove rejected_response"),
    ({"messages": PAIR, "rejected_messages": PAIR}, "; or remove rejected_messages"),
    ({"prompt": "Q", "completion": "A", "rejected": "B"}, "; or remove rejected to"),
    (
        {"question": "Q", "response_j": "A", "response_k": "B"},
        "; or --prompt-key question --response-key response_j to",
    ),
    ({"input": "Q", "accepted": "A", "rejected": "B"}, "; or --prompt-key input --response-key accepted to"),
    ({"history": "Q", "human_ref_A": "A", "human_ref_B": "B", "labels": 1}, "; or write the good answers as"),
    ({"prompt": "Q", "response_0": "A", "response_1": "B", "better_response_id": 0}, "; or write the good answers as"),
]


@mutation(
    "lora/data/formats.py", 'if why := not used and pairs.refused_as("conversation", value):', "if False:", case="0"
)
@mutation("lora/data/pairs.py", "(key for key in PROMPTS if isinstance(row.get(key), str))", "iter(PROMPTS)", case="1")
@mutation("lora/data/pairs.py", "if not (fields or pair):", "if not fields:", case="10")
@pytest.mark.parametrize(("row", "fix"), PREFERENCES, ids=map(str, range(len(PREFERENCES))))
def test_a_preference_row_is_named_with_what_helps_for_its_own_keys(tmp_path, row, fix):
    problem = refused(tmp_path, row)
    assert "a preference row (" in problem and fix in problem
    assert "Give --method dpo, or --method reward to train a reward model; or " in problem
    if fix.startswith("; or --prompt-key"):
        *_, key, _, answer, _ = fix.split()
        assert texts_of(tmp_path, row, keys=(key, answer)) == ["Q", "A"]


# ---- what a model of text cannot learn -------------------------------------------------------------------------------

BESIDE = {
    "tools": [{"type": "function"}], "functions": [{}], "images": ["a.png"], "image": "a.png", "videos": ["a.mp4"],
    "audios": ["a.wav"], "audio": {"path": "a.wav"}, "objects": {"bbox": []}, "input_ids": [1], "labels": [1],
    "chat_template_kwargs": {"enable_thinking": False}, "enable_thinking": False, "documents": ["d"], "mask": "User",
    "reasoning": "Because.", "thinking": "Because.", "reasoning_content": "Because.", "cot": "Because.",
    "image_url": "u", "video_paths": ["v"], "preference": "rejected", "chosen": "x", "rejected_x": "x",
    "history": [["a", "b"]], "input": "x", "context": "x", "query": "x",
}  # fmt: skip


@mutation(
    "lora/data/foreign_fields.py", "(field in OF_A_ROW or MEDIA.fullmatch(field)) and", "False and", case="images"
)
@mutation("lora/data/foreign_fields.py", "if field in THOUGHTS:", "if False:", case="reasoning")
@pytest.mark.parametrize("field", BESIDE)
def test_what_would_not_be_learned_beside_a_row_is_refused_by_name(tmp_path, field):
    for row in ({"messages": PAIR}, {"question": "Q", "answer": "A"}, {"text": "T"}):
        if "messages" in row or field not in ("history", "input", "context", "query"):
            assert field in refused(tmp_path, row | {field: BESIDE[field]})
    for nothing in (None, "", [], {}):
        assert read([written(tmp_path / "a.jsonl", {"messages": PAIR, field: nothing})])


def test_tools_that_are_an_empty_list_as_json_are_none(tmp_path):
    assert texts_of(tmp_path, {"messages": PAIR, "tools": "[]"}) == ["Hi", "Hello."]
    assert "it has tools" in refused(tmp_path, {"messages": PAIR, "tools": '[{"name": "f"}]'})


@mutation("lora/data/formats.py", "if why := foreign_fields.refused_in_message(message, name):", "if False:")
@pytest.mark.parametrize("field", ["tool_calls", "function_call", "images", "audio", "refusal", "train_detail"])
def test_what_would_not_be_learned_in_a_message_is_refused_by_name(tmp_path, field):
    row = {"messages": [USER, {**ANSWER, field: [{"a": 1}]}]}
    assert f"message 2 has {field}, " in refused(tmp_path, row)
    assert texts_of(tmp_path, {"messages": [USER, {**ANSWER, field: None}]}) == ["Hi", "Hello."]


def test_keys_that_are_named_are_read_whatever_other_tools_call_so(tmp_path):
    row = {"problem": "Q", "reasoning": "A", "solution": "no"}
    assert texts_of(tmp_path, row, keys=("problem", "reasoning")) == ["Q", "A"]
    assert "it has False as label" in refused(tmp_path, row | {"label": False}, keys=("problem", "reasoning"))


# ---- thoughts --------------------------------------------------------------------------------------------------------


@mutation("lora/data/formats.py", 'return {"reasoning_content": text} if text else {}', "return {}")
@pytest.mark.parametrize("field", foreign_fields.THOUGHTS)
def test_thoughts_of_an_answer_are_kept_under_one_name(tmp_path, field):
    row = {"messages": [USER, {**ANSWER, field: "Hm."}]}
    [found] = read([written(tmp_path / "a.jsonl", row)])
    assert found.messages == [USER, {**ANSWER, "reasoning_content": "Hm."}]
    assert "only answers are learned" in refused(tmp_path, {"messages": [{**USER, field: "Hm."}, ANSWER]})
    assert f"message 2 has list as {field}, expected text" in refused(
        tmp_path, {"messages": [USER, {**ANSWER, field: ["Hm."]}]}
    )
    raw = json.dumps({"messages": [USER, {**ANSWER, field: "\ud800"}]}).encode()
    assert "half a surrogate pair" in problems_of(written(tmp_path / "b.jsonl", raw=raw))[0]


def test_thoughts_under_two_names_are_one_or_refused(tmp_path):
    row = {"messages": [USER, {**ANSWER, "reasoning": "Hm.", "reasoning_content": "Hm."}]}
    [found] = read([written(tmp_path / "a.jsonl", row)])
    assert found.messages[1] == {**ANSWER, "reasoning_content": "Hm."}
    row["messages"][1]["thinking"] = "Ah."
    assert "which differ" in refused(tmp_path, row)


THINKING = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@mutation("lora/text/guard.py", 'if key != "train"}', 'if key in ("role", "content")}')
def test_thoughts_are_trained_where_the_template_writes_them_and_refused_where_it_does_not(tmp_path):
    """A control token that they spell is text, as in the answer."""
    row = {"messages": [USER, {**ANSWER, "thinking": "Hm <|im_end|>."}]}
    rows = read([written(tmp_path / "a.jsonl", row)])
    chat = Chat(byte_level(), ChatTemplate(THINKING, BEGIN, "here"), [0])
    [example] = encode(rows, chat, 1000)
    trained = [token for token, yes in zip(example.tokens, example.trained, strict=True) if yes]
    assert chat.tokenizer.decode(trained) == "<think>Hm <|im_end|>.</think>Hello."
    assert trained.count(chat.end_of_turn) == 1 and trained[-1] == chat.end_of_turn
    with pytest.raises(BadInput, match=r"a\.jsonl:1: chat template in .*never reads reasoning_content of a message"):
        encode(rows, chat_of("chatml"), 1000)


# ---- conversations that begin with an answer -------------------------------------------------------------------------

LED = [{"from": "gpt", "value": "I am here."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]


@mutation("lora/data/formats.py", 'if not (leads and leading == "drop"):', "if True:")
@mutation("lora/data/formats.py", '({"train": False} if leads else {})', "{}")
@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["bare", "system"])
def test_a_leading_answer_is_an_error_dropped_or_context_as_asked(tmp_path, system):
    turns = [*({"from": "system", "value": turn["content"]} for turn in system), *LED]
    for row, shape in (({"conversations": turns}, "conversations"),
                       ({"messages": [*system, {**ANSWER, "content": "I am here."}, *PAIR]}, "messages")):  # fmt: skip
        path = written(tmp_path / "b.jsonl", row)
        assert "--leading-answers drop or keep" in refused(tmp_path, row)
        [dropped] = read([path], leading="drop")
        assert dropped.messages == [*system, *PAIR] and dropped.shape == f"{shape}, leading answers dropped"
        [kept] = read([path], leading="keep")
        first = {"role": "assistant", "content": "I am here.", "train": False}
        assert kept.messages == [*system, first, *PAIR] and kept.shape == f"{shape}, leading answers not trained"


def test_nothing_is_left_of_a_conversation_that_is_only_a_leading_answer(tmp_path):
    for leading in ("drop", "keep"):
        assert "nothing to train" in refused(tmp_path, {"conversations": LED[:1]}, leading=leading)
    [found] = read([written(tmp_path / "a.jsonl", {"conversations": [LED[0], *LED]})], leading="drop")
    assert found.messages == PAIR
    assert "Let user and assistant alternate" in refused(tmp_path, {"conversations": [LED[0], *LED]}, leading="keep")
    [found] = read([written(tmp_path / "a.jsonl", {"messages": PAIR})], leading="drop")
    assert found.shape == "messages"


# ---- what --check says -----------------------------------------------------------------------------------------------


@mutation("lora/data/foreign_fields.py", "if field not in KNOWN and not says_nothing(m[field])", "if False")
@mutation("lora/data/foreign_fields.py", "for field in JUDGED if", "for field in () if")
def test_check_names_fields_that_nothing_reads_with_their_count(tmp_path, capsys):
    rows = []
    for i in range(3):
        answer = {**ANSWER, "content": f"{i * 7919} x", "citations": ["a"] if i < 2 else [], "thinking": "Hm."}
        rows.append(
            {"messages": [{**USER, "content": f"Question {i}", "name": "Ann", "id": None}, answer], "reward": i}
        )
    path = written(tmp_path / "a.jsonl", *rows)
    assert lint_report(TrainSettings.resolve(["--data", str(path), "--check"], ""), lambda name: path) == 2
    found = [line for line in capsys.readouterr().out.splitlines() if ": FIELD: " in line]
    what = "which is not learned. Remove it, put it into the content, or leave out rows by it"
    expected = ((2, "citations"), (3, "name"), (3, "reward"))
    assert found == [f'{path}:1: FIELD: {n} rows with "{field}", {what}' for n, field in expected]


def test_problems_are_those_of_the_rows_alone(tmp_path):
    assert problems_of(written(tmp_path / "a.jsonl", {"messages": PAIR}, {"messages": PAIR, "label": False}))
