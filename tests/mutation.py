"""`@mutation(file, line, broken)` on a test: with that line of the product broken so, the test must fail.

The claim is the test's name. `python tests/mutate.py` reads the decorators and tries each one.
"""


def mutation(file: str, line: str, broken: str, case: str | None = None):
    """`line` occurs once in `file`; `case` is the test's parametrised id, where one case alone notices it."""
    del file, line, broken, case  # they are for mutate.py, which reads them from the source
    return lambda test: test
