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
ADD = [{"role": "user", "content": "Hi\n1 2"}]


def one(path, row, kind="pair", **how) -> Conversation:
    [found] = read([written(path / "a.jsonl", row)], kind=kind, **how)
    return found


def refused(path, row, kind="pair", **how) -> str:
    with pytest.raises(BadInput) as raised:
        read([written(path / "a.jsonl", {"irrelevant": 1}, row)], kind=kind, **how)
    first, problem = raised.value.problems
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
    "UltraFeedback binarized": ({"prompt": "Hi", "prompt_id": "x", **WHOLE, "messages": PAIR, "score_chosen": 9.0,
                                 "score_rejected": 2.0}, []),
    "UltraFeedback with a system turn": ({"prompt": "Hi", "chosen": [SYSTEM, *PAIR], "rejected": [SYSTEM, *BAD]},
                                         [SYSTEM]),
    "lists beside the messages of the chosen one": ({"messages": PAIR, **WHOLE}, []),
    "lists that hold the prompt's turns": ({"prompt": [*EARLIER, USER], "chosen": [*EARLIER, *PAIR],
                                            "rejected": [*EARLIER, *BAD]}, CONTEXT),
    "lists that hold the prompt's turns but its system turn": ({"prompt": [SYSTEM, USER], **WHOLE}, [SYSTEM]),
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


@mutation("lora/data/pairs.py", 'BETTER = {"human_ref_A": ("labels", (1, 0))', 'BETTER = {"human_ref_A": ("labels", (0, 1))', case="SHP, A")  # fmt: skip
@mutation("lora/data/pairs.py", '("better_response_id", (0, 1))}', '("better_response_id", (1, 0))}', case="PKU, 1")
@mutation("lora/data/pairs.py", "return [*system, *after]", "return after", case="lists that hold the prompt's turns but its system turn")  # fmt: skip
@mutation("lora/data/pairs.py", 'if place < same and turn["role"]', 'if False and turn["role"]', case="HH-RLHF")
@mutation("lora/data/pairs.py", "_text_of(asked[0]) == _text_of(again[0])", "False", case="lists beside the messages of the chosen one")
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
