"""Documents that spell control tokens: text, unless --control-tokens says otherwise; then none stands there twice."""

import json

import pytest

from lora.text.chat import Chat
from lora.text.template import ChatTemplate
from lora.text.tokenizer import Tokenizer
from tests import cli
from tests.mutation import mutation
from tests.scripts.test_commands import ok
from tests.text.test_template import CHATML, byte_level, byte_level_json, plain_ids


def document(text: str) -> list[dict]:
    return [{"role": "text", "content": text}]


def chat_with(around: tuple[str, ...] = ("$",), control_tokens: bool = True) -> Chat:
    """A chat whose tokenizer puts control tokens `around` a text ($), and whose end of a document is <|endoftext|>."""
    raw, names = json.loads(byte_level_json()), [name for name in around if name != "$"]
    if names:
        pieces = [{"Sequence": {"id": "A", "type_id": 0}} if n == "$" else {"SpecialToken": {"id": n, "type_id": 0}}
                  for n in around]  # fmt: skip
        special = {name: {"id": name, "ids": [byte_level().id(name)], "tokens": [name]} for name in names}
        pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
        raw["post_processor"] = {
            "type": "TemplateProcessing",
            "single": pieces,
            "pair": pair,
            "special_tokens": special,
        }
    tokenizer = Tokenizer(json.dumps(raw).encode())
    return Chat(tokenizer, ChatTemplate(CHATML, where="here"), [tokenizer.id("<|endoftext|>")], None, control_tokens)


TURN = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>"
CASES = [  # what the tokenizer puts round a text, the text, the text whose tokens are trained
    (("$",), TURN, TURN),  # its end of turn ends it
    (("$",), TURN + "\n", TURN + "\n"),
    (("$",), "Once upon a time.", "Once upon a time.<|endoftext|>"),
    (("$",), "Once.<|endoftext|>", "Once.<|endoftext|>"),
    (("$",), "Once.<s>", "Once.<s><|endoftext|>"),  # which ends no answer
    (("<s>", "$"), TURN, "<s>" + TURN),
    (("<s>", "$"), "<s>" + TURN, "<s>" + TURN),
    (("<s>", "$", "</s>"), "<s>a</s><s>b", "<s>a</s><s>b</s><|endoftext|>"),
    (("<s>", "$", "<|endoftext|>"), "<s>a<|endoftext|>", "<s>a<|endoftext|>"),
    (("$", "<|endoftext|>"), "a", "a<|endoftext|>"),
]


@mutation("lora/text/tokenizer.py", "begin = [] if ids[: len(begin)] == begin else begin", "pass", case="6")
@mutation("lora/text/tokenizer.py", "([] if ids[len(ids) - len(end) :] == end else end)", "end", case="8")
@mutation("lora/text/chat.py", "self.tokenizer.encode_document(text, self.control_tokens)",
          "self.tokenizer.encode_document(text)", case="0")  # fmt: skip
@mutation("lora/text/chat.py", "text.rstrip().endswith(spelled[-1])", "text.endswith(spelled[-1])", case="1")
@pytest.mark.parametrize(("around", "text", "whole"), CASES, ids=range(len(CASES)))
def test_with_the_flag_a_document_is_read_with_its_control_tokens_and_none_stands_there_twice(around, text, whole):
    [part] = chat_with(around).tokenize(document(text))
    assert part.tokens == plain_ids(whole) and part.example().trained == [True] * len(part.tokens)


def test_without_the_flag_every_letter_of_it_is_text():
    chat = chat_with(("<s>", "$"), control_tokens=False)
    [part] = chat.tokenize(document("<s>" + TURN))
    assert chat.tokenizer.decode(part.tokens) == "<s>" + TURN
    assert [i for i in part.tokens if i in chat.tokenizer.control.values()] == plain_ids("<s><|endoftext|>")


def test_messages_are_read_alike_with_and_without_the_flag():
    messages = [{"role": "user", "content": TURN}, {"role": "assistant", "content": "No <|im_end|>."}]
    assert chat_with().tokenize(messages) == chat_with(control_tokens=False).tokenize(messages)


NOTE = "documents spell <|im_start|>, <|im_end|>, which"


@mutation("lora/run/plan.py", "template_args, args.control_tokens)", "template_args)")
@mutation("lora/run/trainable.py", 'spoken["control_tokens"] = True', "pass")
@mutation("lora/inference/session.py", 'control_tokens or trained.get("control_tokens", False)', "control_tokens")
def test_a_run_names_the_control_tokens_and_the_flag_and_remembers_it(tmp_path):
    texts = [TURN, TURN + "\n", "Plain.", "<|eot_id|> is of others"]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    done = cli.train("out", "--max-steps", 1, cwd=tmp_path, data="data.jsonl")
    ok(done)
    assert f"note     2 {NOTE} stay text, letter by letter; --control-tokens reads them as tokens" in done.err
    assert "note     1 times documents spell <|eot_id|>, which this tokenizer has no tokens for" in done.err
    assert "rows spell a control token" not in done.err
    done = cli.train("with", "--max-steps", 1, "--control-tokens", cwd=tmp_path, data="data.jsonl")
    ok(done)
    assert f"note     2 {NOTE} are read as tokens" in done.err
    assert json.loads((tmp_path / "with/settings.json").read_text())["control_tokens"] is True
    assert json.loads((tmp_path / "with/passport.json").read_text())["chat"]["control_tokens"] is True
    assert "control_tokens" not in json.loads((tmp_path / "out/passport.json").read_text())["chat"]
    again = cli.train("with", "--resume", "--max-steps", 1, cwd=tmp_path, data="data.jsonl")
    assert again.code == 0, again.err
    rows = ("--data", "data.jsonl", "--no-generate", "--no-retention", *cli.ON_CPU)
    told, flag = (
        ok(cli.call("evaluate", "--adapter", "with", *rows, *more, cwd=tmp_path)).splitlines()[1]
        for more in ((), ("--control-tokens",))
    )
    assert told.split()[-1] == flag.split()[-1] and told.split()[-2] != flag.split()[-2]  # the adapter's; the base's
