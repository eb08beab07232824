"""Pieces of an answer, joined, are its text up to the first stop string, wherever the borders of tokens are."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora import pretrained
from lora.serve.texts import Text
from tests import cli
from tests.mutation import mutation

CALM = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
LETTERS = "ab é中🙂\n"  # some of one byte, some of several tokens


def up_to_a_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """What is shown of a text that comes character by character, and whether it is stopped."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))], True
    return text, False


def tokenizer():
    return pretrained.load_chat(pretrained.find(str(cli.model_folder()))).tokenizer


def shown(ids, stops) -> tuple[str, bool, list[str]]:
    text = Text(tokenizer(), stops)
    pieces = [text.push(i) for i in ids]
    return "".join([*pieces, text.end()]), text.stopped, pieces


@mutation("lora/serve/texts.py", "return text[: min(found)[1]]", "return text[: min(place for _, place in found)]")
@mutation("lora/serve/texts.py", "return text[: len(text) - keep]", "return text")
@mutation(
    "lora/serve/texts.py", "range(min(len(stop) - 1, len(text)), 0, -1)", "range(1, min(len(stop) - 1, len(text)))"
)
def test_pieces_joined_are_the_text_up_to_the_first_stop():
    of = tokenizer()

    @settings(max_examples=300, **CALM)
    @given(st.text(LETTERS, max_size=40), st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=3))
    def check(text, stops):
        ids = of.encode_plain(text)
        assert shown(ids, stops)[:2] == up_to_a_stop(of.decode(ids), stops)

    check()
    word = next(
        i for i in range(3, 290) if of.decode([i]).isalpha() and len(set(of.decode([i]))) == len(of.decode([i])) > 2
    )
    letters = of.decode([word])
    assert shown([word], [letters[1], letters])[0] == letters[0]  # one token, in which the shorter is complete first


def test_tokens_that_are_half_a_character_are_held_back():
    of = tokenizer()

    @settings(max_examples=200, **CALM)
    @given(
        st.lists(st.integers(3, 290), max_size=30), st.lists(st.text("abé\ufffd", min_size=1, max_size=3), max_size=2)
    )
    def check(ids, stops):
        text, stopped, pieces = shown(ids, stops)
        assert (text, stopped) == up_to_a_stop(of.decode(ids), stops)
        assert stops or "".join(pieces) == of.decode(ids)[: len("".join(pieces))]

    check()
    ids = of.encode_plain("🙂")
    assert len(ids) > 1 and shown(ids, [])[2] == [""] * (len(ids) - 1) + ["🙂"]
