"""Countdown: make a target from a few numbers, each used once, with + - * / and parentheses.

python data_gen/countdown.py --out weights/countdown.jsonl                      rows for --reward countdown
python data_gen/countdown.py --answers --out weights/countdown-sft.jsonl        the same with worked answers, for sft

A row is {"prompt", "nums", "target"}, as in the public sets, with --answers also {"completion"}. Every row can be
solved. A worked answer has one operation a line, and then the whole expression:

    7 - 3 = 4
    4 * 6 = 24
    (7 - 3) * 6 = 24
"""

import hashlib
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a script: Python looks beside this file, and `lora` lies one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    from lora.errors import before_imports

    before_imports(__name__)


from tqdm import tqdm

from data_gen import outputs
from lora import errors, files

ASK = "Use the numbers {} once each with + - * / and parentheses to make {}. End with the expression."
MOST_NUMBERS, MOST_ROWS, MOST = 6, 1_000_000, 1000
TEST_SHARE = 10  # one game in so many is held out
TRIES = 1000  # games drawn for a row before there are said to be no more


class Value(NamedTuple):
    """A number that is given or made: how it is written, by which operator, and the lines of work that made it."""

    number: int
    text: str
    operator: str = ""
    work: tuple[str, ...] = ()


class Game(NamedTuple):
    nums: list[int]
    target: int
    answer: str


def is_test(nums: list[int], target: int) -> bool:
    """Whether a game is held out: a hash of its numbers in any order and of its target, of nothing else."""
    digest = hashlib.sha256(f"{sorted(nums)}={target}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % TEST_SHARE == 0


def question(nums: list[int], target: int) -> str:
    return ASK.format(", ".join(map(str, nums)), target)


def draw(numbers: int, highest: int, chance: random.Random) -> Game | None:
    """Numbers, which are joined two by two with random operators until one is left. All that is made on the way is a
    whole number from 1 on; None where what is left is no target."""
    values = [Value(n, str(n)) for n in (chance.randint(1, highest) for _ in range(numbers))]
    nums = [value.number for value in values]
    while len(values) > 1:
        chance.shuffle(values)
        a, b, *values = values
        operators = ["+", "*", *("-" * (a.number > b.number)), *("/" * (a.number % b.number == 0))]
        values.append(join(a, chance.choice(operators), b))
    [made] = values
    if not 1 <= made.number <= highest or made.number in nums:
        return None
    return Game(nums, made.number, "\n".join([*made.work, f"{made.text} = {made.number}"][numbers == 2 :]))


def join(a: Value, operator: str, b: Value) -> Value:
    """One operation: what it makes, with the parentheses that the order of operations needs."""
    number = {"+": a.number + b.number, "-": a.number - b.number, "*": a.number * b.number}.get(operator)
    number = a.number // b.number if number is None else number
    sums = ("+", "-")
    left = f"({a.text})" if operator not in sums and a.operator in sums else a.text
    weaker = {"+": (), "-": sums, "*": (*sums, "/"), "/": (*sums, "*", "/")}[operator]
    right = f"({b.text})" if b.operator in weaker else b.text
    line = f"{a.number} {operator} {b.number} = {number}"
    return Value(number, f"{left} {operator} {right}", operator, (*a.work, *b.work, line))


def games(numbers: int, rows: int, highest: int, seed: int = 0, held_out: bool = False) -> list[Game]:
    """`rows` different games of either training or the test. A pure function of the arguments; more rows begin with the
    same games. Raises BadInput, also if there are too few."""
    flag = "--test-rows" if held_out else "--rows"
    wrong = []
    for name, value, least, most in (
        ("--numbers", numbers, 2, MOST_NUMBERS), (flag, rows, 1, MOST_ROWS), ("--highest", highest, 4, MOST),
    ):  # fmt: skip
        if not least <= value <= most:
            wrong.append(f"wrong {name} in the command line: {value} is not in {least}..{most}. Give another number")
    if wrong:
        raise errors.BadInput(*wrong)
    found, seen, tries, chance = [], set(), 0, random.Random(seed)
    while len(found) < rows:
        tries += 1
        game = draw(numbers, highest, chance)
        key = game and (*sorted(game.nums), game.target)
        if game and key not in seen and is_test(game.nums, game.target) == held_out:
            seen.add(key)
            found.append(game)
            tries = 0
        elif tries > TRIES * TEST_SHARE:
            why = f"after {len(found)} games no new one is found, and {rows} are asked for"
            raise errors.BadInput(f"wrong {flag} in the command line: {why}. Lower it, or raise --numbers or --highest")
    return found


def rows_of(found: list[Game], answers: bool) -> Iterator[dict]:
    for game in found:
        row = {"prompt": question(game.nums, game.target), "nums": game.nums, "target": game.target}
        yield row | ({"completion": game.answer} if answers else {})


# ---- the command -----------------------------------------------------------------------------------------------------


def story(argv) -> None:
    parser = errors.Parser(prog="data_gen/countdown.py", description=__doc__)
    parser.add_argument("--numbers", type=int, default=3, help="how many numbers a game has")
    parser.add_argument("--highest", type=int, default=20, help="numbers and targets are at most so high")
    parser.add_argument("--rows", type=int, default=1000, help="how many rows")
    parser.add_argument("--answers", action="store_true", help="rows have a worked answer as their completion, for sft")
    parser.add_argument("--seed", type=int, default=0, help="which games, and their order")
    outputs.add_flags(parser, "held-out games, which no training file has")
    args = parser.parse_args(argv)
    made = outputs.of_flags(args, lambda rows, held_out: games(args.numbers, rows, args.highest, args.seed, held_out))
    for path, found, held_out in made:
        files.write_rows(path, tqdm(rows_of(found, args.answers), total=len(found), unit="row", disable=None))
        errors.say(f"{len(found)} {'held-out ' * held_out}rows in {path}")


def main(argv=None) -> int:
    return errors.run(story, argv)


if __name__ == "__main__":
    sys.exit(main())
