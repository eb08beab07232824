"""The process in which a reward function runs. It is run as a file, and imports nothing of ours.

    python worker.py FILE FUNCTION      a function of the user's own
    python worker.py REGEX              1.0 where a regular expression finds anything, else 0.0

Requests and replies are lines of JSON over what were stdin and stdout; what the function prints goes to stderr. First
it says what the function takes: {"needs", "takes", "any"}. Then a request {"prompts": [...], ...} has the reply
{"values": [...]}. Where something is wrong the reply is {"wrong": why, "place": (file, line)}.
"""

import ctypes
import importlib.util
import inspect
import json
import math
import os
import queue
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from contextlib import suppress
from numbers import Real

LEAVE = 3.0  # seconds for what the function does at its end


class Wrong(Exception):
    """What is wrong with the function, without the name of it."""


def main(argv: list[str]) -> None:
    requests, replies = take_pipes()
    file = os.path.abspath(argv[0])  # the function may change the folder
    try:
        function = load(file, argv[1]) if len(argv) == 2 else searching(argv[0])
        answer = takes = signature(function)
    except BaseException as error:  # SystemExit, too
        answer = explain(error, file)
    while True:
        replies.write(json.dumps(answer).encode() + b"\n")
        replies.flush()
        request = requests.get()
        if request is None or "wrong" in answer:
            return
        columns = json.loads(request)
        given = {name: values for name, values in columns.items() if takes["any"] or name in takes["takes"]}
        try:
            answer = {"values": numbers(function(**given), len(columns["completions"]))}
        except BaseException as error:
            answer = explain(error, file)


def take_pipes():
    """Requests as a queue, and where replies go. Both are out of the reach of print, input and subprocesses."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends this process
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, prctl(2): a killed run leaves nothing behind
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    requests = queue.SimpleQueue()

    def receive():
        for line in incoming:
            requests.put(line)
        requests.put(None)  # the run has ended
        time.sleep(LEAVE)
        os._exit(0)

    threading.Thread(target=receive, daemon=True).start()
    return requests, outgoing


# ---- the function ----------------------------------------------------------------------------------------------------


def load(file: str, name: str):
    """The function `name` of a file, whose folder is where it imports from."""
    here, folder = os.path.dirname(os.path.abspath(__file__)), os.path.dirname(file)
    sys.path[:] = [folder, *(path for path in sys.path if os.path.abspath(path) != here)]
    stem = os.path.splitext(os.path.basename(file))[0]
    spec = importlib.util.spec_from_file_location(stem if stem not in sys.modules else f"{stem}_of_rewards", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if function is None:
        raise Wrong("there is no such function in the file. Check the spelling")
    if not callable(function) or inspect.isclass(function):
        raise Wrong(f"it is a {'class' if callable(function) else type(function).__name__}, no function. Give another")
    call = function if inspect.isroutine(function) else type(function).__call__
    if inspect.iscoroutinefunction(call) or inspect.isasyncgenfunction(call):
        raise Wrong("it is an async function, which is not supported. Write def in place of async def")
    return function


def searching(regex: str):
    """The reward function of format:REGEX."""
    with warnings.catch_warnings(action="ignore"):
        search = re.compile(regex).search
    return lambda completions: [1.0 if search(text) else 0.0 for text in completions]


def signature(function) -> dict:
    """Which columns the function needs, which it takes, and whether it takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise Wrong("it does not say what it takes. Write a function with def") from None
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for parameter in parameters:
        if parameter.kind == parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise Wrong(f"it takes {parameter.name} by position only, and columns come by name. Leave out the /")
    return {
        "needs": [p.name for p in by_name if p.default is p.empty],
        "takes": [p.name for p in by_name],
        "any": any(p.kind == p.VAR_KEYWORD for p in parameters),
    }


def numbers(values, count: int) -> list[float | None]:
    """What the function gave, as plain numbers; None is "not scorable"."""
    if not isinstance(values, (list, tuple)) and hasattr(values, "tolist"):  # an array, a tensor
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        given = "nothing" if values is None else f"a {type(values).__name__}"
        raise Wrong(f"it gave {given}, not a list. Return a list with a number or None for each completion")
    if len(values) != count:
        raise Wrong(f"it gave {len(values)} values for {count} completions. Return one for each")
    return [number(value, place) for place, value in enumerate(values)]


def number(value, place: int) -> float | None:
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if value is None:
        return None
    if not isinstance(value, Real):
        raise Wrong(f"its value {place} is {repr(value)[:60]}, no number. Return a number or None for each completion")
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise Wrong(f"its value {place} is {value}, which is not finite. Return None for what cannot be scored")
    return value


# ---- what went wrong -------------------------------------------------------------------------------------------------


def explain(error: BaseException, file: str) -> dict:
    """Why, and the last line of the file that led there."""
    if isinstance(error, Wrong):
        return {"wrong": str(error)}
    if isinstance(error, SystemExit):
        why = "it ends the program (sys.exit)"
    else:
        try:
            text = (str(error).strip().splitlines() or [""])[0][:200].rstrip(".")
        except BaseException:
            text = ""
        why = f"it raises {type(error).__name__}{': ' * bool(text)}{text}"
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    its_own = [place for place in places if place[0] == file]
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        its_own = [(error.filename, error.lineno)]
    return {"wrong": f"{why}. Repair it", "place": (its_own or [None])[-1]}


if __name__ == "__main__":
    with suppress(BrokenPipeError):  # the run is gone
        main(sys.argv[1:])
