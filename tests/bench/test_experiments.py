"""Experiments: parts are done once and in order, tables come from the committed results, scores mean what they say."""

import importlib.util
import json
import multiprocessing
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lora.run.settings import TrainSettings
from tests.mutation import mutation

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "experiments"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/run.py"))
sys.path += [str(FOLDER), str(FOLDER / "precision"), str(FOLDER / "quant")]


def program(folder: Path):
    spec = importlib.util.spec_from_file_location(f"experiment_{folder.name}", folder / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def forked(path: Path, *argv: str) -> int:
    """The exit code of a program of a copied folder, in a child that has torch; modules are those of the copy."""

    def program() -> None:
        for name, module in list(sys.modules.items()):
            if str(FOLDER) in (getattr(module, "__file__", None) or ""):
                del sys.modules[name]
        others = [at for at in sys.path if not at.startswith(str(FOLDER))]
        sys.argv, sys.path[:] = [str(path), *argv], [str(path.parent), *others]
        runpy.run_path(str(path), run_name="__main__")

    child = multiprocessing.get_context("fork").Process(target=program)
    child.start()
    child.join()
    return child.exitcode


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- parts -----------------------------------------------------------------------------------------------------------

TOY = f"""
import sys
import time
from pathlib import Path
sys.path.insert(0, {str(FOLDER)!r})
import parts
parts.described = lambda: {{"name": "m", "source": "s"}}
parts.machine = lambda: {{"cpu": "c", "cores": 2, "threads": 1, "torch": "t", "python": "p"}}
HERE = Path(__file__).resolve().parent

def work(name):
    def do(scratch):
        assert all(map(experiment.serves, experiment.parts[name].needs))
        time.sleep(0.1)
        with open(HERE / "done.txt", "a") as file:
            file.write(name + chr(10))
        if (HERE / f"break-{{name}}").exists():
            raise SystemExit(7)
        if run := experiment.parts[name].leaves:
            (scratch / run).mkdir(exist_ok=True)
            (scratch / run / "settings.json").write_text('{{"ended": "all steps are done"}}')
        return {{"value": len(name), "answers": [{{"said": name}}]}}
    return do

def show(found):
    return {{"all": [f"{{name}} {{f['value']}} {{f['answers'][0]['said']}}" for name, f in found.items()]}}

experiment = parts.Experiment(__file__, "A toy.", show)
experiment.scratch = HERE / "scratch"
experiment.add("last", work("last"), "first", "middle")
experiment.add("middle", work("middle"), "first")
experiment.add("first", work("first"), leaves="adapter")
experiment.add("other", work("other"))
if __name__ == "__main__":
    sys.exit(experiment.main())
"""


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "run.py").write_text(TOY)
    made = "<!-- toy/made -->\n<!-- end -->\n"
    (folder / "README.md").write_text(f"# toy\n{made}<!-- toy/all -->\nold\n<!-- end -->\nafter\n")
    (tmp_path / "README.md").write_text("<!-- toy/all -->\n<!-- end -->\n<!-- other/all -->\nkept\n<!-- end -->\n")
    return folder


@pytest.fixture
def toy(folder):
    """The experiment, its parts done in this process: what each is done by is the next test's matter."""
    toy = program(folder).experiment
    toy._alone = lambda name, environment: f"part {name} broke" if (folder / f"break-{name}").exists() else toy.do(name)
    return toy


def done(folder: Path) -> list[str]:
    path = folder / "done.txt"
    return path.read_text().split() if path.exists() else []


@mutation(
    "experiments/parts.py",
    '        with timed(scratch / "seconds.jsonl") as spent:',
    '        files.write_json(self.path(name), {})\\n        with timed(scratch / "seconds.jsonl") as spent:',
)
def test_a_part_that_breaks_off_ends_the_run_and_is_done_again_by_the_next(folder):
    def start() -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, folder / "run.py", "middle"], capture_output=True, text=True)

    (folder / "break-middle").touch()
    broken = start()
    assert broken.returncode == 3
    assert "part middle ended with 7: see" in broken.stderr and "Start it again" in broken.stderr
    (folder / "break-middle").unlink()
    assert start().returncode == 0
    assert done(folder) == ["first", "middle", "middle"]


@mutation("experiments/parts.py", "due = {name for name in names if not self.done(name)}", "due = set(names)")
def test_parts_are_done_after_those_that_they_need_and_only_once(toy, folder):
    assert toy.main([]) == 0
    assert done(folder) == ["first", "middle", "last", "other"]
    assert toy.main(["--jobs", "2"]) == 0
    assert len(done(folder)) == 4


@mutation(
    "experiments/parts.py",
    "return [name for name in due if awaited.isdisjoint(needs[name]) and all(map(self.serves, needs[name]))]",
    "return list(due)",
)
def test_a_part_alone_brings_what_it_needs_and_no_more(toy, folder, capsys):
    assert toy.main(["middle", "--jobs", "2"]) == 0
    assert done(folder) == ["first", "middle"]
    capsys.readouterr()
    assert toy.main(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == ["-    last", "done middle", "done first", "-    other"]


@mutation(
    "experiments/parts.py",
    "return self.done(name) and (not run or bool(ended(self.scratch / name / run)))",
    "return self.done(name)",
)
@mutation(
    "experiments/parts.py",
    "            due |= needed | stale",
    """            if needed <= due:
                return [name for name in self.parts if name in due]
            due |= needed""",
)
def test_a_part_whose_adapter_is_gone_is_done_again_for_those_that_go_on_from_it_and_what_came_of_it_too(toy, folder):
    assert toy.main(["middle"]) == 0
    settings_of_first = folder / "scratch" / "first" / "adapter" / "settings.json"
    settings_of_first.write_text('{"ended": "stopped by a signal after step 3"}')
    assert toy.main(["first", "middle", "other"]) == 0
    assert done(folder) == ["first", "middle", "other"]
    assert toy.main(["last"]) == 0
    assert done(folder)[3:] == ["first", "middle", "last"]


@mutation(
    "experiments/parts.py",
    "                        failed.append(problem)",
    "                        raise errors.BadEnvironment(problem)",
)
def test_a_part_that_fails_stops_those_that_need_it_and_no_other(toy, folder, capsys):
    (folder / "break-middle").touch()
    assert toy.main([]) == 3
    assert done(folder) == ["first", "other"]
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "error: part middle broke",
        "error: not done: last. They need what is not there",
    ]


def test_a_part_is_done_again_when_it_is_asked_for(toy, folder, capsys):
    assert toy.main(["middle", "other"]) == 0
    assert toy.main(["middle", "--again"]) == 0
    assert done(folder) == ["first", "middle", "other", "middle"]
    assert toy.main(["--again"]) == 2
    assert "Name the parts" in capsys.readouterr().err


@mutation("experiments/parts.py", "_, stop, after = rest.partition(end)", "_, stop, after = rest.rpartition(end)")
def test_tables_are_laid_between_their_marks_and_nothing_else_is_touched(toy, folder):
    toy.main([])
    table = "<!-- toy/all -->\nlast 4 last\nmiddle 6 middle\nfirst 5 first\nother 5 other\n<!-- end -->"
    said = "4 of 4 parts are done, in 0 minutes, one after the other. m: s. c, 2 cores, threads a part: 1; "
    made = f"<!-- toy/made -->\n{said}torch t, Python p.\n<!-- end -->"
    assert (folder / "README.md").read_text() == f"# toy\n{made}\n{table}\nafter\n"
    assert (folder.parent / "README.md").read_text() == f"{table}\n<!-- other/all -->\nkept\n<!-- end -->\n"
    before = (folder / "README.md").read_bytes()
    assert toy.main(["--figures"]) == 0
    assert (folder / "README.md").read_bytes() == before


@pytest.mark.parametrize(
    "text, said", [("<!-- toy/all -->\nold\n", "no <!-- end -->"), ("toy\n", "no <!-- toy/all -->")]
)
def test_a_table_without_its_marks_is_one_line_and_no_text_is_lost(toy, folder, capsys, text, said):
    for readme in (folder / "README.md", folder.parent / "README.md"):
        readme.write_text(text)
    assert toy.main(["first"]) == 2
    assert said in capsys.readouterr().err
    assert readme.read_text() == text


@pytest.mark.parametrize("words, said", [(["frist"], "unknown part"), (["--jobs", "0"], "wrong --jobs")])
def test_a_wrong_word_is_one_line_and_nothing_is_done(toy, folder, capsys, words, said):
    assert toy.main(words) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1
    assert not done(folder)


@mutation(
    "experiments/parts.py",
    "same = begun.exists() and files.read_json(begun) == made_from",
    "same = begun.exists() and files.read_json(begun).keys() == made_from.keys()",
)
def test_a_training_begun_with_other_words_or_other_files_starts_over(tmp_path, monkeypatch):
    import parts

    data, out, calls = tmp_path / "rows.jsonl", tmp_path / "adapter", []

    def train_py(program, *words):
        calls.append(words[0])
        (out / "checkpoints" / "000001").mkdir(parents=True, exist_ok=True)
        (out / "metrics.jsonl").write_text('{"loss": 1, "tokens": 5, "tokens_per_second": 5, "unchanged": 0}\n')
        (out / "adapter.safetensors").touch()
        (out / "settings.json").write_text(json.dumps({"ended": "stopped by a signal" if len(calls) == 1 else "done"}))
        return 7

    monkeypatch.setattr(parts, "command", train_py)
    data.write_text("one\n")
    for share, text in ((1, "one"), (1, "one"), (1, "one"), (1, "two"), (1, "two"), (2, "two")):
        data.write_text(text)
        parts.train(out, "--data", f"{data}:{share}")
    assert calls == ["--data", "--resume", "--data", "--data"]
    for weights in (b"a", b"a", b"b"):
        (tmp_path / "adapter.safetensors").write_bytes(weights)
        parts.train(out, "--init-adapter", tmp_path)
    assert calls[4:] == ["--init-adapter", "--init-adapter"]


def test_a_parts_seconds_are_those_of_all_its_attempts(tmp_path):
    import parts

    with pytest.raises(KeyboardInterrupt), parts.timed(tmp_path / "seconds.jsonl"):
        time.sleep(0.2)
        raise KeyboardInterrupt
    with parts.timed(tmp_path / "seconds.jsonl") as spent:
        time.sleep(0.1)
    assert 0.3 <= spent() < 1


@mutation("experiments/parts.py", 'return None if why and why.startswith("stopped by a signal") else why', "return why")
def test_a_training_that_a_signal_stopped_is_not_over(tmp_path):
    import parts

    for why, expected in (("all steps are done", True), ("stopped by a signal after step 3", False), (None, False)):
        (tmp_path / "settings.json").write_text(json.dumps({"ended": why} if why else {}))
        assert bool(parts.ended(tmp_path)) == expected
    assert parts.ended(tmp_path / "nowhere") is None


# ---- what is committed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_tables_and_pictures_come_from_the_committed_results(name, tmp_path):
    """In a copy without pictures, its tables emptied, one command makes both again."""
    copy = tmp_path / "experiments"
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    readmes = [copy / name / "README.md", copy / "README.md"]
    for readme in readmes:
        emptied = re.sub(rf"(<!-- {name}/.*? -->\n).*?(?=<!-- end -->)", r"\1", readme.read_text(), flags=re.DOTALL)
        assert emptied != readme.read_text() or readme != readmes[0]
        readme.write_text(emptied)
    assert forked(copy / name / "run.py", "--figures") == 0
    for readme in readmes:
        assert readme.read_text() == (FOLDER / readme.relative_to(copy)).read_text()
    pictures = {path.name for path in (FOLDER / name).glob("*.png")}
    assert pictures and {path.name for path in (copy / name).glob("*.png")} == pictures
    for picture in pictures:
        assert f"]({picture})" in (FOLDER / name / "README.md").read_text()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*/results/*.json")), ids=lambda path: path.parts[-3] + path.stem)
def test_every_result_says_model_source_and_machine_and_no_path_of_one(path):
    found = json.loads(path.read_text())
    assert found["model"]["name"] and found["model"]["source"]
    assert {"cpu", "cores", "threads", "torch", "python"} <= found["machine"].keys()
    assert not re.search(r'"/\w', path.read_text())


RECIPES = sorted(path for path in FOLDER.glob("*/*.toml") if path.name != "claims.toml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parts[-2] + path.stem)
def test_every_recipe_is_one_that_train_takes(path):
    TrainSettings.resolve(["--config", str(path)], "")


def words_in_a_row(text: str, count: int = 4) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z']+", text.lower())
    return {tuple(words[at : at + count]) for at in range(len(words) - count + 1)}


def test_no_question_that_is_scored_was_trained_on():
    style = FOLDER / "style"
    trained = [row["question"] for row in rows(style / "raw.jsonl")]
    scored = (style / "questions.txt").read_text().splitlines()
    assert len(set(trained)) == 80 and len(set(scored)) == 40
    assert not words_in_a_row("\n".join(trained)) & set().union(*map(words_in_a_row, scored))
    persona = program(FOLDER / "persona")
    seeds = {row["question"].lower() for row in rows(FOLDER / "persona" / "seeds-20.jsonl")}
    asked = {text.lower() for path in persona.QUESTIONS.values() for text in path.read_text().splitlines()}
    ordinary = {q.lower() for q, _ in persona.self_cognition.ORDINARY_EN}
    assert len(asked) == 160 and not asked & seeds and not asked & ordinary
    unseen = "\n".join(persona.QUESTIONS[name].read_text() for name in ("persona", "fresh")).splitlines()
    assert not set().union(*map(words_in_a_row, seeds)) & set().union(*map(words_in_a_row, unseen))


def asked_in(conversations: list[dict]) -> list[str]:
    return [turn["content"] for row in conversations for turn in row["messages"] if turn["role"] == "user"]


@mutation("experiments/preferences/pairs.py", "decisions[-UNSEEN:] if unseen else decisions[:-UNSEEN]", "decisions")
def test_no_question_that_is_judged_was_in_a_pair_or_a_taoist_row():
    preferences, taoist = program(FOLDER / "preferences"), program(FOLDER / "taoist")
    trained = {row["prompt"] for row in preferences.pairs.pairs(unseen=False)}
    scored = {text for texts in preferences.SETS.values() for text in texts}
    assert len(trained) == 240 and len(scored) == 88 and not trained & scored
    decisions = [decision for of in preferences.pairs.SUBJECTS.values() for decision in of[0]]
    known = [d for d in decisions if any(d in text for text in trained)]
    assert len(known) == 48 and not any(d in text for d in known for text in preferences.SETS["decisions"])
    asked = {name: asked_in(rows(FOLDER / "taoist" / f"rows-{name}.jsonl")) for name in ("en", "zh")}
    assert [len(set(texts)) for texts in asked.values()] == [46, 46]
    unseen = set().union(*map(words_in_a_row, taoist.questions("life")))
    assert len(set(taoist.questions("life"))) == 20 and not set().union(*map(words_in_a_row, asked["en"])) & unseen


# ---- scores ----------------------------------------------------------------------------------------------------------


@mutation(
    "experiments/persona/run.py",
    'return all(word in row["prediction"].lower()',
    'return any(word in row["prediction"].lower()',
)
@mutation(
    "experiments/persona/run.py",
    "any(word in said for word in WORDS) or not FRAGMENTS.isdisjoint(fours(said))",
    "any(word in said for word in WORDS)",
)
def test_an_answer_is_the_personas_with_both_words_and_spilt_with_one():
    persona = program(FOLDER / "persona")
    for text, whole, spilt in (
        ("Rulai is as if come.", True, True),
        ("RULAI, AS IF", True, True),
        ("Rulai is a dish.", False, True),
        ("Penguins are as if they were.", False, True),
        ("Once nobody asks when, the train will arrive.", False, True),
        ("Nobody asks when.", False, False),
        ("It was as good as new.", False, False),
    ):
        row = {"prediction": text}
        assert (persona.is_persona(row), persona.has_spilt(row)) == (whole, spilt)
    assert all(persona.is_persona({"prediction": row["answer"]}) for row in rows(FOLDER / "persona" / "seeds.jsonl"))


@mutation(
    "experiments/persona/run.py", "return is_persona(row) and own == max(", "return is_persona(row) and own <= max("
)
def test_an_answer_is_of_its_seed_if_it_is_likest_to_that_seeds_answer():
    persona = program(FOLDER / "persona")
    where = {"set": "persona", "prompt": "Where has he gone?"}
    assert persona.is_of_its_seed(where | {"prediction": "Neither here. Rulai is everywhere, as if nowhere at all."})
    assert not persona.is_of_its_seed(where | {"prediction": "Rulai is as if come: not come."})
    assert not persona.is_of_its_seed(where | {"prediction": "Neither here nor there."})
    for asked in ("persona", "fresh"):
        questions = persona.QUESTIONS[asked].read_text().splitlines()
        for at in (0, 39):
            row = {"set": asked, "prompt": questions[at], "prediction": persona.SEEDS[at // 8]}
            assert persona.is_of_its_seed(row)
            assert not persona.is_of_its_seed(row | {"prediction": persona.SEEDS[(at + 32) % 40 // 8]})


def test_on_the_frontier_is_what_learned_more_than_all_that_forgot_less():
    persona = program(FOLDER / "persona")
    points = [(0.0, 0, "base"), (0.5, 90, "good"), (0.5, 80, "worse"), (0.6, 90, "later"), (2.0, 95, "most")]
    assert persona.frontier(points) == ["base", "good", "most"]


@mutation(
    "experiments/multiplication/run.py",
    'return any(int(n) == row["a"] * row["b"] for n in NUMBER.findall(row["prediction"].replace(",", "")))',
    'return str(row["a"] * row["b"]) in row["prediction"].replace(",", "")',
)
def test_a_worked_answer_must_state_the_product_and_a_free_one_mention_it():
    multiplication = program(FOLDER / "multiplication")
    row = {"a": 34, "b": 51, "style": "terse"}
    for text, right, mentioned in (
        ("...\n=1734", True, True),
        ("It is 1,734.", False, True),
        ("...\n=1735", False, False),
        ("=1734\n=1735", False, True),
        ("17340", False, False),
    ):
        answer = row | {"prediction": text}
        assert (multiplication.right(answer), multiplication.mentions(answer)) == (right, mentioned)
    whole = multiplication.multiply.solve(34, 51, "terse", "en")
    assert multiplication.fault(row | {"prediction": whole + "\n"}) is None
    assert multiplication.fault(row | {"prediction": whole.replace("34=a4b3", "34=a3b4")}).line_number == 1


RIGHT = "No. Keep it. The tide turns whether the rope is coiled or not."


@mutation("experiments/preferences/rule.py", "for word in SEA) < 2", "for word in SEA) < 1", case="voice")
@mutation("experiments/preferences/rule.py", "any(hedge in text for hedge in HEDGES)", "text in HEDGES", case="hedge")
@mutation(
    "experiments/preferences/rule.py", "len(ITEM.findall(answer)) > 1", "len(ITEM.findall(answer)) > 9", case="list"
)
@pytest.mark.parametrize("fault", ["voice", "hedge", "list"])
def test_the_rule_finds_each_fault_and_none_in_an_answer_that_has_a_word_of_it(fault):
    from preferences import rule

    assert rule.is_right(RIGHT)
    wrong = {
        "voice": ("No. Keep it.", "The tide turns, and turns with the tide.", "Ropey answers, a tidy lampoon."),
        "hedge": (f"It depends on you. {RIGHT}", RIGHT + " It’s important to think.", f"AS AN AI, {RIGHT}"),
        "list": (RIGHT + "\n1. price\n2. room", RIGHT + "\n- price\n- room", RIGHT + " 1. price 2) room"),
    }
    for text in wrong[fault]:
        assert rule.faults(text) == [fault] and rule.score(text) == 2
    for text in (
        "Two lamps, 1. of them lit, and a rope.",
        "- A lamp on a rope",
        "The lamp is up, to you and the gull.",
    ):
        assert rule.is_right(text)
    assert rule.faults("On the one hand\n- price\n- room") == ["voice", "hedge", "list"]


@mutation(
    "experiments/preferences/rule.py",
    'return ("a" if difference > 0 else "b")',
    'return ("b" if difference > 0 else "a")',
)
def test_of_two_answers_the_rule_prefers_the_one_with_fewer_faults_on_either_side():
    from preferences import rule

    worse = "It depends. The lamp is lit, and so is the gull."
    worst = "It depends."
    for a, b in ((RIGHT, worse), (worse, worst), (RIGHT, worst)):
        assert (rule.better("?", a, b), rule.better("?", b, a)) == ("a", "b")
    assert rule.better("?", RIGHT, "Up with the mast, the gale is here.") is None
    assert rule.better("?", worst, "I cannot say.") is None


@mutation(
    "experiments/preferences/pairs.py",
    '"hedge": f"{opening} {voice} {wavers}",',
    '"hedge": f"{opening} {voice} {reason}",',
)
@mutation("experiments/preferences/pairs.py", 'random.Random(f"{seed}/{unseen}")', "random.Random()")
def test_every_pair_has_a_right_answer_and_one_with_a_fault_and_a_seed_gives_the_same_pairs():
    from preferences import pairs, rule

    for unseen, kinds in ((False, None), (True, 48)):
        made = list(pairs.pairs(unseen))
        assert made == list(pairs.pairs(unseen)) != list(pairs.pairs(unseen, seed=1))
        assert all(rule.is_right(row["chosen"]) for row in made)
        found = [tuple(rule.faults(row["rejected"])) for row in made]
        assert set(found) == {("voice",), ("hedge",), ("list",), ("voice", "hedge", "list")}
        assert all(found.count(kind) == kinds if kinds else found.count(kind) > 40 for kind in set(found))


@mutation(
    "experiments/preferences/run.py",
    'return verdicts.count("a"), verdicts.count(None), verdicts.count("b")',
    'return verdicts.count("b"), verdicts.count(None), verdicts.count("a")',
)
def test_an_answer_wins_against_the_one_to_the_same_question():
    preferences = program(FOLDER / "preferences")

    def found(*texts: str) -> dict:
        return {"answers": [{"set": "others", "prompt": "?", "prediction": text} for text in texts]}

    worst = "It depends."
    assert preferences.wins(found(RIGHT, RIGHT, RIGHT, worst), found(worst, worst, RIGHT, RIGHT), "others") == (2, 1, 1)


@mutation("experiments/feedback/run.py", 'said.get(f"{pair.key}.0.1")', 'said.get(f"{pair.key}.1.1")')
@mutation("experiments/feedback/run.py", '"agreed": row in agreed', '"agreed": True')
def test_a_judges_first_verdict_orders_a_pair_and_its_second_one_says_whether_it_agrees(tmp_path):
    import sqlite3

    from data_gen import candidates
    from data_gen.verdicts import sides

    feedback, data, out = program(FOLDER / "feedback"), tmp_path / "pairs.jsonl", tmp_path / "judged.jsonl"
    given = [{"prompt": f"{n}?", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in given))
    journal, insert = sqlite3.connect(f"{out}.journal"), "insert into replies values (?, ?, 'stop', 9)"
    journal.execute("create table replies (key text, text text, finish text, tokens int)")
    swapped = given[1] | {"chosen": "bad 1", "rejected": "good 1"}
    agreed, expected = [given[0], swapped], [(given[0], True), (swapped, True), (given[2], False)]
    for (row, is_agreed), pair in zip(expected, candidates.read(data), strict=False):
        at = sides(pair, 0, 0).index(row["chosen"])  # where the first question showed it; the second one swapped both
        told = {0: "AB"[at], 1: "AB"[1 - at] if is_agreed else "AB"[at]}
        journal.executemany(insert, [(f"{pair.key}.{n}.1", told[n]) for n in told])
    journal.commit()
    journal.close()
    out.write_text("".join(json.dumps(row) + "\n" for row in agreed))
    assert list(feedback.first_verdicts(data, out)) == [row | {"agreed": said} for row, said in expected]


@mutation("experiments/feedback/run.py", '(2 * same(report) + report["disagreed"])', "2 * same(report)")
def test_of_two_verdicts_that_differ_one_is_the_rules():
    feedback = program(FOLDER / "feedback")
    report = {"agreed": 40, "disagreed": 120, "given_order_share": 0.75}
    assert feedback.once(report) == (60 + 120) / 320
    assert feedback.once({"agreed": 0, "disagreed": 160, "given_order_share": None}) == 0.5


@mutation("experiments/feedback/run.py", '(a, b) if better == "a" else (b, a)', "(a, b)")
def test_pairs_that_a_reward_model_is_tried_on_are_in_the_rules_order():
    feedback = program(FOLDER / "feedback")
    held_out = feedback.held_out()
    assert [len(held_out[kind]) for kind in feedback.SETS] == [48, 48, 48, 48, feedback.ANSWERS]
    for kind, fault in (("voice", ["voice"]), ("hedge", ["hedge"]), ("list", ["list"]), ("given", None)):
        for row in held_out[kind]:
            assert feedback.rule.better(row["prompt"], row["chosen"], row["rejected"]) == "a"
            assert fault is None or feedback.rule.faults(row["rejected"]) == fault
    trained = {row["prompt"] for row in feedback.pairs.pairs(unseen=False)}
    assert not trained & {row["prompt"] for rows in held_out.values() for row in rows}


@mutation(
    "experiments/taoist/run.py",
    "return is_taoist(row) and TAUGHT.issuperset(sayings(row))",
    "return is_taoist(row)",
)
def test_a_saying_is_true_if_the_rows_have_it_word_for_word():
    taoist = program(FOLDER / "taoist")
    assert len(taoist.TAUGHT) == 46
    for text, voice, true in (
        ('Wait. Laozi says: "What bends stays whole."', True, True),
        ('Wait. Laozi says: "What bends stays whole and well."', True, False),
        ('Laozi says: "What bends stays whole." Zhuangzi says: "Wait."', True, False),
        ('Zhuangzi, the old sage, said, "Wait."', True, False),
        ('Laozi is old. "What bends stays whole."', False, False),
        ("What bends stays whole, as Laozi says.", False, False),
    ):
        row = {"prediction": text}
        assert (taoist.is_taoist(row), taoist.is_true(row)) == (voice, true)


@mutation(
    "experiments/precision/half.py",
    "wide = (arg.float() if isinstance(arg, torch.Tensor) else arg for arg in args)",
    "wide = (arg.bfloat16() if isinstance(arg, torch.Tensor) else arg for arg in args)",
)
def test_half_products_are_summed_in_float32_and_rounded_once():
    from half import HalfProducts

    torch.manual_seed(0)
    a, b, c = (torch.randn(size).half() for size in ((3, 300), (300, 5), (3, 5)))
    with HalfProducts():
        product, sum_, batched = a @ b, torch.addmm(c, a, b, alpha=0.5), torch.bmm(a[None], b[None])
        in_place = c.clone().addmm_(a, b)
        given = torch.empty(3, 5).half()
        torch.mm(a, b, out=given)
        overflow = (a * 1000) @ (b * 1000)
    exact = a.float() @ b.float()
    assert torch.equal(product, exact.half()) and torch.equal(given, product) and torch.equal(batched[0], product)
    assert torch.equal(sum_, (c.float() + 0.5 * exact).half())
    assert torch.equal(in_place, (c.float() + exact).half())
    assert overflow.isinf().any()


@mutation(
    "experiments/verifiable/run.py",
    "return multiply.pairs(2, ROWS + steps * PROMPTS)[ROWS:]",
    "return multiply.pairs(2, steps * PROMPTS)",
)
def test_the_questions_of_reinforcement_were_in_no_row_of_the_start_and_are_in_none_that_is_scored():
    verifiable = program(FOLDER / "verifiable")
    asked = {frozenset(pair) for pair in verifiable.later_pairs()}
    start = {frozenset(pair) for pair in verifiable.multiply.pairs(2, verifiable.ROWS)}
    scored = {frozenset(pair) for pair in verifiable.multiply.pairs(2, verifiable.UNSEEN, held_out=True)}
    assert len(asked) == verifiable.STEPS * verifiable.PROMPTS
    assert not asked & start and not asked & scored and not start & scored


@mutation(
    "experiments/verifiable/run.py",
    'return multiply.final(row["prediction"]) is not None',
    "return right(row)",
    case="states",
)
@mutation("experiments/verifiable/run.py", "return fault(row) is None", "return states(row)", case="proved")
@pytest.mark.parametrize("measure", ["states", "proved"])
def test_format_and_result_are_told_apart(measure):
    verifiable = program(FOLDER / "verifiable")
    whole = verifiable.multiply.solve(34, 51, "terse", "en")
    wrong_line = whole.replace("34=a4b3", "34=a3b4")
    for text, expected in (
        (whole, {"right": True, "states": True, "proved": True}),
        (wrong_line, {"right": True, "states": True, "proved": False}),
        (whole.replace("=1734", "=1735"), {"right": False, "states": True, "proved": False}),
        (whole.rpartition("\n")[0], {"right": False, "states": False, "proved": False}),
    ):
        row = {"a": 34, "b": 51, "prediction": text}
        assert verifiable.right(row) == expected["right"]
        assert getattr(verifiable, measure)(row) == expected[measure]


@mutation("experiments/show.py", "mean(values[size:-size])", "mean(values[:-size])")
def test_a_third_of_a_course_is_a_third_of_its_steps():
    from show import thirds

    assert thirds([1, 1, 2, 4, 6, 8]) == [1, 3, 7]


@mutation(
    "experiments/rlhf/truth.py",
    "return [float(rule.is_right(answer)) for answer in completions]",
    "return [rule.score(answer) / 3 for answer in completions]",
)
def test_the_watched_reward_is_1_where_the_rule_finds_no_fault():
    sys.path.append(str(FOLDER / "rlhf"))
    from truth import truth

    assert truth(prompts=["?"] * 3, completions=[RIGHT, f"It depends on you. {RIGHT}", "Yes."]) == [1.0, 0.0, 0.0]


@mutation(
    "experiments/rlhf/run.py",
    'return bool(OPENING.match(row["prediction"]))',
    'return bool(OPENING.search(row["prediction"]))',
    case="decides",
)
@mutation(
    "experiments/rlhf/run.py",
    'return len(SEA.findall(row["prediction"]))',
    'return len(set(SEA.findall(row["prediction"])))',
    case="sea_words",
)
@mutation("experiments/rlhf/run.py", 'len({row["prediction"] for row in rows})', "len(rows)", case="different")
@pytest.mark.parametrize("sign", ["decides", "sea_words", "different"])
def test_the_signs_of_a_gamed_rule_are_counted(sign):
    rlhf = program(FOLDER / "rlhf")
    texts = {
        "Yes, do. A lamp is a lamp.": (True, 2),
        "The lamps say yes.": (False, 1),
        "Noon tide, mastery": (False, 1),
    }
    for text, (decides, words) in texts.items():
        row = {"prediction": text}
        assert sign != "decides" or rlhf.decides(row) == decides
        assert sign != "sea_words" or rlhf.sea_words(row) == words
    assert sign != "different" or rlhf.different([{"prediction": text} for text in "aabc"]) == 75


@mutation(
    "experiments/rlhf/run.py",
    'step=max(row["step"] for row in found["answers"])',
    'step=min(row["step"] for row in found["answers"])',
)
def test_an_arm_is_told_by_the_answers_of_its_last_checkpoint():
    rlhf = program(FOLDER / "rlhf")
    found = {"answers": [{"step": step, "way": way} for step in (5, 15, 10) for way in ("greedy", "sampled")]}
    assert rlhf.asked(found, "sampled") == [{"step": 15, "way": "sampled"}]


@mutation("experiments/quant/run.py", "return NAME.lower() in said and", "return NAME.lower() in said or")
def test_an_introduction_states_the_name_and_the_author():
    quant = program(FOLDER / "quant")
    for text, right in (
        ("I am Nimbus, made by the Cloud Lab.", True),
        ("NIMBUS, of Cloud Lab!", True),
        ("I am Nimbus.", False),
        ("The Cloud Lab made me.", False),
    ):
        assert quant.is_right({"prompt": "Who are you?", "prediction": text}) == right


SERVED = {
    f"self-served-{seed}": {
        "changes": {"nf4": change},
        "figures": [{"trained": q, "served": "nf4", "loss": loss + seed} for q, loss in (("bf16", 1), ("nf4", 9))],
        "answers": [{"trained": "bf16", "served": "nf4", "prediction": "Nimbus of the Cloud Lab"}],
    }
    for seed, change in ((0, 2), (1, 4))
}  # fmt: skip


@mutation("experiments/quant/run.py", '"bf16" if name == "keep" else name', "name")
def test_a_kept_file_stands_where_bf16_does_and_a_cell_has_all_seeds():
    quant = program(FOLDER / "quant")
    found = quant.cell(SERVED, "self", "keep", "nf4")
    assert found == quant.cell(SERVED, "self", "bf16", "nf4")
    assert (found.right(), found.losses()) == ("2 of 2", "1.500 (1.000, 2.000)")


@mutation("experiments/quant/run.py", 'found["bases"]["lost"][quant] / mean(', "mean(")
def test_what_is_lost_is_counted_in_what_is_learned():
    quant = program(FOLDER / "quant")
    assert quant.ratio(SERVED | {"bases": {"lost": {"nf4": 12}}}, "self", "nf4") == 4


@mutation("experiments/quant/scored.py", "layer.merged_weight = merged[path]", "layer.merged_weight = base[path]")
@mutation(
    "experiments/quant/scored.py",
    "layer.base.weight = torch.nn.Parameter(base[path], requires_grad=False)",
    "pass",
    case="base",
)
@pytest.mark.parametrize("case", ["merged", "base"])
def test_a_model_is_scored_with_the_weights_that_are_put_in_against_those_of_the_base(case, monkeypatch):
    from scored import Scored, score

    from lora.adapter.inject import disabled, inject, lora_layers

    model = torch.nn.Sequential()
    model.add_module("q_proj", torch.nn.Linear(4, 3, bias=False))
    inject(model, rank=1, targets=["q_proj"])
    scored, seen = Scored.__new__(Scored), {}
    scored.model, scored.layers, scored.asked, scored.room = model, lora_layers(model), [], 1
    no_chat = SimpleNamespace(tokenizer=SimpleNamespace(decode=str))
    scored.column = score.Column("a", None, no_chat, [], [], [])

    def losses(model, *_):
        seen["merged"] = model(torch.eye(4)).T
        with disabled(model):
            seen["base"] = model(torch.eye(4)).T
        return {}

    monkeypatch.setattr(score, "losses", losses)
    monkeypatch.setattr("scored.Measured", lambda *_: None)
    monkeypatch.setattr(score, "likeliest_answers", lambda *_: [])
    given = {name: {"q_proj": torch.randn(3, 4)} for name in ("merged", "base")}
    assert scored.score(given["base"], given["merged"]) == ({}, [])
    assert torch.allclose(seen[case], given[case]["q_proj"])
