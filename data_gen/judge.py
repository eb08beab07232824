"""Preference pairs from a judge, who compares two answers to a prompt twice, with the sides swapped.

Only two verdicts that agree make a pair. The judge is a model behind an endpoint, which is asked for a letter, A or B;
a local model, whose verdict is the letter that it finds likelier as the next token, so that no text of it is read; or
a function of yours. Both answers come from a file (`candidates.py`) or are sampled from a model of ours.

python data_gen/judge.py --data weights/answers.jsonl --local smollm2-135m-instruct --out weights/pairs.jsonl
python data_gen/judge.py --data weights/answers.jsonl --base-url http://localhost:8000/v1 --judge-model NAME --out ...
python data_gen/judge.py --prompts questions.txt --adapter weights/heron --rule rules.py:shorter --out ...
"""

import importlib.util
import json
import sys
from argparse import SUPPRESS
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

if not __package__:  # run as a script: Python looks beside this file, and `lora` lies one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if __name__ == "__main__":
    from lora.errors import before_imports

    before_imports(__name__)

from data_gen import candidates, teacher
from data_gen.candidates import Pair
from data_gen.journal import SUFFIX, Question, Reply, beside
from data_gen.verdicts import (
    ALIKE,
    CRITERION,
    FAILED,
    FRAMES,
    LABELS,
    TURNS,
    Verdicts,
    measure,
    question,
    sides,
    tell,
    verdict_of,
    winner,
)
from lora import errors, files
from lora.errors import BadEnvironment, BadInput

TRIES = 3  # of a comparison whose reply names no side
JUDGE_FLAGS = {"teacher": "--judge-model", "answer_tokens": "--judge-tokens", "temperature": "--judge-temperature"}


# ---- asking ----------------------------------------------------------------------------------------------------------


class Questions(Sequence):
    """The comparisons of some (pair, turn) as questions, made as they are looked at; `attempt` is part of the key."""

    def __init__(self, asked: list[tuple[Pair, int]], attempt: int, seed: int, criterion: str, lang: str):
        self._asked, self._attempt, self._how = asked, attempt, (seed, criterion, lang)

    def __len__(self) -> int:
        return len(self._asked)

    def __getitem__(self, place: int) -> Question:
        pair, turn = self._asked[place]
        text = question(pair, turn, *self._how)
        return Question(f"{pair.key}.{turn}.{self._attempt}", [{"role": "user", "content": text}])


class Asking(NamedTuple):
    """How the comparisons are asked, and the journal that keeps every reply, so that a second run asks none again."""

    journal: Path
    seed: int
    criterion: str
    lang: str

    def replies(self, master: teacher.Teacher, asked: list[tuple[Pair, int]], attempt: int = 1):
        """((key of the pair, turn), reply) of each comparison that was asked."""
        how = {"seed": self.seed, "criterion": self.criterion, "lang": self.lang}
        for reply in master.ask(Questions(asked, attempt, **how), self.journal, how):
            key, turn, _ = reply.key.split(".")
            yield (key, int(turn)), reply


def ask(master: teacher.Teacher, pairs: list[Pair], asking: Asking) -> Verdicts:
    """Two verdicts on each pair. A comparison is asked up to TRIES times, until its reply names a side."""
    waiting, found = [(pair, turn) for pair in pairs for turn in TURNS], {}
    for attempt in range(1, TRIES + 1):
        found |= {place: verdict_of(reply) for place, reply in asking.replies(master, waiting, attempt)}
        waiting = [(pair, turn) for pair, turn in waiting if found.get((pair.key, turn), "") is None]
    return found


def ask_calibrated(master: "LocalJudge", pairs: list[Pair], asking: Asking) -> Verdicts:
    """Two verdicts of a local model on each pair, without its liking for a side: that shows where both sides are the
    same answer, and is subtracted. As Zhao et al. 2021, https://arxiv.org/abs/2102.09690, do with empty inputs."""
    asked = [(pair, turn) for pair in pairs for turn in (*TURNS, *ALIKE)]
    odds = {place: odds_in(reply) for place, reply in asking.replies(master, asked)}
    found = {}
    for pair, turn in asked:
        needed = [odds.get((pair.key, t), "not asked") for t in (turn, *ALIKE)]
        if turn in TURNS and "not asked" not in needed:
            found[pair.key, turn] = FAILED if None in needed else label_of(needed[0] - sum(needed[1:]) / 2)
    return found


class LocalJudge(teacher.Local):
    """A model of ours. Its verdict is the label that it finds likelier where its answer begins."""

    def _generate(self, model, chat, batch) -> None:
        import torch

        from lora.device import few_rows

        a, b = (chat.tokenizer.encode(label) for label in LABELS)
        # some tokenizers begin every text with a token of its own
        same = next(place for place, tokens in enumerate(zip(a, b, strict=False)) if len({*tokens}) > 1)
        head = model.head_weight  # (V, D)
        for _, asked, ids in batch:  # one at a time: the same verdict whatever is asked beside it
            ids = torch.tensor([*ids, *a[:same]], device=model.device)  # (T,)
            with torch.inference_mode(), few_rows(len(ids), model.device):
                last = model.trunk(ids)[-1].float()  # (D,)
                # log p(A) - log p(B) is the difference of the logits, here in float32: in bfloat16 many are equal
                odds = float(last @ (head[a[same]].float() - head[b[same]].float()))
            text = json.dumps({"better": label_of(odds), "odds": odds})
            self._keep(asked, Reply(asked.key, text, "stop", len(ids)), 1)


def label_of(odds: float) -> str | None:
    return LABELS[0] if odds > 0 else LABELS[1] if odds < 0 else None


def odds_in(reply: Reply) -> float | None:
    """log p(A) - log p(B) as LocalJudge replied it; None where it could not."""
    return None if reply.finish == FAILED else json.loads(reply.text)["odds"]


# ---- a rule ----------------------------------------------------------------------------------------------------------

Rule = Callable[[str | list[dict], str, str], str | None]


def load_rule(named: str) -> Rule:
    """The function of FILE.py:NAME. Raises BadInput where there is none."""
    file, _, name = named.rpartition(":")
    if not file.endswith(".py") or not files.is_regular(Path(file)):
        raise BadInput(f"wrong --rule in {named}: there is no such Python file. Give FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location("the_rule", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise BadInput(f"wrong --rule in {file}: {type(error).__name__}: {error}. Repair it") from None
    rule = getattr(module, name, None)
    if not callable(rule):
        raise BadInput(f"wrong --rule in {file}: it has no function {name}. Check the spelling")
    return rule


def ask_rule(rule: Rule, pairs: list[Pair], seed: int) -> Verdicts:
    """Two verdicts of rule(prompt, a, b) on each pair: "a" names the answer that is given first; None names neither."""
    found = {}
    for pair in pairs:
        for turn in TURNS:
            try:
                said = rule(pair.prompt, *sides(pair, turn, seed))
            except Exception as error:
                why = f"{type(error).__name__}: {error}"[:200]
                raise BadInput(f"wrong --rule in the command line: it raises {why}. Repair it") from error
            if said not in ("a", "b", None):
                raise BadInput(f"wrong --rule in the command line: it gave {said!r:.80}. Let it give 'a', 'b' or None")
            found[pair.key, turn] = said and said.upper()
    return found


# ---- the command -----------------------------------------------------------------------------------------------------


# settings of the model that answers --prompts -> flag, what it takes, and what --help says
SAMPLING = {
    "prompt_key": ("--prompt-key", "KEY", "key of the prompt in rows of --prompts of another shape"),
    "model": ("--model", "MODEL", "that model: a folder, hub id or .gguf file; else the adapter's base or the default"),
    "adapter": ("--adapter", "DIR", "an adapter for it"),
    "drawn_at": ("--temperature", "T", "of its answers; else 1"),
    "longest": ("--answer-tokens", "N", "most tokens of its answers; else 256. Pairs with longer ones are left out"),
}


def parse(argv):
    parser = errors.Parser(prog="data_gen/judge.py", description=__doc__)
    add = parser.add_argument_group("what is compared").add_argument
    shapes = "rows with a prompt and a, b; or answers: [...]; or chosen, rejected, whose order is compared, too"
    add("--data", type=Path, default=SUPPRESS, metavar="FILE", help=shapes)
    told = "instead: prompts, one a line or in rows; a model of ours answers each of them twice"
    add("--prompts", default=SUPPRESS, metavar="FILE", help=told)
    for name, (flag, takes, told) in SAMPLING.items():
        add(flag, dest=name, type={"T": float, "N": int}.get(takes, str), default=SUPPRESS, metavar=takes, help=told)
    teacher.add_flags(parser, "the judge", JUDGE_FLAGS)
    add = parser.add_argument_group("how it judges").add_argument
    told = "instead of a model: function(prompt, a, b) that gives 'a', 'b' or None"
    add("--rule", default=SUPPRESS, metavar="FILE.py:FUNCTION", help=told)
    told = f"what the better answer is, as 'which is more honest'; else '{CRITERION['en']}'"
    add("--criterion", default=SUPPRESS, metavar="WORDS", help=told)
    told = "of --local: subtract its liking for a side, which shows where both sides are the same answer"
    add("--calibrate", action="store_true", help=told)
    add("--lang", choices=tuple(FRAMES), default="en", help="language of the question to the judge")
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of the sampled answers, and of which side is shown first")
    told = "the JSONL file; replaced if there. The figures are in OUT.report.json, replies so far in OUT.journal"
    add("--out", type=Path, required=True, default=SUPPRESS, help=told)
    return parser.parse_args(argv)


def check(args) -> None:
    """Raises BadInput with the flags that are wrong together, before anything is read."""
    given, problems = vars(args), []

    def wrong(flag: str, why: str, fix: str = "Leave it out") -> None:
        problems.append(f"wrong {flag} in the command line: {why}. {fix}")

    if ("data" in args) == ("prompts" in args):
        why = "both --data and --prompts" if "data" in args else "neither --data nor --prompts"
        wrong("arguments", why, "Give one of them")
    if not {"base_url", "local", "rule"} & given.keys():
        wrong("arguments", "there is no judge", "Give --base-url, --local or --rule")
    for name, (flag, *_) in SAMPLING.items():
        if name in args and "data" in args:
            wrong(flag, "it is for answers to --prompts")
    for name, low, high in (("drawn_at", 1e-6, 100), ("longest", 1, 2**31)):
        if name in args and not low <= given[name] <= high:
            wrong(SAMPLING[name][0], f"{given[name]} is out of range", f"Give {low} to {high}")
    for name in ("base_url", "local", "local_adapter", "teacher", "temperature", "criterion"):
        if name in args and "rule" in args:
            wrong(teacher.flag_of(name, JUDGE_FLAGS), "a rule is the judge")
    if "temperature" in args and "local" in args:
        wrong(JUDGE_FLAGS["temperature"], "a local judge draws nothing")
    if args.calibrate and "local" not in args:
        wrong("--calibrate", "it is for the log-probabilities of --local")
    if "criterion" in args and not args.criterion.strip():
        wrong("--criterion", "it is empty", "Give words, or leave it out")
    read = [Path(given[name]) for name in ("data", "prompts") if name in args]
    read += [Path(args.rule.rpartition(":")[0])] if "rule" in args else []
    problems += files.unwritable("--out", args.out, *read) or files.unwritable("--out", report_of(args.out), *read)
    if problems:
        raise BadInput(*problems)


def report_of(out: Path) -> Path:
    return out.with_name(out.name + ".report.json")


def compared(args, left_out: Counter) -> list[Pair]:
    """The pairs of --data, or sampled answers to --prompts."""
    if "data" in args:
        return candidates.different(candidates.read(args.data), left_out)
    from lora.adapter import passport
    from lora.inference import prompts
    from lora.pretrained import default_model

    given = vars(args)
    asked, adapter = prompts.read(args.prompts, given.get("prompt_key")), given.get("adapter")
    name = given.get("model") or (passport.base_of(adapter) if adapter else default_model.NAME)
    how = (given.get("drawn_at", 1.0), given.get("longest", 256), args.concurrency, args.seed)
    model = candidates.model_of_ours(name, adapter, *how)
    journal = args.out.with_name(args.out.name + ".answers" + SUFFIX)
    return candidates.different(candidates.sample(model, asked, journal, left_out), left_out)


def run(argv) -> None:
    args, left_out = parse(argv), Counter(dict.fromkeys(candidates.LEFT_OUT, 0))
    check(args)
    rule = load_rule(args.rule) if "rule" in args else None
    master = None if rule else teacher.from_flags(args, JUDGE_FLAGS, LocalJudge)
    asking = Asking(beside(args.out), args.seed, vars(args).get("criterion", CRITERION[args.lang]), args.lang)
    try:
        pairs = compared(args, left_out)
        if rule:
            verdicts = ask_rule(rule, pairs, args.seed)
        else:
            verdicts = (ask_calibrated if args.calibrate else ask)(master, pairs, asking)
    except errors.Stopped as stop:
        if master:
            stop.note = f"\nstopped; the same command goes on with the answers in {asking.journal}"
        raise
    report = measure(pairs, verdicts, args.seed) | {"left_out": dict(left_out)}
    judge = {"rule": args.rule} if rule else master.about | {"criterion": asking.criterion, "lang": args.lang}
    judge |= {"calibrated": True} if args.calibrate else {}
    files.write_json(report_of(args.out), report | {"judge": judge, "seed": args.seed})
    if report["agreed"]:
        winners = [winner(pair, verdicts, args.seed) for pair in pairs]
        files.write_rows(args.out, [pair.row(won) for pair, won in zip(pairs, winners, strict=True) if won])
    errors.say(tell(report, args.out))
    if master:
        errors.say(master.account())
        if report["not_asked"]:
            fix = "The same command with more room goes on" if "--max" in master.stopped else "The same command goes on"
            errors.say(f"{report['not_asked']:,} comparisons were not asked: {master.stopped}. {fix}")
    if not report["agreed"]:
        stopped = (master.stopped, master.problem) if master else ()
        why = "; ".join(filter(None, stopped)) or "no two verdicts agree" if pairs else "no two answers differ"
        fix = f"{report_of(args.out)} has the figures; give another judge and --out, or other answers"
        raise BadEnvironment(f"no pairs in {args.out}: {why}. {fix}")


def main(argv=None) -> int:
    return errors.run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
