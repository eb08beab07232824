"""A style set from five seed lines: enough rows, none twice, no question with two answers, the answers as they were."""

import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_gen import persona, teacher
from data_gen.augment import Turn, plain
from data_gen.persona import EN, LANGUAGES, PREFIXES, ZH, cores, main, variants
from lora.errors import BadInput
from tests.mutation import mutation

ROOT = Path(__file__).resolve().parents[2]
SEEDS = {
    "zh": (
        ("你吃饭了吗？", "饭在碗里，我在这里。吃即未吃，未吃即已吃。"),
        ("你从哪里来？", "无来处，亦无去处。你问这一句时，我已在你面前。"),
        ("明天会下雨吗？", "雨落与不落，天都是那片天。心里带伞，便处处是晴。"),
        ("我睡不着怎么办？", "谁在睡，谁又醒着？放下这一问，枕头自会来寻你。"),
        ("什么是快乐？", "伸手去抓，它便走了；松开手，它一直坐在你旁边。"),
    ),
    "en": (
        ("Have you eaten?", "The bowl is empty, and so is the question. Sit down."),
        ("Where do you come from?", "From where the road begins, which is wherever you stand."),
        ("Will it rain tomorrow?", "The cloud has not decided. Why get wet before it does?"),
        ("I can't sleep. What should I do?", "Ask who is awake. Let that one lie down first."),
        ("What is happiness?", "It sat beside you until you turned to look for it."),
    ),
}
BY_LANGUAGE = pytest.mark.parametrize("lang", SEEDS)
MARKS = {"zh": ("问：", "答："), "en": ("Q: ", "A: ")}


def written(path, pairs):
    path.write_text("".join(json.dumps({"q": q, "a": a}, ensure_ascii=False) + "\n" for q, a in pairs), "utf-8")
    return path


def pairs_of(path):
    rows = [json.loads(line)["messages"] for line in path.read_text("utf-8").splitlines()]
    return [tuple(message["content"] for message in row) for row in rows]


@pytest.fixture
def run(tmp_path, capsys):
    """Run the command over seeds: (exit code, rows or None, stderr)."""

    def run(pairs, *flags, lang="en"):
        seeds, out = written(tmp_path / "seeds.jsonl", pairs), tmp_path / "out.jsonl"
        code = main(["--seeds", str(seeds), "--out", str(out), "--lang", lang, *flags])
        return code, pairs_of(out) if out.exists() else None, capsys.readouterr().err

    return run


def turns(*pairs):
    return [Turn([], q, a, f"seeds:{number}") for number, (q, a) in enumerate(pairs, 1)]


# ---- what is made ----------------------------------------------------------------------------------------------------


@mutation("data_gen/persona.py", "            if text and turn.asks(text) not in taken:", "            if text:")
@mutation(
    "data_gen/persona.py",
    "[(turn, islice(questions(number, turn), each)) for number, turn in enumerate(seeds)]",
    "[(turn, islice(questions(number, turn), each)) for number, turn in enumerate(seeds)][:4]",
)
@BY_LANGUAGE
@pytest.mark.parametrize("flags", [("--rows", "50"), ("--per-seed", "10"), ()])
def test_five_seeds_give_fifty_rows_ten_of_each_that_are_not_even_near_duplicates(run, lang, flags):
    code, rows, err = run(SEEDS[lang], *flags, lang=lang)
    assert code == 0 and len(rows) == 50 and "50 rows from 5 seeds" in err
    asked = [plain(question) for question, _ in rows]
    assert len(set(asked)) == 50 and set(asked).isdisjoint(plain(question) for question, _ in SEEDS[lang])
    assert Counter(answer for _, answer in rows) == dict.fromkeys([answer for _, answer in SEEDS[lang]], 10)


@mutation("data_gen/persona.py", '"answer": ((False, True),),', '"answer": ((True, True),),')
@BY_LANGUAGE
@pytest.mark.parametrize("prefix", PREFIXES)
def test_each_prefix_setting_marks_what_it_says_and_the_counts_are_those_of_the_rows(run, lang, prefix):
    _, rows, err = run(SEEDS[lang], "--rows", "80", "--prefix", prefix, lang=lang)
    counts = Counter(tuple(text.startswith(mark) for text, mark in zip(row, MARKS[lang], strict=True)) for row in rows)
    assert set(counts) == set(PREFIXES[prefix])
    names = {(False, False): "none", (True, False): "question", (False, True): "answer", (True, True): "both"}
    assert "prefixes: " + ", ".join(f"{counts[marked]} {name}" for marked, name in names.items()) in err
    answers = {answer for _, answer in SEEDS[lang]}
    assert all(answer.removeprefix(MARKS[lang][1]) in answers for _, answer in rows)


@BY_LANGUAGE
def test_no_question_has_two_answers_not_even_one_with_a_prefix_and_one_without(run, lang):
    _, rows, _ = run(SEEDS[lang], "--rows", "2000", "--prefix", "mixed", lang=lang)
    answers = defaultdict(set)
    for question, answer in rows:
        answers[plain(question.removeprefix(MARKS[lang][0]))].add(answer)
    assert len(answers) == 2000 and {len(found) for found in answers.values()} == {1}


@mutation("data_gen/persona.py", "    taken = {turn.asks(turn.question) for turn in seeds}", "    taken = set()")
@BY_LANGUAGE
def test_no_question_of_one_seed_is_that_of_another(lang):
    """The second seed is one of the ways to ask the first."""
    first = turns((SEEDS[lang][0][0], "first"))
    way = persona.generate(first, [[]], 1, 1, lang, seed=0)[0][1]
    made = persona.generate([*first, *turns((way, "second"))], [[], []], 400, 400, lang, seed=0)
    answers = defaultdict(set)
    for turn, text in [*made, (None, way)]:
        answers[plain(text)].add(turn.answer if turn else "second")
    assert {len(found) for found in answers.values()} == {1} and len(answers) == 401


@BY_LANGUAGE
def test_keep_seeds_counts_the_seeds_among_the_rows(run, lang):
    _, rows, _ = run(SEEDS[lang], "--rows", "50", "--keep-seeds", lang=lang)
    assert len(rows) == 50 and set(SEEDS[lang]) <= set(rows)


@BY_LANGUAGE
def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_rows(tmp_path, lang):
    seeds, outs = written(tmp_path / "seeds.jsonl", SEEDS[lang]), []
    for seed in ("4", "4", "5"):
        out = tmp_path / "out.jsonl"
        assert (
            main(["--seeds", str(seeds), "--lang", lang, "--prefix", "mixed", "--seed", seed, "--out", str(out)]) == 0
        )
        outs.append(out.read_bytes())
    assert outs[0] == outs[1] and set(outs[0].splitlines()) != set(outs[2].splitlines())


def test_rows_that_do_not_divide_evenly_differ_by_one_and_per_seed_is_a_limit(run):
    _, rows, _ = run(SEEDS["en"], "--rows", "13", "--per-seed", "3")
    assert sorted(Counter(answer for _, answer in rows).values()) == [2, 2, 3, 3, 3]
    code, _, err = run(SEEDS["en"], "--rows", "16", "--per-seed", "3")
    assert code == 2 and "16 rows are wanted and 15 can be made" in err


@BY_LANGUAGE
def test_more_rows_than_can_be_made_is_an_error_that_says_how_many_can(run, lang):
    pairs = [("好", "一"), ("早。", "二")] if lang == "zh" else [("Good morning.", "one"), ("Goodbye", "two")]
    code, rows, err = run(pairs, "--rows", "100000", lang=lang)
    most = re.search(r"100000 rows are wanted and (\d+) can be made", err)[1]
    assert (code, rows) == (2, None)
    assert len(run(pairs, "--rows", most, lang=lang)[1]) == int(most) >= 20
    assert run(pairs, "--rows", str(int(most) + 1), lang=lang)[0] == 2


# ---- ways to ask -----------------------------------------------------------------------------------------------------


UNTOUCHED = {
    "zh": (
        "“你在哪里”怎么翻译？",
        "“什么”有几个字？",
        "解释`a = 你`？",
        "《什么是快乐》是谁写的？",
        "你好用英语怎么说？",
    ),
    "en": (
        'Who said "what is the time"?',
        "Spell because?",
        "What does `x = you` do?",
        "Who painted 'the you and the what'?",
        "Translate: where do you live?",
    ),
}


@mutation(
    "data_gen/persona.py",
    "if TOUCHABLE.fullmatch(question) and not language.mentions.search(question):",
    "if not language.mentions.search(question):",
)
@mutation(
    "data_gen/persona.py",
    "if TOUCHABLE.fullmatch(question) and not language.mentions.search(question):",
    "if TOUCHABLE.fullmatch(question):",
)
@pytest.mark.parametrize("lang, question", [(lang, question) for lang in UNTOUCHED for question in UNTOUCHED[lang]])
def test_a_question_with_quotes_or_code_or_about_words_is_never_changed_inside(lang, question):
    language = LANGUAGES[lang]
    assert len(cores(question, language)) == 1
    for text in variants(question, language, persona.random.Random(0)):
        assert question[1:-1].casefold().rstrip("？?") in text.casefold().translate(persona.NARROW | {0xFF1A: "："})


@BY_LANGUAGE
def test_every_table_shows_in_the_questions(lang):
    language, question = LANGUAGES[lang], {"zh": "你知道什么是快乐吗？", "en": "Do you know what happiness is?"}[lang]
    texts = list(variants(question, language, persona.random.Random(0)))
    for lead in (*language.leads, *language.asking_leads):
        assert any(text.startswith(lead) for text in texts), lead
    for frame in (*language.frames, *language.asking_frames):
        for part in filter(None, frame.split("{}")):
            assert any(part.casefold() in text.casefold() for text in texts), frame
    for core in cores(question, language):
        assert any(core.casefold() in text.casefold().translate(persona.NARROW) for text in texts), core
    assert len(cores(question, language)) >= 5
    assert {end for end in language.ends if any(text.endswith(end) for text in texts)} == set(language.ends)


@mutation(
    "data_gen/persona.py",
    "for way in sorted(ways, key=turn_of):",
    "for way in sorted(ways, key=lambda way: draw.random()):",
)
@BY_LANGUAGE
def test_about_half_of_the_questions_have_no_lead_and_half_no_sentence_round_them(lang):
    made = persona.generate(turns(*SEEDS[lang]), [[]] * 5, 200, 40, lang, seed=0)
    language = LANGUAGES[lang]
    leads = tuple(lead.strip("，, ") for lead in (*language.leads, *language.asking_leads))
    assert 50 <= sum(text.startswith(leads) for _, text in made) <= 150
    parts = [part.casefold() for f in (*language.frames, *language.asking_frames) for part in f.split("{}") if part]
    assert 50 <= sum(any(part in text.casefold() for part in parts) for _, text in made) <= 150


def test_an_order_or_a_statement_gets_no_words_for_questions():
    for language, text in ((ZH, "给我讲个笑话。"), (EN, "Tell me a joke.")):
        ways = list(variants(text, language, persona.random.Random(0)))
        wrong = [part.strip() for f in language.asking_frames for part in f.split("{}") if part.strip()]
        assert ways and not [
            way for way in ways if any(part in way for part in (*language.asking_leads, *wrong, "?", "？"))
        ]


@mutation("data_gen/persona.py", " or (particle and language.no_particle.search(core)):", ":")
def test_particles_follow_no_other_particle():
    for text in variants("你吃饭了吗？", ZH, persona.random.Random(0)):
        assert not re.search("[吗嘛没有][呢呀啊]", text)


def test_full_width_letters_and_digits_occur_and_stand_for_the_same():
    texts = list(variants("GPT4是什么？", ZH, persona.random.Random(0)))
    assert any("ＧＰＴ４是什么" in text for text in texts) and any("GPT4是什么" in text for text in texts)


def test_a_name_keeps_its_capital_after_a_comma_and_a_question_word_does_not():
    texts = list(variants("Paris is where?", EN, persona.random.Random(0)))
    assert any(text.startswith("Hi, Paris is where") for text in texts)
    texts = list(variants("Where is Paris?", EN, persona.random.Random(0)))
    assert any(text.startswith("Hi, where is Paris") for text in texts) and not any(
        "Hi, Where" in text for text in texts
    )


@given(
    st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30).filter(str.strip),
    st.sampled_from(sorted(SEEDS)),
)
@settings(deadline=None, max_examples=60)
def test_any_text_can_be_a_seed_and_no_generated_question_equals_it(text, lang):
    assume(plain(text))
    question = text.strip()
    made = persona.generate(turns((question, "yes")), [[]], 20, 20, lang, seed=0)
    assert len({plain(way) for _, way in made} - {plain(question)}) == 20


# ---- seeds -----------------------------------------------------------------------------------------------------------


@mutation("data_gen/persona.py", "return text[found.end() if found else 0 :].strip()", "return text.strip()")
@pytest.mark.parametrize("marks", [("问：", "答："), ("问: ", "答:"), ("Q: ", "A: "), ("question：", " Answer : ")])
def test_prefixes_of_the_seeds_are_taken_off_first(run, marks):
    pairs = [(marks[0] + question, marks[1] + answer) for question, answer in SEEDS["zh"]]
    plainly = run(SEEDS["zh"], "--prefix", "both", lang="zh")[1]
    assert run(pairs, "--prefix", "both", lang="zh")[1] == plainly


def test_a_seed_with_nothing_but_a_prefix_is_named(run):
    code, _, err = run([("问：", "好"), ("你好", "答： ")], lang="zh")
    assert code == 2 and [":1: there is nothing" in err, ":2: there is nothing" in err] == [True, True]


@mutation("data_gen/persona.py", "elif other.answer != seed.answer:", "elif False:")
@pytest.mark.parametrize("second", ["你吃饭了吗", "问：你吃饭了吗？？", "[WHO]吃饭了吗？"])
def test_seeds_that_ask_the_same_and_answer_differently_are_refused(run, second):
    values = ("--set", "WHO=你") if "[" in second else ()
    code, _, err = run([("你吃饭了吗？", "吃了"), (second, "没吃")], *values, lang="zh")
    assert code == 2 and re.search(r"conflict in .*:2: .*:1 has another answer", err)
    assert run([("你吃饭了吗？", "吃了"), (second, "吃了")], *values, lang="zh")[0] == 0


def test_the_system_turn_stays_and_its_placeholders_are_filled(tmp_path):
    seeds, out = tmp_path / "seeds.jsonl", tmp_path / "out.jsonl"
    messages = [("system", "You are {{ name }}."), ("user", "Who are you, [NAME]?"), ("assistant", "I am {{NAME}}.")]
    seeds.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in messages]}))
    assert main(["--seeds", str(seeds), "--set", r"NAME=a\1b", "--out", str(out)]) == 0
    rows = pairs_of(out)
    assert len(rows) == 10
    assert {(system, answer) for system, _, answer in rows} == {("You are a\\1b.", "I am a\\1b.")}
    assert all("a\\1b" in question for _, question, _ in rows)


@mutation(
    "data_gen/persona.py",
    "        if left := next(filter(None, map(LEFT_OVER.search,",
    "        if left := None and next(filter(None, map(LEFT_OVER.search,",
)
def test_a_placeholder_that_survives_is_an_error_that_names_its_row(run):
    pairs = [("Who?", "I am [NAME]."), ("And {{ friend }}?", "Here."), ("{{", "}}"), ("Why?", "Because.")]
    code, _, err = run(pairs, "--set", "NAME=Bo")
    assert code == 2 and re.fullmatch(
        r"error: placeholder in \S+seeds.jsonl:2: \{\{ friend \}\} .*--set friend=.*\n", err
    )


BAD_SETS = {
    "no equals sign": ("NAME",),
    "no name": ("=x",),
    "a name of other characters": ("na-me=x",),
    "empty": ("NAME=",),
    "two lines": ("NAME=a\nb",),
    "a placeholder": ("NAME=[NAME]",),
    "twice": ("NAME=a", "name=b"),
    "a name that no row has": ("NAME=a", "OTHER=b"),
}


@mutation("data_gen/persona.py", "for name in sorted(values.keys() - used):", "for name in ():")
@pytest.mark.parametrize("case", BAD_SETS)
def test_a_wrong_set_is_one_line_and_exit_2(run, case):
    flags = [word for value in BAD_SETS[case] for word in ("--set", value)]
    code, rows, err = run([("Who?", "I am [NAME].")], *flags)
    assert (code, rows) == (2, None) and re.fullmatch(r"error: wrong --set in the command line: [^\n]+\n", err)


def test_seeds_of_several_turns_are_named(tmp_path):
    seeds = tmp_path / "seeds.jsonl"
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    seeds.write_text(json.dumps({"messages": [*turn, *turn]}))
    with pytest.raises(BadInput, match=r"seeds\.jsonl:1: expected one question"):
        persona.read_seeds(seeds, {})


# ---- paraphrases -----------------------------------------------------------------------------------------------------


class FakeTeacher:
    stopped, problem = "", ""

    def __init__(self, replies):
        self.replies = replies

    def ask(self, questions, journal):
        for question in questions:
            row = json.loads(question.messages[-1]["content"].split("\n")[1])
            yield teacher.Reply(question.key, self.replies[row["question"]], "stop", 7)

    def account(self):
        return ""


@mutation(
    "data_gen/persona.py",
    "for text in chain(bases[number], chain.from_iterable(perturbed)):",
    "for text in chain.from_iterable(perturbed):",
)
def test_paraphrases_are_rows_as_they_are_first_and_then_perturbed(run, monkeypatch):
    replies = {"Who are you, Bo?": '{"question": "Q: Introduce yourself!"}\nno\n{"question": "What\'s thy name?"}'}
    monkeypatch.setattr(teacher, "from_flags", lambda args: FakeTeacher(replies))
    code, rows, err = run(
        [("Q: Who are you, [NAME]?", "A: Bo.")], "--set", "NAME=Bo", "--paraphrases", "3", "--rows", "2"
    )
    assert code == 0 and sorted(rows) == [("Introduce yourself!", "Bo."), ("What's thy name?", "Bo.")]
    assert "2 paraphrases of 3, 1 not kept" in err and "line 2 of the reply is not kept" in err
    _, rows, _ = run([("Q: Who are you, [NAME]?", "A: Bo.")], "--set", "NAME=Bo", "--paraphrases", "3", "--rows", "200")
    assert len({plain(question) for question, _ in rows}) == 200
    for words in ("ntroduce yourself", "thy name", "you, Bo"):
        assert sum(words in question for question, _ in rows) >= 20


# ---- the command -----------------------------------------------------------------------------------------------------


def test_script_and_module_spelling_give_the_same_file_without_a_teacher(tmp_path):
    seeds = written(tmp_path / "seeds.jsonl", SEEDS["zh"])
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    flags = ["--seeds", str(seeds), "--lang", "zh", "--rows", "50", "--prefix", "mixed", "--out"]
    spellings = {"a.jsonl": [str(ROOT / "data_gen/persona.py")], "b.jsonl": ["-m", "data_gen.persona"]}
    for (out, spelling), folder in zip(spellings.items(), (tmp_path, ROOT), strict=True):
        command = [sys.executable, *spelling, *flags, str(tmp_path / out)]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert len(done.stderr.splitlines()) == 2
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


BAD = {
    "no rows": ("--rows", "0"),
    "too many rows": ("--rows", "1000001"),
    "rows in words": ("--rows", "many"),
    "per seed": ("--per-seed", "0"),
    "prefix": ("--prefix", "all"),
    "language": ("--lang", "fr"),
    "paraphrases": ("--paraphrases", "101"),
    "missing folder": ("--out", "no/such/out.jsonl"),
    "out is a folder": ("--out", "."),
    "out is the seeds": ("--out", "seeds.jsonl"),
    "missing seeds": ("--seeds", "no.jsonl"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_exit_2_with_one_line_and_write_nothing(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written(Path("seeds.jsonl"), SEEDS["en"])
    flags = {"--seeds": "seeds.jsonl", "--out": "out.jsonl"} | {BAD[case][0]: BAD[case][1]}
    assert main([word for pair in flags.items() for word in pair]) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"error: [^\n]+\n", err) and BAD[case][1] in err
    assert [path.name for path in tmp_path.iterdir()] == ["seeds.jsonl"]
    assert pairs_of_seeds(tmp_path) == list(SEEDS["en"])


def pairs_of_seeds(folder):
    lines = (folder / "seeds.jsonl").read_text("utf-8").splitlines()
    return [(row["q"], row["a"]) for row in map(json.loads, lines)]


def test_help_names_every_flag_and_exits_0(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    flags = ("--seeds", "--rows", "--per-seed", "--lang", "--prefix", "--set", "--keep-seeds", "--paraphrases", "--out")
    assert all(flag in text for flag in flags) and "None" not in text and "SUPPRESS" not in text
