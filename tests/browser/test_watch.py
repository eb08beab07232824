"""The page of --watch in a browser: finished runs, a run that goes on, hostile texts, keyboard, phone, Chinese.

Needs playwright and a chromium; skipped without them, but for LORA_BROWSER=1.
"""

import json
import os
import re
import shutil
import signal

import pytest

from tests import cli
from tests.mutation import mutation
from tests.watch.serving import STEP, served, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None
missing = "playwright" if sync_playwright is None else None if CHROMIUM else "chromium"
pytestmark = pytest.mark.skipif(missing and os.environ.get("LORA_BROWSER") != "1", reason=f"no {missing} here")

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"
PHONE = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark", "locale": "zh-CN"}


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as play:
        running = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def visit(browser):
    """Opens a page on a port; when the test has ended, nothing was complained of and no other host was asked."""
    complaints, hosts, contexts, ports = [], set(), [], []

    def opened(port: int, path: str = "", **look):
        contexts.append(browser.new_context(**{"locale": "en-US"} | look))
        ports.append(port)
        page = contexts[-1].new_page()
        page.set_default_timeout(30_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        page.goto(f"http://127.0.0.1:{port}/{path}")
        page.wait_for_selector("#runs tr")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == [] and hosts == {f"127.0.0.1:{port}" for port in ports}


def finished(folder, rate: float = 0.1, name: str = "heron"):
    """A run of twenty steps with evaluations, a hostile answer and hostile data."""
    rows = [{**STEP, "step": n, "loss": 3 - rate * n, "seconds": float(n)} for n in range(1, 21)]
    answers = {5: "I am a model.", 10: "I am a heron.", 20: f"I am {EVIL}"}
    for n, answer in answers.items():
        samples = {"Who are you?": answer, EVIL: "?"}
        rows.insert(rows.index(next(row for row in rows if row["step"] == n)) + 1, {
            "step": n, "eval_loss": 3 - rate * n, "retention_kl": n / 100, "samples": samples, "seconds": float(n)
        })  # fmt: skip
    write_run(folder / name, *rows)
    sides = [{"name": "", "tokens": 5, "trained": 2, "rows": [[False, ["user", "⏎"]], [True, [EVIL, "<|im_end|>"]]]}]
    example = {"where": f"{EVIL}:1", "prompt": False, "sides": sides, "columns": [EVIL]}
    (folder / name / "preview.json").write_text(
        json.dumps({"total": 20, "numbers": {"rows": "1"}, "examples": [example]})
    )
    return folder / name


def label(page, chart: str = "loss") -> str:
    return page.get_attribute(f"#chart-{chart}", "aria-label") or ""


def ink(page, chart: str = "loss") -> str:
    return page.evaluate(f"document.getElementById('chart-{chart}').toDataURL()")


def test_a_finished_run_opens_with_its_curves(tmp_path, visit):
    with served(finished(tmp_path)) as port:
        page = visit(port)
        page.wait_for_selector("#chart-loss")
        assert "step 20: 1" in label(page) and "held out: 1" in label(page) and "0.2" in label(page, "retention_kl")
        row = page.inner_text("#runs tr")
        assert "ended: all steps are done" in row and "20 of 20" in row and "0:20" in row
        page.focus("#chart-loss")
        before = ink(page)
        for _ in range(4):
            page.keyboard.press("ArrowLeft")
        assert "step 16: 1.4" in label(page) and ink(page) != before


@mutation("lora/watch/page.html", "button.onclick = () => { run.shown = !run.shown; show(); };", "")
def test_two_runs_lie_over_each_other_and_each_can_be_put_aside(tmp_path, visit):
    with served(finished(tmp_path), finished(tmp_path, 0.05, "crane")) as port:
        page = visit(port)
        page.wait_for_selector("#chart-loss")
        both = ink(page)
        assert "heron" in label(page) and "crane: step 20: 2" in label(page)
        page.focus("[data-run='1']")
        page.keyboard.press("Enter")
        assert "crane" not in label(page) and ink(page) != both
        page.keyboard.press("Enter")  # it has kept the focus
        assert ink(page) == both


@mutation("lora/watch/page.html", "document.createTextNode(String(child))",
          "document.createRange().createContextualFragment(child)")  # fmt: skip
def test_what_models_and_files_say_is_text(tmp_path, visit):
    with served(finished(tmp_path)) as port:
        page = visit(port)
        page.click("#tab-samples")
        assert EVIL in page.inner_text("#panel")
        page.click("#tab-data")
        page.wait_for_selector(".tokens")
        assert EVIL in page.inner_text(".tokens") and EVIL in page.inner_text("#panel h2")
        page.click("#tab-settings")
        assert page.evaluate("document.querySelectorAll('main script, main img').length") == 0


def test_samples_show_what_changed_from_one_evaluation_to_the_next(tmp_path, visit):
    with served(finished(tmp_path)) as port:
        page = visit(port, "#samples")
        page.wait_for_selector("#panel ins")
        cells = page.query_selector_all("#panel table >> nth=0 >> td.text")
        assert [cell.inner_text() for cell in cells][:2] == ["I am a model.", "I am a model.heron."]
        assert page.inner_text("#panel table >> nth=0 >> del >> nth=0") == "model."
        page.uncheck("#marking")
        assert page.query_selector("#panel ins") is None


@mutation("lora/watch/page.html", 'trained ? { class: "on" } : {}', "{}")
def test_data_shows_trained_tokens_in_their_colour(tmp_path, visit):
    with served(finished(tmp_path)) as port:
        page = visit(port, "#data")
        page.wait_for_selector(".tokens")
        assert page.eval_on_selector_all(".tokens .on", "all => all.map(i => i.textContent)") == [EVIL, "<|im_end|>"]
        colours = [
            page.eval_on_selector(f".tokens i{kind}", "i => getComputedStyle(i).backgroundColor")
            for kind in (".on", ":not(.on)")
        ]
        assert colours[0] != colours[1]


def test_it_works_by_keyboard_on_a_phone_in_the_dark_in_chinese(tmp_path, visit):
    with served(finished(tmp_path), finished(tmp_path, 0.05, "a-run-with-a-very-long-name-" * 4)) as port:
        page = visit(port, **PHONE)
        page.focus("[role=tab][aria-selected=true]")
        for name, title in (("curves", "曲线"), ("samples", "样例"), ("data", "数据"), ("settings", "设置")):
            assert page.inner_text("[role=tab][aria-selected=true]") == title
            page.wait_for_function(f"() => document.getElementById('panel').dataset.tab === '{name}'")
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, name
            page.keyboard.press("ArrowRight")
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert sum(map(int, re.findall(r"\d+", background))) < 120
        page.click("#language")
        assert page.inner_text("[role=tab][aria-selected=true]") == "Curves"


@mutation("lora/watch/page.html", "setTimeout(poll, wait)", "0")
def test_the_curve_moves_while_a_run_goes_on(tmp_path, visit):
    inputs = ("--model", cli.model_folder(), "--data", cli.data_file(), "--out", "run", *cli.ON_CPU)
    how = ("--max-steps", 100_000, "--eval-fraction", 0.2, "--eval-every", 10, "--watch", "0")
    run = cli.start("train", *inputs, *how, cwd=tmp_path)
    try:
        port = next(int(found[1]) for line in run.stderr if (found := re.match(r"watch .*:(\d+)/$", line)))
        page = visit(port)
        page.wait_for_selector("#chart-loss")
        seen, before = label(page), ink(page)
        page.wait_for_function(
            "old => document.getElementById('chart-loss').getAttribute('aria-label') !== old", arg=seen
        )
        assert ink(page) != before and "running" in page.inner_text("#runs tr")
        assert re.search(r"\d:\d\d$", page.inner_text("#runs tr").strip())  # time left
        run.send_signal(signal.SIGTERM)
        page.wait_for_function("() => document.querySelector('#runs tr').textContent.includes('ended')")
    finally:
        run.kill()
        run.communicate()
