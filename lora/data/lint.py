"""What is wrong with training data before a run pays for it: `check` returns findings, `FILE:LINE: CODE: message`.

Rows are compared as `normal` text, a turn a line. Near-duplicates share 90 % or more of their 5-grams of characters
(Jaccard similarity of the sets). Candidates come from MinHash signatures cut into bands (Broder 1997; Leskovec et al.,
"Mining of Massive Datasets", chapter 3): a pair of similarity s shares a band with probability 1 - (1 - s^r)^b, for
r = 12 hashes in each of b = 22 bands 0.9993 at s = 0.9, 0.28 at 0.7 and 0.005 at 0.5. Every candidate is then compared
exactly, so what is reported is true. Work is linear in the rows: in a band a row is compared with the first row and the
NEAREST ones that have it too, rows of one group are not compared again, and after TRIES comparisons in vain a row is
left alone. So only where more than NEAREST + 1 rows share a band without being near-duplicates may one be overlooked.
"""

import re
import sys
import unicodedata
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from lora.data.formats import Conversation, Problem
from lora.errors import one_line

CODES = {  # code -> what it means; first what a row is itself, then what it is beside others
    "FILE": "the file cannot be read, or holds no rows",
    "ENCODING": "the file is not UTF-8",
    "BROKEN": "the line is not JSON",
    "UNKNOWN": "the row has none of the known shapes",
    "ROW": "the row has a known shape but cannot be used",
    "ROLES": "the turns are not system, then user and assistant alternately",
    "EMPTY": "a turn has no text",
    "SURROGATE": "a text holds half a surrogate pair, which is no character",
    "PLACEHOLDER": "a slot such as [NAME] or {{name}} was never filled in (code between backticks may have some)",
    "LEFTOVER": "the answer is an error message or a refusal that a teacher left",
    "PREFIX": "some questions or answers of the file begin with 问：, 答：, Q:, User: or the like, and others do not",
    "SCHEMA": "the file has rows of more than one shape",
    "DUPLICATE": "all turns are those of another row, but for case, white space and punctuation",
    "NEAR-DUPLICATE": "90 % or more of its 5-grams of characters are those of another row (Jaccard)",
    "CONFLICT": "another row answers the same question differently",
    "OVERLAP": "an evaluation row or its question is in the training data too, perhaps with its numbers swapped",
}
GRAM = 5  # characters
BANDS, ROWS = 22, 12
NEAREST, TRIES = 8, 4
LIKELY = 0.82  # share of equal hashes: 4 standard deviations, of sqrt(0.9 * 0.1 / 264) each, below 0.9
CHUNK = 2**17  # characters that are hashed at once; its arrays fit into the cache


class Finding(NamedTuple):
    """One line of the report; findings sort by file, line and code."""

    file: str
    line: int
    code: str
    message: str

    def __str__(self) -> str:
        return one_line(f"{self.file}:{self.line}: {self.code}: {self.message}")


def check(train: Sequence[Conversation | Problem], evaluation: Sequence[Conversation | Problem] = ()) -> list[Finding]:
    """All findings, sorted. Rows that could not be read pass through; each set is also compared with itself."""
    found = []
    for row in (*train, *evaluation):
        found += [_finding(row.where, row.code, row.text)] if _unread(row) else _alone(row)
    train, evaluation = ([row for row in rows if not _unread(row)] for rows in (train, evaluation))
    found += _mixed([*train, *evaluation])
    sets = [[_Row.of(row) for row in rows] for rows in (train, evaluation)]
    for rows in sets:
        found += [*_repeats(rows), *_conflicts(rows)]
    return sorted([*found, *_overlap(*sets)])


def _unread(row) -> bool:
    return hasattr(row, "code")


def _finding(where: str, code: str, message: str) -> Finding:
    file, _, line = where.rpartition(":")
    return Finding(file, int(line), code, message) if file and line.isdecimal() else Finding(where, 1, code, message)


def _quote(text: str) -> str:
    text = one_line(" ".join(text[:400].split()))
    return f'"{text if len(text) <= 60 else text[:57] + "..."}"'


# ---- a row by itself -------------------------------------------------------------------------------------------------

CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
PLACEHOLDER = re.compile(
    r"(?<![A-Za-z0-9_\]])\[(?!(?:ERROR|INFO|WARN|WARNING|DEBUG|FATAL|TRACE|INST|MASK|CLS|SEP|PAD|UNK|BOS|EOS)\])"
    r"[A-Z]{2}[A-Z0-9]*(?:[_ ][A-Z0-9]+)*\](?!\()"  # [NAME], [FIRST_NAME]; not x[KEY], [A-Z], [LINK](url)
    r"|\[(?i:your|insert|enter)[ _][^\]\n]{1,40}\](?!\()"
    r"|[\[【](?:[你您]的[^\]】\n]{1,20}|姓名|名字|作者)[\]】]"
    r"|(?<![\\^_}])\{\{\s*[^\W\d][\w .-]+\}\}"  # {{name}}; not TeX's x^{{n}}
)
LABEL = re.compile(r"\s*(问题?|提问|回?答|用户|助手|[qabcd]|question|answer|user|human|assistant|bot)\s*[:：]\s*", re.I)

# How an answer begins that is none, in lower case with straight apostrophes.
CUT_OFF = (  # also as the last line of an answer that was cut off
    r"(?:an? )?(?:(?:internal )?server|network|connection|gateway|unknown|unexpected) error",
    r"there was an error generating a response|(?:the )?(?:request|connection) (?:has )?timed out",
    r"网络(?:连接)?(?:错误|异常|超时|失败|繁忙)|(?:请求|连接)(?:超时|失败|过于频繁)",
)
ERRORS = (
    r"(?:(?:http|error|status|code)[ :]+)+[45]\d\d\b[^\n]{0,60}|bad gateway|gateway time-?out|too many requests",
    r"service (?:temporarily )?unavailable|rate limit (?:exceeded|reached)|an error (?:has )?occurred",
    r"something went wrong|(?:发生|出现)了?(?:未知)?错误|出错了|(?:服务器?|系统)(?:内部)?(?:错误|异常|繁忙|超时)",
)
CANNOT = r"(?:can't|cannot|can not|won't|don't|do not|am unable|am not able|'m unable|'m not able)"
SORRY_ZH = r"(?:很|非常|十分|真的)?(?:抱歉|对不起|不好意思)[,，。!！ ]*"
REFUSALS = (
    rf"(?:i'm |i am )?(?:(?:very|so|really) )?sorry,? (?:but )?(?:as an ai\b|(?:i|we) ?{CANNOT})",
    rf"i ?{CANNOT} (?:to )?(?:assist|help|provide|fulfil|comply|answer|do that|create|generate|discuss|engage)",
    rf"as an? (?:ai|artificial intelligence|large language model|language model)\b[^.]{{0,40}}\b(?:i|we) ?{CANNOT}",
    rf"{SORRY_ZH}(?:作为.{{0,16}}[,，])?(?:但是?)?我?(?:暂时|目前|还|现在)?(?:无法|不能|没办法)",
    rf"(?:{SORRY_ZH})?作为(?:一个|一名|一款)?(?:大型?)?(?:ai|人工智能|语言模型).{{0,16}}我(?:还|暂时)?(?:无法|不能|没有|不会)",
    r"我(?:暂时|目前|还)?(?:无法|不能)(?:回答|提供|满足|协助|帮助|完成|生成|讨论|访问)",
)
CUT = re.compile(rf"(?:{'|'.join(CUT_OFF)})\W*")
# A message ends here, or goes on after a mark or with one of these words; "network errors are ..." is a subject.
ERROR = re.compile(
    rf"(?:{'|'.join(CUT_OFF + ERRORS)})(?=$|\s*[^\w\s]|\s+(?:please|while|when|try|occurred|has)\b|\s*请)"
)
REFUSAL = re.compile("|".join(REFUSALS))
ERROR_LENGTH, REFUSAL_LENGTH = 160, 300  # characters of the whole answer: a longer one says something besides


def _alone(row: Conversation) -> Iterator[Finding]:
    slots = (PLACEHOLDER.search(CODE.sub(" ", message["content"])) for message in row.messages)
    if slot := next(filter(None, slots), None):
        yield _finding(row.where, "PLACEHOLDER", f"{_quote(slot[0])} is not filled in. Fill it in or remove the row")
    for message in row.messages:
        if message["role"] in ("assistant", "text") and message.get("train", True) and is_leftover(message["content"]):
            text = f"{_quote(message['content'])} is an error message or a refusal. Ask again or remove the row"
            yield _finding(row.where, "LEFTOVER", text)
            return


def is_leftover(answer: str) -> bool:
    """Whether an answer is short and begins as an error message or a refusal, or its last line is an error message."""
    text = re.sub(r"^\W+", "", LABEL.sub("", answer[:1000], count=1) if LABEL.match(answer) else answer[:1000])
    start = text.casefold().replace("’", "'")
    last = next((line for line in reversed(answer[-200:].casefold().splitlines()) if re.search(r"\w", line)), "")
    return bool(
        (len(answer) <= ERROR_LENGTH and ERROR.match(start))
        or (len(answer) <= REFUSAL_LENGTH and REFUSAL.match(start))
        or CUT.fullmatch(last.strip())
    )


# ---- the rows of a file ----------------------------------------------------------------------------------------------


def _mixed(rows: Sequence[Conversation]) -> Iterator[Finding]:
    """PREFIX and SCHEMA: one finding a file, at its first row that is not as most are."""
    files = defaultdict(list)
    for row in rows:
        files[row.where.rpartition(":")[0]].append(row)
    for same in files.values():
        asking = [(row.where, _labels(row, "user"), _labels(row, "assistant")) for row in same]
        choices = any(labels & set("bcd") for _, _, labels in asking)  # "A: Paris", "B: London"
        styles = [(where, _style(q, a - set("abcd") if choices else a)) for where, q, a in asking if q or a]
        yield from _minority(styles, "PREFIX", "Write all alike")
        yield from _minority([(row.where, row.shape) for row in same], "SCHEMA", "Write all in one shape")


def _labels(row: Conversation, role: str) -> set[str]:
    """How the turns of a role begin: "问", "answer", or "" where there is no prefix."""
    matches = (LABEL.match(message["content"]) for message in row.messages if message["role"] == role)
    return {match[1].casefold() if match else "" for match in matches}


def _style(questions: set[str], answers: set[str]) -> str:
    sides = (" or ".join(f"{label}:" if label else "none" for label in sorted(side)) for side in (questions, answers))
    return "prefix of questions {}, of answers {}".format(*(side or "none" for side in sides))


def _minority(kinds: list[tuple[str, str]], code: str, fix: str) -> Iterator[Finding]:
    counts = Counter(kind for _, kind in kinds)
    if len(counts) > 1:
        [(most, count)] = counts.most_common(1)
        where, other = next(pair for pair in kinds if pair[1] != most)
        yield _finding(where, code, one_line(f"{count} of {len(kinds)} rows: {most}; this one: {other}. {fix}"))


# ---- rows beside others ----------------------------------------------------------------------------------------------

SIGNS = "-*/%#&@\\·"  # punctuation to Unicode, but 12-3 is not 123 and C# is not C; + = < > are symbols anyway
POWER = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹]")  # 3² is not 32
NUMBER = re.compile(r"[0-9]+(?:˙[0-9]+)?")


@cache
def _dropped() -> tuple[dict[int, None], re.Pattern]:
    """What `normal` leaves out, as a table for str.translate, and as it stands between two digits."""
    chars = [chr(code) for code in range(sys.maxunicode + 1)]
    chars = [c for c in chars if unicodedata.category(c) in ("Cc", "Cf") or unicodedata.category(c)[0] in "PZ"]
    chars = [c for c in chars if c not in SIGNS]
    return {ord(c): None for c in chars}, re.compile(rf"(?<=[0-9])[{re.escape(''.join(chars))}]+(?=[0-9])")


def normal(text: str) -> str:
    """A text for comparison: NFKC, case folded, without white space and punctuation (SIGNS stay).

    Numbers stay apart (1, 12 and 11, 2 are different) and keep their decimal point. Nothing but punctuation is itself.
    """
    table, between = _dropped()
    folded = text if text.isascii() else unicodedata.normalize("NFKC", POWER.sub(r"^\g<0>", text))
    folded = between.sub(lambda gap: "˙" if gap[0] == "." else "|", folded.casefold())
    return folded.translate(table) or "".join(text.split())


class _Row(NamedTuple):
    where: str
    text: str  # normal turns, a line each
    system: bool  # the first of them is a system turn
    answers: frozenset[int]  # those that are answers to learn

    @classmethod
    def of(cls, row: Conversation) -> "_Row":
        turns = row.messages
        answers = (i for i, m in enumerate(turns) if m["role"] == "assistant" and m.get("train", True))
        lines = "\n".join(normal(message["content"]) for message in turns)
        return cls(row.where, lines, turns[0]["role"] == "system", frozenset(answers))

    def asked(self, loosely: bool = False) -> Iterator[tuple[bytes, str]]:
        """For every answer, a digest of all turns before it, and the answer; for a document, its digest and "".

        `loosely`: without a system turn, the numbers of a turn sorted.
        """
        turns, digest = self.text.split("\n"), blake2b(digest_size=16)
        for place, turn in enumerate(turns):
            if place in self.answers:
                yield digest.digest(), turn
            if not (loosely and place == 0 and self.system):
                turn = _numbers_sorted(turn) if loosely else turn
                digest.update(turn.encode("utf-8", "surrogatepass") + b"\n")
        if not self.answers:
            yield digest.digest(), ""

    def question(self) -> str:
        """The turns before the last answer, without a system turn; of a document all of it."""
        return "\n".join(self.text.split("\n")[self.system : max(self.answers, default=None)])


def _numbers_sorted(text: str) -> str:
    numbers = iter(sorted(NUMBER.findall(text), key=lambda number: (len(number), number)))
    return NUMBER.sub(lambda _: next(numbers), text)


def _repeats(rows: list[_Row]) -> Iterator[Finding]:
    """DUPLICATE and NEAR-DUPLICATE: every later row of a group once, beside its first row or one between them."""
    first: dict[str, _Row] = {}
    for row in rows:
        if (other := first.setdefault(row.text, row)) is not row:
            yield _finding(row.where, "DUPLICATE", f"same as {other.where}. Remove one of them")
    texts, rows = list(first), list(first.values())
    beside = defaultdict(list)
    for one, other in near_pairs(texts):
        beside[one].append(other)
        beside[other].append(one)
    reached = set()
    for start in sorted(beside):
        queue = [] if start in reached else [start]
        reached.add(start)
        for near in queue:
            for row in sorted(set(beside[near]) - reached):
                reached.add(row)
                queue.append(row)
                other = start if near == start or is_near(texts[start], texts[row]) else near
                text = f"nearly the same as {rows[other].where}. Keep one of them, or make them differ"
                yield _finding(rows[row].where, "NEAR-DUPLICATE", text)


def _conflicts(rows: list[_Row]) -> Iterator[Finding]:
    known: dict[bytes, tuple[str, str]] = {}
    for row in rows:
        for asked, answer in row.asked():
            where, other = known.setdefault(asked, (row.where, answer))
            if answer != other:
                text = f"its question is answered differently in {where}. Keep one answer, or ask differently"
                yield _finding(row.where, "CONFLICT", text)
                break


def _overlap(train: list[_Row], evaluation: list[_Row]) -> Iterator[Finding]:
    if not evaluation:
        return
    known = {key: row.where for row in reversed(train) for key, _ in row.asked(loosely=True)}
    texts = {text: row.where for row in reversed(train) for text in (row.text, row.question())}
    fix = "Remove it from one of them"
    left: dict[str, list[str]] = defaultdict(list)
    for row in evaluation:
        *_, (key, _) = row.asked(loosely=True)
        if key in known:
            yield _finding(
                row.where, "OVERLAP", f"the same question or text is in the training data at {known[key]}. {fix}"
            )
        else:
            for text in {row.question(), row.text}:
                left[text].append(row.where)
    both, found = [*texts, *left], set()
    for one, other in near_pairs(both, len(texts)):
        for where in left[both[other]]:
            if where not in found:
                found.add(where)
                text = f"nearly the same is in the training data at {texts[both[one]]}. {fix}"
                yield _finding(where, "OVERLAP", text)


# ---- near-duplicates -------------------------------------------------------------------------------------------------


def near_pairs(texts: Sequence[str], split: int = 0) -> Iterator[tuple[int, int]]:
    """Pairs (i, j), i < j, of near texts that join each group of them; with `split`, only pairs with i < split <= j."""
    places = [place for place, text in enumerate(texts) if len(text) >= GRAM]  # a shorter one has no 5-gram
    long = [texts[place] for place in places]
    group, vain = list(range(len(long))), Counter()

    def leader(member: int) -> int:
        while group[member] != member:
            group[member] = member = group[group[member]]
        return member

    for one, other in _candidates(long, bisect_left(places, split)):
        ours, theirs = leader(one), leader(other)
        if ours == theirs or vain[other] >= TRIES:
            continue
        if is_near(long[one], long[other]):
            group[max(ours, theirs)] = min(ours, theirs)
            yield places[one], places[other]
        else:
            vain[other] += 1


@lru_cache(maxsize=1024)
def _grams(text: str) -> set[str]:
    return {text[start : start + GRAM] for start in range(len(text) - GRAM + 1)}


def is_near(one: str, other: str) -> bool:
    """Whether the Jaccard similarity of their 5-grams is 0.9 or more, in whole numbers."""
    ours, theirs = _grams(one), _grams(other)
    if 10 * min(len(ours), len(theirs)) < 9 * max(len(ours), len(theirs)):
        return False
    shared = len(ours & theirs)
    return 10 * shared >= 9 * (len(ours) + len(theirs) - shared) > 0


def _candidates(texts: Sequence[str], split: int) -> Iterator[tuple[int, int]]:
    """Pairs that share a band and most of their hashes, the likeliest first."""
    if len(texts) < 2:
        return
    keys, hashes = _signatures(texts)
    pairs = [np.empty(0, np.int64)]
    for band in range(BANDS):
        order = np.lexsort([keys[:, (band + turn) % BANDS] for turn in (2, 1, 0)])  # in a band, by the next ones
        starts = np.flatnonzero(np.diff(keys[order, band], prepend=keys[order[0], band] ^ 1) != 0)
        sizes = np.diff(starts, append=len(order))
        start = np.repeat(starts, sizes)
        many = np.flatnonzero(np.repeat(sizes, sizes) > 1)
        ends = [(order[many], np.repeat(np.minimum.reduceat(order, starts), sizes)[many])]
        for step in range(1, NEAREST + 1):
            near = many[many - step >= start[many]]
            ends.append((order[near], order[near - step]))
        one, other = (np.concatenate(side) for side in zip(*ends, strict=True))
        one, other = np.minimum(one, other), np.maximum(one, other)
        keep = (one < split) & (split <= other) if split else one < other
        pairs.append(one[keep] * len(texts) + other[keep])
    both = np.sort(np.concatenate(pairs))
    both = both[np.diff(both, prepend=-1) > 0]
    likely = np.empty(len(both), np.float32)
    for at in range(0, len(both), CHUNK):
        one, other = np.divmod(both[at : at + CHUNK], len(texts))
        likely[at : at + CHUNK] = (hashes[one] == hashes[other]).mean(axis=1)
    both, likely = both[likely >= LIKELY], likely[likely >= LIKELY]
    for pair in both[np.argsort(-likely, kind="stable")]:
        yield divmod(int(pair), len(texts))


def _signatures(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """MinHash: a key for each band, uint64 (texts, BANDS), and the low byte of every hash, uint8 (texts, BANDS * ROWS).

    A 5-gram is a random 32-bit number x; hash i of a text is the least a_i x + c_i mod 2^32, a_i odd, over its 5-grams.
    """
    count = BANDS * ROWS
    keys, low = np.empty((len(texts), BANDS), np.uint64), np.empty((len(texts), count), np.uint8)
    factors, terms = (_mix(np.arange(1, 2 * count + 1, dtype=np.uint64)) >> 32).astype(np.uint32).reshape(2, count)
    factors |= np.uint32(1)
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    total, at = np.cumsum(lengths), 0
    while at < len(texts):
        end = max(at + 1, int(np.searchsorted(total, total[at] - lengths[at] + CHUNK)))
        codes = np.frombuffer("".join(texts[at:end]).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
        grams = np.zeros(len(codes) - GRAM + 1, np.uint64)
        for place in range(GRAM):
            grams = grams * PRIME + codes[place : place + len(grams)]
        ends = total[at:end] - total[at] + lengths[at]
        whole = np.ones(len(codes), bool)
        for place in range(1, GRAM):
            whole[ends - place] = False  # begins in one text and ends in the next
        grams = (_mix(grams) >> 32).astype(np.uint32)[whole[: len(grams)]]
        starts = ends - lengths[at:end] - (GRAM - 1) * np.arange(end - at)
        least, hashed = np.empty((count, end - at), np.uint32), np.empty_like(grams)
        for number in range(count):
            np.multiply(grams, factors[number], out=hashed)
            np.add(hashed, terms[number], out=hashed)
            np.minimum.reduceat(hashed, starts, out=least[number])
        low[at:end] = least.T.astype(np.uint8)
        key = np.zeros((BANDS, end - at), np.uint64)
        for row in least.reshape(BANDS, ROWS, -1).transpose(1, 0, 2):
            key = _mix(key * PRIME + row)
        keys[at:end] = key.T
        at = end
    return keys, low


PRIME = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): 64 bits that depend on all bits of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
