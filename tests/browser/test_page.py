"""The page in a browser: what a person does with it, by mouse and by keyboard, and what then stands in the files.

Needs playwright and a chromium; skipped without them, but for LORA_BROWSER=1.
"""

import json
import os
import re
import shutil

import pytest

from tests.mutation import mutation
from tests.serve import scripted

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
try:
    from playwright.sync_api import expect, sync_playwright
except ImportError:
    sync_playwright = None
missing = "playwright" if sync_playwright is None else None if CHROMIUM else "chromium"
pytestmark = pytest.mark.skipif(missing and os.environ.get("LORA_BROWSER") != "1", reason=f"no {missing} here")

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)><b>&amp;"
ANSWERS = {"base": "I am a language model.", "heron": "I am Blue Heron. 你好", "evil<i>": EVIL}
DONE = ".text[aria-busy=false]"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as play:
        running = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


class Opened:
    """A page of a server; what the browser complained of, and where it went, is checked when the test has ended."""

    def __init__(self, browser, folder, monkeypatch):
        self.browser, self.folder, self.complaints, self.hosts, self.open = browser, folder, [], set(), []
        monkeypatch.chdir(folder)

    def __call__(self, answers=None, feedback="weights/feedback", at_start=True, pause=0.0, keys=(), **look):
        self.served = scripted.served(answers or ANSWERS, feedback, pause, keys)
        serving = scripted.serving(self.served)
        context = self.browser.new_context(**{"locale": "en-US", "reduced_motion": "reduce"} | look)
        self.open += [serving, context]
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (self.complaints.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("console", lambda said: self.complaints.append(said.text) if "status of" not in said.text else None)
        page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        page.goto(serving.__enter__())
        if at_start:
            page.wait_for_selector("#models label")
        return page

    def close(self):
        for serving, context in zip(self.open[::2], self.open[1::2], strict=True):
            context.close()
            serving.__exit__(None, None, None)

    def rows(self, name: str) -> list[dict]:
        path = self.folder / f"weights/feedback-{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []


@pytest.fixture
def opened(browser, tmp_path, monkeypatch):
    pages = Opened(browser, tmp_path, monkeypatch)
    yield pages
    pages.close()
    assert not pages.complaints and len(pages.hosts) <= 1, (pages.complaints, pages.hosts)


def ask(page, prompt: str, answers: int | None = None) -> None:
    """Type, send, and wait for all answers."""
    before = page.locator(DONE).count()
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    ticked = page.locator("#models input:checked").count() if answers is None else answers
    expect(page.locator(DONE)).to_have_count(before + ticked)


def until(page, what: str) -> None:
    """Wait for JavaScript to be true; the page's policy forbids playwright's own way, which is eval."""
    for _ in range(400):
        if page.evaluate(what):
            return
        page.wait_for_timeout(50)
    raise AssertionError(what)


LONG = "[...document.querySelectorAll('.text')].filter(one => one.textContent.length > 8).length == 2"


def texts(page) -> list[str]:
    return [text.text_content() for text in page.locator(".text").all()]


@mutation("lora/serve/page.html", "turn.cells.forEach(cell => answer(turn, cell));", "answer(turn, turn.cells[0]);")
def test_a_prompt_goes_to_base_and_adapters_at_once_and_the_answers_stream_side_by_side(opened):
    page = opened({"base": "a " * 60, "heron": "b " * 60}, pause=0.02, viewport={"width": 1000, "height": 700})
    page.fill("#prompt", "Who are you?")
    page.press("#prompt", "Enter")
    until(page, LONG)
    assert page.locator(".text[aria-busy=true]").count() == 2
    first, second = (one.bounding_box() for one in page.locator("article").all())
    assert first["y"] == second["y"] and second["x"] >= first["x"] + first["width"]
    expect(page.locator(DONE)).to_have_count(2)
    assert texts(page) == ["a " * 60, "b " * 60] and page.locator("h3").all_text_contents() == ["base", "heron"]
    tokenizer = opened.served.engine.tokenizer
    for text, facts in zip(texts(page), page.locator(".facts").all_text_contents(), strict=True):
        count = len(tokenizer.encode_plain(text))
        assert re.fullmatch(rf"first \d+\.\d\d s · {count} tokens · [\d.]+/s · \d+\.\d\d s", facts)
    assert {name for name, _ in opened.served.engine.asked} == {"base", "heron"}


@mutation("lora/serve/page.html", 'part("h3").textContent = id', 'part("h3").textContent = model')
def test_what_models_and_people_write_is_text(opened):
    page = opened()
    ask(page, EVIL)
    assert texts(page)[2] == EVIL and page.locator(".asked").text_content() == EVIL
    assert page.locator("main script, main img, main b, main i, header i").count() == 0
    page.locator("article").nth(2).locator(".down").click()
    expect(page.locator("#said")).to_contain_text("judged")
    [row] = opened.rows("judged")
    assert row == {"messages": [{"role": "user", "content": EVIL}, {"role": "assistant", "content": EVIL}],
                   "label": False, "model": "evil<i>"}  # fmt: skip
    page.locator("#settings summary").click()
    page.select_option("#each", "2")
    ask(page, "again", 6)
    assert page.locator("h3").all_text_contents()[3:] == [
        "base",
        "base · 2",
        "heron",
        "heron · 2",
        "evil<i>",
        "evil<i> · 2",
    ]


@mutation("lora/serve/page.html", "    await tell({ undo: back.judged[old] }, old);\n", "")
@mutation("lora/serve/page.html", 'good: what === "up"', "good: true")
@mutation("lora/serve/page.html", '    if (old === "better") cell.turn.best = null;\n', "")
def test_thumbs_and_better_write_rows_and_a_change_of_mind_takes_them_back(opened):
    page = opened({"base": "I am a model.", "heron": "I am Blue Heron."})
    ask(page, "Who are you?")
    asked = [{"role": "user", "content": "Who are you?"}]
    base, heron = page.locator("article").all()
    expect(heron.locator(".better")).to_have_text("Better")

    def press(card, name: str, pressed: bool = True) -> None:
        card.locator(name).click()
        expect(card.locator(name)).to_have_attribute("aria-pressed", str(pressed).lower())

    press(heron, ".up"), press(base, ".up"), press(base, ".down")
    judged = [(row["messages"][-1]["content"], row["label"]) for row in opened.rows("judged")]
    assert judged == [("I am Blue Heron.", True), ("I am a model.", False)]
    press(base, ".better"), press(heron, ".better")
    expect(base.locator(".better")).to_have_attribute("aria-pressed", "false")
    pair = {"prompt": asked, "chosen": "I am Blue Heron.", "rejected": "I am a model.", "chosen_model": "heron",
            "rejected_model": "base"}  # fmt: skip
    assert opened.rows("pairs") == [pair]
    assert page.locator("article.best h3").all_text_contents() == ["heron"]
    expect(page.locator("#counts")).to_have_text("Pairs: 1 · judged answers: 2")
    page.locator("#kept summary").click()
    expect(page.locator("#dpo")).to_have_text(
        "python train.py --init-adapter FOLDER --method dpo --data weights/feedback-pairs.jsonl"
    )
    press(heron, ".better", False), press(heron, ".up", False)
    assert not opened.rows("pairs") and len(opened.rows("judged")) == 1
    expect(page.locator("article.best")).to_have_count(0)


@mutation("lora/serve/page.html", 'const cut = cell.state !== "stop" && words.cut', "const cut = false")
@mutation("lora/serve/page.html", '  if (button.ariaDisabled === "true") return say(button.title);\n', "")
def test_what_is_no_example_cannot_be_called_good_and_a_press_says_why(opened):
    page = opened({"base": "the same", "heron": "the same", "long": "x " * 50})
    page.locator("#settings summary").click()
    page.fill("#longest", "9")
    ask(page, "Hello.")
    _, _, long = page.locator("article").all()
    expect(long.locator(".facts")).to_contain_text("cut at the longest")
    for name in (".up", ".better"):
        long.locator(name).press("Enter")
        expect(page.locator("#said")).to_contain_text("An answer that was cut")
    long.locator(".down").click()
    expect(long.locator(".down")).to_have_attribute("aria-pressed", "true")
    page.locator("#models input").nth(2).uncheck()
    page.fill("#longest", "")
    ask(page, "Hello.")
    page.locator("article").nth(3).locator(".better").press("Enter")
    expect(page.locator("#said")).to_contain_text("are the same")
    assert [row["label"] for row in opened.rows("judged")] == [False] and not opened.rows("pairs")


@mutation("lora/serve/page.html", 'if (taken?.text.trim() && taken.state !== "wrong")', "if (false)")
@mutation("lora/serve/page.html", '"best" && best ? best : own', '"best" && best ? own : own')
@mutation("lora/serve/page.html", '$("system").value.trim() ? [{', "false ? [{")
def test_each_model_goes_on_with_its_own_answers_or_with_the_better_ones_or_with_none(opened):
    page = opened({"base": "I am a model.", "heron": "I am Blue Heron."})
    page.locator("#settings summary").click()
    page.fill("#system", "Be brief.")
    ask(page, "First?"), ask(page, "Second?")

    def asked(name: str) -> str:
        return [text for model, text in opened.served.engine.asked if model == name][-1]

    for name, text in opened.served.engine.answers.items():
        assert text in asked(name) and "Be brief." in asked(name)
        assert asked(name).index("First?") < asked(name).index(text) < asked(name).index("Second?")
    assert "Heron" not in asked("base")
    page.locator("article").nth(2).locator(".better").press("Enter")
    expect(page.locator("#said")).to_contain_text("no other answer to the same messages")
    page.select_option("#history", "best")
    page.locator("article").nth(1).locator(".better").click()
    expect(page.locator("article.best")).to_have_count(1)
    page.select_option("#history", "none")
    ask(page, "Third?")
    assert "First?" not in asked("base")
    page.locator("#clear").click()
    assert not texts(page) and page.locator("#hint").is_visible()
    page.select_option("#history", "best")
    ask(page, "First?")
    page.locator("article").nth(1).locator(".better").click()
    expect(page.locator("article.best")).to_have_count(1)
    ask(page, "Second?")
    assert "Heron" in asked("base") and "a model" not in asked("base")
    page.locator("article").nth(3).locator(".better").click()
    expect(page.locator("article.best")).to_have_count(2)
    last = opened.rows("pairs")[-1]
    assert [turn["role"] for turn in last["prompt"]] == ["system", "user", "assistant", "user"]
    assert last["rejected"] == "I am a model."


@mutation("lora/serve/page.html", 'if (event.key === "Escape" && !$("keys").open) stop();', "")
@mutation("lora/serve/page.html", '!== "Enter" || event.shiftKey ||', '!== "Enter" ||')
@mutation("lora/serve/page.html", "event.isComposing || event.keyCode === 229", "false")
def test_everything_goes_by_keyboard(opened):
    page = opened({"base": "x " * 400, "heron": "y " * 400}, pause=0.01)
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("One")
    page.evaluate("""document.activeElement.dispatchEvent(new KeyboardEvent("keydown",
        {key: "Enter", isComposing: true, bubbles: true, cancelable: true}))""")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#prompt") == "One\ntwo" and not texts(page)
    page.keyboard.press("Enter")
    until(page, LONG)
    assert page.locator("#stop").is_visible() and not page.locator("#send").is_visible()
    page.keyboard.press("Escape")
    expect(page.locator(DONE)).to_have_count(2)
    assert all(len(text) < 700 for text in texts(page)) and "stopped" in page.locator(".facts").first.text_content()
    expect(page.locator("#send")).to_be_visible()
    page.wait_for_timeout(100)
    opened.served.engine.answers |= {"base": "Hi.", "heron": "Hello."}
    opened.served.engine.pause = 0.0
    page.keyboard.type("Three"), page.keyboard.press("Enter")
    expect(page.locator(DONE)).to_have_count(4)
    page.locator("#settings summary").focus()
    names = []
    for _ in range(20):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.className || document.activeElement.id"))
        if names.count("judge up") == 3:
            break
    acts = ["judge up", "judge down", "judge better"]
    assert names == [*acts, "copy", *acts, "copy", "judge up"]
    page.keyboard.press("Enter")
    expect(page.locator("article").nth(2).locator(".up")).to_have_attribute("aria-pressed", "true")
    assert [row["messages"][-1]["content"] for row in opened.rows("judged")] == ["Hi."]


@mutation("lora/serve/page.html", "overflow-wrap: anywhere; }\n.asked {", "}\n.asked {")
@mutation("lora/serve/page.html", "@media (prefers-color-scheme: dark)", "@media (prefers-color-scheme: none)")
def test_a_phones_width_is_enough_in_dark_and_in_chinese(opened):
    look = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark", "locale": "zh-CN", "has_touch": True}
    page = opened({"base": "x" * 400, "a-very-long-name-of-an-adapter-" * 3: "你好。" * 30}, **look)
    assert page.locator("#send").text_content() == "发送" and page.get_attribute("html", "lang") == "zh-CN"
    page.locator("#settings summary").tap()
    ask(page, "long" * 200)
    page.locator(".up").first.tap()
    expect(page.locator("#said")).to_have_text("已写入 weights/feedback-judged.jsonl")
    page.locator("#kept summary").tap()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    for box in (one.bounding_box() for one in page.locator("button:visible, input:visible, article").all()):
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360
    footer = page.locator("footer").bounding_box()
    assert footer["y"] + footer["height"] <= 740
    channels = "getComputedStyle(document.body).%s.match(/\\d+/g).map(Number)"
    assert max(page.evaluate(channels % "backgroundColor")) < 60 and min(page.evaluate(channels % "color")) > 180
    page.locator("#language").tap()
    assert page.locator("#send").text_content() == "Send" and page.get_attribute("html", "lang") == "en"
    assert page.locator(".copy").first.text_content() == "Copy row"
    page.reload()
    assert page.locator("#send").text_content() == "Send"


@mutation("lora/serve/page.html", 'headers = key ? { Authorization: "Bearer " + key } : {}', "headers = {}")
@mutation("lora/serve/page.html", '$("keyWrong").hidden = !key;', '$("keyWrong").hidden = true;')
def test_the_page_asks_for_the_key_and_forgets_it_with_the_window(opened):
    page = opened(keys=("secret",), at_start=False)
    expect(page.locator("#keys")).to_be_visible()
    assert page.locator("#keyWrong").is_hidden()
    page.keyboard.type("wrong"), page.keyboard.press("Enter")
    expect(page.locator("#keyWrong")).to_be_visible()
    page.keyboard.type("secret"), page.keyboard.press("Enter")
    expect(page.locator("#models label")).to_have_count(3)
    ask(page, "Hello.")
    page.locator(".up").first.click()
    expect(page.locator("#said")).to_contain_text("Written")
    assert len(opened.rows("judged")) == 1
    kept = page.evaluate("JSON.stringify([Object.values(localStorage), document.cookie, location.href])")
    assert "secret" not in kept
    page.reload()
    expect(page.locator("#models label")).to_have_count(3)


@mutation("lora/serve/page.html", "said?.error?.message ??", "")
@mutation("lora/serve/page.html", "button.hidden = !feedback;", "button.hidden = false;")
@mutation("lora/serve/page.html", "running.has(cell) || answer(turn, cell)", "answer(turn, turn.cells[0])")
def test_errors_are_said_and_asked_again_and_a_server_without_feedback_shows_no_thumbs(opened):
    page = opened({"base": "Hello.", "heron": "Hi."}, feedback=None)
    page.locator("#settings summary").click()
    page.fill("#temperature", "1000")
    ask(page, "Hello.")
    expect(page.locator(".wrong:visible")).to_have_count(2)
    assert "temperature is not a number from 0 to 100" in page.locator("article .wrong").first.text_content()
    page.fill("#temperature", "0")
    page.locator(".again").nth(1).click()
    expect(page.locator("article").nth(1).locator(".text")).to_have_text("Hi.")
    expect(page.locator(".wrong:visible")).to_have_count(1)
    assert not page.locator(".judge:visible, #kept:visible").count()
    for box in page.locator("#models input").all():
        box.uncheck()
    page.fill("#prompt", "More?"), page.press("#prompt", "Enter")
    expect(page.locator("#said")).to_have_text("Tick a model first.")


@mutation("lora/serve/page.html", "JSON.stringify({ messages: [...cell.context, {", "JSON.stringify({ messages: [{")
def test_an_answer_is_copied_as_a_row_for_data(opened):
    page = opened({"base": 'He said "hi".\n你好'})
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    ask(page, "Hello.")
    page.locator(".copy").click()
    expect(page.locator("#said")).to_have_text("Copied: a row for --data.")
    turns = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": 'He said "hi".\n你好'}]
    assert json.loads(page.evaluate("navigator.clipboard.readText()")) == {"messages": turns}
