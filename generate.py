"""Talk to a model, with no adapter, with one, or with several.

python generate.py --adapter weights/self-introduction                         a chat
python generate.py --adapter weights/self-introduction --prompt "Who are you?"  the answer alone on stdout
python generate.py --prompts questions.txt --out answers.jsonl                 many, in batches
python generate.py --adapter weights/a weights/b                               a chat; /adapter NAME switches
python generate.py --adapter weights/a weights/b --compare --prompt "Hello."   the base's answer, a's and b's
"""

from lora.errors import quiet_imports, run

quiet_imports(__name__)

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import date
from pathlib import Path

from tqdm import tqdm

from lora import device as machine
from lora import files, pretrained
from lora.adapter import passport, store
from lora.adapter.inject import lora_layers
from lora.adapter.merge import merge_and_unload
from lora.data import formats
from lora.errors import BadInput, say
from lora.export import receipt
from lora.inference import several
from lora.inference.columns import table
from lora.inference.generate import Sampling, generate
from lora.pretrained import hub
from lora.run.settings import GenerateSettings
from lora.text.template import FROZEN_DATE
from lora.text.tokenizer import Stream


def story(argv) -> int:
    s = GenerateSettings.resolve(argv, __doc__)
    check(s)
    prompts = read_prompts(s)

    # ---- the base: --model, or what the adapters remember
    adapters = s.adapter or []
    base = s.model or (several.common_base(adapters, s.no_verify) if adapters else hub.DEFAULT)
    checkpoint = pretrained.find(base)
    say(f"model    {checkpoint.described}")
    device = machine.choose_device(s.device)
    dtype, _ = machine.choose_dtype(s.dtype, device)
    how = Sampling(s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty, s.seed)
    if len(adapters) > 1 or s.compare:
        return side_by_side(checkpoint, prompts, s, how, device, dtype)

    adapter = adapters[0] if adapters else None
    chat = load_chat(checkpoint, adapter, s)
    model = pretrained.load_model(checkpoint, dtype, device)
    if adapter:
        store.load(model, adapter)
        if not s.no_verify:
            passport.verify(adapter, checkpoint.name, checkpoint.header, checkpoint.read, lora_layers(model))
        receipt.prove(model, adapter)
        merge_and_unload(model)  # plain Linears again: the adapter costs nothing from here on
        say(f"adapter  {adapter}")

    if prompts is None:
        name = list(several.column_names(adapters))[-1]
        return talk(model, {name: chat}, s, how)
    rows = [(messages, encode(model, chat, messages, where)) for messages, where in prompts]
    if s.prompt is not None:
        stream(model, chat, rows[0][1], s.max_new_tokens, how)
        return 0
    answer_all(model, chat, rows, s, how)
    return 0


def side_by_side(checkpoint, prompts, s, how: Sampling, device, dtype) -> int:
    """The base and every adapter of it: answers to the same prompts in a table, or a chat that switches."""
    names, chats, asked, problems = several.column_names(s.adapter), {}, {}, []
    empty = pretrained.empty_model(checkpoint)  # on which all is tried before anything is loaded
    for name, adapter in names.items():
        with collecting(problems):
            if adapter:
                say(f"adapter  {name}: {adapter}")
                several.dry_load(empty, adapter, checkpoint, not s.no_verify)
            chats[name] = load_chat(checkpoint, adapter, s)
            asked[name] = [encode(empty, chats[name], messages, where) for messages, where in prompts or ()]
    if problems:
        raise BadInput(*dict.fromkeys(problems))

    model = pretrained.load_model(checkpoint, dtype, device)
    adapters = several.Several(model)
    for name, adapter in names.items():
        if adapter:
            adapters.add(name, adapter)
            adapters.switch(name)
            receipt.prove(model, adapter)
    if prompts is None:
        return talk(model, chats, s, how, lambda name: adapters.switch(name, merged=True))

    found = {}
    for name, chat in chats.items():
        adapters.switch(name, merged=True)
        found[name] = list(answers(model, chat, asked[name], s, how, f"answering {name}"))
    texts = [messages[-1]["content"] for messages, _ in prompts]
    if s.out is not None:
        rows = ({"prompt": p, "predictions": {name: found[name][i] for name in found}} for i, p in enumerate(texts))
        files.write_rows(s.out, rows)
    print(table(texts, found, shutil.get_terminal_size((100, 24)).columns))
    return 0


@contextmanager
def collecting(problems: list[str]):
    """What is wrong inside the block is added to a list, and the story goes on."""
    try:
        yield
    except BadInput as error:
        problems += error.problems


def check(s) -> None:
    problems = []
    if s.prompt is not None and s.prompts is not None:
        problems.append("contradiction in the command line: --prompt and --prompts. Give one of them")
    if s.system is not None and spoilt(s.system):
        problems.append("wrong encoding in --system: not UTF-8. Convert it to UTF-8")
    if s.adapter and (len(s.adapter) > 1 or s.compare):
        problems += several.unfit("--adapter", s.adapter)
        if not s.compare and (s.prompt is not None or s.prompts is not None):
            problems.append("several answers in the command line: there is more than one --adapter. Add --compare")
    if s.compare and not (s.adapter and (s.prompt is not None or s.prompts is not None)):
        lacks = "--prompt TEXT or --prompts FILE" if s.adapter else "--adapter FOLDER"
        problems.append(f"nothing to compare in the command line: --compare needs more. Add {lacks}")
    if s.out is not None and s.prompts is None and not s.compare:
        problems.append("wrong --out in the command line: it is for the answers to --prompts. Add --prompts FILE")
    if s.out is not None:
        read = filter(None, (s.prompts, s.template, s.model, *(s.adapter or ())))
        problems += unwritable("--out", Path(s.out), *read)
    if problems:
        raise BadInput(*problems)


def unwritable(flag: str, path: Path, *read: str) -> list[str]:
    """Why answers could not be written to this file, or what would be lost; `read` are files and folders."""
    inputs = [file for name in read for file in ([*Path(name).iterdir()] if Path(name).is_dir() else [Path(name)])]
    found = files.unwritable(flag, path, *inputs)
    if not found and path.is_file() and not holds_answers(path):
        found.append(f"wrong {flag} in {path}: it is there and holds no predictions. Choose another name")
    return found


def holds_answers(path: Path) -> bool:
    """Is it empty, or its first line a row that this program or evaluate.py wrote?"""
    with open(path, "rb") as file:
        line = file.readline()
    try:
        row = json.loads(line or b'{"prediction": ""}')
    except ValueError:
        return False
    return isinstance(row, dict) and not row.keys().isdisjoint({"prediction", "predictions"})


def load_chat(checkpoint, adapter: str | None, s):
    """The chat as an adapter was trained with it, unless flags say otherwise."""
    trained = ((passport.read(adapter) if adapter else None) or {}).get("chat", {})
    system = False if s.no_system else trained.get("system") if s.system is None else s.system
    template = s.template or (passport.template_of(adapter) if adapter else None)
    today = date.fromisoformat(s.date or trained.get("date") or str(FROZEN_DATE))
    if s.system is None and not s.no_system and isinstance(system, str):
        say(f"system   as in training: {' '.join(system.split())[:100]}")
    chat = pretrained.load_chat(checkpoint, system, template, today)
    if adapter:
        passport.verify_chat(adapter, checkpoint.name, chat.tokenizer, chat.template.source, s.no_verify)
    return chat


def read_prompts(s) -> list[tuple[list[dict], str]] | None:
    """(messages, where) of every prompt; None for a chat."""
    if s.prompt is not None:
        text = sys.stdin.read() if s.prompt == "-" else s.prompt
        if not text.strip():
            raise BadInput("empty prompt in the command line: there is nothing to answer. Give --prompt TEXT")
        return [([{"role": "user", "content": text}], "--prompt")]
    return None if s.prompts is None else prompts_in(s.prompts)


def prompts_in(path: str) -> list[tuple[list[dict], str]]:
    """(messages, where) of a file with a prompt a line, or with conversation rows."""
    data = files.read_bytes(path)
    start = data.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith((b"{", b"\x1f\x8b")) or (start.startswith(b"[") and path.endswith(".json")):
        return [(until_answer(c.messages), c.where) for c in formats.read([path], answered=False)]
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise BadInput(f"wrong encoding in {path}: not UTF-8 at byte {error.start}. Convert it to UTF-8") from None
    asked = [(line.rstrip("\r"), f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not asked:
        raise BadInput(f"no prompts in {path}: the file is empty. Give a prompt a line")
    return [([{"role": "user", "content": line}], where) for line, where in asked]


def until_answer(messages: list[dict]) -> list[dict]:
    """A conversation without its last answer."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def spoilt(text: str) -> bool:
    """Was some of it not UTF-8 where it came from? Python marks such bytes by halves of surrogate pairs."""
    return any("\ud800" <= c <= "\udfff" for c in text)


def encode(model, chat, messages, where: str) -> list[int]:
    if any(spoilt(message["content"]) for message in messages):
        raise BadInput(f"wrong encoding in {where}: not UTF-8. Convert it to UTF-8")
    ids, most = chat.prompt(messages), model.config.max_position_embeddings
    if len(ids) >= most:
        raise BadInput(f"prompt too long in {where}: {len(ids)} tokens, the model has room for {most}. Shorten it")
    return ids


def stream(model, chat, ids: list[int], max_new: int, how: Sampling) -> str:
    """One answer to stdout as it comes; returns it."""
    pieces, decoder = [], Stream(chat.tokenizer)

    def show(piece: str) -> None:
        pieces.append(piece)
        print(piece, end="", flush=True)

    generate(model, [ids], chat.stops, max_new, how, lambda row, token: show(decoder.push(token)))
    show(decoder.end())
    print(flush=True)
    return "".join(pieces)


def answers(model, chat, prompts: list[list[int]], s, how: Sampling, doing: str = "answering") -> Iterator[str]:
    """The answers to prompts, computed in batches."""
    with tqdm(total=len(prompts), desc=doing, unit="prompt", disable=None) as bar:
        for start in range(0, len(prompts), s.batch_size):
            batch = prompts[start : start + s.batch_size]
            drawn = replace(how, seed=how.seed + start)  # row i by seed + i, however they are batched
            yield from map(chat.tokenizer.decode, generate(model, batch, chat.stops, s.max_new_tokens, drawn))
            bar.update(len(batch))


def answer_all(model, chat, rows, s, how: Sampling) -> None:
    """`{prompt, prediction}` for every row: to --out when all are there, else to stdout as they come."""
    found = answers(model, chat, [ids for _, ids in rows], s, how)
    pairs = zip((messages[-1]["content"] for messages, _ in rows), found, strict=True)
    answered = ({"prompt": prompt, "prediction": text} for prompt, text in pairs)
    if s.out is not None:
        files.write_rows(s.out, list(answered))
        return
    for row in answered:
        print(json.dumps(row, ensure_ascii=False), flush=True)


def talk(model, chats: dict, s, how: Sampling, switch: Callable[[str], None] = lambda name: None) -> int:
    """A chat that keeps its history, with each model by its own chat. `switch` puts the adapter of a name in place."""
    with suppress(ImportError):
        import readline  # noqa: F401 (arrow keys and history for input)
    name = list(chats)[min(1, len(chats) - 1)]  # the first adapter, or all there is
    switch(name)
    say("/reset forgets the conversation, /system TEXT sets the system turn, /adapter NAME switches, /quit ends")
    system, history = [], []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            return 0
        if command in ("/reset", "/system"):
            history = []
            if command == "/system":
                system = [{"role": "system", "content": rest}] if rest else []
            say("(new conversation)")
        elif command == "/adapter":
            if rest.strip() in chats:
                name = rest.strip()
                switch(name)
            elif rest:
                say(f"no adapter {rest} was given with --adapter")
            say(f"(now {name}, of {', '.join(chats)})")
        elif command.startswith("/"):
            say(f"unknown command {command}; there are /reset, /system TEXT, /adapter NAME and /quit")
        elif line.strip():
            turn = {"role": "user", "content": line}
            try:
                ids = encode(model, chats[name], [*system, *history, turn], "this conversation")
            except BadInput as error:
                say(f"{error} (/reset begins a new one)")
                continue
            answer = stream(model, chats[name], ids, s.max_new_tokens, how)
            history += [turn, {"role": "assistant", "content": answer}]


def main(argv=None) -> int:
    return run(story, argv)


if __name__ == "__main__":
    sys.exit(main())
