"""The preview shows what a model will see and what it will learn, token by token, and the numbers of a data set."""

import json
import os
import sys
from collections.abc import Iterator

import numpy as np

from lora.data.batch import Linked
from lora.data.encode import Encoded
from lora.data.formats import Conversation
from lora.errors import one_line
from lora.text.chat import Example
from lora.text.tokenizer import BROKEN, Tokenizer

COLUMNS, WIDTH = 3, 100  # of a prompt's row, and characters of each
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


def coloured(stream=None) -> bool:
    """Colours are for a terminal: not for a file or a pipe, nor where NO_COLOR is set (https://no-color.org)."""
    stream = stream or sys.stdout
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def pieces(tokenizer: Tokenizer, ids: list[int]) -> Iterator[str]:
    """Each token as visible text: control tokens by name, … for a token that is only part of a character."""
    pending = []
    for i in ids:
        pending = [i] if i in tokenizer.control.values() else [*pending, i]
        text = tokenizer.spell(pending)
        if text.endswith(BROKEN) and len(pending) < 4:  # a character has at most four bytes
            yield "…"
            continue
        text, pending = text.replace("\n", "⏎").replace("\t", "→"), []
        yield "".join(c if c.isprintable() else f"\\u{{{ord(c):x}}}" for c in text)


def rows(example: Example, tokenizer: Tokenizer) -> list[tuple[bool, list[str]]]:
    """The tokens in lines. A line is trained as a whole or not at all; it ends where the text's own line ends (⏎)."""
    found: list[tuple[bool, list[str]]] = []
    for text, trained in zip(pieces(tokenizer, example.tokens), example.trained, strict=True):
        if not found or trained != found[-1][0] or found[-1][1][-1].endswith("⏎"):
            found.append((trained, []))
        found[-1][1].append(text)
    return found


def lines(example: Example, tokenizer: Tokenizer, colour: bool) -> list[str]:
    """The tokens with `│` between them; a trained line is marked +."""
    shown = [("+ " if trained else "  ") + "│".join(texts) for trained, texts in rows(example, tokenizer)]
    if colour:
        shown = [f"{GREEN}{line}{PLAIN}" if line[0] == "+" else line for line in shown]
    return shown


def show(examples: Encoded, count: int, tokenizer: Tokenizer) -> None:
    """The first `count` examples on stdout; linked ones, as the sides of a pair, below each other, each by its name."""
    colour = coloured()
    for i in range(min(count, len(examples))):
        sides = named(examples[i]) if examples.group > 1 else {"": examples[i]}
        for name, example in sides.items():
            what, learned = ("prompt", "") if examples.prompts else ("example", f", {sum(example.trained)} trained (+)")
            print(f"{what} {i + 1} of {len(examples)}{name}, {one_line(examples.where[i])}: {len(example.tokens)} "
                  f"tokens{learned}")  # fmt: skip
            print("\n".join([*lines(example, tokenizer, colour), *columns(examples.prompts[i : i + 1])]) + "\n")


def told(examples: Encoded, count: int, most: int, tokenizer: Tokenizer) -> list[dict]:
    """The first `count` examples as JSON, of each side the first `most` tokens: what `show` prints."""
    found = []
    for i in range(min(count, len(examples))):
        sides = named(examples[i]) if examples.group > 1 else {"": examples[i]}
        parts = [
            {
                "name": name.removeprefix(", "),
                "tokens": len(example.tokens),
                "trained": sum(example.trained),
                "rows": rows(Example(example.tokens[:most], example.trained[:most]), tokenizer),
            }
            for name, example in sides.items()
        ]
        where, more = one_line(examples.where[i]), [*columns(examples.prompts[i : i + 1])]
        found.append({"where": where, "prompt": bool(examples.prompts), "sides": parts, "columns": more})
    return found


def columns(prompts: list[Conversation]) -> Iterator[str]:
    """A line for each of the first COLUMNS columns that rewards get besides the question."""
    for prompt in prompts:
        others = [item for item in prompt.row.items() if item[0] not in prompt.shape.split("/")]
        for name, value in others[:COLUMNS]:
            text = one_line(f"{name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
            yield text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"


def named(linked: Linked) -> dict[str, Example]:
    """Linked examples by what they are: the sides of a pair, or a judged answer and one to measure against."""
    margin = linked.known.get("margin", (0.0,))[0]
    names = f", chosen{f' by a margin of {margin:g}' if margin else ''}", ", rejected"
    if "good" in linked.known:
        names = ", good" if linked.known["good"][0] else ", bad", ", with another row's answer"
    return dict(zip(names, linked.examples, strict=True))


def numbers(examples: Encoded, tokens_per_step: int, memory: float) -> dict[str, str]:
    """The size of the data: name -> value, in this order."""
    lengths, trained = examples.document_lengths, int(examples.trained.sum())
    p50, p95 = (int(np.percentile(lengths, p, method="inverted_cdf")) for p in (50, 95))
    found = {
        "rows": examples.rows, "tokens": len(examples.tokens),
        **({} if examples.prompts else {"trained tokens": trained}),
        "length p50": p50, "length p95": p95, "length max": lengths.max(),
        **({} if examples.prompts else {"trained share": f"{trained / len(examples.tokens):.4f}"}),
        **({"equal sides": examples.equal} if examples.equal else {}),
        "dropped": examples.dropped, "truncated": examples.truncated,
        **({"split": examples.split} if examples.split else {}),
        "tokens per step": tokens_per_step, "memory": f"{memory / 1e9:.1f} GB",
    }  # fmt: skip
    return {name: str(value) for name, value in found.items()}
