"""What `--check` finds in conversations and what it leaves alone; near-duplicates are exactly those by definition."""

import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.data import near
from lora.data.formats import Conversation, Problem
from lora.data.lint import CODES, check, is_leftover, normal
from tests.mutation import mutation

TURNS = ("user", "assistant")


def row(*turns, where="a.jsonl:1", system=None, shape="messages", untrained=()):
    """A conversation of alternate turns; one turn is a document."""
    if len(turns) == 1:
        return Conversation([{"role": "text", "content": turns[0]}], where, "text")
    messages = [{"role": TURNS[i % 2], "content": text} for i, text in enumerate(turns)]
    for place in untrained:
        messages[place]["train"] = False
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(messages, where, shape)


def rows(*pairs, file="a.jsonl"):
    return [row(*pair, where=f"{file}:{line}") for line, pair in enumerate(pairs, 1)]


def found(train, evaluation=()):
    """(file, line, code) of every finding."""
    return [(f.file, f.line, f.code) for f in check(train, evaluation)]


def codes(*pairs):
    return [code for _, _, code in found(rows(*pairs))]


# ---- one row ---------------------------------------------------------------------------------------------------------


@mutation("lora/data/lint.py", "(?<![A-Za-z0-9_\\]])\\[(?!", "(?<![\\w\\]])\\[(?!")
@pytest.mark.parametrize(
    "text",
    [
        "I am [NAME].",
        "我是[NAME]。",
        "Dear {{name}},",
        "Dear {{ first_name }}",
        "[FIRST_NAME]",
        "Yours, [Your Name]",
        "我叫【你的名字】",
        "[LAST_FIRST NAME2]",
    ],
)
def test_a_placeholder_is_found_in_any_turn(text):
    assert codes(("Who?", text)) == codes((text, "Well.")) == ["PLACEHOLDER"]
    assert codes((f"Is {text} left?",)) == ["PLACEHOLDER"]


@mutation("lora/data/lint.py", 'CODE.sub(" ", message["content"])', 'message["content"]')
@pytest.mark.parametrize(
    "text",
    [
        "It is x[KEY] = 3",
        "the set [A-Z]",
        "see [RFC](https://x)",
        "[1] and [a]",
        "x^{{nn}}",
        "2024-01-01 [ERROR] full",
        "Use `{{name}}` here",
        "```\n[NAME]\n```",
        "a [B] c",
        "{name}",
    ],
)
def test_brackets_of_code_links_and_mathematics_are_no_placeholders(text):
    assert codes(("Who?", text)) == []


@mutation("lora/data/leftovers.py", "or CUT.fullmatch(last.strip())", "or False")
@mutation(
    "lora/data/leftovers.py",
    'LABEL.sub("", answer[:1000], count=1) if LABEL.match(answer) else answer[:1000]',
    "answer[:1000]",
)
@pytest.mark.parametrize(
    "answer",
    [
        "答：!\nnetwork error",
        "Network error, please try again",
        "网络错误，请稍后重试",
        "Error code: 429",
        "HTTP 502 Bad Gateway",
        "I'm sorry, but I can't help with that.",
        "I’m unable to assist.",
        "As an AI language model, I don't have feelings.",
        "抱歉，我无法回答这个问题。",
        "A: I cannot help with that.",
        "作为一个AI语言模型，我没有感情。",
        "The sea is wide. " * 40 + "\n\nnetwork error",
    ],
)
def test_an_error_or_a_refusal_left_as_the_answer_is_found(answer):
    assert codes(("Who?", answer)) == ["LEFTOVER"]


@mutation("lora/data/leftovers.py", "len(answer) <= REFUSAL_LENGTH and ", "")
@pytest.mark.parametrize(
    "answer",
    [
        "Network errors are failures of a connection.",
        "A network error means lost packets.",
        "Network error: what it is. " + "First, a cable may be loose. " * 10,
        "Sorry, I'm Max.",
        "I'm sorry to hear that. Do you want to talk?",
        "作为一个AI助手，我很高兴认识你。",
        "我不能说他错了。",
        "I'm sorry, but I can't agree with him, " + "and here is why he is wrong. " * 12,
    ],
)
def test_an_answer_about_errors_or_of_another_kind_of_sorrow_is_none(answer):
    assert not is_leftover(answer)


@mutation("lora/data/lint.py", 'message.get("train", row.row is None)', "True")
def test_a_question_or_an_answer_that_is_not_learned_may_be_an_error_message():
    assert codes(("network error", "What happened?")) == []
    assert found([row("a", "network error", "b", "Fine.", untrained=[1])]) == []


# ---- a file ----------------------------------------------------------------------------------------------------------


def test_prefixes_of_some_rows_give_one_finding_at_the_first_of_the_fewer_with_the_counts():
    with_prefix = [(f"问：第{i}个问题是{chr(0x4E00 + i)}", f"答：是{chr(0x5000 + i)}") for i in range(39)]
    without = [(f"这是{chr(0x6000 + i)}吗", f"对的{chr(0x7000 + i)}") for i in range(34)]
    findings = check(rows(*with_prefix, *without))
    assert [(f.line, f.code) for f in findings] == [(40, "PREFIX")]
    assert "39 of 73" in findings[0].message and "问:" in findings[0].message
    assert check(rows(*with_prefix)) == check(rows(*without)) == []


@mutation("lora/data/lint.py", 'a - set("abcd") if choices else a', "a")
def test_a_prefix_of_answers_alone_counts_and_letters_of_a_choice_do_not():
    assert codes(("Up?", "Yes"), ("Down?", "Answer: no"), ("Left?", "Perhaps")) == ["PREFIX"]
    assert codes(("Capital?", "A: Paris"), ("Largest?", "B: London"), ("Oldest?", "Rome")) == []
    assert codes(("Q: up?", "A: yes"), ("Down?", "no"), ("Left?", "Perhaps")) == ["PREFIX"]


@mutation("lora/data/lint.py", 'files[row.where.rpartition(":")[0]].append(row)', 'files[""].append(row)')
def test_prefixes_and_shapes_are_counted_for_each_file():
    one = rows(("Q: up?", "A: yes"), file="a.jsonl")
    other = [row("Down?", "no", where="b.jsonl:1", shape="q/a")]
    assert check([*one, *other]) == []


@mutation("lora/data/lint.py", "if pair[1] != most)", "if pair[1] == most)")
def test_a_file_of_two_shapes_gives_one_finding():
    mixed = rows(("a", "1"), ("b", "2"), ("c", "3"), ("d", "4"))
    [finding] = check([mixed[0], *(row._replace(shape="q/a") for row in mixed[1:])])
    assert (finding.line, finding.code) == (1, "SCHEMA")
    assert "3 of 4" in finding.message and "messages" in finding.message


# ---- two rows --------------------------------------------------------------------------------------------------------


@mutation("lora/data/lint.py", "first.setdefault((row.text, good), row)", "first.pop((row.text, good), row)")
def test_duplicates_but_for_case_space_and_punctuation_point_to_the_first():
    findings = check(
        rows(("What is it?", "A dog."), ("Other", "x"), ("what  is it", "a DOG"), ("ｗhat is it？", "A dog!"))
    )
    assert [(f.line, f.code) for f in findings] == [(3, "DUPLICATE"), (4, "DUPLICATE")]
    assert all("a.jsonl:1" in f.message for f in findings)


@mutation("lora/data/lint.py", '"˙" if gap[0] == "." else "|"', '""')
@mutation("lora/data/lint.py", '"˙" if gap[0] == "." else "|"', '"|"')
@mutation("lora/data/lint.py", "if c not in SIGNS", "if c")
@mutation("lora/data/lint.py", 'POWER.sub(r"^\\g<0>", text)', "text")
@pytest.mark.parametrize(
    "one, other",
    [
        ("12-3", "123"),
        ("1, 12", "11, 2"),
        ("1.5", "15"),
        ("1.5", "1 5"),
        ("3²", "32"),
        ("C#", "C"),
        ("2*3", "2+3"),
        ("2**3", "23"),
        ("x-y", "x*y"),
        ("?", "!"),
        ("a\nb", "ab c"),
    ],
)
def test_signs_and_the_ends_of_numbers_make_questions_different(one, other):
    assert normal(one) != normal(other)
    assert codes((one, "yes"), (other, "no")) == []


@mutation("lora/data/lint.py", 'unicodedata.normalize("NFKC", ', '("")+(')
@pytest.mark.parametrize(
    "one, other",
    [
        ("２＊３", "2*3"),
        ("Hello, World!", "hello world"),
        ("你 好？", "你好"),
        ("a\u200bb", "ab"),
        ("a well-known e-mail", "A well known email"),
        ("**Now**, or - later", "now or later"),
        ("- a\n* b", "a\nb"),
    ],
)
def test_width_case_space_and_punctuation_do_not(one, other):
    assert normal(one) == normal(other)


@mutation(
    "lora/data/lint.py",
    '                digest.update(turn.encode("utf-8", "surrogatepass") + b"\\n")',
    '                digest = blake2b(turn.encode("utf-8", "surrogatepass"), digest_size=16)',
)
def test_a_conflict_is_the_same_question_with_another_answer():
    assert codes(("Who?", "Max"), ("who", "max."), ("WHO", "Tom")) == ["DUPLICATE", "CONFLICT"]
    assert "a.jsonl:1" in check(rows(("Who?", "Max"), ("who", "Tom")))[0].message
    assert found([row("Who?", "Max", system="one"), row("Who?", "Tom", system="two")]) == []
    assert found([row("Hi", "Hey", "Who?", "Max"), row("Ho", "Hey", "Who?", "Tom")]) == []
    assert [code for *_, code in found([row("Hi", "Hey", "Who?", "Max"), row("Hi", "Hey", "Who?", "Tom")])] == [
        "CONFLICT"
    ]
    assert found([row("Hi", "Hey", "Who?", "Max", untrained=[1]), row("Hi", "Ho", "Why?", "So")]) == []


LONG = (
    "the quick brown fox jumps over the lazy dog while seven wizards quietly mix potions of jade and honey all night, "
    "and nobody in that sleepy village under twelve green hills can say why"
)


def test_a_near_duplicate_is_reported_once_and_not_as_duplicate_too():
    near = LONG.replace("jade", "jadx")
    assert codes((LONG, "yes"), (near, "yes")) == ["NEAR-DUPLICATE"]
    assert codes((LONG, "yes"), (LONG, "Yes!")) == ["DUPLICATE"]
    assert codes((LONG, "yes"), (near, "yes"), (near, "yes")) == ["NEAR-DUPLICATE", "DUPLICATE"]
    assert codes((LONG, "yes"), (LONG[::-1], "yes")) == []


# ---- training and evaluation -----------------------------------------------------------------------------------------


@mutation("lora/data/lint.py", "turn = _numbers_sorted(turn) if loosely else turn", "turn = turn")
@mutation("lora/data/lint.py", "if not (loosely and place == 0 and self.system):", "if True:")
@pytest.mark.parametrize(
    "learned, tested",
    [
        ("计算874*265", "计算265*874"),
        ("计算８７４＊２６５", "计算 265 * 874"),
        ("What is 1.5*2?", "what is 2*1.5"),
        ("Who are you?", "who are YOU"),
        (LONG, LONG.replace("jade", "jadx")),
    ],
)
def test_a_question_of_the_evaluation_data_in_the_training_data_is_overlap(learned, tested):
    held_out = rows(("Something else", "x"), (tested, "And a very different answer"), file="e.jsonl")
    train = rows(("Hello there", "Hey"), (learned, "The answer"))
    findings = check(train, held_out)
    assert [(f.file, f.line, f.code) for f in findings] == [("e.jsonl", 2, "OVERLAP")]
    assert "a.jsonl:2" in findings[0].message
    system = row(tested, "x", where="e.jsonl:1", system="Be brief.")
    assert found(train, [system]) == [("e.jsonl", 1, "OVERLAP")]
    assert found([row(learned, "a", "b", "c")], [system]) == [("e.jsonl", 1, "OVERLAP")]


@pytest.mark.parametrize(
    "learned, tested", [("计算874*265", "计算874*256"), ("计算874*265", "计算874+265"), ("Sum 12 34", "Sum 1 234")]
)
def test_other_numbers_or_signs_are_no_overlap(learned, tested):
    assert found([row(learned, "x")], [row(tested, "x")]) == []


def test_a_document_or_a_whole_row_that_is_nearly_in_the_training_data_is_overlap():
    assert found([row(LONG)], [row(LONG.replace("jade", "jadx"))]) == [("a.jsonl", 1, "OVERLAP")]
    assert found([row("Why so?", LONG * 2)], [row("How so?", LONG * 2)]) == [("a.jsonl", 1, "OVERLAP")]
    assert found([row(LONG)], [row(LONG[::-1])]) == []


@mutation("lora/data/lint.py", "turn = _numbers_sorted(turn) if loosely else turn", "turn = _numbers_sorted(turn)")
def test_swapped_operands_within_the_training_data_are_fine():
    assert codes(("计算874*265", "231610"), ("计算265*874", "231610")) == []
    assert codes(("计算874-265", "609"), ("计算265-874", "-609")) == []


# ---- the report ------------------------------------------------------------------------------------------------------


@mutation("lora/data/lint.py", 'file, _, line = where.rpartition(":")', 'file, _, line = where.partition(":")')
def test_rows_that_could_not_be_read_pass_through():
    broken = Problem("C:a:b.jsonl:7", "BROKEN", "no\nend")
    [finding] = check([broken, row("a", "b")])
    assert finding == ("C:a:b.jsonl", 7, "BROKEN", "no\nend")
    assert str(finding) == "C:a:b.jsonl:7: BROKEN: no\\nend"
    assert check([], [Problem("a.gz", "FILE", "empty")])[0][:2] == ("a.gz", 1)


@mutation("lora/data/lint.py", "return sorted([*found, *_overlap(*sets)])", "return [*found, *_overlap(*sets)]")
def test_the_report_is_sorted_by_file_line_and_code_whatever_the_order_of_rows():
    pairs = [("Who?", "I am [NAME]"), ("who", "network error"), ("Who", "I am [NAME]"), (LONG, "b"), (LONG + "!", "c")]
    lines = rows(*pairs * 3, file="b.jsonl") + rows(*pairs, file="a.jsonl")
    findings = check(lines)
    assert findings == sorted(findings) == check(lines)
    assert [f.line for f in findings if f.file == "b.jsonl"][-1] > 9  # numbers, not text
    assert {f.code for f in findings} <= set(CODES)


@mutation(
    "lora/data/lint.py",
    'return one_line(f"{self.file}:{self.line}: {self.code}: {self.message}")',
    'return f"{self.file}:{self.line}: {self.code}: {self.message}"',
)
def test_every_finding_is_one_printable_line():
    nasty = "[NAME] \x1b[31m\u202e\r\n\ud800 " * 30
    lines = [row(nasty, nasty, where="a\n\x1b.jsonl:1", shape="x\n"), row(nasty, nasty + "b", where="a\n\x1b.jsonl:2")]
    lines.append(row("network error\u2028" * 5, "network error\x00", where="a:3"))
    findings = check(lines, lines)
    assert {"PLACEHOLDER", "LEFTOVER", "SCHEMA", "OVERLAP"} <= {f.code for f in findings}
    for finding in findings:
        assert str(finding).isprintable() and len(str(finding)) < 300
        assert re.fullmatch(r".+:\d+: [A-Z-]+: .+", str(finding))


@settings(deadline=None, max_examples=150)
@given(st.lists(st.tuples(st.text(max_size=30), st.text(st.characters(), max_size=30)), max_size=6))
def test_any_text_can_be_checked(pairs):
    findings = check(rows(*pairs), rows(*pairs, file="e.jsonl"))
    assert {f.line for f in findings if f.code == "OVERLAP"} == set(range(1, len(pairs) + 1))
    assert all(str(f).isprintable() for f in findings)


# ---- near-duplicates by definition -----------------------------------------------------------------------------------


def jaccard(one, other):
    one, other = ({text[i : i + 5] for i in range(len(text) - 4)} for text in (one, other))
    return len(one & other) / len(one | other) if one | other else 0.0


def families(seed, count=300, alphabet="abcdefghij一二三四五"):
    """Texts of 3 to 400 characters, most of them an earlier one with a few changes."""
    source, texts = random.Random(seed), []
    while len(texts) < count:
        text = "".join(source.choices(alphabet, k=source.choice([3, 4, 5, 6, 20, 60, 200, 400])))
        if texts and source.random() < 0.75:
            text = source.choice(texts)
            for _ in range(source.randint(1, 1 + len(text) // 60)):
                place = source.randrange(len(text) + 1)
                text = (
                    text[:place] + source.choice([source.choice(alphabet), ""]) + text[place + source.randint(0, 1) :]
                )
        if text and text not in texts:
            texts.append(text)
    return texts


def groups(pairs):
    """The connected components of a graph, as a set of sets."""
    parts = {}
    for one, other in pairs:
        joined = parts.get(one, frozenset([one])) | parts.get(other, frozenset([other]))
        parts |= dict.fromkeys(joined, joined)
    return set(parts.values())


@mutation("lora/data/near.py", "10 * shared >= 9 *", "10 * shared >= 8 *")
@mutation("lora/data/near.py", "(len(ours) + len(theirs) - shared) > 0", "min(len(ours), len(theirs)) > 0")
@mutation("lora/data/lint.py", "queue.append(row)", "pass")
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.large) for seed in (2, 3))])
def test_near_duplicates_are_those_that_every_pair_compared_gives(seed):
    texts = families(seed)
    expected = [(i, j) for j in range(len(texts)) for i in range(j) if 10 * jaccard(texts[i], texts[j]) >= 9]
    pairs = list(near.near_pairs(texts))
    assert len(expected) > 30
    assert set(pairs) <= set(expected)
    assert groups(pairs) == groups(expected)
    assert len(pairs) == sum(len(group) - 1 for group in groups(expected))
    reported = {line for _, line, code in found(rows(*((text,) for text in texts))) if code == "NEAR-DUPLICATE"}
    assert reported == {place + 1 for group in groups(expected) for place in group - {min(group)}}


@mutation("lora/data/near.py", "(one < split) & (split <= other) if split else one < other", "one < other")
@pytest.mark.parametrize("seed", range(2))
def test_across_a_split_every_later_text_that_is_near_an_earlier_one_is_found(seed):
    texts = families(seed + 10)
    pairs = set(near.near_pairs(texts, 200))
    expected = {(i, j) for j in range(200, 300) for i in range(200) if 10 * jaccard(texts[i], texts[j]) >= 9}
    assert pairs <= expected
    assert {j for _, j in pairs} == {j for _, j in expected} != set()


def test_the_order_of_rows_changes_no_group():
    texts = families(5)
    lines = {text: row(text, where=f"a.jsonl:{number}") for number, text in enumerate(texts, 1)}

    def together(order):
        findings = check([lines[text] for text in order])
        return groups((f.line, int(re.search(r"a\.jsonl:(\d+)", f.message)[1])) for f in findings)

    shuffled = texts[:]
    random.Random(0).shuffle(shuffled)
    assert together(texts) == together(shuffled) != set()


@mutation(
    "lora/data/near.py",
    "_mix(np.arange(1, 2 * count + 1, dtype=np.uint64))",
    "_mix(np.ones(2 * count, dtype=np.uint64))",
)
def test_signatures_agree_as_often_as_the_sets_do():
    """The share of equal hashes estimates the Jaccard similarity: 40 pairs, each within 5 standard deviations."""
    source = random.Random(1)
    base = ["".join(source.choices("abcdefghijklmnop", k=300)) for _ in range(40)]
    other = [text[: 300 - 6 * cut] + "z" * 6 * cut for cut, text in enumerate(base)]
    _, hashes = near._signatures([*base, *other])
    shares = (hashes[:40] == hashes[40:]).mean(axis=1)
    exact = np.array([jaccard(*pair) for pair in zip(base, other, strict=True)])
    assert np.all(np.abs(shares - exact) < 5 * np.sqrt(exact * (1 - exact) / hashes.shape[1]) + 0.01)
    assert exact.min() < 0.3


@mutation("lora/data/near.py", "whole[ends - place] = False", "whole[ends - 1] = False")
def test_a_signature_does_not_depend_on_the_texts_beside_it(monkeypatch):
    texts = [text for text in families(6, 60) if len(text) >= 5]
    together = near._signatures(texts)
    monkeypatch.setattr(near, "CHUNK", 1)
    for one, other in zip(together, near._signatures(texts), strict=True):
        assert np.array_equal(one, other)


@mutation("lora/data/near.py", "BANDS, ROWS = 22, 12", "BANDS, ROWS = 4, 66")
def test_candidates_at_the_threshold_are_found():
    """200 pairs of 380 equal 5-grams and 40 others or fewer: each is missed with a probability below 0.0007."""
    source, texts = random.Random(2), []
    for _ in range(200):
        text = "".join(source.choices("abcdefghijklmnopqrstuvw", k=384))
        texts += [text + "".join(source.choices("XYZ", k=20)), text + "".join(source.choices("UVW", k=20))]
    pairs = set(near.near_pairs(texts))
    assert all(0.9 <= jaccard(*texts[i : i + 2]) < 0.93 for i in range(0, 400, 2))
    assert sum((i, i + 1) in pairs for i in range(0, 400, 2)) >= 198


# ---- hostile data ----------------------------------------------------------------------------------------------------


def comparisons(monkeypatch, texts):
    count, is_near = [0], near.is_near

    def counted(one, other):
        count[0] += 1
        return is_near(one, other)

    monkeypatch.setattr(near, "is_near", counted)
    return found(rows(*((text,) for text in texts))), count[0]


def test_equal_rows_are_compared_with_nothing(monkeypatch):
    findings, count = comparisons(monkeypatch, [LONG] * 3000)
    assert (len(findings), count) == (2999, 0)


@mutation("lora/data/near.py", "if ours == theirs or vain", "if vain")
def test_rows_that_are_all_near_need_as_many_comparisons_as_rows(monkeypatch):
    findings, count = comparisons(monkeypatch, [f"{LONG} {LONG[::-1]} {number}" for number in range(2000)])
    assert [code for *_, code in findings] == ["NEAR-DUPLICATE"] * 1999
    assert count <= 3 * 2000


@mutation("lora/data/near.py", "            vain[other] += 1", "            pass")
def test_rows_that_are_all_nearly_near_need_few_comparisons_each(monkeypatch):
    source = random.Random(3)
    texts = [LONG + "".join(source.choices("ABCDEFGHIJ", k=10)) for _ in range(2000)]
    assert 0.8 < jaccard(texts[0], texts[1]) < 0.9
    _, count = comparisons(monkeypatch, texts)
    assert count <= (near.TRIES + 3) * 2000
