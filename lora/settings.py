"""A table of flags becomes argparse, `--config` and `settings.json`.

`resolve` reads a config file (TOML or JSON), lets flags override it, and checks every range; all problems at once.
"""

import math
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lora import files
from lora.errors import BadInput, Parser
from lora.flags import ONE_OF_TWO, Setting


def parser(table: Sequence[Setting], description: str) -> Parser:
    build = Parser(description=description)
    for s in table:
        text = s.help + (f" ({s.range})" if s.range else "")
        if s.kind is bool:
            build.add_argument(s.flag, dest=s.name, action="store_true", default=None, help=text)
        else:
            metavar = "TEXT" if s.kind is str else s.kind.__name__.upper()
            default = "" if s.default is None else f" [{' '.join(s.default) if s.many else s.default}]"
            build.add_argument(
                *filter(None, (s.flag, s.alias)),
                dest=s.name,
                action="extend" if s.adds else "store",
                nargs="+" if s.many else "?" if s.bare else None,
                const="" if s.bare else None,
                metavar=metavar,
                help=(text + default).replace("%", "%%"),
            )
    return build


def _read(path: Path) -> dict:
    if path.suffix.lower() != ".toml":
        return files.read_json(path)
    try:
        return tomllib.loads(files.read_bytes(path).decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"broken TOML in {path}: {error}. Repair it") from None


def _value(s: Setting, value: Any, where: str, problems: list[str]) -> Any:
    """One value of the setting's kind and range; from a flag it is a string, from a file it has a type."""
    from_flag = isinstance(value, str)
    try:
        if s.kind is str and (not from_flag or b"\0" in os.fsencode(value)):  # which also refuses half a surrogate pair
            raise ValueError
        if s.kind is bool:
            if type(value) is not bool:
                raise ValueError
            return value
        if s.kind in (int, float) and isinstance(value, bool):
            raise ValueError
        result = s.kind(value)
        if s.kind is int and not from_flag and result != value:
            raise ValueError
        if s.kind is float and not math.isfinite(result):
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        kinds = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        problems.append(f"wrong {s.flag} in {where}: {value!r} is not {kinds[s.kind]}. Give {s.range or kinds[s.kind]}")
        return s.default
    if not s.check(result):
        problems.append(f"wrong {s.flag} in {where}: {value!r} is out of range. Give {s.range}")
    return result


def resolve(
    table: Sequence[Setting], argv: Sequence[str] | None, description: str, saved: dict | None = None
) -> SimpleNamespace:
    """Flags over config file over what a run `saved` over defaults; `given` has the names of the first two.

    Raises BadInput with everything that is wrong.
    """
    flags = vars(parser(table, description).parse_args(argv))
    problems: list[str] = []
    known = {s.name: s for s in table}
    config, where = {}, flags.get("config")
    if where is not None:
        config = {key.replace("-", "_"): value for key, value in _read(Path(where)).items()}
        config.pop(ENDED, None)
        for key in config.keys() - (known.keys() - {"config"}):
            problems.append(f"unknown key in {where}:{key}: no such setting. Known are {', '.join(known)}")
    values = {}
    for s in table:
        if flags.get(s.name) is not None:
            value, source = flags[s.name], "the command line"
        elif config.get(s.name) is not None:
            value, source = config[s.name], str(where)
        elif (saved or {}).get(s.name) is not None:
            value, source = saved[s.name], "the checkpoint"
        else:
            values[s.name] = s.default
            continue
        if s.many:
            items = value if isinstance(value, list) else [value]
            if not items:
                problems.append(f"wrong {s.flag} in {source}: an empty list. Give at least one, or leave it out")
            values[s.name] = [_value(s, item, source, problems) for item in items]
        else:
            values[s.name] = _value(s, value, source, problems)
    if problems:
        raise BadInput(*problems)
    for pair in ONE_OF_TWO:  # a flag of one kind replaces a config file's value of the other
        if pair[0] in known and all(values[name] for name in pair):
            given = [name for name in pair if flags.get(name) is not None]
            if len(given) == 2:
                both = " and ".join(known[name].flag for name in pair)
                raise BadInput(f"contradiction in the command line: {both}. Give one of them")
            given = given or [name for name in pair if config.get(name) is not None]
            if len(given) != 1:
                raise BadInput(f"contradiction in {where}: {' and '.join(pair)}. Give one of them")
            [lost] = set(pair) - set(given)
            values[lost] = known[lost].default
    given = {s.name for s in table if flags.get(s.name) is not None or config.get(s.name) is not None}
    return SimpleNamespace(**values, given=given)


ENDED = "ended"  # in settings.json: why the run ended


def to_save(table: Sequence[Setting], values: SimpleNamespace) -> dict:
    """What `settings.json` holds: it can be given back as `--config` as it is."""
    return {s.name: getattr(values, s.name) for s in table if s.saved}


def decisive(table: Sequence[Setting], values: SimpleNamespace) -> dict:
    """The settings that decide what is learned."""
    return {s.name: getattr(values, s.name) for s in table if s.saved and not s.free}


def changed(table: Sequence[Setting], before: dict, now: SimpleNamespace) -> list[str]:
    """The names of those that are not what they were; a new one had its default."""
    known = {s.name: s.default for s in table} | before
    return [name for name, value in decisive(table, now).items() if known[name] != value]
