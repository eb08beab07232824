"""The files of a generator whose rows are split by a hash: those to train on, and those that are held out."""

import os
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from lora import errors, files


class Output(NamedTuple):
    """A file, and what is to be written to it."""

    path: Path
    made: Sequence
    held_out: bool


def add_flags(parser, held_out: str) -> None:
    """--out, --test-out, --test-rows; `held_out` says what stands in --test-out."""
    parser.add_argument("--out", type=Path, required=True, default=SUPPRESS, help="the JSONL file; replaced if there")
    test_help = f"a JSONL file of {held_out}; replaced if there"
    parser.add_argument("--test-out", type=Path, default=SUPPRESS, help=test_help)
    parser.add_argument("--test-rows", type=int, default=SUPPRESS, help="how many rows in --test-out")


def of_flags(args, make: Callable[[int, bool], Sequence]) -> list[Output]:
    """Each file that is asked for, with what `make(rows, held_out)` gives for it. Raises BadInput with everything that
    is wrong with files and rows, before anything is written."""
    wanted, found, wrong = [("--out", args.out, args.rows, False)], [], []
    if "test_out" in args and "test_rows" in args:
        wanted.append(("--test-out", args.test_out, args.test_rows, True))
    elif "test_out" in args or "test_rows" in args:
        wrong.append("wrong arguments in the command line: --test-out and --test-rows need each other. Give both")
    for flag, path, rows, held_out in wanted:
        wrong += files.unwritable(flag, path)
        if held_out and os.path.realpath(path) == os.path.realpath(args.out):
            wrong.append(f"wrong {flag} in {path}: it is --out, too. Choose another name")
        with errors.collecting(wrong):
            found.append(Output(path, make(rows, held_out), held_out))
    if wrong:
        raise errors.BadInput(*dict.fromkeys(wrong))
    return found
