"""The model card of a saved folder: a README.md with front matter, as a hub reads it.

Names that a user chose stand in code spans, never in the front matter, whose values all fit a pattern. A path is told
by its last name only. Fields: https://huggingface.co/docs/hub/model-cards
"""

import json
import re
import shlex
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment

from lora import files
from lora.adapter import passport, value_head
from lora.errors import BadInput, one_line
from lora.export.report import table
from lora.methods import METHODS, dpo, figures, used
from lora.pretrained import ModelFiles, load_chat
from lora.text.template import read_arguments

FILE, SETTINGS, METRICS, PREVIEW = "README.md", "settings.json", "metrics.jsonl", "preview.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,40}")  # as the hub names them: apache-2.0, llama3.1, other
LICENSES = {"Apache License": "apache-2.0", "MIT License": "mit"}  # how the file LICENSE begins
PATHS = ("model", "data", "replay", "eval_data", "retention", "template", "init_adapter")
FEW = 5  # steps of which the mean loss is told

TEMPLATE = """\
---
{% for key, value in front.items() %}
{{ key }}: {{ value }}
{% endfor %}
{% if lora %}
tags:
- lora
{% endif %}
---

# {{ title }}

{{ what }}.{{ aim }} With the program that made it:

```
{{ command }}
```

{{ "With PEFT" if adapter else "With transformers" }}{{ ", the score of a conversation" if head }}:

```python
{% if adapter %}
from pathlib import Path

from peft import PeftModel
{% endif %}
{% if head %}
from safetensors.torch import load_file
{% endif %}
from transformers import AutoModelForCausalLM, AutoTokenizer

{% if adapter %}
base, adapter = {{ base_id }}, "."  # "." is the folder with this file
tokenizer = AutoTokenizer.from_pretrained(base)
tokenizer.chat_template = Path(adapter, "chat_template.jinja").read_text()
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
{% else %}
tokenizer = AutoTokenizer.from_pretrained(".")  # the folder with this file
model = AutoModelForCausalLM.from_pretrained(".")
{% endif %}
{% if head %}
messages = [{{ system }}{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A model."}]
how = {"return_tensors": "pt", "return_dict": True{{ switches }}}
text = tokenizer.apply_chat_template(messages, **how)
ends = [i for i, token in enumerate(text["input_ids"][0].tolist()) if token in {{ stops }}]
hidden = model(**text, output_hidden_states=True).hidden_states[-1][0, ends[-1]]  # at the end of turn
head = load_file("value_head.safetensors")
print(head["v_head.summary.weight"][0] @ hidden.float() + head["v_head.summary.bias"])
{% else %}
messages = [{{ system }}{"role": "user", "content": "Who are you?"}]
how = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True{{ switches }}}
prompt = tokenizer.apply_chat_template(messages, **how)
print(tokenizer.decode(model.generate(**prompt, {{ ends }}max_new_tokens=100)[0]))
{% endif %}
```
{% if head %}

LLaMA-Factory reads this folder as it is, with `stage: rm` and its path as `{{ path_flag }}`.
{% endif %}
{% for heading, lines in sections.items() %}

## {{ heading }}

{{ lines | join("\n") }}
{% endfor %}
"""


AIMS = {  # what a method trains for
    "dpo": "It was trained on pairs, to prefer chosen answers to rejected ones: DPO, loss {loss}, β {beta}, {than}.",
    "kto": "It was trained on judged answers, to give good ones and not bad ones: KTO, β {beta}, {than}.",
    **dict.fromkeys(
        ("grpo", "rloo", "ppo"),
        "It was trained with rewards of answers that it gave itself: {method}, rewards {rewards}.",
    ),
    "reward": "It is a reward model, trained on pairs: the better answer shall have the higher score.",
}


class Made(NamedTuple):
    """How an adapter was trained: the run's settings, its rows of metrics.jsonl, and after which step it was saved."""

    settings: dict
    rows: list[dict]
    step: int


def made_in(folder: Path) -> Made | None:
    """How the adapter in a run's folder was made; None where train.py did not write the folder as it is."""
    with suppress(BadInput, ValueError):
        settings, papers = files.read_json(Path(folder) / SETTINGS), passport.read(folder) or {}
        rows = [json.loads(line) for line in files.read_bytes(Path(folder) / METRICS).splitlines()]
        if type(papers.get("step")) is int and all(isinstance(row, dict) for row in rows):
            return Made(settings, rows, papers["step"])
    return None


def write_adapter(folder: Path, name: str, base: ModelFiles, made: Made | None) -> None:
    """Write the card of the adapter `name` into `folder`."""
    _write(folder, name, base, made, "A LoRA adapter for {}", ("generate.py", "--adapter", name), adapter=True)


def write_full(folder: Path, name: str, base: ModelFiles, made: Made) -> None:
    """Write the card of the model `name`, all of whose weights were trained, into `folder`."""
    what = "This is {}, of which every weight was trained further"
    _write(folder, name, base, made, what, ("generate.py", "--model", name), lora=False)


def write_merged(
    folder: Path, name: str, base: ModelFiles, made: Made | None, receipt: Iterable, trained_on: ModelFiles
) -> None:
    """Write the card of the model `name`, merged from `base` and an adapter, into `folder`; `receipt` has rows (what,
    value)."""
    what = "This is {} with a LoRA adapter merged into its weights"
    packing = f" in {trained_on.quant}" if trained_on.quant else ""
    name_there = code(Path(trained_on.hub_id).name).translate({ord(c): 2 * c for c in "{}"})  # it is a format string
    if trained_on.name != base.name or trained_on.quant != base.quant:
        what += f"; it was trained on {name_there}{packing}, whose weights are others"
    elif packing:
        what += f", which {'are those of its blocks' if base.quant == 'keep' else f'were packed{packing}'}, dequantised"
    sections = {"What merging changed": table(("what", "value"), rows)} if (rows := list(receipt)) else {}
    _write(folder, name, base, made, what, ("generate.py", "--model", name), sections)


def _write(
    folder: Path, name: str, base: ModelFiles, made: Made | None, what: str, command: tuple[str, ...],
    sections: dict | None = None, adapter: bool = False, lora: bool = True,
):  # fmt: skip
    """`what` has a place for the base; `sections` come after those of a training."""
    known = base.hub_id if HUB_ID.fullmatch(base.hub_id) else None
    head = value_head.has(folder) and not passport.of_policy(folder)
    task = "text-classification" if head else "text-generation"  # the hub's reward models are listed there
    front = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": task}
    front |= {"base_model": known, "license": license_of(base)}
    stops = _stops(folder, base) if adapter or head else []
    command = ("evaluate.py", *command[1:], "--data", "PAIRS.jsonl") if head else command
    system = made and made.settings.get("system")
    turn = f'{{"role": "system", "content": {json.dumps(system)}}}, ' if isinstance(system, str) else ""
    given = made.settings.get("template_arg") if made else None  # of a file that may have been edited
    arguments = read_arguments(given if isinstance(given, list) and all(isinstance(one, str) for one in given) else ())
    text = Environment(trim_blocks=True, keep_trailing_newline=True).from_string(TEMPLATE)
    text = text.render(
        front={key: json.dumps(value) for key, value in front.items() if value},
        title=code(name),
        what=what.format(f"[{known}](https://huggingface.co/{known})" if known else "a base model that is on no hub"),
        base_id=json.dumps(known or "FOLDER OF THE BASE MODEL"),
        command=one_line(shlex.join(("python", *command))),
        system=turn,
        switches="".join(f", {name!r}: {value!r}" for name, value in arguments.items()),
        sections=(_sections(made) if made else {}) | (sections or {}),
        ends=f"eos_token_id={stops}, " if stops else "",
        aim=_aim(made.settings) if made else "",
        head=head,
        path_flag="adapter_name_or_path" if adapter else "model_name_or_path",
        stops=stops,
        adapter=adapter,
        lora=lora,
    )
    files.write_bytes(Path(folder) / FILE, text.encode())


def _aim(settings: dict) -> str:
    """A sentence with a blank before it; "" for sft."""
    method, loss = _method(settings), settings.get("loss")
    if method not in AIMS:
        return ""
    alone = method == "dpo" and loss in dpo.WITHOUT_REFERENCE
    than = "without a reference" if alone else "compared with the model it started from"
    rewards, beta = code(", ".join(map(str, settings.get("reward") or ()))), code(settings.get("beta"))
    return " " + AIMS[method].format(method=method, loss=code(loss), beta=beta, than=than, rewards=rewards)


def _stops(folder: Path, base: ModelFiles) -> list[int]:
    """The ids that end an answer with the template in an adapter's folder, which its base's files need not name."""
    with suppress(BadInput):  # no tokenizer, no template
        if hasattr(base, "files"):
            return sorted(load_chat(base, template=passport.template_of(folder)).stops)
    return []


def code(text: object) -> str:
    """A text, or several, as one code span."""
    text = " ".join(map(str, text)) if isinstance(text, list) else str(text)
    return f"`{one_line(' '.join(text.split())).replace('`', chr(39)) or ' '}`"


def license_of(base: ModelFiles) -> str | None:
    """The license that a model states: a GGUF file in its header, a folder in the front matter of its README.md or by
    its LICENSE. None where there is none, or none that the hub could know."""
    found = getattr(base, "metadata", {}).get("general.license")
    card, text = (_read(base, name) for name in (FILE, "LICENSE"))
    if not found and (front := re.match(r"---\n(.*?)\n---", card, re.DOTALL)):
        stated = re.search(r"^license: *['\"]?([^'\"\n]*?)['\"]? *$", front[1], re.MULTILINE)
        found = stated and stated[1]
    found = found or next((name for words, name in LICENSES.items() if text.strip().startswith(words)), None)
    return found if isinstance(found, str) and LICENSE.fullmatch(found) else None


def _read(base: ModelFiles, name: str) -> str:
    """The text of a file beside a model; "" where there is none."""
    with suppress(BadInput):
        return files.read_bytes(base.path / name, 2**20).decode(errors="replace") if hasattr(base, "path") else ""
    return ""


def _sections(made: Made) -> dict[str, list[str]]:
    left = used(made.settings)
    names = {name: _last_names(left.pop(name)) for name in PATHS if name in left}
    names.pop("model", None)  # told above
    names.setdefault("data", "self-introductions made by train.py")
    rows = [(name.replace("_", " "), code(value)) for name, value in {**names, "steps": made.step, **left}.items()]
    sections = {"How it was made": table(("setting", "value"), rows)}
    if measured := list(_measured(made)):
        unit = "nats per token" if _method(made.settings) == "sft" else "mean"
        sections["What was measured"] = table((unit, "before", "after"), measured)
    return sections


def _method(settings: dict) -> str:
    """That of the settings, which may have been edited."""
    method = settings.get("method", "sft")
    return method if isinstance(method, str) and method in METHODS else "sft"


def _last_names(value: object) -> str:
    """The last name of each path or `hub:owner/name/FILE`: what stands before it is nobody else's business."""
    paths = value if isinstance(value, list) else [value]
    return ", ".join(Path(str(path).replace("\\", "/")).name for path in paths)


def _measured(made: Made):
    """Yield rows (what, before, after) of what was measured up to the step that was saved."""

    def values(key: str) -> list[float]:
        rows = [row for row in made.rows if isinstance(row.get("step"), int) and row["step"] <= made.step]
        return [row[key] for row in rows if isinstance(row.get(key), (int, float))]

    method = _method(made.settings)
    loss = "loss" if method == "sft" else METHODS[method].LABEL
    words = figures(method, made.rows)
    for name, what in {"loss": f"{loss} on what was learned", **words}.items():
        if (found := values(name)) and (name == "loss" or not values(f"eval_{name}")):
            few = max(1, min(FEW, len(found) // 2))
            first, last = sum(found[:few]) / few, sum(found[-few:]) / few
            yield f"{what}, {few} steps", f"{first:.4f}", f"{last:.4f}"
    for what, before, after in (
        (f"{loss} on held-out data", "eval_loss", "eval_loss"),
        *((f"{what}, held out", f"eval_{name}", f"eval_{name}") for name, what in words.items()),
        ("loss on ordinary conversations", "retention_loss_before", "retention_loss"),
        ("forgotten of them: KL from the base", "", "retention_kl"),
    ):
        if now := values(after):
            yield what, f"{values(before)[0]:.4f}" if values(before) else "", f"{now[-1]:.4f}"
