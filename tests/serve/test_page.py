"""The page is one file that loads nothing, makes no markup of what it is told, and is all that can be read."""

import base64
import configparser
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from lora.serve.app import application
from tests.mutation import mutation
from tests.serve import scripted

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "lora/serve/page.html").read_text(encoding="utf-8")


def client(**how) -> TestClient:
    served = scripted.served({"base": "Hello."}, **how)
    return TestClient(application(served), "http://127.0.0.1", raise_server_exceptions=False)


class Parts(HTMLParser):
    """Every tag with its attributes, and the texts of scripts and styles."""

    def __init__(self):
        super().__init__()
        self.tags, self.texts = [], {"script": [], "style": []}

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.cdata_elem:
            self.texts[self.cdata_elem].append(data)


def parts() -> Parts:
    found = Parts()
    found.feed(PAGE)
    return found


@mutation("lora/serve/page.py", "\"default-src 'none'\", ", "")
@mutation("lora/serve/page.py", "\"connect-src 'self'\"", '"connect-src *"')
@mutation("lora/serve/page.py", "hashlib.sha256(text.encode())", "hashlib.sha256(text.strip().encode())")
@mutation("lora/serve/page.py", '    "X-Content-Type-Options": "nosniff",\n', "")
def test_the_page_may_run_what_stands_in_it_and_talk_to_its_own_server_and_nothing_else():
    response = client().get("/")
    assert response.status_code == 200 and response.text == PAGE
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    rules = dict(rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; "))

    def hashed(kind: str) -> str:
        [text] = parts().texts[kind]
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert rules.pop("script-src") == hashed("script") and rules.pop("style-src") == hashed("style")
    assert rules == {
        "default-src": "'none'", "connect-src": "'self'", "img-src": "data:", "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'", "require-trusted-types-for": "'script'", "trusted-types": "'none'",
    }  # fmt: skip
    for name, value in (
        ("x-content-type-options", "nosniff"), ("referrer-policy", "no-referrer"), ("x-frame-options", "DENY"),
        ("cross-origin-opener-policy", "same-origin"), ("cross-origin-resource-policy", "same-origin"),
    ):  # fmt: skip
        assert response.headers[name] == value
    assert not [name for name in response.headers if name.startswith("access-control")]


@mutation("lora/serve/page.html", '<link rel="icon" href="data:,">', '<link rel="icon" href="//cdn.example/x.ico">')
@mutation("lora/serve/page.html", '<p class="facts"></p>', '<p class="facts" style="color: red"></p>')
@mutation("lora/serve/page.html", 'part("h3").textContent = id', 'part("h3").innerHTML = id')
def test_no_other_host_is_named_and_no_text_becomes_markup_or_code():
    assert not re.findall(r"https?:|wss?:|(?<![:\w])//[\w.]+\.\w|@import|url\(", re.sub(r"(?m)// .*$", "", PAGE))
    for tag, attributes in parts().tags:
        outside = {"src", "action", "formaction", "srcset", "ping", "style"} & attributes.keys()
        assert not outside and not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert attributes.get("href", "data:,") == "data:,", (tag, attributes)
        assert tag not in ("iframe", "object", "embed", "base", "img", "a"), tag
    [script] = parts().texts["script"]
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\bFunction\(|createContextualFragment"
    assert not re.findall(rf"{forbidden}|DOMParser|setHTML|srcdoc|setTimeout\([\"'`]|import\(|\.cookie", script)


@mutation("lora/serve/page.html", 'stopped: "已停止", ', "")
@mutation("lora/serve/page.html", 'data-t="clear" data-title="clearTitle"', 'data-t="clear" data-title="clearIt"')
def test_every_text_is_there_in_both_languages():
    [script] = parts().texts["script"]
    tables = re.search(r"const TEXTS = \{\n  en: \{(.*?)\n  \},\n  zh: \{(.*?)\n  \},\n\};", script, re.DOTALL)
    english, chinese = ([*re.findall(r'(\w+): "(?:[^"]*)"', table)] for table in tables.groups())
    assert english == chinese and len(english) == len({*english}) > 40
    used = {text for _, attributes in parts().tags for name, text in attributes.items()
            if name in ("data-t", "data-title", "data-placeholder")}  # fmt: skip
    used |= {*re.findall(r"\bwords\.(\w+)", script)}
    assert used <= {*english}
    assert not {*english} - used - {"stopped", "length"}  # which are the names of how an answer ended


@pytest.mark.parametrize("prefix", ["/", "//", "/v1/models/", "/feedback/", "/static/"])
def test_no_path_leads_to_a_file(prefix):
    here = client()
    for name in (
        "page.html", "app.py", "generate.py", "README.md", "etc/passwd", "/etc/passwd", "../app.py",
        "../../../../../../etc/passwd", "%2e%2e/%2e%2e/%2e%2e/etc/passwd", "..%2f..%2f..%2fetc%2fpasswd",
        "..\\..\\etc\\passwd", "%00", "file:///etc/passwd", ".git/config", "weights/feedback-pairs.jsonl",
    ):  # fmt: skip
        response = here.get(f"http://127.0.0.1{prefix}{name}")
        assert response.status_code in (404, 405), (prefix, name, response.text[:200])
        assert "error" in json.loads(response.text) and "root:" not in response.text and "import " not in response.text


def test_the_page_itself_needs_no_key_and_holds_none():
    here = client(keys=("a-secret-key",))
    assert here.get("/").text == PAGE
    assert {here.get(path).status_code for path in ("/settings", "/v1/models", "/metrics")} == {401}


@mutation("setup.cfg", "lora.serve = page.html\n", "")
def test_an_installed_package_has_the_page():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["options.package_data"]["lora.serve"] == "page.html"
