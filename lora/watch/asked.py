"""What --watch was given: an address for the run that begins, or folders of runs to open without training."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora.address import LOOPBACK, parse_address
from lora.errors import BadInput
from lora.watch.reading import Run, is_run

PORTS = range(8001, 8011)  # without an address: the first that is free, as several runs may go on at once
ADDRESS = re.compile(r"([^/\\]*:)?[0-9]+")


def addresses(given: Iterable[str]) -> list[str]:
    """Those that are PORT or HOST:PORT. A folder that is called so is given as ./8001."""
    return [text for text in given if ADDRESS.fullmatch(text)]


def folders(given: Iterable[str] | None) -> list[str]:
    return [text for text in given or () if not ADDRESS.fullmatch(text)]


def places(given: Iterable[str]) -> list[tuple[str, int]]:
    """Where to listen: (host, port), the first that is free."""
    if found := addresses(given):
        return [parse_address(found[0], "--watch")]
    return [(LOOPBACK, port) for port in PORTS]


def open_runs(names: Sequence[str]) -> list[Run]:
    """The runs in some folders. Raises BadInput for those that hold none."""
    wrong = [name for name in names if not is_run(Path(name))]
    line = "no run in {}: it has neither settings.json nor metrics.jsonl. Give the folder of a run, or an address"
    if wrong:
        raise BadInput(*(line.format(name) for name in wrong))
    return [Run(Path(name)) for name in dict.fromkeys(names)]
