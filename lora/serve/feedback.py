"""What people say of answers, as rows that training reads: pairs for `--method dpo`, judged answers for `--method kto`.

A row is written only if the reader of training data takes it (`lora.data.formats`). Files are appended to, a row in one
write. What was written is taken back by spaces over it, so that no other row moves.
"""

import threading
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from lora import files
from lora.data import formats
from lora.errors import BadInput
from lora.serve.requests import Body, Wrong, turn

LARGEST_FILE = 256 * 2**20  # bytes; whoever reaches the page can make it write
MOST_REJECTED = 16  # answers that one is better than, at once
REMEMBERED = 10_000  # rows that can be taken back


class Feedback:
    """Two files, `{name}-pairs.jsonl` and `{name}-judged.jsonl`, made with their folder when the first row comes.

    Raises BadInput for files that hold anything else.
    """

    def __init__(self, name: str):
        self.paths = {kind: Path(f"{name}-{end}.jsonl") for kind, end in (("pair", "pairs"), ("judged", "judged"))}
        self.lock, self.counts, self.last = threading.Lock(), Counter(), 0
        self.written: dict[int, tuple[str, int, bytes]] = {}  # number of a row -> its kind, where it begins, its line
        problems = []
        for kind, path in self.paths.items():
            if path.parent.exists():
                problems += files.unwritable("--feedback", path)
            else:
                above = next(folder for folder in path.parents if folder.exists())
                if not above.is_dir():
                    problems.append(f"wrong --feedback in {path}: {above} is not a folder. Choose another name")
            if path.is_file() and path.stat().st_size:
                for row in formats.scan([path], kind=kind):
                    if isinstance(row, formats.Problem):
                        why = f"it is there, and line {row.where.rpartition(':')[2]} is no row of the page"
                        problems.append(f"wrong --feedback in {path}: {why}. Choose another name")
                        break
                    self.counts[kind] += 1
        if problems:
            raise BadInput(*dict.fromkeys(problems))

    def state(self) -> dict:
        """Both files, with the rows that they hold."""
        return {kind: {"file": str(path), "rows": self.counts[kind]} for kind, path in self.paths.items()}

    def add(self, raw: object, models: Collection[str]) -> dict:
        """Write what a request says; numbers of its rows, and `state`. Raises Wrong.

        {"messages", "answer", "good": true or false}    an answer is good or bad
        {"messages", "chosen", "rejected": [...]}        an answer is better than others
        {"undo": [numbers]}                              takes rows back

        An answer is {"model": one of `models`, "text"}; messages end with the user's turn.
        """
        body = Body(raw)
        known = {"messages", "answer", "good", "chosen", "rejected", "undo"}
        if unknown := sorted(body.raw.keys() - known):
            raise Wrong(400, f"{unknown[0][:100]} is no field of a judgement. Leave it out.")
        with self.lock:
            if "undo" in body.raw:
                return {"rows": [], **self._undo(body)}
            kind, rows = read(body, models)
            for row in rows:
                found = formats.read_row("the row", row, kind)
                if isinstance(found, formats.Problem):
                    raise Wrong(400, f"It would be no row to train on: {found.text}")
            return {"rows": [self._append(kind, row) for row in rows], **self.state()}

    def _append(self, kind: str, row: dict) -> int:
        path = self.paths[kind]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.stat().st_size > LARGEST_FILE:
                raise Wrong(507, f"{path} is larger than {LARGEST_FILE >> 20} MB. Move it away.")
            start, line = files.append_row(path, row)
        except OSError as error:
            raise Wrong(507, f"{path} cannot be written: {error.strerror or error}.") from None
        self.last += 1
        self.counts[kind] += 1
        self.written[self.last] = kind, start, line
        self.written.pop(self.last - REMEMBERED, None)
        return self.last

    def _undo(self, body: Body) -> dict:
        for number in body.get("undo", list, "a list of numbers of rows"):
            kind, start, line = self.written.pop(number, (None, 0, b"")) if isinstance(number, int) else (None, 0, b"")
            try:
                if kind is None or not files.blank_row(self.paths[kind], start, line):
                    raise Wrong(409, "The row is no longer where it was written: take it out of the file by hand.")
            except OSError as error:
                raise Wrong(507, f"{self.paths[kind]} cannot be written: {error.strerror or error}.") from None
            self.counts[kind] -= 1
        return self.state()


def read(body: Body, models: Collection[str]) -> tuple[str, list[dict]]:
    """The kind and the rows of a judgement. Raises Wrong."""
    messages = body.get("messages", list, "a list of messages", [])
    messages = [turn(message, f"messages[{i}]") for i, message in enumerate(messages)]
    good = body.get("good", bool, "true or false")
    if good is not None:
        model, text = answer(body.raw.get("answer"), "answer", models)
        return "judged", [{"messages": [*messages, {"role": "assistant", "content": text}], "label": good,
                           "model": model}]  # fmt: skip
    better, chosen = answer(body.raw.get("chosen"), "chosen", models)
    others = body.get("rejected", list, "a list of answers", [])
    if not 0 < len(others) <= MOST_REJECTED:
        raise Wrong(400, f"rejected is not a list of 1 to {MOST_REJECTED} answers.", "rejected")
    others = [answer(other, f"rejected[{i}]", models) for i, other in enumerate(others)]
    if any(text == chosen for _, text in others):
        raise Wrong(400, "Both answers are the same: neither is better.", "rejected")
    return "pair", [
        {"prompt": messages, "chosen": chosen, "rejected": text, "chosen_model": better, "rejected_model": model}
        for model, text in dict.fromkeys(others)
    ]  # fmt: skip


def answer(raw: object, where: str, models: Collection[str]) -> tuple[str, str]:
    """The model and the text of an answer. Raises Wrong."""
    body = Body(raw) if isinstance(raw, dict) else None
    if body is None or body.raw.keys() != {"model", "text"}:
        raise Wrong(400, f"{where} is not an answer: an object with model and text.", where)
    model, text = (body.get(name, str, "a text", "") for name in ("model", "text"))
    if model not in models:
        raise Wrong(404, f"There is no model {model[:100]!r} here.", where, "model_not_found")
    return model, text
