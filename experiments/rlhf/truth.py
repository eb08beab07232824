"""What is wanted, as a reward function: the rule that the reward model's pairs were labelled by.

Given to train.py with next to no weight, it changes nothing and shows at every step what the rule says of the answers.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from preferences import rule


def truth(completions: list[str], **_) -> list[float]:
    """1 where the rule finds no fault, else 0."""
    return [float(rule.is_right(answer)) for answer in completions]
