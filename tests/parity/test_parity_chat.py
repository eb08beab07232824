"""Templates with switches, and templates that prompt otherwise than they write: ids beside transformers' own.

Those of public families are retold in tests/text/public_templates.py. The real files that trl has are read from there,
and with LORA_TEMPLATES=FOLDER every *.jinja in a folder (llama.cpp's models/templates, say).
"""

import importlib.util
import os
import random
import re
from datetime import date
from pathlib import Path

import pytest

from lora.errors import BadInput
from lora.text.chat import Chat
from lora.text.template import ChatTemplate
from lora.text.tokenizer import Tokenizer
from tests.text import public_templates
from tests.text.public_templates import OFF, ON, PUBLIC, Public
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


# ---- public templates, retold and real -------------------------------------------------------------------------------

GEMMA, LFM = ("<bos>", "<eos>"), ("<|startoftext|>", "<|im_end|>")
QWEN, DEEPSEEK = public_templates.CHATML, public_templates.DEEPSEEK
REAL = {  # of trl/chat_templates: bos_token, eos_token, and what their switches are set to
    **dict.fromkeys(("qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_8", "qwen3_6"), (*QWEN, [{}, ON, OFF])),
    **dict.fromkeys(("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5"), (*GEMMA, [{}, ON])),
    **dict.fromkeys(("lfm2", "lfm2_v2", "lfm2_2_5", "lfm2_2_5_v2"), (*LFM, [{}])),
    "phi3_5": ("<|endoftext|>", "<|endoftext|>", [{}]), "deepseek_r1_distill": (*DEEPSEEK, [{}]),
    "qwen2_5": (*QWEN, [{}]), "qwen3_instruct_2507": (*QWEN, [{}]),
}  # fmt: skip
SWITCHES = [{}, ON, OFF, {"thinking": True}, {"thinking_budget": 0}, {"thinking_budget": 512},
            {"preserve_thinking": True}, {"keep_past_thinking": True}, {"reasoning_effort": "low"}]  # fmt: skip
ENDS = ("<|im_end|>", "<turn|>", "</s>", "<|end_of_text|>", "<seed:eos>", "[|endofturn|]", "<｜end▁of▁sentence｜>")
SPELLED = re.compile(
    r"<\|[\w\" -]{1,30}\|>|<｜[^<>｜']{1,40}｜>|\[\|\w+\|\]|\[/?[A-Z_]{3,}\]|</?seed:\w+>|<\|\w+>|<\w+\|>|</s>|<s>"
)


def real_templates() -> dict[str, Public]:
    spec, found = importlib.util.find_spec("trl"), {}
    beside = Path(spec.origin).parent / "chat_templates" if spec and spec.origin else Path("nowhere")
    for name, (bos, eos, variants) in REAL.items():
        if (path := beside / f"{name}.jinja").exists():
            source = path.read_text()
            found |= {f"{name} {arguments}": Public(source, bos, eos, arguments) for arguments in variants}
    folder = os.environ.get("LORA_TEMPLATES", "")
    for path in sorted(Path(folder).glob("*.jinja")) if folder else ():
        source = path.read_text()
        eos = next((end for end in ENDS if end in source), "<|endoftext|>")
        variants = [arguments for arguments in SWITCHES if arguments.keys() <= ChatTemplate(source).switches]
        found |= {f"{path.stem} {arguments}": Public(source, "<s>", eos, arguments) for arguments in variants}
    return found


ALL = PUBLIC | real_templates()


def test_real_templates_are_there_to_be_compared():
    assert os.environ.get("LORA_PARITY") != "1" or len(ALL) >= len(PUBLIC) + 30


def random_talks(count: int) -> list[list[dict]]:
    """Conversations of one to three turns, with thoughts or none, system turns or none or empty ones."""
    draw = random.Random(7)
    words = ["a", "Hello", " ", "\n", "\n\n", "The quick", "日本", "👩‍🚀", "é", "0", "'s", "<", "|>", "[", "]", "</"]

    def text(thought: bool = False) -> str:
        said = "".join(draw.choices(words, k=draw.randint(1, 6)))
        return (THOUGHT if thought and draw.random() < 0.3 else "") + (said if said.strip() else "x" + said)

    return [
        turns(*(text(i % 2 == 1) for i in range(2 * draw.randint(1, 3))), system=draw.choice([None, None, "", text()]))
        for _ in range(count)
    ]


def public_pair(public: Public):
    """Our chat with a template, what transformers makes of it, and the tokenizer of both."""
    source, bos, eos, arguments = public
    spelled = [*public_templates.CONTROL, *SPELLED.findall(source)]
    ours = Tokenizer(public_templates.tokenizer_json(tuple(dict.fromkeys([bos, eos, *spelled]))))
    names = {"bos_token": bos, "eos_token": eos}
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=ours._fast, chat_template=source, **names)
    template = ChatTemplate(source, names, "here", date.today(), arguments)
    return Chat(ours, template, [ours.id(eos)]), reference


def rendered(render, *given) -> str | None:
    """What is rendered; None where it is refused."""
    try:
        return render(*given)
    except Exception:
        return None


TALKED = [*TALKS, turns("Hi ", " Hello. ", "And? ", "No.\n", system=" S "), turns("Hi", "Hello.", system=""),
          *random_talks(25)]  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_a_public_template_writes_what_transformers_writes_and_answers_follow_its_prompts(name):
    try:
        ours, reference = public_pair(ALL[name])
    except BadInput as error:  # made for other programs: it loops over the tools that nobody gave
        assert (
            re.search("not iterable|undefined", str(error))
            and rendered(public_reference(ALL[name]), turns("Hi")) is None
        )
        return
    arguments = ALL[name].arguments

    def theirs(messages, generate=False):
        return reference.apply_chat_template(messages, add_generation_prompt=generate, tokenize=False, **arguments)

    spell = ours.tokenizer.spell
    for messages in TALKED:
        for count in range(1, len(messages) + 1):
            for generate in (False, True):
                wanted = rendered(theirs, messages[:count], generate)
                assert rendered(ours.template.render, messages[:count], generate) == wanted
        if rendered(theirs, messages) is None:
            continue
        before, read = ours.cuts, [*ours._renderer._as_read(messages)]
        whole = ids_of(reference, read, False, **arguments)
        places = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        parts = ours.tokenize(messages)
        found = [(part, *span) for part in parts for span in part.answers]
        assert len(found) == len(places)
        if whole.count(ours.end_of_turn) < len(places):
            continue  # the template writes no end of turn, and each answer is given one
        for place, (part, begin, end) in zip(places, found, strict=True):
            prompt = ids_of(reference, read[:place], True, **arguments)
            assert spell(part.tokens[:begin]) == spell(prompt)
            assert ours.cuts > before or part.tokens[:begin] == prompt
            assert part.tokens[end - 1] == ours.end_of_turn
        if len(parts) == 1:
            assert ours.cuts > before or ours.joined or parts[0].tokens == whole


def public_reference(public: Public):
    names = {"bos_token": public.bos, "eos_token": public.eos}
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_level()._fast, chat_template=public.source, **names
    )
    return lambda messages: reference.apply_chat_template(messages, tokenize=False, **public.arguments)


@pytest.mark.parametrize(
    "name", ["ministral3", "lfm2_5", "qwen3_5", "gemma4", "seed_oss", *(n for n in ALL if "lfm2_2_5" in n)]
)
def test_a_thought_beside_an_answer_is_written_as_transformers_writes_it(name):
    ours, reference = public_pair(ALL[name])
    question, answer = turns("Hi", "Hello.")
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Hello."}]
    told = {**answer, "content": parts} if name == "ministral3" else {**answer, "reasoning_content": "Hm."}
    [part] = ours.tokenize([question, {**answer, "reasoning_content": "Hm."}])
    theirs = ids_of(reference, [question, told], False, **ALL[name].arguments)
    assert ours.tokenizer.spell(part.tokens) == ours.tokenizer.spell(theirs) and "Hm." in ours.tokenizer.spell(theirs)


@pytest.mark.parametrize("name", ["gemma4", "lfm2_5", "minicpm5", "ministral3", "hunyuan"])
def test_a_bos_that_template_and_tokenizer_both_put_is_written_once_as_in_transformers(name):
    from tests.text.test_public_templates import with_bos

    source, bos, eos, arguments = PUBLIC[name]
    tokenizer, names = with_bos(name), {"bos_token": bos, "eos_token": eos}
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._fast, chat_template=source, **names)
    ours = Chat(tokenizer, ChatTemplate(source, names), [tokenizer.id(eos)])
    theirs = ids_of(reference, turns("Hi", "Hello."), False, **arguments)
    assert ours.tokenize(turns("Hi", "Hello."))[0].tokens == theirs and theirs.count(tokenizer.id(bos)) == 1
