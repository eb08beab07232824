"""Answers that a template writes otherwise than it prompts for them, and answers of which it leaves something out."""

import re

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lora.errors import BadInput
from lora.text.chat import Chat
from lora.text.left_out import left_out
from lora.text.template import ChatTemplate
from tests import cli
from tests.mutation import mutation
from tests.scripts.test_commands import ok
from tests.text.test_template import (
    CALM,
    CHATML,
    DATED,
    DEEPSEEK,
    LLAMA2,
    LLAMA3,
    MISTRAL,
    QWEN3,
    SPELLED,
    TEXT,
    byte_level,
    conversations,
    plain_ids,
    runs,
    turns,
)

# ---- short templates of the kinds that public models have ------------------------------------------------------------

ASK = "<｜User｜>Hi<｜Assistant｜>"
END = "<｜end▁of▁sentence｜>"
OPENS = (  # its prompt opens a thought, its whole has none (as R1's distilled models have it)
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "{{ '<｜User｜>' + m.content }}{% else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
LATE = (  # the system turn stands in the last turn, if that is a question (as in Mistral v0.3)
    "{% set system = messages[0].content if messages[0].role == 'system' else none %}"
    "{% set rest = messages[1:] if system else messages %}{{ bos_token }}{% for m in rest %}"
    "{% if m.role == 'user' %}{% set first = system + '\n\n' if loop.last and system else '' %}"
    "{{ '[INST] ' + first + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
SWITCH = (  # a switch decides how the prompt ends (as in DeepSeek V3.1)
    "{% set thinking = thinking | default(false) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<｜User｜>' + m.content }}{% else %}{{ '<｜Assistant｜></think>' }}"
    "{{ m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{% endif %}"
)
EMPTY = (  # a thought that is empty already ends the prompt (as in Qwen3 with enable_thinking=false)
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and '</think>' not in m.content %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)
NAMES = {"bos_token": "<s>", "eos_token": END}
KINDS = {
    "opens": (OPENS, {}),
    "late system": (LATE, {}),
    "switch on": (SWITCH, {"thinking": True}),
    "switch off": (SWITCH, {}),
    "empty": (EMPTY, {}),
}
THOUGHT = "<think>\nHm.\n</think>\n\n"


def chat_of(kind: str) -> Chat:
    source, arguments = KINDS[kind]
    return Chat(byte_level(), ChatTemplate(source, NAMES, "here", arguments=arguments), [0])


def examples(chat: Chat, messages, train_on: str = "assistant") -> list[tuple[list[int], list[int]]]:
    """(ids before the answer, ids of the answer) of each example."""
    found = [part.example() for part in chat.tokenize(messages, train_on)]
    spans = [(tokens, *runs(trained)) for tokens, trained in found]
    return [(tokens[:begin], tokens[begin:end]) for tokens, (begin, end) in spans]


CASES = [  # kind, answer, the prompt, what is trained
    ("opens", "Hello.", ASK + "<think>\n", "Hello." + END),
    ("opens", THOUGHT + "Hello.", ASK + "<think>\n", "Hm.\n</think>\n\nHello." + END),
    ("opens", "<think>Hm.</think>Hello.", ASK + "<think>\n", "Hm.</think>Hello." + END),
    ("opens", "Hm.\n</think>\n\nHello.", ASK + "<think>\n", "Hm.\n</think>\n\nHello." + END),
    ("late system", " Hello. ", "<s>[INST] Hi[/INST]", " Hello." + END),
    ("switch on", "Hello.", ASK + "<think>", "</think>Hello." + END),
    ("switch on", THOUGHT + "Hello.", ASK + "<think>", "\nHm.\n</think>\n\nHello." + END),
    ("switch off", "Hello.", ASK + "</think>", "Hello." + END),
    ("empty", "Hello.", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
     "Hello.<|im_end|>"),
    ("empty", THOUGHT + "Hello.", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
     "Hello.<|im_end|>"),
]  # fmt: skip


@mutation("lora/text/template.py", "given = self.tokens | self.arguments", "given = self.tokens", case="5")
@mutation("lora/text/thoughts.py", "return answer if _closing(opened) in answer else None", "return None", case="3")
@mutation("lora/text/thoughts.py", "text.startswith(opened[0]) else tag", "True else tag", case="2")
@mutation("lora/text/thoughts.py", "if text.startswith(tag):", "if False:", case="1")
@mutation("lora/text/thoughts.py", '[2].lstrip("\\n") if empty else answer', "[2] if None else answer", case="9")
@mutation("lora/text/answers.py", 'common = common[: 1 + max(common.rfind(c) for c in ">]:\\n ")]', "pass", case="5")
@pytest.mark.parametrize(("kind", "answer", "prompt", "trained"), CASES, ids=range(len(CASES)))
def test_an_answer_follows_the_generation_prompt_and_what_that_has_opened_is_not_written_twice(
    kind, answer, prompt, trained
):
    [(before, said)] = examples(chat_of(kind), turns("Hi", answer))
    assert before == plain_ids(prompt) == chat_of(kind).prompt(turns("Hi"))
    assert said == plain_ids(trained)


@mutation("lora/text/answers.py", "text = self._join(guarded[: i + 1], guard, answers.index(i) + 1)", "pass")
def test_a_system_turn_that_moves_to_the_last_question_stands_before_each_answer_as_in_generation():
    messages = turns("Hi", "Hello.", "And?", "No.", system="Be brief.")
    chat = chat_of("late system")
    first, second = examples(chat, messages)
    assert first == (plain_ids("<s>[INST] Be brief.\n\nHi[/INST]"), plain_ids(" Hello." + END))
    before = plain_ids("<s>[INST] Hi[/INST] Hello." + END + "[INST] Be brief.\n\nAnd?[/INST]")
    assert second == (before, plain_ids(" No." + END)) and before == chat.prompt(messages[:4])
    assert chat.joined == 2
    [whole] = chat.tokenize(messages[1:])  # in one, without the system turn
    assert len(whole.answers) == 2 and chat.joined == 2


@mutation("lora/text/answers.py", "not written.startswith(prompted) and", "")
def test_a_thought_beside_an_answer_is_kept_where_only_the_turns_before_are_written_otherwise():
    source = LATE.replace(
        "m.content | trim", "('(' + m.reasoning_content + ')' if m.reasoning_content else '') + m.content"
    )
    chat = Chat(byte_level(), ChatTemplate(source, NAMES, "here"), [0])
    messages = turns("Hi", "Hello.", "And?", "No.", system="Be brief.")
    messages[4]["reasoning_content"] = "Hm."
    assert [said for _, said in examples(chat, messages)] == [plain_ids(" Hello." + END), plain_ids(" (Hm.)No." + END)]
    assert chat.joined == 2


@mutation("lora/text/answers.py", "answers = [*prompt.answers, self._answer(", "answers = [self._answer(")
def test_an_earlier_answer_is_cut_from_its_prompt_as_in_generation_where_a_later_one_is_put_together():
    messages = turns("Hi", "Hello.", "And?", THOUGHT + "No.")
    chat = chat_of("empty")
    assert chat.tokenize(messages[:2])[0].answers and chat.cuts  # the tokenizer takes the last line end to the answer
    [_, (before, said)] = examples(chat, messages)
    assert before == chat.prompt(messages[:3]) and said == plain_ids("No.<|im_end|>") and chat.joined == 1


@pytest.mark.parametrize("kind", KINDS)
@hypothesis_settings(max_examples=60, **CALM)
@given(messages=conversations(st.one_of(TEXT, SPELLED, TEXT.map(lambda text: f"<think>{text}</think>x{text}"))))
def test_whatever_is_said_the_ids_before_an_answer_are_the_prompt_and_it_ends_with_its_end_of_turn(kind, messages):
    chat = chat_of(kind)
    messages = messages if kind in ("opens", "late system") else [m for m in messages if m["role"] != "system"]
    places = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    found = [(part.tokens, span) for part in chat.tokenize(messages) for span in part.answers]
    assert len(found) == len(places)
    for place, (tokens, (begin, end)) in zip(places, found, strict=True):
        assert tokens[:begin] == chat.prompt(messages[:place])
        ids, controls = tokens[begin:end], set(chat.tokenizer.control.values())
        assert [i for i in ids if i in controls] == [chat.end_of_turn] == ids[-1:]
        answer = messages[place]["content"]
        rest = "".join(answer.rpartition("</think>")[2].split())
        assert rest in "".join(chat.tokenizer.decode(tokens[:end]).split())


def test_examples_that_are_put_together_and_thoughts_that_stay_open_are_counted():
    chat = chat_of("opens")
    chat.tokenize(turns("Hi", THOUGHT + "Hello.", "And?", "No."))
    assert (chat.joined, chat.unclosed) == (2, 1)
    chat.tokenize(turns("Hi", THOUGHT + "Hello."), "all")  # every token of the whole, as it is
    assert chat.joined == 2 and chat_of("switch off").joined == 0


@mutation("lora/text/answers.py", "if not found:", "if False:")
def test_a_template_that_does_not_write_an_answer_is_refused_for_training_and_can_be_talked_to():
    deaf = "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>' + m.content }}{% endif %}{% endfor %}" + (
        "{% if add_generation_prompt %}[A]{% endif %}"
    )
    chat = Chat(byte_level(), ChatTemplate(deaf, where="here"), [0])
    for train_on in ("assistant", "last"):
        with pytest.raises(BadInput, match=r"chat template in here: it does not write answer [12]"):
            chat.tokenize(turns("Hello", "Hello.", "More", "No."), train_on)
    assert chat.prompt(turns("Hi")) == plain_ids("<s>Hi[A]")


@mutation("lora/text/answers.py", "if place and not written.strip():", "if False:")
def test_a_template_that_writes_nothing_but_its_end_of_turn_for_an_answer_is_refused():
    blind = CHATML.replace("m.content", "(m.content if m.role == 'user' else '')")
    with pytest.raises(BadInput, match="chat template in here: it writes nothing for answer 1"):
        Chat(byte_level(), ChatTemplate(blind, where="here"), [0]).tokenize(turns("Hello", "Hello."))


@mutation("lora/text/answers.py", "except BadInput:  # the template takes", "except ValueError:  # the template takes")
def test_a_beginning_that_the_template_refuses_does_not_stop_a_row_that_it_takes():
    strict = "{% if messages[-1].role == 'assistant' and messages|length == 1 %}{{ raise_exception('A lone answer') }}"
    chat = Chat(byte_level(), ChatTemplate(strict + "{% endif %}" + CHATML, where="here"), [0])
    messages = [{"role": "assistant", "content": "Hi!", "train": False}, *turns("Hi", "Hello.")]
    [part] = chat.tokenize(messages)
    [(begin, end)] = part.answers
    assert chat.tokenizer.decode(part.tokens[:begin]) == "assistant\nHi!\nuser\nHi\nassistant\n"
    assert part.tokens[begin:end] == plain_ids("Hello.<|im_end|>")
    with pytest.raises(BadInput, match=r"here: it writes no prompt for an answer without a turn before it\."):
        Chat(byte_level(), ChatTemplate(DATED, where="here"), [0]).tokenize([messages[0] | {"train": True}])


# ---- what a template leaves out --------------------------------------------------------------------------------------


def missing(source: str, *texts: str, arguments=None, **tokens) -> list[str]:
    chat = Chat(byte_level(), ChatTemplate(source, NAMES | tokens, "here", arguments=arguments), [0])
    return [text for part in chat.tokenize(turns(*texts)) for text in part.missing]


@mutation("lora/text/left_out.py", "last = alike(words[first:][::-1], there[first:][::-1])", "last = 0")
@mutation("lora/text/answers.py", 'sub(" ", text.text[begin:end])', 'sub("x", text.text[begin:end])')
def test_a_thought_that_the_template_cuts_out_of_an_answer_is_named():
    assert missing(DEEPSEEK, "Hi", THOUGHT + "Hello.") == ["<think> Hm. </think>"]
    assert (
        missing(DEEPSEEK, "Hi", THOUGHT + "Hello.", "And?", "No.", "So?", THOUGHT + "Yes.")
        == ["<think> Hm. </think>"] * 2
    )
    assert missing(DEEPSEEK, "Hi", "Hm <|im_end|>.</think> Hello.") == ["Hm <|im_end|>.</think>"]
    assert missing(CHATML.replace("m.content", "m.content.replace('bad', '***')"), "Hi", "A bad word.") == ["bad"]
    assert missing(CHATML.replace("m.content", "m.content[:5]"), "Hi", "Hello world.") == ["Hello world."[6:]]
    assert missing(EMPTY, "Hi", THOUGHT + "Hello.") == ["<think> Hm. </think>"]


MARKS = "{% for m in messages %}{{ ('Q: ' if m.role == 'user' else 'A: ') + m.content.removeprefix('A: ') + '\n' }}"
MARKS += "{% endfor %}{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"


@mutation("lora/text/left_out.py", "if wanted in start[max(0, len(start) - len(wanted) + 1) :] + _letters(written):",
          "if wanted in _letters(written):")  # fmt: skip
@mutation("lora/text/left_out.py", 'return "".join(text.split())', "return text")
@pytest.mark.parametrize("source", [CHATML, LLAMA2, LLAMA3, MISTRAL, QWEN3, OPENS, LATE, MARKS], ids=range(8))
@pytest.mark.parametrize(
    "answer",
    [
        "Hello.",
        "  Hello.\n\nMore.  ",
        "A: Hello.",
        THOUGHT + "Hello.",
        "<think>Hm.</think>Hello.",
        "A <s> b <|im_end|>",
    ],
)
def test_what_a_template_trims_or_writes_round_an_answer_is_nothing_left_out(source, answer):
    assert missing(source, "Hi", answer) == []


@hypothesis_settings(max_examples=200, **CALM)
@given(st.text(max_size=30), st.text(max_size=30), st.text(max_size=30))
def test_text_that_is_written_whole_is_never_left_out(before, text, behind):
    assert left_out(text, before, text + behind) == ""
    assert left_out(text, before + text[:5], text[5:] + behind) == "" or not text[5:].split()


@mutation("lora/data/encode.py", "self.first_missing = where, chat.missing[0]", "pass")
def test_a_run_tells_what_is_missing_where_and_that_examples_are_put_together(tmp_path):
    base = cli.write_model(tmp_path / "model")
    (base / "chat_template.jinja").write_text(DEEPSEEK.replace("<｜", "<|").replace("｜>", "|>"))
    pair = [("user", "Hi"), ("assistant", "Hello.")], [("user", "Hi!"), ("assistant", THOUGHT + "Hello.")]
    (tmp_path / "data.jsonl").write_text(cli.rows([*pair, pair[1]]))
    done = cli.train("out", "--max-steps", 1, cwd=tmp_path, model=base, data="data.jsonl")
    ok(done)
    said = "the first is data.jsonl:2, without: <think> Hm. </think>\n"
    assert f"note     2 answers are trained without what the template leaves out of them; {said}" in done.err
    (base / "chat_template.jinja").write_text(OPENS)
    done = cli.train("out2", "--max-steps", 1, cwd=tmp_path, model=base, data="data.jsonl")
    ok(done)
    assert len(re.findall(r"note     3 examples are put together, prompt and answer", done.err)) == 1
    assert "note     1 of these answers stand in the thought that the prompt opens" in done.err
    assert "leaves out" not in done.err
    assert ok(cli.ask("--adapter", "out2", "--prompt", "Hi", cwd=tmp_path)) is not None
