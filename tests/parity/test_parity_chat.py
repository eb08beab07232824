"""Templates with switches, and templates that prompt otherwise than they write: ids beside transformers' own."""

import os

import pytest

from lora.text.chat import Chat
from lora.text.template import ChatTemplate
from tests.text.test_answers import EMPTY, KINDS, NAMES, OPENS, SWITCH, THOUGHT
from tests.text.test_guard import PHI, stripping
from tests.text.test_template import byte_level, turns

if os.environ.get("LORA_PARITY") == "1":
    import transformers
else:
    transformers = pytest.importorskip("transformers")


def both(source: str, arguments: dict, tokenizer=None):
    tokenizer = tokenizer or byte_level(lines=source == EMPTY)  # GPT-2's own would be cut behind two line ends
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._fast, chat_template=source, **NAMES)
    return Chat(tokenizer, ChatTemplate(source, NAMES, "here", arguments=arguments), [0]), reference


def ids_of(reference, messages, generate: bool, **arguments) -> list[int]:
    how = {"add_generation_prompt": generate, "tokenize": True, "return_dict": False}
    return reference.apply_chat_template(messages, **how, **arguments)


TALKS = [turns("Hi", "Hello."), turns("Hi", "Hello.", "And?", "No."), turns("Hi", THOUGHT + "Hello.", "And?", "No.")]


@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_before_every_answer_are_the_generation_prompt_of_transformers(kind):
    source, arguments = KINDS[kind]
    ours, reference = both(source, arguments)
    for messages in TALKS:
        places = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        found = [part.tokens[:begin] for part in ours.tokenize(messages) for begin, _ in part.answers]
        assert found == [ids_of(reference, messages[:i], True, **arguments) for i in places]


@pytest.mark.parametrize("source", [SWITCH, EMPTY, PHI], ids=["switch", "empty", "stripping"])
def test_where_the_whole_begins_with_its_prompt_ids_are_those_of_transformers(source):
    ours, reference = both(source, {}, stripping(rstrip=True) if source == PHI else None)
    for messages in TALKS[:2]:
        [part] = ours.tokenize(messages)
        assert part.tokens == ids_of(reference, messages, False) and ours.joined == ours.cuts == 0


def test_an_example_that_is_put_together_ends_as_the_whole_of_transformers():
    ours, reference = both(OPENS, {})
    for messages in TALKS:
        [part] = ours.tokenize(messages, "last")
        [(begin, _)] = part.answers
        theirs = ids_of(reference, messages, False)
        assert part.tokens[begin:] == theirs[-len(part.tokens[begin:]) :] and ours.joined
