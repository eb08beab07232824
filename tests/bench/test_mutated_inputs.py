"""The program of mutated inputs notices what it counts: a traceback, a crash, a hang, memory."""

import os
import time
from collections import Counter

import pytest

from bench import mutated_inputs, mutators
from lora.errors import BadInput, run


def outcomes(monkeypatch, *mains) -> list[str]:
    """What the program says of inputs that are read by these."""
    kinds = [lambda place, chosen, main=main: lambda: run(lambda argv: main()) for main in mains]
    monkeypatch.setattr(mutated_inputs, "kind_of", lambda number: kinds[number])
    found = mutated_inputs.part(list(range(len(mains))), seed=0)
    assert sorted(number for number, *_ in found) == list(range(len(mains)))
    return [outcome for _, outcome, _ in sorted(found)]


def refuse():
    raise BadInput("wrong")


def test_an_input_that_is_used_or_refused_is_counted_as_such(monkeypatch):
    assert outcomes(monkeypatch, lambda: 0, refuse) == ["used", "refused"]


@pytest.mark.parametrize(
    ("main", "outcome"),
    [
        (lambda: 1 // 0, "traceback"),
        (lambda: os._exit(1), "traceback"),
        (lambda: os.abort(), "traceback"),
        (lambda: time.sleep(60), "hang"),
        (lambda: bytearray(b"x" * 300_000_000), "memory"),
    ],
    ids=["traceback", "exit", "crash", "hang", "memory"],
)
def test_a_failure_is_counted_and_the_inputs_after_it_are_read(monkeypatch, main, outcome):
    monkeypatch.setattr(mutated_inputs, "SECONDS", 2)
    monkeypatch.setattr(mutated_inputs, "BYTES", 200_000_000)
    assert outcomes(monkeypatch, lambda: 0, main, refuse) == ["used", outcome, "refused"]


def test_every_kind_has_inputs_that_are_used_and_inputs_that_are_refused():
    mutated_inputs.prepare()
    found = Counter()
    for number in range(100):
        [(_, outcome, _)] = mutated_inputs.part([number], seed=1)
        found[mutated_inputs.kind_of(number).__name__, outcome] += 1
    kinds = {kind.__name__ for kind in mutated_inputs.KINDS}
    assert {kind for kind, _ in found} == kinds and {outcome for _, outcome in found} == {"used", "refused"}


def test_an_input_is_the_same_whenever_it_is_made():
    def made():
        chosen = mutated_inputs.random.Random("0/1")
        return [
            mutators.json_text(mutators.ROWS[2], chosen),
            mutators.template(chosen),
            mutators.data(b"a" * 99, chosen),
        ]

    assert made() == made() and made()[2] != b"a" * 99
