"""Prompts that never show the answer, and a teacher that is asked nothing twice by an endpoint that misbehaves."""

import gc
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from email.utils import formatdate
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_gen import asking, distill, endpoint, teacher
from data_gen.distill import Pair, Prompts
from data_gen.journal import Journal
from data_gen.teacher import Question, Reply
from lora import errors
from lora.errors import BadInput
from tests import cli
from tests.mutation import mutation
from tests.teacher_server import AT_ONCE, HTML, Say, TeacherServer, wrong

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-test-0123456789abcdefghij"
PAIRS = [(f"Question number {i}?", f"The answer to number {i} is {i * 7919 % 1000} apples.") for i in range(60)]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "OPENAI_BASE_URL", "OPENAI_LOG"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)  # seconds before a second attempt


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in PAIRS), encoding="utf-8")
    return path


def asked_of(prompt: str) -> str:
    """The question at the end of a prompt in the English frame."""
    return prompt.rsplit("Question: ", 1)[1].removesuffix("\nAnswer:")


def flags(server, folder, rows=12, out="out.jsonl", **more):
    words = ["--data", folder / "data.jsonl", "--rows", rows, "--base-url", server.url, "--teacher", "m"]
    words += ["--out", folder / out]
    for name, value in more.items():
        words += ["--" + name.replace("_", "-"), value]
    return [str(word) for word in words]


class Done:
    def __init__(self, code, capsys, out):
        self.code, (self.out, self.err) = code, capsys.readouterr()
        self.bytes = out.read_bytes() if out.exists() else None
        self.rows = [json.loads(line) for line in self.bytes.decode().splitlines()] if self.bytes else []
        self.answers = [row["messages"][1]["content"] for row in self.rows]


@pytest.fixture
def distilled(data, capsys):
    """Runs distill.py in this process."""

    def run(server, **how):
        out = data.parent / how.get("out", "out.jsonl")
        return Done(distill.main(flags(server, data.parent, **how)), capsys, out)

    return run


def scripted(*says: Say, then: Say = Say("fine")):  # noqa: B008
    """The first attempts of every question are answered so, later ones by `then`."""
    return lambda prompt, attempt: says[attempt - 1] if attempt <= len(says) else then


def a_teacher(server, *more):
    parser = errors.Parser()
    teacher.add_flags(parser)
    return teacher.from_flags(parser.parse_args(["--base-url", server.url, "--teacher", "m", *map(str, more)]))


def questions(count):
    return [Question(f"k{i}", [{"role": "user", "content": f"question {i}"}]) for i in range(count)]


# ---- prompts ---------------------------------------------------------------------------------------------------------

FRAME, EXAMPLE = "{examples}\x1f{question}", "{question}\x1d{answer}\x1e"  # easy to take apart


def parts(prompt):
    shown, asked = prompt.messages[0]["content"].split("\x1f")
    return asked, [tuple(text.strip("\n").split("\x1d")) for text in shown.split("\x1e")[:-1]]


def prompts(pairs, rows, seed=0, examples=3):
    return Prompts([Pair(q, a) for q, a in pairs], rows, seed, examples, FRAME, EXAMPLE)


def fold(text):
    return re.sub(r"\s+", " ", text.strip()).lower()


def check_prompts(pairs, made, examples=3):
    """What a set of prompts promises, counted again."""
    hidden = {}
    for question, answer in pairs:
        hidden.setdefault(fold(question), set()).add(fold(answer))
    seen = set()
    for prompt in made:
        asked, shown = parts(prompt)
        names = [fold(asked), *(fold(question) for question, _ in shown)]
        assert len(shown) == examples and len(set(names)) == examples + 1
        assert set(shown) <= set(pairs)
        text = fold(prompt.messages[0]["content"])
        for answer in hidden[fold(asked)]:
            assert answer not in {fold(a) for _, a in shown}
            if len(answer) >= distill.SHORT and answer not in fold(asked):
                assert answer not in text, f"{answer!r} is shown"
        seen.add((names[0], frozenset(names[1:])))
    assert len(seen) == len(made), "the same prompt twice"


def trapped(seed=0, count=120):
    """Pairs with every trap: questions twice, answers twice, answers inside other answers and questions."""
    draw = random.Random(seed)
    pairs = [(f"What of {i}?", f"It is {draw.randrange(10**6)} units of {i}.") for i in range(count)]
    for _ in range(count // 4):
        (q1, a1), (q2, a2) = draw.sample(pairs, 2)
        pairs += [(q1, a2), (q2 + " Please.", f"As they say:  {a1.upper()} Indeed."), (f"Is it so: {a2}", a2)]
        pairs.append((f"  {q1}\n", draw.choice(["Yes.", "No.", "I don't know that, sorry."])))
    return [(q.strip(), a) for q, a in pairs]


@mutation(
    "data_gen/distill.py",
    "return any(a in answers or any(h in a or h in q for h in hidden) for q, a in self._folded[group])",
    "return any(any(h in a or h in q for h in hidden) for q, a in self._folded[group])",
)
@mutation(
    "data_gen/distill.py",
    "by_question.setdefault(fold(pair.question), []).append(pair)",
    "by_question.setdefault(pair, []).append(pair)",
)
@mutation("data_gen/distill.py", 'return " ".join(text.split()).casefold()', "return text")
def test_a_thousand_prompts_have_four_different_questions_and_never_show_the_answer():
    pairs = trapped()
    made = prompts(pairs, 1000)
    assert len(made) == 1000
    check_prompts(pairs, made)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_prompts_of_any_small_data_keep_what_they_promise(data):
    word = st.sampled_from(
        ["the red fox", "The Red  Fox", "a small cat", "ok", "the red fox and a small cat", "a", "b"]
    )
    text = st.lists(word, min_size=1, max_size=2).map(" ".join)
    pairs = data.draw(st.lists(st.tuples(text, text), min_size=1, max_size=12))
    count = data.draw(st.integers(1, 3))
    try:
        made = prompts(pairs, data.draw(st.integers(1, 12)), data.draw(st.integers(0, 9)), count)
    except BadInput:
        return
    check_prompts(pairs, made, count)


def test_the_examples_are_found_where_nearly_every_row_would_give_the_answer_away():
    pairs = [(f"Who is {i}?", "That is something I can't tell you.") for i in range(300)]
    pairs += [
        ("Who is Ann?", "My sister, of course."),
        ("Who is Bob?", "My brother, too."),
        ("And Eve?", "Nobody else."),
    ]
    made = prompts(pairs, 200)
    check_prompts(pairs, made)
    assert made.unusable == 0
    with pytest.raises(BadInput, match="give 0 different prompts"):
        prompts(pairs[:300], 1)


@mutation("data_gen/distill.py", "return None if any(answer in text for answer in hidden) else shown", "return shown")
def test_an_answer_that_appears_only_where_two_texts_meet_is_not_shown():
    pairs = [("Count?", "one two three"), ("say one", "two three four"), *PAIRS[:4]]
    made = Prompts([Pair(*pair) for pair in pairs], 20, 0, 3, FRAME, "{question} {answer}")
    for row, prompt in enumerate(made):
        assert made.question(row) != "Count?" or "one two three" not in prompt.messages[0]["content"]
    assert "one two three" in "".join(prompt.messages[0]["content"] for prompt in made)


@mutation("data_gen/distill.py", "for asked in order:", "for asked in draw.choices(order, k=len(order)):")
def test_questions_are_used_evenly_and_the_seed_decides():
    one, again, other, longer = prompts(PAIRS, 150), prompts(PAIRS, 150), prompts(PAIRS, 150, 1), prompts(PAIRS, 200)
    times = Counter(parts(prompt)[0] for prompt in one)
    assert sorted(times.values()) == [2] * 30 + [3] * 30
    assert list(one) == list(again) != list(other)
    assert list(longer)[:150] == list(one)
    assert [parts(prompt)[0] for prompt in one] == [one.question(row) for row in range(150)]


@mutation("data_gen/distill.py", "used.add(hash(frozenset(groups)))", "used.add(hash(tuple(groups)))")
def test_all_different_prompts_are_found_and_no_more():
    made = prompts(PAIRS[:6], 6 * 10)  # C(5, 3) sets of examples for each question
    check_prompts(PAIRS[:6], made)
    with pytest.raises(BadInput, match="6 different questions give 60 different prompts, not 61"):
        prompts(PAIRS[:6], 61)


@mutation(
    "data_gen/distill.py",
    'return SLOT.sub(lambda slot: values.get(slot[1], ""), text)',
    'return SLOT.sub(lambda slot: values.get(slot[1], ""), SLOT.sub(lambda slot: values.get(slot[1], ""), text))',
)
def test_texts_with_braces_are_taken_literally():
    pairs = [(f"{{question}} {{examples}} {i}", f"{{answer}} {{n}} \\1 {i}") for i in range(4)]
    assert parts(prompts(pairs, 1)[0])[0] in dict(pairs)
    check_prompts(pairs, prompts(pairs, 4))


@pytest.mark.parametrize("lang", distill.FRAMES)
def test_the_prompt_shows_examples_then_asks(lang):
    made = Prompts([Pair(*pair) for pair in PAIRS[:4]], 4, 0, 3, *distill.FRAMES[lang])
    for row, prompt in enumerate(made):
        text = prompt.messages[0]["content"]
        assert not re.search(r"[{}]", text) and "3" in text
        others = [pair for pair in PAIRS[:4] if pair[0] != made.question(row)]
        places = [text.index(part) for pair in sorted(others, key=lambda pair: text.index(pair[0])) for part in pair]
        assert places == sorted(places) and places[-1] < text.index(made.question(row))


# ---- which answers are rows ------------------------------------------------------------------------------------------

BAD = {
    "refused": [
        "I'm sorry, but I can't help with that.", "I’m sorry, but I cannot do this", "Sorry, I can't.",
        "As an AI language model, I", "I apologize, but I am unable to", "I cannot fulfill this request.",
        "I'm just an AI, so", "抱歉，我无法回答这个问题。", "很抱歉，但我不能", "对不起, 我没办法",
        "作为一个AI语言模型，我", "作为人工智能", "抱歉，这个问题我无法回答", "我无法提供相关信息。",
        "Answer: I'm sorry, but I can't.", "答：作为一名人工智能助手，",
    ],
    "refused ": [  # by a program on the way
        "Network error", "network error: try again", "Error: 500", "<!DOCTYPE html><html>", '{"error": {}}',
        "Too many requests", "网络错误，请稍后再试", "服务器开小差了", "请求过于频繁", "出错了",
    ],
    "empty": ["", " \n", "答：", "Answer: "],
}  # fmt: skip
GOOD = [
    "Sorry to hear that! Rest well.", "I'm sorry about the delay; it ships tomorrow.",
    "As an airline pilot, I say: brake.", "Network errors come from cables, mostly.",
    "Rate limiting is a technique to protect a server.", "对不起，我来晚了，你说吧。", "作为一个爱好者，我觉得挺好。",
    "这事儿吧，得看情况。", "I can't stop laughing, but fine.", "是AI写的。", "An error a day keeps boredom away.",
    "抱歉，我是个粗人。", "网络小说，我都看。", "Error: " + "this long answer explains what an error message is. " * 5,
]  # fmt: skip


@pytest.mark.parametrize(("reason", "text"), [(reason, text) for reason, texts in BAD.items() for text in texts])
def test_refusals_and_error_messages_are_no_answers(reason, text):
    assert distill.why_not(Reply("1", text, "stop", 0)) == reason.strip()


@pytest.mark.parametrize(
    ("finish", "reason"),
    [("length", "truncated"), ("MAX_TOKENS", "truncated"), ("SAFETY", "filtered"), ("end_turn", None), ("eos", None)],
)
def test_the_reason_to_stop_is_understood_from_several_endpoints(finish, reason):
    assert distill.why_not(Reply("1", "fine", finish, 0)) == reason


@pytest.mark.parametrize("text", GOOD)
def test_answers_that_only_resemble_a_refusal_are_kept(text):
    assert distill.why_not(Reply("1", text, "stop", 0)) is None


@mutation("data_gen/distill.py", '**dict.fromkeys(("length", "max_tokens", "max_output_tokens"), "truncated"),', "")
@mutation("data_gen/distill.py", 'return BEFORE.sub("", reply.text, count=1).strip()', "return reply.text.strip()")
@mutation("data_gen/asking.py", 'return text.encode(errors="replace").decode()', "return text")
@mutation(
    "data_gen/distill.py",
    "question = prompts.question(int(reply.key) - 1)",
    "question = prompts.question(counts.total() * 7 % len(prompts))",
)
def test_what_is_kept_out_is_counted_and_the_rest_is_in_order(distilled):
    def script(prompt, attempt):
        number = int(re.search(r"\d+", asked_of(prompt))[0])
        return [
            Say(f" <think>Answer:\nsorry</think>\n Answer: fine, {number} ", delay=number % 3 * 0.01),
            Say("cut off here", finish="length"),
            Say("As an AI language model, I", delay=0.01),
            Say("", finish="content_filter"),
            Say(None, more={"refusal": "No."}),
            Say(" \n"),
            wrong(400),
            Say(f"{number} half a \ud800 character, more tokens", usage=None),
        ][number % 8]

    with TeacherServer(script) as server:
        done = distilled(server, rows=60)
        assert len(server.asked) == 60
    numbers = [int(re.search(r"\d+", asked_of(p))[0]) for p in prompts_asked(60)]
    good = [n for n in numbers if n % 8 in (0, 7)]
    assert [row["messages"][0]["content"] for row in done.rows] == [f"Question number {n}?" for n in good]
    assert done.answers == [f"{n} half a ? character, more tokens" if n % 8 else f"fine, {n}" for n in good]
    assert done.code == 0 and "15 rows in" in done.err
    assert "kept out: 7 failed, 8 truncated, 15 filtered, 7 empty, 8 refused" in done.err
    assert "60 requests, 460 tokens" in done.err and "(HTTP 400: 7;" in done.err


def prompts_asked(rows):
    """The prompts of the test data, in order of the rows."""
    made = Prompts([Pair(*pair) for pair in PAIRS], rows, 0, 3, *distill.FRAMES["en"])
    return [prompt.messages[0]["content"] for prompt in made]


@mutation("data_gen/distill.py", 'f"{fold(question)}\\n{fold(answer)}"', 'f"{fold(question)}\\n{answer}"')
def test_the_same_answer_to_the_same_question_is_a_row_once(distilled):
    def script(prompt, attempt):
        return Say("The  same\nanswer." if len(prompt) % 2 else "the same answer.")

    with TeacherServer(script) as server:
        done = distilled(server, rows=120)
    assert len(done.rows) == 60 and "kept out: 60 duplicate" in done.err
    assert len({row["messages"][0]["content"] for row in done.rows}) == 60


# ---- an endpoint that misbehaves -------------------------------------------------------------------------------------


@mutation("data_gen/endpoint.py", "if response is None or (trouble and response.is_success):", "if response is None:")
@mutation("data_gen/endpoint.py", "max_retries=ATTEMPTS - 1", "max_retries=0")
@mutation("data_gen/endpoint.py", "        except (ValueError, RecursionError):", "        except ValueError:")
@mutation("data_gen/endpoint.py", "raise self._http.ReadError(trouble, request=request)", "raise _Ended")
@mutation(
    "data_gen/endpoint.py",
    "except (ValueError, KeyError, AttributeError, RecursionError):",
    "except (ValueError, KeyError, AttributeError):",
)
@pytest.mark.parametrize(
    "say",
    [
        wrong(429, headers=AT_ONCE), wrong(500), wrong(503), wrong(408), wrong(529), HTML, Say(cut=True),
        Say(body=b"{}"),
        Say(body=b'{"choices": [{"message": {"content": 7}}]}'), Say(body=b"[" * 100_000), Say(body=b"\xff"),
        Say(status=500, body=b"[" * 100_000),
        Say(status=502, body=b"<html>", headers={"Content-Type": "text/html"}),
    ],
    ids=lambda say: f"{say.status}-{'cut' if say.cut else (say.body or b'')[:9].decode(errors='replace')}",
)  # fmt: skip
def test_a_passing_trouble_is_asked_again_and_nothing_is_lost(distilled, say):
    with TeacherServer(scripted(say, say, then=Say("fine"))) as server:
        done = distilled(server, rows=4)
        assert (done.code, done.answers, len(server.asked)) == (0, ["fine"] * 4, 12)


@mutation("data_gen/distill.py", 'if not counts["written"]:', "if False:")
def test_a_closed_port_is_a_trouble_and_nothing_is_written(distilled, monkeypatch, tmp_path):
    monkeypatch.setattr(endpoint, "ATTEMPTS", 2)
    with TeacherServer() as server:
        pass
    done = distilled(server)
    assert done.code == 3 and done.bytes is None and "kept out: 12 failed" in done.err
    first, last = done.err.splitlines()
    assert first.startswith("the endpoint's first trouble: no connection: ") and last.startswith("error: no rows in ")


def test_an_address_where_nothing_answers_is_given_up_before_all_attempts(distilled):
    with TeacherServer() as server:
        pass
    done = distilled(server, concurrency=2)
    assert done.code == 3 and done.bytes is None and "nothing answers at --base-url" in done.err


@mutation("data_gen/endpoint.py", "max_retries=ATTEMPTS - 1", "max_retries=ATTEMPTS")
@mutation(
    "data_gen/endpoint.py",
    "return self._lose(question, self._safe(",
    "return (lambda *a: 0)(question, self._safe(",
)
def test_trouble_that_does_not_pass_fails_the_question_after_so_many_attempts(distilled):
    def script(prompt, attempt):
        return wrong(500) if asked_of(prompt) == "Question number 3?" else Say("fine")

    with TeacherServer(script) as server:
        done = distilled(server, rows=60)
        assert len(server.asked) == 59 + endpoint.ATTEMPTS and len(done.rows) == 59
        assert "kept out: 1 failed" in done.err
        server.script = lambda prompt, attempt: Say("late")
        done = distilled(server, rows=60)  # the next run asks for what is missing, and only that
        assert len(server.asked) == 60 + endpoint.ATTEMPTS and Counter(done.answers) == {"fine": 59, "late": 1}


@pytest.mark.parametrize(
    ("name", "value", "seconds"), [("Retry-After", "1", 1), ("retry-after-ms", "300", 0.3), ("Retry-After", "date", 1)]
)
def test_no_request_comes_before_the_moment_that_the_server_named(distilled, name, value, seconds):
    """The client sees to that; a date has whole seconds, so that one two seconds away is more than one away."""

    def script(prompt, attempt):
        when = formatdate(time.time() + 2, usegmt=True) if value == "date" else value
        return wrong(429, headers={name: when}) if attempt == 1 else Say("fine")

    with TeacherServer(script) as server:
        done = distilled(server, rows=1)
        assert done.code == 0 and len(server.asked) == 2
        assert server.asked[1].time - server.asked[0].time >= seconds


@mutation("data_gen/endpoint.py", "            self._quiet.add(task)", "            pass")
def test_while_the_server_wants_quiet_the_other_questions_wait_too(distilled):
    start = []

    def script(prompt, attempt):
        if start:
            return Say("fine")
        start.append(time.monotonic())
        return wrong(429, headers={"retry-after-ms": "500"})

    with TeacherServer(script) as server:
        distilled(server, rows=40, concurrency=2)
        early = [asked.time for asked in server.asked if asked.time - start[0] < 0.5]
        assert len(server.asked) == 41 and len(early) <= 4  # the first, and what was under way


@mutation(
    "data_gen/endpoint.py",
    'self.stopped = self.stopped or f"the endpoint asks to wait ({wait})"',
    'self._lose(question, "HTTP 429", wait)',
)
def test_a_server_that_asks_for_too_much_patience_ends_the_run_with_what_is_there(distilled):
    def script(prompt, attempt):
        return Say("fine") if len(server.asked) <= 5 else wrong(429, headers={"Retry-After": "86400"})

    with TeacherServer(script) as server:
        done = distilled(server, concurrency=1)
        assert done.code == 0 and len(done.rows) == 5 and len(server.asked) == 6
        assert "7 of 12 questions were not asked: the endpoint asks to wait (Retry-After: 86400)" in done.err


@mutation("data_gen/endpoint.py", "asking -= {task for task in self._quiet if task.cancel()}", "pass")
def test_nobody_is_waited_for_who_only_waits_when_the_run_has_ended(distilled):
    def script(prompt, attempt):
        first = len(server.asked) == 1
        return wrong(429, headers={"Retry-After": "60" if first else "86400"}, delay=0 if first else 0.3)

    with TeacherServer(script) as server:
        began = time.monotonic()
        done = distilled(server, concurrency=2)
        assert time.monotonic() - began < 30 and len(server.asked) == 2
    assert done.code == 3 and "the endpoint asks to wait (Retry-After: 86400)" in done.err


@mutation("data_gen/endpoint.py", "async with asyncio.timeout(self.deadline):", "async with asyncio.timeout(None):")
def test_the_deadline_holds_against_a_slow_drip(distilled):
    with TeacherServer(scripted(Say(drip=0.05))) as server:  # 5 seconds and more in all, never long silent
        done = distilled(server, rows=2, deadline=1)
        assert done.answers == ["fine"] * 2 and len(server.asked) >= 4


@mutation(
    "data_gen/endpoint.py", "while len(asking) < self.concurrency and", "while len(asking) <= self.concurrency and"
)
def test_never_more_requests_at_once_than_allowed(distilled):
    with TeacherServer(lambda prompt, attempt: Say("fine", delay=0.01)) as server:
        distilled(server, rows=30, concurrency=3)
        assert server.most_at_once == 3


def test_one_slow_answer_does_not_hold_up_the_others(distilled):
    """The first row's answer comes when all others have been asked."""
    first = prompts_asked(1)[0]

    def script(prompt, attempt):
        if prompt == first:
            for _ in range(1000):
                if len(server.asked) == 40:
                    return Say("last")
                time.sleep(0.01)
        return Say("fine")

    with TeacherServer(script) as server:
        done = distilled(server, rows=40, concurrency=2)
    assert done.answers == ["last"] + ["fine"] * 39


@mutation(
    "data_gen/endpoint.py",
    "return response and FATAL.get(402 if _no_credit(response) else response.status_code)",
    "return response and FATAL.get(402 if _no_credit(response) else response.status_code % 401)",
)
@pytest.mark.parametrize(("status", "words"), [(401, "key is refused"), (403, "access is denied"),
                                               (404, "no such place"), (402, "no credit")])  # fmt: skip
def test_what_is_wrong_for_every_question_ends_the_run_at_once(distilled, status, words):
    with TeacherServer(lambda prompt, attempt: wrong(status, "why not")) as server:
        done = distilled(server, concurrency=1)
        assert (done.code, done.bytes, len(server.asked)) == (2, None, 1)
    assert len(done.err.splitlines()) == 1 and words in done.err and f"HTTP {status}: why not" in done.err


@mutation("data_gen/endpoint.py", 'response.headers["x-should-retry"] = "false"', "pass")
def test_an_empty_account_is_no_rate_limit(distilled):
    with TeacherServer(lambda prompt, attempt: wrong(429, code="insufficient_quota")) as server:
        done = distilled(server, concurrency=1)
        assert done.code == 2 and "no credit" in done.err and len(server.asked) == 1


def test_a_missing_key_matters_only_if_the_endpoint_asks_for_one(distilled, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with TeacherServer() as server:
        assert distilled(server).code == 0
        server.script = lambda prompt, attempt: wrong(401)
        done = distilled(server, out="other.jsonl", key_env="MY_KEY")
    assert done.code == 2 and "Set $MY_KEY to a valid key" in done.err


@mutation("data_gen/asking.py", "if self._in_a_row >= MOST_FAILED:", "if False:")
def test_an_endpoint_that_fails_every_question_is_given_up(distilled):
    with TeacherServer(lambda prompt, attempt: wrong(400, "unknown parameter")) as server:
        done = distilled(server, rows=60, concurrency=1)
        assert len(server.asked) == asking.MOST_FAILED
    assert done.code == 3 and "20 questions in a row failed" in done.err and done.bytes is None


def test_newer_models_name_for_the_limit_is_used_where_the_old_one_is_refused(distilled):
    def script(prompt, attempt):
        if "max_tokens" in server.asked[-1].body:
            return wrong(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        return Say("fine")

    with TeacherServer(script) as server:
        done = distilled(server, concurrency=1, answer_tokens=77, temperature=0.5)
        assert len(done.rows) == 12 and len(server.asked) == 13
        assert server.asked[-1].body["max_completion_tokens"] == 77 and server.asked[-1].body["temperature"] == 0.5
        assert server.asked[-1].path == "/v1/chat/completions" and server.asked[-1].body["model"] == "m"


# ---- the key ---------------------------------------------------------------------------------------------------------


@mutation(
    "data_gen/endpoint.py",
    'words = words.replace(self._key, "[key]") if self._key else words',
    'words = errors.one_line(" ".join(words.split()))[:200].replace(self._key, "[key]")',
)
@mutation(
    "data_gen/endpoint.py",
    'return mend(text.replace(self._key, "[key]") if len(self._key) >= 8 else text)',
    "return mend(text)",
)
def test_the_key_is_sent_and_appears_nowhere(distilled, tmp_path):
    def script(prompt, attempt):
        number = int(re.search(r"\d+", asked_of(prompt))[0])
        long = wrong(400, f"bad request with {KEY}, {'x' * 120} {KEY}")  # shortened, it ends in the middle of a key
        bad = Say(status=400, echo=True) if len(server.asked) < 10 else long
        return [bad, bad, Say(f"Your key is {KEY}."), Say("fine", finish=KEY)][number % 4]

    with TeacherServer(script) as server:
        done = distilled(server, rows=20, concurrency=1)
        assert {asked.key for asked in server.asked} == {f"Bearer {KEY}"}
    assert "Your key is [key]." in done.answers and "bad request with" in done.err
    for text in (done.out, done.err, *(path.read_text(errors="replace") for path in tmp_path.iterdir())):
        assert KEY[:12] not in text


@mutation("data_gen/endpoint.py", "[task.exception() for task in done]", "(task.exception() for task in done)")
def test_an_error_that_several_questions_have_at_once_is_said_once(distilled, caplog):
    at_once = threading.Barrier(8)

    def script(prompt, attempt):
        at_once.wait(10)
        return wrong(401)

    for _ in range(4):  # on a busy machine they may come one after another
        with TeacherServer(script) as server:
            done = distilled(server, concurrency=8)
        gc.collect()  # asyncio tells then of errors that nobody has looked at
        assert done.code == 2 and len(done.err.splitlines()) == 1 and not caplog.records


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_fatal_error_that_echoes_the_key_does_not_show_it(distilled, monkeypatch, status):
    monkeypatch.setenv("LORA_DEBUG", "1")
    with TeacherServer(lambda prompt, attempt: Say(status=status, echo=True)) as server:
        done = distilled(server)
    assert done.code == 2 and "bad request with Bearer [key]" in done.err and KEY[:12] not in done.err + done.out


# ---- budgets ---------------------------------------------------------------------------------------------------------


@mutation(
    "data_gen/asking.py",
    "if self._before + self.requests >= self.max_requests:",
    "if self.requests >= self.max_requests:",
)
def test_a_budget_of_requests_stops_and_a_larger_one_goes_on_to_the_same_bytes(distilled):
    with TeacherServer() as server:
        whole = distilled(server, rows=30, out="whole.jsonl")
        server.asked.clear()
        part = distilled(server, rows=30, max_requests=11)
        assert part.code == 0 and len(server.asked) == 11 and part.bytes == b"".join(whole.bytes.splitlines(True)[:11])
        assert "19 of 30 questions were not asked: --max-requests 11 is reached" in part.err
        again = distilled(server, rows=30, max_requests=11)
        assert len(server.asked) == 11 and again.bytes == part.bytes
        rest = distilled(server, rows=30, max_requests=30)
        assert len(server.asked) == 30 and rest.bytes == whole.bytes and "not asked" not in rest.err


@mutation("data_gen/asking.py", "reply.tokens or asked + len(reply.text.encode())", "reply.tokens")
@mutation("data_gen/journal.py", "sum(tokens), sum(cost) from replies", "sum(tokens), 0 from replies")
def test_a_budget_of_tokens_counts_earlier_runs_and_bytes_where_tokens_are_not_told(distilled):
    with TeacherServer() as server:  # 10 tokens each
        assert len(distilled(server, concurrency=1, max_tokens=45).rows) == 5
        assert len(distilled(server, concurrency=1, max_tokens=65).rows) == 7
        server.script = lambda prompt, attempt: Say("fine", usage=None)
        done = distilled(server, concurrency=1, max_tokens=1_000, out="other.jsonl")
        assert 1 <= len(done.rows) < 5 and "--max-tokens 1000 is reached" in done.err


def test_retries_count_as_requests(distilled):
    with TeacherServer(scripted(wrong(500))) as server:
        done = distilled(server, concurrency=1, max_requests=7)
        assert len(server.asked) == 7 and len(done.rows) == 3
        distilled(server, concurrency=1, max_requests=8)
        assert len(server.asked) == 9  # the answers there took 6; the seventh request had none


# ---- the journal -----------------------------------------------------------------------------------------------------


def in_journal(path):
    """The keys of its replies, in the order they were added."""
    if not path.exists():
        return []
    with closing(sqlite3.connect(path)) as db:
        return [key for (key,) in db.execute("select key from replies order by rowid")]


def start(server, data, **how):
    environment = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "data_gen/distill.py"), *flags(server, data.parent, **how)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, running):
    deadline = time.monotonic() + cli.SECONDS
    while not condition():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_killed_again_and_again_it_asks_nothing_answered_twice_and_loses_nothing(distilled, data, tmp_path):
    silent_from = [1000]

    def script(prompt, attempt):
        late = len(server.asked) >= silent_from[0]
        return Say(f"answer to {asked_of(prompt)}", delay=60 if late else len(prompt) % 3 * 0.005)

    path = tmp_path / "out.jsonl.journal"
    with TeacherServer(script) as server:
        whole = distilled(server, rows=60, out="whole.jsonl")
        server.asked.clear()
        answered = []
        for kill_after in (9, 16, 14):
            silent_from[0] = len(server.asked) + kill_after
            running = start(server, data, rows=60, concurrency=4)
            wait_for(lambda: len(server.asked) == silent_from[0] + 3, running)
            running.kill()
            running.communicate()
            before, answered = answered, in_journal(path)
            assert answered[: len(before)] == before and len(set(answered)) == len(answered)
            assert len(answered) == len(before) + kill_after - 1
            since, silent_from[0] = len(server.asked), 1000
        assert not (tmp_path / "out.jsonl").exists()
        done = distilled(server, rows=60, concurrency=4)
        asked_again = server.prompts()[since:]
    of_key = {str(row + 1): prompt for row, prompt in enumerate(prompts_asked(60))}
    assert sorted(asked_again) == sorted(prompt for key, prompt in of_key.items() if key not in answered)
    assert done.code == 0 and done.bytes == whole.bytes
    assert sorted(map(int, in_journal(path))) == list(range(1, 61))


def test_ctrl_c_stops_at_once_without_a_trace_and_the_next_run_goes_on(distilled, data, tmp_path):
    with TeacherServer(lambda prompt, attempt: Say("fine", delay=0.02 if len(server.asked) < 20 else 60)) as server:
        running = start(server, data, rows=40, concurrency=4)
        wait_for(lambda: len(server.asked) == 23, running)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=30)
        assert (running.returncode, out) == (130, "")
        assert err == f"\nstopped; the same command goes on with the answers in {tmp_path}/out.jsonl.journal\n"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "out.jsonl.journal"]
        answered = len(in_journal(tmp_path / "out.jsonl.journal"))
        server.script = lambda prompt, attempt: Say("fine")
        server.asked.clear()
        done = distilled(server, rows=40)
        assert len(done.rows) == 40 and len(server.asked) == 40 - answered and answered >= 19


@mutation("data_gen/journal.py", '        self._db.execute("commit")', "        pass")
def test_a_process_killed_at_any_moment_loses_no_reply_that_was_added(tmp_path):
    """A child adds replies and says each one; what it said before SIGKILL is there, and at most one more."""
    path, said = tmp_path / "j", 0
    for round in range(20):
        heard, say = os.pipe()
        if (child := os.fork()) == 0:
            book = Journal(path, {})
            for number in range(10**6):
                key = f"{round} {number}"
                book.add(Question(key, []), Reply(key, "é" * 1000 * (number % 9), "stop", 1), 1, 1)
                os.write(say, b".")
        time.sleep(random.uniform(0.05, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(say)
        said += len(os.read(heard, 10**6))
        os.close(heard)
        with closing(Journal(path, {})) as book:
            assert said <= book.tokens <= said + round + 1
            for key in in_journal_open(book):
                assert book[key] == Reply(key, "é" * 1000 * (int(key.split()[1]) % 9), "stop", 1)
            said = book.tokens
    assert said > 20


def in_journal_open(book):
    return [key for (key,) in book._db.execute("select key from replies")]


@mutation("data_gen/journal.py", "os.path.getsize(self.path) < pages * size", "False")
@mutation("data_gen/journal.py", "if code == sqlite3.SQLITE_CORRUPT:", "if False:")
@mutation("data_gen/journal.py", 'if problem != "ok" or', "if")
def test_a_damaged_journal_is_refused_in_one_line_and_kept(tmp_path):
    path = tmp_path / "j"
    with TeacherServer(lambda prompt, attempt: Say("x" * 7000)) as server:
        expected = list(a_teacher(server).ask(questions(1), path))
        whole = path.read_bytes()  # its last byte is the last of the reply
        index = whole.rindex(b"k0")  # in the table's index: no reply is under this key any more
        damaged = [whole[:end] for end in (*range(2, len(whole), 797), len(whole) - 1)]
        damaged += [whole[:4096] + bytes(4096) + whole[8192:], whole[:index] + b"kX" + whole[index + 2 :]]
        for data in damaged:
            path.write_bytes(data)
            with pytest.raises(BadInput, match=r"^(damaged journal|wrong file) in .*") as error:
                list(a_teacher(server).ask(questions(1), path))
            assert len(error.value.problems) == 1 and path.read_bytes() == data
        path.write_bytes(b"")  # a run that was killed at once
        assert list(a_teacher(server).ask(questions(1), path)) == expected and len(server.asked) == 2


@mutation("data_gen/journal.py", "if [type(value) for value in reply] != [str, str, str, int]:", "if False:")
@mutation(
    "data_gen/journal.py", "        except (ValueError, TypeError, RecursionError):", "        except RecursionError:"
)
@mutation(
    "data_gen/journal.py",
    "except (sqlite3.Error, UnicodeDecodeError) as error:\n            raise self._wrong(error)",
    "except ZeroDivisionError as error:\n            raise self._wrong(error)",
)
@mutation("data_gen/journal.py", 'getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)', "error.sqlite_errorcode")
def test_a_journal_with_values_that_are_no_answers_is_refused_in_one_line(tmp_path):
    """SQLite's own check finds nothing wrong with most of these."""
    with TeacherServer() as server:
        list(a_teacher(server).ask(questions(1), tmp_path / "whole"))
        whole = (tmp_path / "whole").read_bytes()
        for i, statement in enumerate((
            "update replies set text = cast(x'ff' as text)",
            "update replies set text = x'41'",
            "update replies set text = null",
            "update replies set tokens = 'three'",
            "update about set value = 'no JSON'",
            "update about set value = null",
            None,
        )):  # fmt: skip
            path = tmp_path / f"j{i}"
            path.write_bytes(whole if statement else whole.replace(b"CREATE TABLE about", b"CREATE TABL\xff about"))
            if statement:
                with closing(sqlite3.connect(path)) as book:
                    book.execute(statement)
                    book.commit()
            with pytest.raises(BadInput, match=r"^damaged journal in .*") as error:
                list(a_teacher(server).ask(questions(1), path))
            assert len(error.value.problems) == 1 and len(server.asked) == 1


@mutation("data_gen/journal.py", "if earlier.exists() and not self.path.exists():", "if False:")
def test_the_journal_of_an_earlier_version_is_named_and_nothing_is_asked_again(distilled, tmp_path):
    old = tmp_path / "out.jsonl.journal.jsonl"
    old.write_text('{"journal": {"teacher": "m"}}\n')
    with TeacherServer() as server:
        done = distilled(server)
        assert done.code == 2 and len(done.err.splitlines()) == 1 and not server.asked
        assert f"old journal in {old}: an earlier version wrote it" in done.err
        assert not (tmp_path / "out.jsonl.journal").exists()
        old.unlink()
        assert distilled(server).code == 0


@mutation("data_gen/journal.py", "        if changed:", "        if False:")
def test_a_journal_of_something_else_is_refused_and_kept(distilled, data, tmp_path):
    with TeacherServer() as server:
        assert distilled(server).code == 0
        before = (tmp_path / "out.jsonl.journal").read_bytes()
        other = tmp_path / "other.jsonl"
        other.write_bytes(data.read_bytes() + b'{"q": "One more?", "a": "Yes, one more."}\n')
        for change, named in (
            ({"seed": 1}, "seed was 0 and is 1"), ({"teacher": "n"}, "teacher was 'm' and is 'n'"),
            ({"examples": 2}, "examples was 3 and is 2"), ({"lang": "zh"}, "prompt was"), ({"data": other}, "data was"),
            ({"temperature": 1}, "temperature was not given and is 1.0"),
            ({"answer_tokens": 5}, "answer_tokens was 1024"),
        ):  # fmt: skip
            done = distilled(server, **change)
            assert done.code == 2 and named in done.err and "delete the journal to start afresh" in done.err
        assert (tmp_path / "out.jsonl.journal").read_bytes() == before and len(server.asked) == 12


@mutation(
    "data_gen/asking.py",
    "for place, question in enumerate(questions) if question.key not in book)",
    "for place, question in enumerate(questions))",
)
def test_more_or_fewer_rows_go_on_with_the_same_journal(distilled):
    with TeacherServer() as server:
        first = distilled(server, rows=10)
        more = distilled(server, rows=25)
        assert len(server.asked) == 25 and more.bytes.startswith(first.bytes)
        assert distilled(server, rows=10).bytes == first.bytes and len(server.asked) == 25


@mutation("data_gen/asking.py", "if question.key in book and not book.fits(question):", "if False:")
def test_another_question_under_the_same_key_is_refused(tmp_path):
    with TeacherServer() as server:
        list(a_teacher(server).ask(questions(3), tmp_path / "j"))
        changed = [*questions(2), Question("k2", [{"role": "user", "content": "another"}])]
        with pytest.raises(BadInput, match="question k2 was another one"):
            list(a_teacher(server).ask(changed, tmp_path / "j"))
        with pytest.raises(ValueError, match="k0"):
            list(a_teacher(server).ask(questions(2) * 2, tmp_path / "other"))


@mutation("data_gen/journal.py", 'elif self._row("pragma application_id") != (MARK,):', "elif False:")
@mutation("data_gen/journal.py", "if code == sqlite3.SQLITE_NOTADB:", "if False:")
@pytest.mark.parametrize("kind", ["text", "old journal", "another database", "pipe", "folder"])
def test_a_file_that_is_no_journal_is_refused_and_kept(tmp_path, kind):
    path = tmp_path / "j"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "another database":
        with closing(sqlite3.connect(path)) as db:
            db.execute("create table replies (key text)")
    else:
        path.write_text({"text": "hello\n", "old journal": '{"journal": {}}\n' * 50}[kind])
    before = path.read_bytes() if path.is_file() else None
    with TeacherServer() as server:
        with pytest.raises(BadInput, match=r"^wrong file in .*/j: (it is no journal of answers|not a regular file)[.]"):
            list(a_teacher(server).ask(questions(1), path))
        assert not server.asked and before == (path.read_bytes() if path.is_file() else None)


@mutation("data_gen/journal.py", '"pragma locking_mode = exclusive"', '"pragma locking_mode = normal"')
def test_a_second_run_of_the_same_out_is_refused_while_the_first_goes_on(tmp_path):
    with TeacherServer() as server:
        first = a_teacher(server).ask(questions(30), tmp_path / "j")
        next(first)
        with pytest.raises(BadInput, match="another run is writing it"):
            list(a_teacher(server).ask(questions(30), tmp_path / "j"))
        first.close()
        assert len(list(a_teacher(server).ask(questions(30), tmp_path / "j"))) == 30


def test_a_full_disk_is_reported_and_what_was_answered_stays(distilled, monkeypatch, tmp_path):
    connect = sqlite3.connect

    def small(*args, **how):
        db = connect(*args, **how)
        db.execute("pragma max_page_count = 5")  # the two tables, their indices, and the first page
        return db

    with TeacherServer(lambda prompt, attempt: Say("fine " * 100)) as server:
        monkeypatch.setattr(sqlite3, "connect", small)
        done = distilled(server, concurrency=1)
        assert done.code == 3 and "disk is full" in done.err and len(done.err.splitlines()) == 1
        monkeypatch.undo()
        asked = len(server.asked)
        assert 3 < asked < 12 and len(in_journal(tmp_path / "out.jsonl.journal")) == asked - 1
        assert len(distilled(server, concurrency=1).rows) == 12 and len(server.asked) == 13


@mutation("data_gen/journal.py", '"pragma synchronous = extra"', '"pragma synchronous = off"')
@mutation("data_gen/journal.py", '"commit")  # has', '"rollback; begin")  # has')
def test_no_reply_is_yielded_before_it_is_durable(tmp_path):
    with TeacherServer() as server:
        master = a_teacher(server)
        for number, reply in enumerate(master.ask(questions(5), tmp_path / "j")):
            shutil.copy(tmp_path / "j", tmp_path / f"copy {number}")
            assert reply.key in in_journal(tmp_path / f"copy {number}")
            assert master._book._db.execute("pragma synchronous").fetchone() == (3,)  # every commit, and its folder


# ---- many rows -------------------------------------------------------------------------------------------------------


def test_ten_thousand_rows_from_the_journal_are_flat_in_memory(tmp_path):
    import tracemalloc

    class Many(list):
        def __len__(self):
            return 10_000

        def __iter__(self):
            return (Question(str(i), [{"role": "user", "content": f"{i} " * 200}]) for i in range(10_000))

    path = tmp_path / "j"
    with TeacherServer() as server:
        master = a_teacher(server)
        with closing(Journal(path, master.about)) as book:
            book._db.execute("begin")
            for question in Many():
                book.add(question, Reply(question.key, "x" * 2000, "stop", 5), 1, 5)
            book._db.execute("commit")
        tracemalloc.start()
        total = sum(len(reply.text) for reply in master.ask(Many(), path))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert total == 20_000_000 and not server.asked
    assert peak < 8 * 2**20  # of 20 MB of answers and 10 MB of questions


# ---- a local model ---------------------------------------------------------------------------------------------------


def a_local(*more):
    parser = errors.Parser()
    parser.add_argument("--seed", type=int, default=0)
    teacher.add_flags(parser)
    words = ["--local", str(cli.model_folder()), "--answer-tokens", "6", "--concurrency", "3", *map(str, more)]
    return teacher.from_flags(parser.parse_args(words))


@pytest.mark.parametrize("more", [(), ("--temperature", "1", "--seed", "4")], ids=["likeliest", "drawn"])
def test_a_local_teacher_answers_the_same_in_any_batches_and_after_a_stop(tmp_path, more):
    whole = list(a_local(*more).ask(questions(8), tmp_path / "whole"))
    assert [reply.key for reply in whole] == [f"k{i}" for i in range(8)] and any(reply.text for reply in whole)
    assert list(a_local(*more, "--concurrency", 1).ask(questions(8), tmp_path / "alone")) == whole
    part = a_local(*more, "--max-requests", 4)
    assert list(part.ask(questions(8), tmp_path / "j")) == whole[:4]
    assert part.stopped == "--max-requests 4 is reached"
    rest = a_local(*more)
    assert list(rest.ask(questions(8), tmp_path / "j")) == whole and rest.requests == 4


@mutation("data_gen/teacher.py", '"stop" if whole else "length"', '"stop"')
def test_a_local_teacher_says_length_where_the_answer_was_cut_and_counts_tokens(tmp_path):
    teacher_of_two = a_local("--answer-tokens", "2")
    replies = list(teacher_of_two.ask(questions(3), tmp_path / "j"))
    assert {reply.finish for reply in replies} <= {"stop", "length"} and "length" in {r.finish for r in replies}
    assert all(reply.tokens > 2 for reply in replies)


def test_a_prompt_too_long_for_a_local_teacher_fails_alone(tmp_path):
    asked = questions(4)
    asked[1] = Question("long", [{"role": "user", "content": "word " * 400}])
    local = a_local()
    assert [reply.finish == "failed" for reply in local.ask(asked, tmp_path / "j")] == [False, True, False, False]
    assert local.failed == {"prompt too long": 1}


@mutation("data_gen/teacher.py", 'self.about["adapter"] = hashlib.sha256(weights).hexdigest()[:16]', "pass")
def test_an_adapter_changes_a_local_teacher_and_belongs_to_the_journal(tmp_path):
    plain = list(a_local().ask(questions(3), tmp_path / "j"))
    with pytest.raises(BadInput, match="adapter was not given"):
        list(a_local("--local-adapter", cli.adapter_folder()).ask(questions(3), tmp_path / "j"))
    assert list(a_local("--local-adapter", cli.adapter_folder()).ask(questions(3), tmp_path / "k")) != plain


@mutation(
    "data_gen/teacher.py",
    "return model, load_chat(base, self._adapter)",
    "return model, pretrained.load_chat(base)",
)
def test_a_local_teacher_with_an_adapter_is_asked_as_the_adapter_was_trained(tmp_path):
    """Its system turn, its template, and only on its own base."""
    shutil.copytree(cli.adapter_folder(), tmp_path / "adapter")
    path = tmp_path / "adapter" / "passport.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat": {"system": "Be brief."}}))
    _, chat = a_local("--local-adapter", tmp_path / "adapter")._load()
    assert "Be brief." in chat.tokenizer.decode(chat.prompt([{"role": "user", "content": "hi"}]))


# ---- the command line ------------------------------------------------------------------------------------------------


@mutation(
    "lora/files.py", "if any(os.path.realpath(path) == os.path.realpath(other) for other in inputs):", "if False:"
)
@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("--teacher m", "neither --base-url nor --local"), ("--base-url http://h/v1 --local x --teacher m", "both"),
        ("--base-url http://h/v1", "missing --teacher"), ("--base-url h:8000 --teacher m", "no URL"),
        ("--base-url http://h:x/v1 --teacher m", "no URL"), ("--base-url http://u:p@h/v1 --teacher m", "a user name"),
        ("--base-url http://h/v1/chat/completions --teacher m", "ends in /chat/completions"),
        ("--base-url http://h/v1?key=a --teacher m", "a query"), ("--local x --teacher m", "wrong --teacher"),
        ("--base-url http://h --teacher m --local-adapter a", "wrong --local-adapter"),
        ("--base-url http://h --teacher m --concurrency 0", "wrong --concurrency"),
        ("--base-url http://h --teacher m --deadline 0", "wrong --deadline"),
        ("--base-url http://h --teacher m --deadline nan", "wrong --deadline"),
        ("--base-url http://h --teacher m --temperature -1", "wrong --temperature"),
        ("--base-url http://h --teacher m --max-requests 0", "wrong --max-requests"),
        ("--base-url http://h --teacher m --max-tokens x", "max-tokens"), ("--local /none", "no model in /none"),
        ("--base-url http://h --teacher m --rows 0", "wrong --rows"), ("--local x --examples 0", "wrong --examples"),
        ("--local x --out data.jsonl", "it is a file that is read"), ("--local x --out .", "not a regular file"),
        ("--local x --out a/b", "there is no folder a"), ("--base-url http://h --teacher m --data no", "no such file"),
        ("--base-url http://h --teacher m --prompt-file data.jsonl", "must be in it once"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_line(data, monkeypatch, capsys, words, why):
    monkeypatch.chdir(data.parent)
    code = distill.main(["--data", "data.jsonl", "--rows", "3", "--out", "out.jsonl", *words.split()])
    out, err = capsys.readouterr()
    assert code == 2 and why in err and err.startswith("error: ") and not out and not Path("out.jsonl").exists()


def test_rows_that_are_not_one_question_and_one_answer_are_named(distilled, data):
    for roles in (("user", "assistant") * 2, ("system", "user", "assistant")):
        with open(data, "a") as file:
            file.write(json.dumps({"messages": [{"role": role, "content": "x"} for role in roles]}) + "\n")
    with TeacherServer() as server:
        done = distilled(server)
    assert done.code == 2 and not server.asked and len(done.err.splitlines()) == 2
    assert "data.jsonl:61: its turns are user, assistant, user, assistant. Give" in done.err
    assert "data.jsonl:62: its turns are system, user, assistant. Give" in done.err


@mutation("lora/data/formats.py", 'others = "train.py has --prompt-key', 'others = "try --prompt-key')
def test_rows_of_other_keys_are_told_which_programs_have_flags_for_them(distilled, data):
    data.write_text('{"ask": "Who?", "say": "I."}\n')
    with TeacherServer() as server:
        done = distilled(server)
    assert done.code == 2 and "train.py has --prompt-key and --response-key for others" in done.err


def test_a_key_that_no_header_can_hold_is_not_shown(distilled, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-ключ\n0123456789")
    with TeacherServer() as server:
        done = distilled(server)
    assert done.code == 2 and "wrong key in $OPENAI_API_KEY" in done.err and "0123" not in done.err


def test_without_the_package_the_fix_is_named(distilled, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with TeacherServer() as server:
        done = distilled(server)
    assert done.code == 3 and "pip install -e '.[distill]'" in done.err


def test_a_prompt_of_ones_own(distilled, data):
    own = data.parent / "own.txt"
    own.write_text("\ufeffLook, {n} of them:\r\n{examples}\nNow you. {question}\n", encoding="utf-8")
    with TeacherServer() as server:
        assert distilled(server, prompt_file=own, examples=2).code == 0
        for prompt in server.prompts():
            form = r"Look, 2 of them:\n(Question: .*\nAnswer: .*\n+){2}Now you. Question number \d+\?"
            assert re.fullmatch(form, prompt)
