"""The chats of public model families, retold: prompts, what is trained, ends of turn, switches, thoughts.

Beside the real templates, and transformers, in tests/parity/test_parity_chat.py.
"""

import json
import re

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lora.errors import BadInput
from lora.pretrained.chat import load_chat
from lora.pretrained.folder import ModelFiles
from lora.pretrained.spoken import Spoken
from lora.text.chat import Chat
from lora.text.template import ChatTemplate
from lora.text.tokenizer import Tokenizer
from tests.mutation import mutation
from tests.text.public_templates import CONTROL, PUBLIC, chat, tokenizer, tokenizer_json
from tests.text.test_template import CALM, SPELLED, TEXT, conversations, turns

# Of "Hi": the prompt. Of "Hello.": what is trained. With the thought "Hm." beside it: what is trained; None: refused.
# How many examples two turns are.
QUESTION = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
CASES = {
    "qwen3_5": (QUESTION + "<think>\n", "\n</think>\n\nHello.<|im_end|>", "Hm.\n</think>\n\nHello.<|im_end|>", 2),
    "qwen3_5 off": (QUESTION + "<think>\n\n</think>\n\n", "Hello.<|im_end|>", "Hello.<|im_end|>", 2),
    "qwen3_6 preserve": (QUESTION + "<think>\n", "\n</think>\n\nHello.<|im_end|>",
                         "Hm.\n</think>\n\nHello.<|im_end|>", 1),
    "qwen3_8": (QUESTION + "<think>\n", "\n</think>\n\nHello.<|im_end|>", "Hm.\n</think>\n\nHello.<|im_end|>", 1),
    "qwen3_8 low": ("<|im_start|>system\nBe quick.<|im_end|>\n" + QUESTION + "<think>\n",
                    "\n</think>\n\nHello.<|im_end|>", "Hm.\n</think>\n\nHello.<|im_end|>", 1),
    "qwen3_8 off": (QUESTION + "<think>\n\n</think>\n\n", "Hello.<|im_end|>", "Hello.<|im_end|>", 1),
    "minicpm5": ("<s>" + QUESTION, "Hello.<|im_end|>", "<think>\nHm.\n</think>\n\nHello.<|im_end|>", 1),
    "minicpm5 on": ("<s>" + QUESTION + "<think>\n", "Hello.<|im_end|>", "Hm.\n</think>\n\nHello.<|im_end|>", 2),
    "minicpm5 off": ("<s>" + QUESTION + "<think>\n\n</think>\n\n", "Hello.<|im_end|>", "Hello.<|im_end|>", 2),
    "ministral3": ("<s>[SYSTEM_PROMPT]Think like this:[THINK]so[/THINK]then answer.[/SYSTEM_PROMPT][INST]Hi[/INST]",
                   "Hello.</s>", "[THINK]Hm.[/THINK]Hello.</s>", 1),
    "phi4": ("<|user|>Hi<|end|><|assistant|>", "Hello.<|end|>", None, 1),
    "granite3": ("<|start_of_role|>system<|end_of_role|>Today: January 01, 2025.<|end_of_text|>\n<|start_of_role|>user"
                 "<|end_of_role|>Hi<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
                 "Hello.<|end_of_text|>", None, 1),
    "granite3 thinking": ("<|start_of_role|>system<|end_of_role|>Today: January 01, 2025. Think.<|end_of_text|>\n"
                          "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n"
                          '<|start_of_role|>assistant {"length": "short"}<|end_of_role|>',
                          "Hello.<|end_of_text|>", None, 2),
    "granite4": ("<|start_of_role|>system<|end_of_role|>You are helpful.<|end_of_text|>\n<|start_of_role|>user"
                 "<|end_of_role|>Hi<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
                 "Hello.<|end_of_text|>", None, 1),
    "lfm2_5": ("<|startoftext|>" + QUESTION, "Hello.<|im_end|>", "<think>Hm.</think>Hello.<|im_end|>", 1),
    "lfm2_5 preserve": ("<|startoftext|>" + QUESTION, "Hello.<|im_end|>", "<think>Hm.</think>Hello.<|im_end|>", 1),
    "gemma4": ("<bos><|turn>user\nHi<turn|>\n<|turn>model\n", "Hello.<turn|>",
               "<|channel>thought\nHm.\n<channel|>Hello.<turn|>", 1),
    "gemma4 on": ("<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n", "Hello.<turn|>",
                  "<|channel>thought\nHm.\n<channel|>Hello.<turn|>", 1),
    "gemma4 large": ("<bos><|turn>user\nHi<turn|>\n<|turn>model\n<|channel>thought\n<channel|>", "Hello.<turn|>",
                     "Hello.<turn|>", 2),
    "olmo3": ("<|endoftext|><|im_start|>system\nYou are helpful. You have no functions.<|im_end|>\n" + QUESTION,
              "Hello.<|im_end|>", None, 1),
    "exaone4": ("[|user|]\nHi[|endofturn|]\n[|assistant|]\n<think>\n\n</think>\n\n", "Hello.[|endofturn|]",
                "Hello.[|endofturn|]", 1),
    "exaone4 on": ("[|user|]\nHi[|endofturn|]\n[|assistant|]\n<think>\n", "\n</think>\n\nHello.[|endofturn|]",
                   "Hm.\n</think>\n\nHello.[|endofturn|]", 1),
    "ernie4_5": ("<|begin_of_sentence|>User: Hi\nAssistant: ", "Hello.<|end_of_sentence|>", None, 1),
    "hunyuan": ("<｜hy_begin▁of▁sentence｜><｜hy_User｜>Hi<｜hy_Assistant｜>", "Hello.<｜hy_place▁holder▁no▁2｜>",
                None, 1),
    "hunyuan moe": ("<|startoftext|>Hi<|extra_0|>", "Hello.<|eos|>", None, 1),
    "hunyuan moe off": ("<|startoftext|>Hi<|extra_0|><think>\n\n</think>\n", "Hello.<|eos|>", None, 2),
    "seed_oss": ("<seed:bos>user\nHi<seed:eos><seed:bos>assistant\n", "Hello.<seed:eos>",
                 "<seed:think>Hm.</seed:think>\nHello.<seed:eos>", 1),
    "seed_oss 512": ("<seed:bos>system\nThink within 512, reflect every 128<seed:eos>"
                     "<seed:bos>user\nHi<seed:eos><seed:bos>assistant\n", "Hello.<seed:eos>",
                     "<seed:think>Hm.</seed:think>\nHello.<seed:eos>", 1),
    "seed_oss 0": ("<seed:bos>user\nHi<seed:eos><seed:bos>assistant\n<seed:think>\n<seed:cot_budget_reflect>No budget."
                   "</seed:cot_budget_reflect>\n</seed:think>", "Hello.<seed:eos>", "Hello.<seed:eos>", 2),
    "r1_0528": ("<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>", "Hello.<｜end▁of▁sentence｜>", None, 1),
}  # fmt: skip
EACH = pytest.mark.parametrize("name", CASES)


def thinking(thought: str = "Hm.") -> list[dict]:
    question, answer = turns("Hi", "Hello.")
    return [question, {**answer, "reasoning_content": thought}]


def spans(name: str, messages) -> list[tuple[str, str]]:
    """(text before the answer, text of the answer) of each."""
    spell = tokenizer().spell
    return [(spell(part.tokens[:begin]), spell(part.tokens[begin:end]))
            for part in chat(name).tokenize(messages) for begin, end in part.answers]  # fmt: skip


def test_every_retold_template_has_a_case():
    assert CASES.keys() == PUBLIC.keys()


@mutation("lora/text/answers.py", "upto = upto.removesuffix(self.closing)", "pass", case="phi4")
@mutation("lora/text/answers.py", "text.removesuffix(self.closing)", "text", case="hunyuan moe off")
@mutation("lora/text/answers.py", 'return "" if longer.startswith(text) else text[last:]', 'return ""', case="hunyuan")
@mutation("lora/text/answers.py", "if ours and [match[0]", "if not ours and [match[0]", case="granite3 thinking")
@EACH
def test_the_prompt_and_what_is_trained_of_an_answer_are_those_of_the_family(name):
    prompt, trained, _, parts = CASES[name]
    assert spans(name, turns("Hi", "Hello.")) == [(prompt, trained)]
    assert (
        chat(name).prompt(turns("Hi"))
        == chat(name).tokenize(turns("Hi", "Hello."))[0].tokens[: len(chat(name).prompt(turns("Hi")))]
    )
    assert len(chat(name).tokenize(turns("Hi", "Hello.", "And?", "No."))) == parts


@mutation("lora/text/thoughts.py", "if PART.search(source):", "if False:", case="ministral3")
@mutation("lora/text/thoughts.py", "return rest | {named[1]: message[KEY]} if named", "return message if named",
          case="lfm2_5")  # fmt: skip
@mutation("lora/text/answers.py", "if thoughts.KEY in answer and", "if False and", case="qwen3_5 off")
@EACH
def test_a_thought_beside_an_answer_stands_where_the_family_has_it_or_is_told_or_refused(name):
    prompt, trained, thought, _ = CASES[name]
    if thought is None:
        with pytest.raises(BadInput, match="it never reads reasoning_content of a message"):
            chat(name).tokenize(thinking())
        return
    assert spans(name, thinking()) == [(prompt, thought)]
    [part] = chat(name).tokenize(thinking())
    assert part.missing == (("Hm.",) if thought == trained else ())


@mutation("lora/text/answers.py", "for message in messages] if self._thinks_twice else messages",
          "for message in messages] if False else messages")  # fmt: skip
@mutation("lora/text/thoughts.py", 'thought.partition("</think>")[0].rpartition("<think>")[2]', "thought")
def test_a_thought_in_the_content_is_written_once_where_the_template_knows_thoughts_beside_it_only():
    inside = turns("Hi", "<think>\nHm.\n</think>\n\nHello.")
    for name in ("qwen3_8", "qwen3_8 low", "qwen3_8 off"):
        assert spans(name, inside) == spans(name, thinking())
        went_on = turns("Hi", "Hm.\n</think>\n\nHello.", "And?")  # what generation gives, behind a thought it has begun
        assert chat(name).prompt(went_on) == chat(name).prompt([*thinking(), went_on[-1]])
    assert spans("ministral3", inside)[0][1] == "<think>\nHm.\n</think>\n\nHello.</s>"  # others read it as it is


@EACH
@hypothesis_settings(max_examples=25, **CALM)
@given(messages=conversations(st.one_of(TEXT, SPELLED, TEXT.map(lambda text: f"<think>\n{text}\n</think>\n\nx{text}"))))
def test_the_ids_before_every_answer_are_the_prompt_and_only_its_end_of_turn_ends_it(name, messages):
    ours = chat(name)
    places = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    found = [(part, span) for part in ours.tokenize(messages) for span in part.answers]
    assert len(found) == len(places)
    for place, (part, (begin, end)) in zip(places, found, strict=True):
        assert part.tokens[:begin] == ours.prompt(messages[:place])
        assert part.tokens[end - 1] == ours.end_of_turn and ours.end_of_turn not in part.tokens[begin : end - 1]


@EACH
def test_an_end_of_turn_is_the_one_that_a_following_question_stands_behind(name):
    """Whatever else a template writes at the end of a text."""
    ours, spell = chat(name), tokenizer().spell
    end = tokenizer().token(ours.end_of_turn)
    whole, longer = (ours.template.render(turns(*texts)) for texts in (("a", "b"), ("a", "b", "c")))
    assert re.search(r"b" + re.escape(end) + r"\s*\S", longer) and re.search(r"b" + re.escape(end), whole)
    assert ours.end_of_turn in ours.stops and spell([ours.end_of_turn]) == end
    assert len(ours.tokenize(turns("a", "b"))[0].answers) == 1


@EACH
def test_text_that_spells_the_control_tokens_of_the_family_forges_no_turn(name):
    ours, control = chat(name), set(tokenizer().control.values())
    forged = turns("a" + "".join(CONTROL) + "b", "c" + "".join(CONTROL) + "d")
    counts = [[i for i in part.tokens if i in control] for m in (forged, turns("x", "y")) for part in ours.tokenize(m)]
    assert counts[0] == counts[1]


# ---- ends of turn in files -------------------------------------------------------------------------------------------


def folder_of(name: str, eos, generation=None, **more) -> ModelFiles:
    """The files beside the weights, as a hub folder of a Llama with this template and tokenizer has them."""
    source, bos, end, _ = PUBLIC[name]
    raw = {"model_type": "llama", "vocab_size": 2000, "hidden_size": 24, "intermediate_size": 40, "eos_token_id": eos,
           "num_hidden_layers": 1, "num_attention_heads": 6, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
           "max_position_embeddings": 512, "rope_theta": 10000.0, "tie_word_embeddings": False, **more}  # fmt: skip
    beside = {"tokenizer.json": tokenizer_json(), "chat_template.jinja": source.encode(),
              "tokenizer_config.json": json.dumps({"bos_token": bos, "eos_token": end}).encode()}  # fmt: skip
    if generation is not None:
        beside["generation_config.json"] = json.dumps({"eos_token_id": generation}).encode()

    class Folder:
        name, config = "model", raw

        @staticmethod
        def files():
            return beside

    return Folder


@pytest.mark.parametrize(("name", "eos", "generation", "stops", "trained", "document"), [
    ("phi4", "<|endoftext|>", ["<|end|>", "<|endoftext|>"], ["<|endoftext|>", "<|end|>"], "<|end|>", "<|endoftext|>"),
    ("phi4", "<|endoftext|>", None, ["<|endoftext|>", "<|end|>"], "<|end|>", "<|endoftext|>"),
    ("gemma4", ["<eos>", "<turn|>"], ["<eos>", "<turn|>", "<|think|>"], ["<eos>", "<turn|>", "<|think|>"], "<turn|>",
     "<eos>"),
    ("gemma4", "<eos>", None, ["<eos>", "<turn|>"], "<turn|>", "<eos>"),
    ("qwen3_5", "<|endoftext|>", ["<|im_end|>", "<|endoftext|>"], ["<|endoftext|>", "<|im_end|>"], "<|im_end|>",
     "<|endoftext|>"),
    ("hunyuan", "<｜hy_place▁holder▁no▁2｜>", None, ["<｜hy_place▁holder▁no▁2｜>"], "<｜hy_place▁holder▁no▁2｜>",
     "<｜hy_place▁holder▁no▁2｜>"),
    ("ernie4_5", "</s>", "</s>", ["</s>", "<|end_of_sentence|>"], "<|end_of_sentence|>", "</s>"),
    ("ministral3", "</s>", None, ["</s>"], "</s>", "</s>"),
])  # fmt: skip
def test_generation_stops_at_every_end_that_the_files_name_and_at_the_one_that_is_trained(
    name, eos, generation, stops, trained, document
):
    def ids(names):
        return [tokenizer().id(one) for one in names] if isinstance(names, list) else names and tokenizer().id(names)

    ours = load_chat(folder_of(name, ids(eos), ids(generation)))
    assert ours.stops == set(ids(stops))
    assert (ours.end_of_turn, ours.end_of_document) == (ids(trained), ids(document))
    spoken = Spoken.of(ours)
    assert spoken.end == ids(trained)
    beside, config = spoken.written(folder_of(name, ids(eos), ids(generation)).files(), {"eos_token_id": ids(eos)})
    for file in (config, json.loads(beside["generation_config.json"])):
        known = file["eos_token_id"]
        assert ids(trained) in (known if isinstance(known, list) else [known])


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def with_bos(name: str, **model) -> Tokenizer:
    """A tokenizer whose own post-processor puts the family's BOS before any text, too."""
    bos = PUBLIC[name].bos
    raw = json.loads(tokenizer_json())
    special = {bos: {"id": bos, "ids": [tokenizer().id(bos)], "tokens": [bos]}}
    one, two = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    post = {"type": "TemplateProcessing", "single": [begin, one], "pair": [begin, one, two], "special_tokens": special}
    return Tokenizer(json.dumps(raw | {"post_processor": post, "model": raw["model"] | model}).encode())


@mutation("lora/text/tokenizer.py", "begin = [] if ids[: len(begin)] == begin else begin", "pass")
@pytest.mark.parametrize("name", ["gemma4", "lfm2_5", "minicpm5", "ministral3", "hunyuan", "r1_0528"])
def test_a_bos_that_template_and_tokenizer_both_put_stands_once(name):
    source, bos, eos, arguments = PUBLIC[name]
    template = ChatTemplate(source, {"bos_token": bos, "eos_token": eos}, arguments=arguments)
    ours = Chat(with_bos(name), template, [tokenizer().id(eos)])
    for messages in (turns("Hi", "Hello."), turns("Hi", "<|end|> it"), turns("Hi", "Hello.", "And?", "No.")):
        for part in ours.tokenize(messages):
            assert part.tokens.count(tokenizer().id(bos)) == 1 and part.tokens[0] == tokenizer().id(bos)
    spelling = Chat(with_bos(name), template, [tokenizer().id(eos)], control_tokens=True)
    for chat_, text in ((ours, "Once."), (spelling, "Once."), (spelling, f"{bos}Once.")):
        [document] = chat_.tokenize([{"role": "text", "content": text}])
        assert document.tokens.count(tokenizer().id(bos)) == 1


@mutation(
    "lora/text/tokenizer.py", "{name: self.size + n for n, name in enumerate(names) if name not in vocabulary}", "{}"
)
def test_a_tokenizer_of_whole_words_and_a_thousand_control_tokens_reads_text_as_text():
    """As tekken has it: words of the vocabulary are not merged anew, and the first thousand ids are control tokens."""
    spare = tuple(f"<SPECIAL_{n}>" for n in range(1000 - len(CONTROL)))
    raw = json.loads(tokenizer_json((*CONTROL, *spare)))
    raw["model"]["vocab"] |= {"Ġgarden": (top := max(raw["model"]["vocab"].values()) + 10)}
    raw["model"]["ignore_merges"] = True
    tekken = Tokenizer(json.dumps(raw).encode())
    source, bos, eos, _ = PUBLIC["ministral3"]
    ours = Chat(tekken, ChatTemplate(source, {"bos_token": bos, "eos_token": eos}), [tekken.id(eos)])
    for text in ("my garden", "my garden [INST]<SPECIAL_7> garden"):
        [part] = ours.tokenize(turns(text, text))
        [(begin, end)] = part.answers
        assert tekken.decode(part.tokens[begin:end]) == text and top in part.tokens[begin:end]
        controls = [i for i in part.tokens if i in tekken.control.values()]
        assert controls == [i for i in ours.tokenize(turns("x", "x"))[0].tokens if i in tekken.control.values()]
