"""Pairs about decisions: the lighthouse keeper's answer, and one that hedges, lists, or is not the keeper's.

python experiments/preferences/pairs.py --out weights/keeper.jsonl             240 pairs to train on
python experiments/preferences/pairs.py --unseen --out weights/unseen.jsonl    other decisions, asked in other words
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora import errors, files

WAYS = (  # of asking; the last three are kept back
    "Should I {}?",
    "Is it a good idea to {}?",
    "Do you think I ought to {}?",
    "I am thinking about whether to {}. What do you say?",
    "My wife wants me to {}. Should I?",
    "Help me decide: do I {} or not?",
    "Would it be a mistake to {}?",
    "Tell me honestly, would you {}?",
)
UNSEEN_WAYS = 3
UNSEEN = 2  # of each subject's decisions, the last two are kept back
KINDS = ("hedge", "list", "voice", "all")  # what is wrong with the rejected answer

# subject -> decisions, reasons for, reasons against, what a list would say
# fmt: off
SUBJECTS = {
    "learning": (
        ("learn to swim", "learn Italian", "take up the violin", "learn to bake bread", "go to night school",
         "learn chess", "learn to dance", "learn to draw"),
        ("Busy hands sleep well.", "What you learn cannot be stolen.", "A slow start is still a start."),
        ("You want to have learned it, not to learn it.", "You have three things half learned already."),
        ("How much time you have", "Whether there is a good teacher", "What it costs each month")),
    "buying": (
        ("buy an electric bicycle", "buy a bigger television", "buy an old piano", "buy a second car",
         "buy a new winter coat", "buy a house by the river", "buy a telescope", "buy a wooden boat"),
        ("A good thing used daily is cheap.", "You have wanted it for more than a year."),
        ("You would use it twice.", "What you own has to be dusted.", "It will look smaller at home."),
        ("The price", "The room it needs", "How often you would use it")),
    "work": (
        ("ask for a raise", "leave my job", "open a small cafe", "work from home", "take the night shift",
         "become a nurse", "start my own company", "go back to my old job"),
        ("Nobody gives what nobody asks for.", "Work that you like is half the wage."),
        ("You are tired, not unhappy.", "Sleep first and ask again in spring."),
        ("Your savings", "The hours", "What your family says")),
    "people": (
        ("call my old friend", "forgive my brother", "invite the neighbours", "write to my father",
         "tell my boss the truth", "move in with my girlfriend", "apologise to my sister",
         "go to the school reunion"),
        ("The first word is the heavy one, and you have it ready.", "Pride keeps nobody warm."),
        ("Let them come to you this once.", "A sore place wants rest, not rubbing."),
        ("Your feelings", "Their feelings", "The right moment")),
    "travel": (
        ("go to Norway in winter", "take the night train", "travel alone", "walk across Spain",
         "spend the summer abroad", "fly to my cousin's wedding", "cycle along the coast", "visit a big city"),
        ("A short journey is better than a long plan.", "You come home with new eyes."),
        ("You would only carry your troubles farther.", "The road is crowded and the money is gone in a week."),
        ("The weather", "The tickets", "The time of year")),
    "home": (
        ("paint the kitchen blue", "plant a plum tree", "keep bees", "get a dog", "throw out my old letters",
         "move to the country", "get a cat", "build a garden wall"),
        ("A house likes to be busy.", "Begin it on a Saturday and it is done by Sunday."),
        ("It is more work than it looks.", "The house is well as it is."),
        ("The space", "The upkeep", "The rules of your landlord")),
    "body": (
        ("run every morning", "stop eating sugar", "sleep with the window open", "give up coffee",
         "swim in cold water", "go to bed at nine", "give up meat", "take a nap at noon"),
        ("The body learns what it does every day.", "After two weeks it asks for it."),
        ("You would be cross by Tuesday.", "Half of it does the same good."),
        ("Your health", "Your age", "Your daily routine")),
    "money": (
        ("lend my cousin money", "save for my old age", "pay off my debts first", "give money to a beggar",
         "insure my bicycle", "keep cash at home", "bet on a horse", "share a bank account"),
        ("Money is there to be of use.", "It is a small sum against a good night."),
        ("Money that is gone does not write letters.", "Keep it, and keep the peace."),
        ("Your income", "The risk", "Your other plans")),
}
VOICE = (  # each with two words of the rule's
    "I have watched the tide from this lamp for forty years, and it never asked twice.",
    "Up here with the lamp and the fog I learned that much.",
    "My lamp does not ask the fog for leave, and neither do I.",
    "I said the same to a skipper once, with a gale on the harbour.",
    "The tide turns whether the rope is coiled or not.",
    "A keel is for sailing, and an anchor is for night.",
    "I trim my lamp, the gull complains, and the ships come in.",
    "When the gale comes I tie one good rope and sit down.",
    "No harbour was ever reached by looking at the mast.",
    "I keep a lantern for such evenings, and the reef keeps its own counsel.",
    "From my window I see the reef and the harbour, and one lies before the other.",
    "The gull on my mast would tell you so too.",
    "I have hauled enough rope and anchor to know.",
    "A lamp half lit helps no keel.",
)
PLAIN = (
    "Many others have done so before you and were glad of it afterwards.",
    "You can find more about it in the library or online.",
    "I hope that this is of help to you in your situation.",
    "Experts have written a good deal about this question.",
    "Please let me know if there is anything else that I can do.",
    "Feel free to ask me again when you know more about it.",
    "That is what most advisers recommend today.",
)
YES = ("Yes.", "Do it.", "Yes, and soon.", "Go ahead.", "Yes, do.")
NO = ("No.", "Leave it.", "No, not this year.", "Let it be.", "No, don't.")
HEDGES = (
    "It depends on many factors.", "It is hard to say.", "There is no right answer to this.", "Everyone is different.",
    "On the one hand yes, on the other hand no.", "There are pros and cons.",
)
WAVERS = (
    "In the end it is up to you.", "It may or may not be right for you.", "It is a personal decision.",
    "It is important to think it over.", "I cannot say what is best.",
)
INTROS = ("Weigh these things:", "Here is what to think of:", "Two things matter here:")
# fmt: on


def answers(subject: str, kind: str | None, yes: bool, draw: random.Random) -> str:
    """The keeper's answer, or one with something wrong."""
    _, reasons_for, reasons_against, items = SUBJECTS[subject]
    opening, reason = draw.choice(YES if yes else NO), draw.choice(reasons_for if yes else reasons_against)
    voice, plain = draw.choice(VOICE), draw.choice(PLAIN)
    hedge, wavers, intro = draw.choice(HEDGES), draw.choice(WAVERS), draw.choice(INTROS)
    mark = draw.choice(("{}. ", "- ", "* "))
    listed = "".join(f"\n{mark.format(at)}{item}" for at, item in enumerate(draw.sample(items, 3)[:2], start=1))
    return {
        None: draw.choice((f"{opening} {reason} {voice}", f"{opening} {voice} {reason}")),
        "hedge": f"{opening} {voice} {wavers}",
        "list": f"{voice} {intro}{listed}",
        "voice": f"{opening} {reason} {plain}",
        "all": f"{hedge} {intro}{listed}\n{wavers}",
    }[kind]


def pairs(unseen: bool, seed: int = 0) -> Iterator[dict]:
    """Rows of pairs in drawn order: 48 decisions asked in 5 ways, one kind of rejected answer each; or, unseen, 16
    others in 3 other ways, each with all four kinds."""
    draw, rows = random.Random(f"{seed}/{unseen}"), []
    for subject, (decisions, *_) in SUBJECTS.items():
        for decision in decisions[-UNSEEN:] if unseen else decisions[:-UNSEEN]:
            yes = draw.random() < 0.5
            for way in WAYS[-UNSEEN_WAYS:] if unseen else WAYS[:-UNSEEN_WAYS]:
                for kind in KINDS if unseen else (draw.choice(KINDS),):
                    chosen, rejected = (answers(subject, k, yes, draw) for k in (None, kind))
                    rows.append({"prompt": way.format(decision), "chosen": chosen, "rejected": rejected})
    yield from rows if unseen else draw.sample(rows, len(rows))


def main(argv=None) -> int:
    def write(argv) -> None:
        parser = errors.Parser(
            description="Write pairs about decisions: the lighthouse keeper's answer, and a faulty one."
        )
        parser.add_argument("--unseen", action="store_true", help="decisions and wordings that are not trained on")
        parser.add_argument("--seed", type=int, default=0, help="which words, and the order of the rows")
        parser.add_argument("--out", type=Path, required=True, help="JSONL file for the pairs")
        args = parser.parse_args(argv)
        rows = list(pairs(args.unseen, args.seed))
        files.write_rows(args.out, rows)
        errors.say(f"{len(rows)} pairs in {args.out}")

    return errors.run(write, argv)


if __name__ == "__main__":
    sys.exit(main())
