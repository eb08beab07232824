"""How long `train.py --check` needs for 100,000 rows, how much memory, and how many planted near-duplicates it finds.

    python bench/lint_speed.py [--rows N] [--kind prose|chinese|template|multiply|same] [--eval N]

Every 50th row is a copy of an earlier one, changed in so many characters that the Jaccard similarity of their 5-grams
stays just above 0.9. `template`: all rows share a long frame, and most pairs are just below 0.9 or just above.
`multiply`: worked multiplications of random numbers. `same`: all rows are one, but for a number.
"""

import argparse
import random
import resource
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lora.data import lint, near  # noqa: E402
from lora.data.formats import Conversation  # noqa: E402

EVERY = 50


def worked(a: int, b: int) -> str:
    lines, total = [], 0
    for place, digit in enumerate(reversed(str(b))):
        part = a * int(digit) * 10**place
        lines += [f"{a} * {digit} * {10**place} = {part}", f"add the product: {total} + {part} = {total + part}"]
        total += part
    return "\n".join([*lines, f"so the result is {total}"])


def rows_of(kind: str, count: int, random: random.Random) -> list[tuple[str, str]]:
    words = ["".join(random.choices("etaoinshrdlucmfwypvbgk", k=random.randint(2, 9))) for _ in range(20_000)]
    frame = " ".join(random.choices(words, k=14))

    def chinese(length: int) -> str:
        return "".join(map(chr, random.choices(range(0x4E00, 0x5600), k=length)))

    def prose(length: int) -> str:
        return " ".join(random.choices(words, k=length))

    def row(i: int) -> tuple[str, str]:
        if kind == "prose":
            return prose(12), prose(random.randint(40, 140))
        if kind == "chinese":
            return chinese(20) + "？", "，".join(chinese(10) for _ in range(random.randint(28, 98)))
        if kind == "template":
            return f"{frame} {random.choice(words)}", f"{frame[::-1]} {random.randrange(100)}"
        if kind == "multiply":
            a, b = random.randrange(10**7, 10**8), random.randrange(10**7, 10**8)
            return f"What is {a} * {b}?", worked(a, b)
        return frame, f"{frame[::-1]} {frame.upper()[::2]} {i}"

    return [row(i) for i in range(count)]


def nearly(pair: tuple[str, str], random: random.Random) -> tuple[str, str]:
    """The row with single characters of its answer changed until one more would bring it below 0.9."""
    question, best = pair
    row = "\n".join(map(lint.normal, pair))
    while True:
        place = random.randrange(len(best))
        worse = best[:place] + random.choice("xyzqj") + best[place + 1 :]
        if not near.is_near(row, f"{lint.normal(question)}\n{lint.normal(worse)}"):
            return question, best
        best = worse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--eval", type=int, default=0, help="as many rows of evaluation data, half of them leaked")
    parser.add_argument("--kind", choices=("prose", "chinese", "template", "multiply", "same"), default="prose")
    args = parser.parse_args()
    source = random.Random(0)
    pairs = rows_of(args.kind, args.rows, source)
    planted = {place: place - source.randint(1, EVERY - 1) for place in range(EVERY, args.rows, EVERY)}
    for place, other in planted.items():
        pairs[place] = nearly(pairs[other], source)
    held_out = rows_of(args.kind, args.eval, source)
    held_out[::2] = source.sample(pairs, len(held_out[::2]))
    train, evaluation = (
        [
            Conversation([{"role": "user", "content": q}, {"role": "assistant", "content": a}], f"{name}.jsonl:{line}")
            for line, (q, a) in enumerate(rows, 1)
        ]
        for name, rows in (("train", pairs), ("eval", held_out))
    )
    size = sum(len(q) + len(a) for q, a in pairs)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    calls, is_near = [0], near.is_near

    def counted(one: str, other: str) -> bool:
        calls[0] += 1
        return is_near(one, other)

    near.is_near = counted
    start, busy = time.monotonic(), time.process_time()
    findings = lint.check(train, evaluation)
    seconds, busy = time.monotonic() - start, time.process_time() - busy
    near.is_near = is_near
    found = {(f.file, f.line) for f in findings if f.code in ("NEAR-DUPLICATE", "DUPLICATE")}
    hits = sum(("train.jsonl", place + 1) in found for place in planted)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"rows          {args.rows:,} of {size / args.rows:.0f} characters ({args.kind})")
    print(f"seconds       {seconds:.1f} ({busy:.1f} of the processor)")
    print(f"memory        {peak / 2**20:.2f} GiB at most, {before / 2**20:.2f} of it before, with the rows")
    print(f"compared      {calls[0]:,} pairs exactly")
    print(f"planted       {hits:,} of {len(planted):,} found ({hits / len(planted):.2%})")
    print(f"findings      {len(findings):,}")


if __name__ == "__main__":
    main()
