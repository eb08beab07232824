"""How the fields of a dataclass become flags: argparse, `--help` in groups, `--config`, ranges, `settings.json`.

    @dataclass
    class Adapter(Settings, group="adapter"):
        rank: int = flag(16, "rank of the adapter", between(1, 65536))

    args = Adapter.resolve(["--rank", "4"], "what the program does")

A field's type is that of its values: `int | None` where there may be none, `list[str]` where there may be several. A
command with several groups of flags inherits from a class for each.
"""

import math
import os
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from datetime import date
from functools import cache
from inspect import get_annotations
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, get_args, get_origin, get_type_hints

from lora import files
from lora.errors import BadInput, Parser

GROUPS = (
    "model",
    "data",
    "method",
    "reinforcement",
    "adapter",
    "chat",
    "answers",
    "optimisation",
    "evaluation",
    "saving",
    "watching",
    "merging",
    "hardware",
)
ENDED = "ended"  # in settings.json: why the run ended


class Range(NamedTuple):
    """Which values a flag takes, in words and as a test."""

    words: str = ""
    holds: Callable[[Any], bool] = lambda value: True


def _is_date(value: str) -> bool:
    try:
        return str(date.fromisoformat(value)) == value
    except ValueError:
        return False


ANYTHING = Range()
ABOVE_0_UP_TO_1 = Range("above 0, up to 1", lambda value: 0 < value <= 1)
FROM_0_BELOW_1 = Range("from 0 to below 1", lambda value: 0 <= value < 1)
DATE = Range("as 2025-01-01", _is_date)


def one_of(*choices: str) -> Range:
    return Range("one of " + ", ".join(choices), lambda value: value in choices)


def between(low: float, high: float) -> Range:
    return Range(f"from {low:g} to {high:g}", lambda value: low <= value <= high)


@dataclass(frozen=True)
class Flag:
    """One flag `--name`, as a field of a `Settings` describes it."""

    name: str
    kind: type  # str, int, float, or bool for a switch
    many: bool  # several values; given again, the flag adds to them
    default: Any
    help: str
    range: Range
    group: str  # one of GROUPS, under which --help shows it
    saved: bool = True  # part of settings.json: what was done, not where it was put
    free: bool = False  # may change when a run is resumed: nothing learned depends on it, or its content is compared
    bare: bool = False  # the flag may stand without a value, which is "", or [] where there may be several
    alias: str = ""  # another spelling of the flag

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def decisive(self) -> bool:
        """Does it decide what is learned?"""
        return self.saved and not self.free


def flag(default: Any, help: str, range: Range = ANYTHING, **how: Any) -> Any:
    """The field of a `Settings` that is a flag; `how` are further fields of `Flag`."""
    described = {"default": default, "help": help, "range": range, **how}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=described)
    return field(default=default, metadata=described)


def _kind(hint: Any) -> tuple[type, bool]:
    """`int | None` -> int, False; `list[str] | None` -> str, True."""
    hint = get_args(hint)[0] if type(None) in get_args(hint) else hint
    return (get_args(hint)[0], True) if get_origin(hint) is list else (hint, False)


@dataclass
class Settings:
    """The settings of one command; `given` has the names of those that flags or a config file gave."""

    given: set[str] = field(default_factory=set, kw_only=True)
    one_of_two: ClassVar[tuple[tuple[str, str], ...]] = ()  # settings that exclude each other
    heading: ClassVar[str] = ""  # the group of the flags that this class adds

    def __init_subclass__(cls, group: str = "") -> None:
        cls.heading = group

    @classmethod
    @cache
    def flags(cls) -> dict[str, Flag]:
        """All flags by name, group by group."""
        hints, found = get_type_hints(cls), []
        for f in fields(cls):
            if f.metadata:
                group = next(base.heading for base in cls.__mro__ if f.name in get_annotations(base))
                found.append(Flag(f.name, *_kind(hints[f.name]), group=group, **f.metadata))
        return {one.name: one for one in sorted(found, key=lambda one: GROUPS.index(one.group))}

    @classmethod
    def resolve(cls, argv: Sequence[str] | None, description: str, saved: dict | None = None) -> Self:
        """Flags over config file over what a run `saved` over defaults. Raises BadInput with all that is wrong."""
        typed = vars(cls._parser(description).parse_args(argv))
        typed = {name: value for name, value in typed.items() if value is not None}
        where, problems = typed.get("config"), []
        config = cls._read_config(where, problems) if where is not None else {}
        sources = ((typed, "the command line"), (config, where), (saved or {}, "the checkpoint"))
        values = {}
        for one in cls.flags().values():
            values[one.name] = one.default
            for found, source in sources:
                if found.get(one.name) is not None:
                    values[one.name] = _values(one, found[one.name], source, problems)
                    break
        if problems:
            raise BadInput(*problems)
        cls._exclude(values, typed, config, where)
        return cls(**values, given=(typed.keys() | config.keys()) & values.keys())

    @classmethod
    def _parser(cls, description: str) -> Parser:
        build = Parser(description=description)
        used = {one.group for one in cls.flags().values()}
        groups = {name: build.add_argument_group(name) for name in GROUPS if name in used}
        for one in cls.flags().values():
            text = one.help + (f" ({one.range.words})" if one.range.words else "")
            if one.kind is bool:
                how = {"action": "store_true", "default": None, "help": text}
            else:
                default = "" if one.default is None else f" [{' '.join(one.default) if one.many else one.default}]"
                how = {
                    "action": "extend" if one.many else "store",
                    "nargs": ("*" if one.bare else "+") if one.many else "?" if one.bare else None,
                    "const": "" if one.bare and not one.many else None,
                    "metavar": "TEXT" if one.kind is str else one.kind.__name__.upper(),
                    "help": (text + default).replace("%", "%%"),
                }
            groups[one.group].add_argument(*filter(None, (one.flag, one.alias)), dest=one.name, **how)
        return build

    @classmethod
    def _read_config(cls, where: str, problems: list[str]) -> dict:
        """The settings in a TOML or JSON file; those that are null are not given."""
        found = {key.replace("-", "_"): value for key, value in _read(Path(where)).items() if key != ENDED}
        known = cls.flags().keys()
        for key in found.keys() - (known - {"config"}):
            problems.append(f"unknown key in {where}:{key}: no such setting. Known are {', '.join(known)}")
        return {key: value for key, value in found.items() if value is not None}

    @classmethod
    def _exclude(cls, values: dict, typed: dict, config: dict, where: str | None) -> None:
        """A flag replaces what a config file says of the other. Raises BadInput for two flags, or two in the file."""
        for pair in cls.one_of_two:
            if not all(values[name] for name in pair):
                continue
            given = [name for name in pair if name in typed]
            if len(given) == 2:
                both = " and ".join(cls.flags()[name].flag for name in pair)
                raise BadInput(f"contradiction in the command line: {both}. Give one of them")
            given = given or [name for name in pair if name in config]
            if len(given) != 1:
                raise BadInput(f"contradiction in {where}: {' and '.join(pair)}. Give one of them")
            [lost] = set(pair) - set(given)
            values[lost] = cls.flags()[lost].default

    def to_save(self) -> dict:
        """What `settings.json` holds: it can be given back as `--config` as it is."""
        return {name: getattr(self, name) for name, one in self.flags().items() if one.saved}

    def decisive(self) -> dict:
        """The settings that decide what is learned."""
        return {name: getattr(self, name) for name, one in self.flags().items() if one.decisive}

    def changed(self, before: dict) -> list[str]:
        """The names of those that are not what they were; a new one had its default."""
        known = {name: one.default for name, one in self.flags().items()} | before
        return [name for name, value in self.decisive().items() if known[name] != value]


def _read(path: Path) -> dict:
    if path.suffix.lower() in (".yaml", ".yml"):
        raise BadInput(f"wrong file in {path}: YAML. Write the settings as TOML or JSON")
    if path.suffix.lower() != ".toml":
        return files.read_json(path)
    try:
        return tomllib.loads(files.read_bytes(path).decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"broken TOML in {path}: {error}. Repair it") from None


def _values(one: Flag, found: Any, where: str, problems: list[str]) -> Any:
    """What a setting is by what was found; what is wrong with it goes to `problems`."""
    if not one.many:
        return _value(one, found, where, problems)
    items = found if isinstance(found, list) else [found]
    if not items and not one.bare:
        problems.append(f"wrong {one.flag} in {where}: an empty list. Give at least one, or leave it out")
    return [_value(one, item, where, problems) for item in items]


def _value(one: Flag, value: Any, where: str, problems: list[str]) -> Any:
    """One value of the flag's kind and range; from a flag it is a string, from a file it has a type."""
    from_flag = isinstance(value, str)
    try:
        if one.kind is str and (not from_flag or b"\0" in os.fsencode(value)):  # nor half a surrogate pair
            raise ValueError
        if one.kind is bool:
            if type(value) is not bool:
                raise ValueError
            return value
        if one.kind in (int, float) and isinstance(value, bool):
            raise ValueError
        result = one.kind(value)
        if one.kind is int and not from_flag and result != value:
            raise ValueError
        if one.kind is float and not math.isfinite(result):
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        kinds = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        fix = f"Give {one.range.words or kinds[one.kind]}"
        problems.append(f"wrong {one.flag} in {where}: {value!r} is not {kinds[one.kind]}. {fix}")
        return one.default
    if not one.range.holds(result):
        problems.append(f"wrong {one.flag} in {where}: {value!r} is out of range. Give {one.range.words}")
    return result
