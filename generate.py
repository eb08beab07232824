"""Talk to a model, with or without an adapter.

python generate.py --adapter weights/self-introduction                         a chat
python generate.py --adapter weights/self-introduction --prompt "Who are you?"  the answer alone on stdout
python generate.py --prompts questions.txt --out answers.jsonl                 many, in batches
"""

from lora.errors import quiet_imports, run

quiet_imports(__name__)

import json
import sys
from contextlib import suppress
from datetime import date
from pathlib import Path

from tqdm import tqdm

from lora import device as machine
from lora import files, flags, settings
from lora.adapter import passport, store
from lora.adapter.inject import lora_layers
from lora.adapter.merge import merge_and_unload
from lora.data import formats
from lora.errors import BadInput, say
from lora.model import download, pretrained
from lora.model.sample import Sampling, generate
from lora.model.template import FROZEN_DATE
from lora.model.tokenizer import Stream
from lora.run import receipt


def story(argv) -> int:
    s = settings.resolve(flags.GENERATE, argv, __doc__)
    check(s)
    prompts = read_prompts(s)

    # ---- the base: --model, or what the adapter remembers
    checkpoint = pretrained.find(s.model or (passport.base_of(s.adapter) if s.adapter else download.DEFAULT))
    say(f"model    {checkpoint.described}")
    device = machine.choose_device(s.device)
    dtype, _ = machine.choose_dtype(s.dtype, device)
    chat = load_chat(checkpoint, s.adapter, s)
    model = pretrained.load_model(checkpoint, dtype, device)
    if s.adapter:
        store.load(model, s.adapter)
        if not s.no_verify:
            passport.verify(s.adapter, checkpoint.name, checkpoint.header, checkpoint.read, lora_layers(model))
        receipt.prove(model, s.adapter)
        merge_and_unload(model)  # plain Linears again: the adapter costs nothing from here on
        say(f"adapter  {s.adapter}")

    how = Sampling(s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty, s.seed)
    if prompts is None:
        return talk(model, chat, s, how)
    rows = [(messages, encode(model, chat, messages, where)) for messages, where in prompts]
    if s.prompt is not None:
        stream(model, chat, rows[0][1], s.max_new_tokens, how)
        return 0
    answer_all(model, chat, rows, s, how)
    return 0


def check(s) -> None:
    problems = []
    if s.prompt is not None and s.prompts is not None:
        problems.append("contradiction in the command line: --prompt and --prompts. Give one of them")
    if s.system is not None and spoilt(s.system):
        problems.append("wrong encoding in --system: not UTF-8. Convert it to UTF-8")
    if s.out is not None and s.prompts is None:
        problems.append("wrong --out in the command line: it is for the answers to --prompts. Add --prompts FILE")
    if s.out is not None and Path(s.out).is_dir():
        problems.append(f"wrong --out in {s.out}: it is a folder. Give a file name")
    if s.out is not None and not Path(s.out).absolute().parent.is_dir():
        problems.append(f"wrong --out in {s.out}: its folder does not exist. Make it first")
    if problems:
        raise BadInput(*problems)


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


def answer_all(model, chat, rows, s, how: Sampling) -> None:
    """`{prompt, prediction}` for every row: to --out when all are there, else to stdout as they come."""
    lines, bar = [], tqdm(total=len(rows), desc="answering", unit="prompt", disable=None)
    for start in range(0, len(rows), s.batch_size):
        batch = rows[start : start + s.batch_size]
        found = generate(model, [ids for _, ids in batch], chat.stops, s.max_new_tokens, how)
        for (messages, _), ids in zip(batch, found, strict=True):
            row = {"prompt": messages[-1]["content"], "prediction": chat.tokenizer.decode(ids)}
            lines.append(json.dumps(row, ensure_ascii=False))
            if s.out is None:
                print(lines[-1], flush=True)
        bar.update(len(batch))
    bar.close()
    if s.out is not None:
        files.write_bytes(s.out, ("\n".join(lines) + "\n").encode())


def talk(model, chat, s, how: Sampling) -> int:
    """A chat that keeps its history."""
    with suppress(ImportError):
        import readline  # noqa: F401 (arrow keys and history for input)
    say("/reset forgets the conversation, /system TEXT sets the system turn, /quit ends")
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
        elif command.startswith("/"):
            say(f"unknown command {command}; there are /reset, /system TEXT and /quit")
        elif line.strip():
            turn = {"role": "user", "content": line}
            try:
                ids = encode(model, chat, [*system, *history, turn], "this conversation")
            except BadInput as error:
                say(f"{error} (/reset begins a new one)")
                continue
            answer = stream(model, chat, ids, s.max_new_tokens, how)
            history += [turn, {"role": "assistant", "content": answer}]


def main(argv=None) -> int:
    return run(story, argv)


if __name__ == "__main__":
    sys.exit(main())
