"""From a few seed lines to a style set: many ways to ask each seed question, and its answer word for word.

Offline a question gets polite openings, sentences round it, particles, colloquial words, misspellings, and other
punctuation or width; `--paraphrases` adds a teacher's rewrites. Nothing is asked twice, so nothing has two answers.
"""

import random
import re
import sys
from argparse import SUPPRESS
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, islice, product, zip_longest
from math import prod
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a script: Python looks beside this file, and `lora` lies one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    from lora.errors import before_imports

    before_imports(__name__)

from data_gen import teacher
from data_gen.augment import (
    MOST_WAYS,
    NARROW,
    OUT_HELP,
    Turn,
    read_turns,
    rewrites,
    told,
    within,
)
from data_gen.self_cognition import LEFT_OVER, MOST_ROWS, check
from lora import errors, files


class Language(NamedTuple):
    """The tables of one language. {} in a frame stands for the question with its mark."""

    marks: tuple[str, str]  # what a question and an answer begin with
    asks: re.Pattern  # finds a question; what is none is a greeting, a statement or an order
    mentions: re.Pattern  # finds a question about words, whose words must stay
    leads: tuple[str, ...]  # before anything
    asking_leads: tuple[str, ...]  # before a question only
    frames: tuple[str, ...]  # round anything
    asking_frames: tuple[str, ...]  # round a question only
    words: tuple[tuple[str, str], ...]  # colloquial forms, (pattern, replacement)
    typos: tuple[tuple[str, str], ...]
    ends: tuple[str, ...]  # the marks of a question
    stop: str  # the mark of anything else, where a sentence follows
    particles: tuple[str, ...]  # before that mark
    no_particle: re.Pattern  # an end that bears no particle


# fmt: off
ZH = Language(
    marks=("问：", "答："),
    asks=re.compile(r"[?？]\s*$|[吗呢么]\s*$|什么|啥|谁|哪|怎|咋|几|多少|为何|如何|是否|有没有|是不是|能不能|可不可以"),
    mentions=re.compile(r"怎么[说写读念拼]|翻译|意思|拼音|汉字|个字|词|造句|成语|英[文语]|中文|方言|[这那]句"),
    leads=("你好，", "您好，", "嗨，", "嘿，", "那个，", "喂，", "哎，", "对了，", "话说，",
           "打扰一下，", "不好意思，", "在吗，"),
    asking_leads=("请问，", "请问一下，", "麻烦问一下，", "想请教一下，", "冒昧问一句，", "我就想问，", "随便问问，",
                  "弱弱地问一句，", "快告诉我，", "你说说看，", "诶，"),
    frames=("{}", "{}谢谢！", "{}先谢过了。", "{}麻烦啦。", "{}拜托了！", "{}等你回话。", "{}在线等。"),
    asking_frames=("我有个问题：{}", "有件事我一直想不明白：{}", "今天忽然想起来问一句：{}", "憋了好久，还是想问：{}",
                   "朋友托我来问：{}", "我的问题是这样的：{}", "{}请回答我。", "{}我很想知道。", "{}想听听你怎么讲。",
                   "{}这个问题困扰我很久了。", "{}说说看吧。", "{}不许绕弯子。", "{}我洗耳恭听。"),
    words=(("什么", "啥"), ("怎么", "咋"), ("怎样", "咋样"), ("你(?![们好])", "您"), ("(?<=了)吗$", "没"),
           ("(?<=了)吗$", "没有"), ("哪里|哪儿", "哪块儿"), ("这里", "这儿"), ("知道", "晓得"), ("到底", "究竟"),
           ("没有", "没"), ("为什么", "为何"), ("今天", "今儿"), ("明天", "明儿"), ("昨天", "昨儿"), ("是不是", "是否"),
           ("能不能", "可不可以"), ("怎么办", "咋整")),
    typos=(("什么", "神马"), ("什么", "什麽"), ("怎么", "肿么"), ("吗$", "嘛"), ("你(?![们好])", "妳"),
           ("知道", "知到"), ("觉得", "觉的"), ("已经", "以经"), ("应该", "因该"), ("喜欢", "喜换"),
           ("时候", "时侯"), ("就是", "就事"), ("到底", "倒底"), ("为什么", "为神马"),
           ("^(?![一二三四五六七八九十百千万零两])([一-龥])", r"\1…\1")),
    ends=("？", "?", "", "？？", "？！", "……"),
    stop="。",
    particles=("", "呢", "呀", "啊"),
    no_particle=re.compile(r"[吗呢吧啊呀嘛没么的]$|没有$"),
)
EN = Language(
    marks=("Q: ", "A: "),
    asks=re.compile(r"\?\s*$|^\s*(?:who|whose|whom|what|which|when|where|why|how|is|are|was|were|am|do|does|did|have|has|"
                    r"had|can|could|will|would|shall|should|may|might)\b", re.IGNORECASE),
    mentions=re.compile(r"\b(?:spell|spelt|words?|translate|means?|meaning|letters?|rhymes?|synonyms?|pronounced?|say|"
                        r"sentence|phrase|grammar|abbreviat\w*|acronym|contraction)\b", re.IGNORECASE),
    leads=("Hi, ", "Hello, ", "Hey, ", "Hello there, ", "Well, ", "So, ", "Um, ", "Okay, ", "Right, ", "By the way, ",
           "Excuse me, ", "Sorry to bother you, "),
    asking_leads=("Quick question: ", "May I ask, ", "Just wondering, ", "Out of curiosity, ", "Tell me, ",
                  "Please tell me: ", "If I may ask, ", "One more thing: ", "Come on, ", "Honestly, "),
    frames=("{}", "{} Thanks!", "{} Thank you in advance.", "{} Cheers!", "{} Thanks a lot.", "{} Much obliged."),
    asking_frames=("I have a question. {}", "Here is what I want to know. {}", "Something has been on my mind. {}",
                   "A friend told me to ask you this. {}", "My question is simple. {}", "This may sound odd. {}",
                   "{} Please answer.", "{} I'd love to know.", "{} I have been wondering all day.",
                   "{} Take your time.", "{} No beating about the bush!", "{} I'm all ears.",
                   "{} That is my question."),
    words=((r"\b([Ww]hat|[Ww]ho|[Ww]here|[Hh]ow) is\b", r"\1's"), (r"\byou\b", "u"), (r"\byour\b", "ur"),
           (r"\bare\b", "r"), (r"\b([Dd])o not\b", r"\1on't"), (r"\b([Dd])on't know\b", r"\1unno"),
           (r"\bgoing to(?= [a-z])\b", "gonna"), (r"\bwant to\b", "wanna"), (r"\bI am(?= \w)", "I'm"),
           (r"\byou are(?= \w)", "you're"), (r"\bbecause\b", "cos"), (r"\b([Pp])lease\b", r"\1ls"),
           (r"\bsomething\b", "somethin'"), (r"\b([Aa])re you\b", r"\1re ya"), (r"\b([Dd])o you\b", r"\1o ya"),
           (r"\b([Ww])hat are you\b", r"\1hat're you"), (r"\bit is(?= \w)", "it's")),
    typos=((r"\bthe\b", "teh"), (r"\byou\b", "yuo"), (r"\byour\b", "yoru"), (r"\b([Ww])hat\b", r"\1aht"),
           (r"\b([Hh])ave\b", r"\1vae"), (r"\bwith\b", "wiht"), (r"\bknow\b", "konw"), (r"\b([Ww])here\b", r"\1ehre"),
           (r"\bbecause\b", "becuase"), (r"\bpeople\b", "poeple"), (r"\bfriend", "freind"), (r"\breally\b", "realy"),
           (r"\babout\b", "abuot"), (r"\b([Tt])oday\b", r"\1odya"), (r"\b([Ss])hould\b", r"\1houdl"),
           (r"\b([WwCc])ould\b", r"\1oudl"), (r"\b([Ww])hen\b", r"\1ehn"), (r"\b([Dd])oes\b", r"\1eos"),
           (r"\bthis\b", "tihs"), (r"\b([Ww])hich\b", r"\1hcih"), (r"\bthat\b", "taht"), (r"\b([Ww])hy\b", r"\1yh"),
           (r"\b([Hh])ow\b", r"\1wo"), (r"\b([Ww])ho\b", r"\1oh"), (r"\band\b", "adn")),
    ends=("?", "??", "", " ?", "?!", "..."),
    stop=".",
    particles=("",),
    no_particle=re.compile("$"),
)
# fmt: on
LANGUAGES = {"zh": ZH, "en": EN}

# --prefix -> which of (question, answer) are marked; a row of `mixed` draws one of them
PREFIXES = {
    "none": ((False, False),),
    "question": ((True, False),),
    "answer": ((False, True),),
    "both": ((True, True),),
    "mixed": ((False, False), (True, False), (False, True), (True, True)),
}
EACH = 10  # rows a seed, where nothing is said

# ---- seeds -----------------------------------------------------------------------------------------------------------

SLOT = re.compile(r"\[([A-Z_]{2,})\]|\{\{\s*(\w+)\s*\}\}")
MARKS = tuple(re.compile(rf"\s*(?:{words})\s*[:：]\s*", re.IGNORECASE) for words in ("问|Q|Question", "答|A|Answer"))


def assignments(words: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE words as a table."""
    values = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]{2,}", name):
            why = "it is not NAME=VALUE with a name of letters"
            raise errors.BadInput(f"wrong --set in the command line: {word!a}: {why}. For example --set NAME=Nimbus")
        if name.upper() in values:
            raise errors.BadInput(f"wrong --set in the command line: {name.upper()} is there twice. Give it once")
        check("--set", value)
        values[name.upper()] = value
    return values


def unmarked(text: str, mark: re.Pattern) -> str:
    found = mark.match(text)
    return text[found.end() if found else 0 :].strip()


def read_seeds(path: Path, values: dict[str, str]) -> list[Turn]:
    """The seeds with their placeholders filled in and without 问：, 答：, Q: and A: before a text.

    Raises BadInput for a placeholder that survives or is in no row, and for two answers to the same question.
    """
    seeds, problems, used, first = [], [], set(), {}

    def value(slot: re.Match) -> str:
        name = (slot[1] or slot[2]).upper()
        used.add(name)
        return values.get(name, slot[0])

    for turn in read_turns(path):
        before = [{**message, "content": SLOT.sub(value, message["content"])} for message in turn.before]
        texts = [SLOT.sub(value, text) for text in (turn.question, turn.answer)]
        if left := next(filter(None, map(LEFT_OVER.search, [*texts, *(m["content"] for m in before)])), None):
            fix = f"Give it a value, --set {left[0].strip('[]{} ')}=..., or remove it"
            problems.append(f"placeholder in {turn.where}: {left[0]} would be learned. {fix}")
            continue
        question, answer = map(unmarked, texts, MARKS)
        if not question or not answer:
            problems.append(f"wrong row in {turn.where}: there is nothing after the prefix. Write the text")
            continue
        seed = Turn(before, question, answer, turn.where)
        other = first.setdefault(seed.asks(question), seed)
        if other is seed:
            seeds.append(seed)
        elif other.answer != seed.answer:
            problems.append(f"conflict in {seed.where}: {other.where} has another answer to its question. Keep one")
    for name in sorted(values.keys() - used):
        problems.append(f"wrong --set in the command line: no row of {path} has [{name}]. Check the name")
    if problems:
        raise errors.BadInput(*problems)
    return seeds


# ---- ways to ask -----------------------------------------------------------------------------------------------------

TOUCHABLE = re.compile(r"(?:[\w ,，。.!！?？…~～、;；-]|(?<=\w)['’](?=\w))+")  # the words of quotes and code must stay
FINAL = re.compile(r"[\s?？!！。.…~～]+$")
FIRST_WORDS = re.compile(
    r"(?:Who|Whose|Whom|What|Which|When|Where|Why|How|Is|Are|Was|Were|Am|Do|Does|Did|Have|Has|Had|Can|Could|Will|Would|"
    r"Shall|Should|May|Might|Please|Tell|Give|Write|Explain|Name|Show|Make|Let|The|This|That|My|Your|There|It)\b"
)  # what may be written small after a comma; other first words may be names
WIDE = {narrow: wide for wide, narrow in NARROW.items() if chr(narrow).isalnum()}
WIDE_ENOUGH = re.compile(r"[\w，。？！]+")


def cores(question: str, language: Language) -> list[str]:
    """The question without its last mark, as it is and with one word changed."""
    core = FINAL.sub("", question) or question
    changed = [core]
    if TOUCHABLE.fullmatch(question) and not language.mentions.search(question):
        changed += [re.sub(pattern, by, core) for pattern, by in (*language.words, *language.typos)]
    return list(dict.fromkeys(changed))


def variants(question: str, language: Language, draw: random.Random) -> Iterator[str]:
    """Ways to ask `question`, in drawn order; some ask in its own words."""
    asking, touchable = language.asks.search(question), TOUCHABLE.fullmatch(question)
    mark = FINAL.search(question)
    ends = language.ends if asking and touchable else (mark[0].strip() if mark else "",)
    separator = "\n" if "\n" in question else language.ends[0] if asking else language.stop
    tables = (
        ("", *language.leads, *(language.asking_leads if asking else ())),
        cores(question, language),
        language.particles if asking and touchable else ("",),
        language.frames + (language.asking_frames if asking else ()),
    )
    ways = product(*(range(len(table)) for table in tables))

    def turn_of(way: tuple[int, ...]) -> float:  # about half of the questions get no lead, half no frame, and so on
        return draw.expovariate(prod(len(table) for table, at in zip(tables, way, strict=True) if not at))

    for way in sorted(ways, key=turn_of):
        lead, core, particle, frame = (table[at] for table, at in zip(tables, way, strict=True))
        head, tail = frame.split("{}")
        doubled = lead and core[:2].casefold() == lead[:2].casefold()
        if doubled or (head and lead in language.asking_leads) or (particle and language.no_particle.search(core)):
            continue
        if lead.endswith(", ") and (head or FIRST_WORDS.match(question)):
            head, core = (_small(head), core) if head else ("", _small(core))
        if language is ZH:
            lead = lead.replace("，", draw.choice(("，", "，", "，", ",", " ")))
            core = core.translate(WIDE) if WIDE_ENOUGH.fullmatch(core) and draw.random() < 0.3 else core
        end = draw.choice(ends) or (separator if tail else "")
        yield f"{lead}{head}{core}{particle}{end}{tail}"


def _small(text: str) -> str:
    return text if text.startswith("I ") else text[0].lower() + text[1:]


def generate(
    seeds: Sequence[Turn],
    bases: Sequence[Sequence[str]],
    rows: int,
    each: int,
    lang: str,
    seed: int,
    keep: bool = False,
) -> list[tuple[Turn, str]]:
    """`rows` pairs of seed and question, the seeds in turn, at most `each` of one; no two ask the same.

    `bases[i]` are other wordings of seed i: used as they are, then perturbed as the seed is. With `keep` the seed's own
    question comes first. Raises BadInput with how many can be made where that is too few.
    """
    taken = {turn.asks(turn.question) for turn in seeds}

    def questions(number: int, turn: Turn) -> Iterator[str]:
        draw = random.Random(f"{seed}/{number}")
        if keep:
            yield turn.question
        perturbed = zip_longest(*(variants(base, LANGUAGES[lang], draw) for base in (turn.question, *bases[number])))
        for text in chain(bases[number], chain.from_iterable(perturbed)):
            if text and turn.asks(text) not in taken:
                taken.add(turn.asks(text))
                yield text

    made, sources = [], [(turn, islice(questions(number, turn), each)) for number, turn in enumerate(seeds)]
    while sources and len(made) < rows:
        drawn = [(turn, source, next(source, None)) for turn, source in sources[: rows - len(made)]]
        made += [(turn, text) for turn, _, text in drawn if text is not None]
        sources = [(turn, source) for turn, source, text in drawn if text is not None] if len(made) < rows else []
    if len(made) < rows:
        fix = "Ask for fewer, or give more seeds, a larger --per-seed or --paraphrases"
        why = f"{rows} rows are wanted and {len(made)} can be made"
        raise errors.BadInput(f"too few seeds for --rows and --per-seed in the command line: {why}. {fix}")
    return made


def prefixed(made: Sequence[tuple[Turn, str]], prefix: str, lang: str, seed: int) -> tuple[list[dict], Counter]:
    """Rows in drawn order, and how many have which prefixes."""
    draw, rows, counts = random.Random(seed), [], Counter()
    for turn, text in draw.sample(made, len(made)):
        marked = draw.choice(PREFIXES[prefix])
        asked, answered = (mark * on for mark, on in zip(LANGUAGES[lang].marks, marked, strict=True))
        rows.append(turn._replace(answer=answered + turn.answer).row(asked + text))
        counts[marked] += 1
    return rows, counts


# ---- the command -----------------------------------------------------------------------------------------------------


def story(argv) -> None:
    about = "Make a style set from a few seed rows: other ways to ask, the same answers."
    parser = errors.Parser(prog="data_gen/persona.py", description=about)
    parser.add_argument("--seeds", type=Path, required=True, default=SUPPRESS, help="conversations of one turn, a few")
    parser.add_argument(
        "--rows", type=within(1, MOST_ROWS), default=SUPPRESS, help=f"how many (default: {EACH} a seed)"
    )
    parser.add_argument("--per-seed", type=within(1, MOST_ROWS), default=SUPPRESS, help="at most so many of one seed")
    parser.add_argument("--lang", choices=tuple(LANGUAGES), default="en", help="language of the seeds")
    parser.add_argument("--prefix", choices=tuple(PREFIXES), default="none", help="which texts begin with Q: and A:")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="fill in [NAME] and {{name}}")
    parser.add_argument("--keep-seeds", action="store_true", help="count the seed questions among the rows")
    parser.add_argument("--paraphrases", type=within(0, MOST_WAYS), default=0, help="a teacher's rewrites of each seed")
    parser.add_argument("--seed", type=int, default=0, help="which ways to ask, and the order of the rows")
    parser.add_argument("--out", type=Path, required=True, default=SUPPRESS, help=OUT_HELP)
    teacher.add_flags(parser)
    args = parser.parse_args(argv)
    if problems := files.unwritable("--out", args.out, args.seeds):
        raise errors.BadInput(*problems)
    seeds = read_seeds(args.seeds, assignments(args.set))
    each = getattr(args, "per_seed", None) or getattr(args, "rows", EACH)
    wanted = getattr(args, "rows", each * len(seeds))
    bases = [[] for _ in seeds]
    if args.paraphrases:
        found, whys = rewrites(seeds, args.paraphrases, args.lang, teacher.from_flags(args), args.out)
        errors.say(f"{sum(map(len, found))} paraphrases of {args.paraphrases * len(seeds)}, {told(whys)}")
        bases = [list(filter(None, (unmarked(text, MARKS[0]) for text in kept))) for kept in found]
    made = generate(seeds, bases, wanted, each, args.lang, args.seed, args.keep_seeds)
    rows, counts = prefixed(made, args.prefix, args.lang, args.seed)
    files.write_rows(args.out, rows)
    errors.say(f"{len(rows)} rows from {len(seeds)} seeds in {args.out}")
    names = {marked: name for name, (marked, *more) in PREFIXES.items() if not more}
    errors.say("prefixes: " + ", ".join(f"{counts[marked]} {name}" for marked, name in names.items()))


def main(argv=None) -> int:
    return errors.run(story, argv)


if __name__ == "__main__":
    sys.exit(main())
