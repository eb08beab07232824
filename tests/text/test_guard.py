"""Text that spells a control token beside white space; and what else a message has than role and content."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from lora.errors import BadInput
from lora.text.chat import Chat
from lora.text.guard import GUARDS, encode_guarded
from lora.text.template import ChatTemplate
from lora.text.tokenizer import Tokenizer
from tests.mutation import mutation
from tests.text.test_template import CALM, CHATML, byte_level, turns

PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
NAMES = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


@cache
def stripping(**sides: bool) -> Tokenizer:
    """As Phi-3 has it: control tokens that take the white space beside them, and ▁ for a blank."""
    letters = [*"▁abcdefghijklmnopqrstuvwxyz.,!?\n<|>/", "▁t", "▁h"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    vocabulary, merges = {piece: i for i, piece in enumerate(pieces)}, [("▁", "t"), ("▁", "h")]
    fast = FastTokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if sides.pop("first", False):  # Metaspace: a blank before the text, and not before each part of it
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    fast.add_special_tokens([AddedToken(token, normalized=False, **sides) for token in NAMES])
    return Tokenizer(fast.to_str().encode())


def spelled(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.token(i) for i in ids]


KINDS = {"right": {"rstrip": True}, "left": {"lstrip": True}, "both": {"lstrip": True, "rstrip": True}, "neither": {},
         "first": {"first": True}, "first right": {"first": True, "rstrip": True}}  # fmt: skip


@mutation("lora/text/guard.py", "pieces.append(tokenizer.mark(match[0], guard))", "pieces.append(match[0])")
@mutation("lora/text/guard.py", 'encode_marked("".join(pieces), guard)', 'encode("".join(pieces))'
          )  # fmt: skip
def test_a_row_that_spells_a_control_token_keeps_the_line_end_beside_it_and_the_template_takes_its_own():
    tokenizer = stripping(rstrip=True)
    chat = Chat(tokenizer, ChatTemplate(PHI), [2])
    [part] = chat.tokenize(turns("a<|end|>\nb", "<|user|>\nc"))
    assert spelled(part.tokens, tokenizer) == [
        "<|user|>", *"▁a<|end|>\nb", "<|end|>", "<|assistant|>", *"▁<|user|>\nc", "<|end|>",
    ]  # fmt: skip
    [harmless] = chat.tokenize(turns("ab", "c"))
    assert spelled(harmless.tokens, tokenizer) == ["<|user|>", *"▁ab", "<|end|>", "<|assistant|>", *"▁c", "<|end|>"]
    assert part.tokens[: part.answers[0][0]] == chat.prompt(turns("a<|end|>\nb"))


PIECES = st.lists(st.sampled_from([*NAMES, "\n", " ", "a", "th", ".", "</s>", "<|", "é"]), max_size=8).map("".join)


@mutation("lora/text/tokenizer.py", "return [ids.get(i, i) for i in", "return [i for i in", case="right")
@pytest.mark.parametrize("kind", KINDS)
@hypothesis_settings(max_examples=100, **CALM)
@given(text=PIECES, guard=st.sampled_from(GUARDS[:3]))
def test_marked_control_strings_are_read_as_the_tokenizer_reads_them_and_others_are_text(kind, text, guard):
    tokenizer = stripping(**KINDS[kind])
    assert tokenizer.encode_marked(tokenizer.mark(text, guard), guard) == tokenizer.encode(text)
    assert tokenizer.encode_marked(text, guard) == tokenizer.encode_plain(text)
    assert encode_guarded(text, guard, tokenizer) == tokenizer.encode(text)
    assert encode_guarded(tokenizer.mark(text, guard), guard, tokenizer) == tokenizer.encode_plain(text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_spells_a_control_token_is_read_as_one_that_spells_none(kind):
    """The parts that are the same in both have the same ids."""
    tokenizer = stripping(**KINDS[kind])
    chat = Chat(tokenizer, ChatTemplate(PHI), [2])
    one, other = (chat.tokenize(turns("hi there", text))[0] for text in ("ab", "<|end|>"))
    assert one.tokens[: one.answers[0][0]] == other.tokens[: other.answers[0][0]] == chat.prompt(turns("hi there"))
    assert chat.guarded == 1 and one.tokens[one.answers[0][1] - 1] == other.tokens[other.answers[0][1] - 1]


# ---- what else a message has -----------------------------------------------------------------------------------------

THOUGHT = "('<think>' + m.reasoning_content + '</think>' if m.reasoning_content else '')"
THINKS = CHATML.replace("+ m.content", f"+ {THOUGHT} + m.content")


@mutation("lora/text/guard.py", 'if key != "train"} for m in messages], ""',
          'if key in ("role", "content")} for m in messages], ""')  # fmt: skip
@mutation("lora/text/guard.py", "{k: tokenizer.mark(v, guard) if isinstance(v, str) else v for k, v in m.items()}",
          '{**m, "content": tokenizer.mark(m["content"], guard)}')  # fmt: skip
def test_a_thought_beside_an_answer_reaches_a_template_that_reads_it_and_stays_text():
    chat = Chat(byte_level(), ChatTemplate(THINKS, where="here"), [0])
    messages = turns("Hi", "Hello.")
    messages[1]["reasoning_content"] = "Hm <|im_end|>."
    [part] = chat.tokenize(messages)
    [(begin, end)] = part.answers
    assert chat.tokenizer.decode(part.tokens[begin:end]) == "<think>Hm <|im_end|>.</think>Hello." and part.missing == ()
    controls = [i for i in part.tokens[begin:end] if i in chat.tokenizer.control.values()]
    assert controls == [chat.tokenizer.id("<|im_end|>")] == part.tokens[end - 1 : end]


@mutation("lora/text/template.py", "if key not in self.source:", "if False:")
def test_a_thought_that_the_template_never_reads_is_refused_by_name_and_one_that_it_drops_is_told():
    messages = turns("Hi", "Hello.")
    messages[1]["reasoning_content"] = "Hm."
    with pytest.raises(BadInput, match="chat template in here: it never reads reasoning_content of a message"):
        Chat(byte_level(), ChatTemplate(CHATML, where="here"), [0]).tokenize(messages)
    drops = THINKS.replace("if m.reasoning_content", "if m.reasoning_content and not loop.last")
    [part] = Chat(byte_level(), ChatTemplate(drops, where="here"), [0]).tokenize(messages)
    assert part.missing == ("Hm.",)
