"""Talk to a model, with no adapter, with one, or with several.

python generate.py --adapter weights/self-introduction                         a chat
python generate.py --adapter weights/self-introduction --prompt "Who are you?"  the answer alone on stdout
python generate.py --prompts questions.txt --out answers.jsonl                 many, in batches
python generate.py --adapter weights/a weights/b                               a chat; /adapter NAME switches
python generate.py --adapter weights/a weights/b --compare --prompt "Hello."   the base's answer, a's and b's
python generate.py --adapter weights/a weights/b --serve 8000                  a page, and an OpenAI-compatible endpoint
"""

from lora import threads
from lora.errors import before_imports, run

before_imports(__name__, threads.ANSWERING)

import json
import shutil
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from lora import files
from lora.address import parse_address
from lora.errors import BadInput, say
from lora.inference import prompts, several
from lora.inference.columns import table
from lora.inference.generate import Sampling
from lora.inference.session import Session, open_session, open_sessions
from lora.run.use_settings import GenerateSettings
from lora.serve import command
from lora.text.template import read_arguments


def main(argv=None) -> int:
    args = GenerateSettings.resolve(argv, __doc__)
    check(args)
    if args.serve is not None:
        return serve(args)
    asked = read_prompts(args)
    if args.compare or len(args.adapter or ()) > 1:
        sessions = open_sessions(args.model, args.adapter, asked or (), **told(args))
        if asked is None:
            return talk(sessions)
        return compare(sessions, asked, args)

    [adapter] = args.adapter or [None]
    session = open_session(args.model, adapter, **told(args))
    if asked is None:
        [*_, name] = several.column_names(args.adapter or ())
        return talk({name: session})
    if args.prompt is None:
        return answer_all(session, asked, args)
    [(messages, where)] = asked
    show(session, messages, where)
    return 0


def serve(args: GenerateSettings) -> int:
    """Answer requests over HTTP until Ctrl-C."""
    keys = command.keys_of(args.api_key)
    listener = command.listen(*parse_address(args.serve, "--serve"))
    given = told(args)
    sampling = Sampling(**{one.name: given.pop(one.name) for one in fields(Sampling)})
    slots, feedback = args.batch_size or 32, None if args.no_feedback else args.feedback
    served = command.open_served(
        args.model, args.adapter or (), keys, feedback=feedback, slots=slots, sampling=sampling, **given
    )
    return command.run(served, listener)


def told(args: GenerateSettings) -> dict:
    """What the flags say of the model, the chat and the sampling, as a session is opened with it."""
    names = ("quant", "device", "dtype", "template", "date", "max_new_tokens")
    system = False if args.no_system else args.system
    told = {"system": system, "template_args": read_arguments(args.template_arg), "verify": not args.no_verify}
    return {name: getattr(args, name) for name in (*names, *(one.name for one in fields(Sampling)))} | told


# ---- what is wrong, before anything is loaded ------------------------------------------------------------------------


def check(args: GenerateSettings) -> None:
    problems = []
    if args.prompt is not None and args.prompts is not None:
        problems.append("contradiction in the command line: --prompt and --prompts. Give one of them")
    if args.prompt_key is not None and args.prompts is None:
        problems.append("wrong --prompt-key in the command line: it is for rows of --prompts. Add --prompts FILE")
    if args.system is not None and not prompts.is_utf8(args.system):
        problems.append("wrong encoding in --system: not UTF-8. Convert it to UTF-8")
    if args.adapter and (len(args.adapter) > 1 or args.compare):
        problems += several.unfit("--adapter", args.adapter)
        if not args.compare and not args.serve and (args.prompt is not None or args.prompts is not None):
            problems.append("several answers in the command line: there is more than one --adapter. Add --compare")
    if args.compare and not (args.adapter and (args.prompt is not None or args.prompts is not None)):
        lacks = "--prompt TEXT or --prompts FILE" if args.adapter else "--adapter FOLDER"
        problems.append(f"nothing to compare in the command line: --compare needs more. Add {lacks}")
    if args.serve is not None:
        others = ("prompt", "prompts", "out", "compare")
        problems += [
            f"contradiction in the command line: --serve and --{name}. Leave one out"
            for name in others
            if getattr(args, name)
        ]
        problems += filter(None, [command.packages_missing()])
    for name in ("api_key", "feedback", "no_feedback"):
        if args.serve is None and name in args.given:
            flag = f"--{name.replace('_', '-')}"
            problems.append(f"wrong {flag} in the command line: it is for --serve. Add --serve PORT")
    if args.out is not None and args.prompts is None and not args.compare:
        problems.append("wrong --out in the command line: it is for the answers to --prompts. Add --prompts FILE")
    if args.out is not None:
        read = filter(None, (args.prompts, args.template, args.model, *(args.adapter or ())))
        problems += prompts.unwritable("--out", Path(args.out), *read)
    if problems:
        raise BadInput(*problems)


def read_prompts(args: GenerateSettings) -> list[tuple[list[dict], str]] | None:
    """(messages, where) of every prompt; None for a chat."""
    if args.prompt is None:
        return None if args.prompts is None else prompts.read(args.prompts, args.prompt_key)
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not text.strip():
        raise BadInput("empty prompt in the command line: there is nothing to answer. Give --prompt TEXT")
    return [([{"role": "user", "content": text}], "--prompt")]


# ---- answers ---------------------------------------------------------------------------------------------------------


def show(session: Session, messages: list[dict], where: str) -> str:
    """Print the answer as it comes; returns it."""
    pieces = []
    for piece in session.stream(messages, where):
        pieces.append(piece)
        print(piece, end="", flush=True)
    print(flush=True)
    return "".join(pieces)


def answer_all(session: Session, asked, args: GenerateSettings) -> int:
    """Write `{prompt, prediction}` for every prompt: to --out when all are there, else to stdout as they come."""
    answers = session.answers([session.encode(*prompt) for prompt in asked], args.batch_size or 16)
    texts = (messages[-1]["content"] for messages, _ in asked)
    rows = ({"prompt": text, "prediction": answer} for text, answer in zip(texts, answers, strict=True))
    if args.out is not None:
        files.write_rows(args.out, list(rows))
        return 0
    for row in rows:
        print(json.dumps(row, ensure_ascii=False), flush=True)
    return 0


def compare(sessions: dict[str, Session], asked, args: GenerateSettings) -> int:
    """Print the answers of all to the same prompts, as a table."""
    found = {}
    for name, session in sessions.items():
        encoded = [session.encode(*prompt) for prompt in asked]
        found[name] = list(session.answers(encoded, args.batch_size or 16, f"answering {name}"))
    texts = [messages[-1]["content"] for messages, _ in asked]
    if args.out is not None:
        rows = ({"prompt": p, "predictions": {name: found[name][i] for name in found}} for i, p in enumerate(texts))
        files.write_rows(args.out, rows)
    print(table(texts, found, shutil.get_terminal_size((100, 24)).columns))
    return 0


def talk(sessions: dict[str, Session]) -> int:
    """A chat that keeps its history, with each model by its own chat template."""
    with suppress(ImportError):
        import readline  # noqa: F401 (arrow keys and history for input)
    name = list(sessions)[min(1, len(sessions) - 1)]  # the first adapter, or all there is
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
            if rest.strip() in sessions:
                name = rest.strip()
            elif rest:
                say(f"no adapter {rest} was given with --adapter")
            say(f"(now {name}, of {', '.join(sessions)})")
        elif command.startswith("/"):
            say(f"unknown command {command}; there are /reset, /system TEXT, /adapter NAME and /quit")
        elif line.strip():
            turn = {"role": "user", "content": line}
            try:
                answer = show(sessions[name], [*system, *history, turn], "this conversation")
            except BadInput as error:
                say(f"{error} (/reset begins a new one)")
                continue
            history += [turn, {"role": "assistant", "content": answer}]


if __name__ == "__main__":
    sys.exit(run(main))
