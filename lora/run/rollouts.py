"""What reinforcement learns from: answers that the model itself gives to the prompts of a step, and their rewards.

A step's prompts are shared out to the ranks; each samples a group of answers to its own, with the adapter merged, and
has them rewarded. What the method needs besides is measured without gradients: log-probabilities of the model of step
0, and values. The result is laid out as any other batch: prompt and answer are a document, the answer is trained.
"""

import math
from collections.abc import Iterator, Sequence

import torch

from lora import device as machine
from lora.data.batch import Batch, Linked, micro_batches
from lora.data.encode import Encoded
from lora.errors import StopFlag
from lora.inference import unpacked
from lora.inference.generate import generate
from lora.inference.rollout import Completion, draws, sample_groups
from lora.methods import compares, has_value_head, policy
from lora.rewards import Asked
from lora.run.plan import Plan
from lora.run.settings import TrainSettings
from lora.text.chat import Example
from lora.train.distributed import DistContext
from lora.train.evaluate import evaluating, means
from lora.train.stopping import WITHOUT_SIGNAL

MERGED = "sampled_merged"
CACHED = 16  # times --micro-tokens positions in a cache: keys and values are far smaller than activations


class Interrupted(Exception):
    """A signal came during an evaluation, or while answers were sampled."""


class Rollouts:
    """Prompts -> rewarded micro-batches, and what they are like."""

    def __init__(
        self,
        model,
        plan: Plan,
        args: TrainSettings,
        processes: DistContext,
        carried: dict[str, float],
        stop: StopFlag,
    ):
        self.model, self.plan, self.args, self.processes = model, plan, args, processes
        self.carried, self.stop = carried, stop
        self.sums, self.samples = {}, []
        self.dense = self._fits(machine.free_memory(processes.device))
        plan.rewards.load(model)

    def _fits(self, free: int | None) -> bool:
        """Are answers sampled with the adapter merged? A resumed run does as it did before, as it rounds otherwise."""
        if unpacked.dense_bytes(self.model):
            self.carried.setdefault(MERGED, int(unpacked.fits(self.model, free)))
        if not (dense := bool(self.carried.get(MERGED, True))):
            unpacked.say_packed(self.model)
        return dense

    def micro_batches(self, indices: Sequence[int], step: int) -> list[Batch]:
        """This process's part of a step, laid out as `Plan.micro_batches` does. Raises Interrupted where a signal came
        while answers were sampled."""
        args, processes = self.args, self.processes
        places = range(processes.rank, len(indices), processes.size)
        rows = [self.plan.examples[indices[place]].tokens for place in places]
        with evaluating(self.model):
            groups = self._sample(rows, places, step)
        items = self._rewarded([indices[place] for place in places], places, rows, groups)
        batches = micro_batches(items, args.micro_tokens, processes.device)
        with evaluating(self.model), torch.no_grad():
            self._measure(batches)
        return batches

    def _sample(self, prompts: Sequence[list[int]], places: Sequence[int], step: int) -> list[list[Completion]]:
        """A group of answers to each prompt, as many prompts at a time as the cache has room for."""
        args, found = self.args, []
        with unpacked.merged_if(self.dense, self.model):
            for some in self._parts(prompts, args.group):
                numbers = [
                    torch.stack([draws(args.seed, step, place, k, args.max_new_tokens) for k in range(args.group)])
                    for place in places[len(found) : len(found) + len(some)]
                ]
                how = self.plan.chat.stops, args.temperature, self._raise_if_stopped
                found += sample_groups(self.model, some, torch.stack(numbers), *how)
        return found

    def _parts(self, prompts: Sequence[list[int]], group: int) -> Iterator[Sequence[list[int]]]:
        room = max(map(len, prompts), default=0) + self.args.max_new_tokens
        at_once = max(1, CACHED * self.args.micro_tokens // (room * group))
        yield from (prompts[start : start + at_once] for start in range(0, len(prompts), at_once))

    def _raise_if_stopped(self) -> None:
        if self.stop.code and self.processes.size == 1:
            raise Interrupted

    def _rewarded(
        self,
        indices: Sequence[int],
        places: Sequence[int],
        prompts: Sequence[list[int]],
        groups: Sequence[list[Completion]],
    ) -> list[Linked]:
        """The answers to some prompts, each as a document that is trained."""
        flat = [(*its, one) for *its, group in zip(indices, places, prompts, groups, strict=True) for one in group]
        asked = [self._asked(self.plan.examples, i, one) for i, _, _, one in flat]
        parts = self.plan.rewards.score(asked)
        totals = self.plan.rewards.total(parts)
        items = []
        for (_, place, prompt, one), total in zip(flat, totals, strict=True):
            tokens, trained = [*prompt, *one.tokens], [False] * len(prompt) + [True] * len(one.tokens)
            known = {"reward": (total,), "group": (float(place),), "ended": (float(one.ended),)}
            items.append(Linked((Example(tokens, trained),), known, {"sampled": one.log_probs}))
        self.sums = self._figures([one for *_, one in flat], parts, totals, self.args.group)
        self.samples = self._shown(asked, parts, totals)
        return items

    def _asked(self, examples: Encoded, i: int, answer: Completion) -> Asked:
        row = examples.prompts[i]
        return Asked(row.row, row.messages, self.plan.chat.tokenizer.decode(answer.text), len(answer.tokens))

    def _figures(
        self, answers: Sequence[Completion], parts: dict, totals: Sequence[float], group: int
    ) -> dict[str, tuple]:
        """(sum, count) of what the answers are like."""
        found = {"reward": _mean(totals)}
        found |= {f"reward_{name}": _mean([math.nan if r is None else r for r in its]) for name, its in parts.items()}
        if group > 1:
            groups = [scored(totals[start : start + group]) for start in range(0, len(totals), group)]
            found["no_signal"] = sum(len(set(its)) < 2 for its in groups), len(groups)
        entropies = [entropy for one in answers for entropy in one.entropies]
        found["entropy"] = sum(entropies), len(entropies)
        found["length"] = sum(len(one.tokens) for one in answers), len(answers)
        found["ended"] = sum(one.ended for one in answers), len(answers)
        return found

    def _shown(self, asked: Sequence[Asked], parts: dict, totals: Sequence[float]) -> list[dict]:
        """The best and the worst answer of the first group."""
        members = [i for i in range(min(len(asked), self.args.group)) if not math.isnan(totals[i])]
        first = sorted(members, key=lambda i: -totals[i])
        return [
            {"prompt": asked[i].messages[-1]["content"], "answer": asked[i].text, "reward": totals[i]}
            | {f"reward_{name}": rewards[i] for name, rewards in parts.items()}
            for i in dict.fromkeys((*first[:1], *first[-1:]))
        ]

    def figures(self) -> dict[str, float]:
        """Means over all ranks' answers of the last step; of what did not occur there is none."""
        found = means(self.sums, self.processes.all_reduce)
        if "no_signal" in found and not has_value_head(self.args.method):  # which tells equal rewards apart
            before = self.carried.get(WITHOUT_SIGNAL, 0)
            self.carried[WITHOUT_SIGNAL] = before + 1 if found["no_signal"] == 1 else 0
        return {**found, "samples": self.samples}

    def _measure(self, batches: Sequence[Batch]) -> None:
        """Write into the batches what a method needs to know before the first gradient."""
        for batch in batches if has_value_head(self.args.method) else ():
            hidden = policy.hidden(self.model, batch)
            batch.per_token["values"] = self.model.v_head(hidden)
            batch.per_token["old"] = policy.log_probs(self.model, hidden, batch, self.args)
        if compares(self.plan.method, self.args):
            with self.plan.reference():
                for batch in batches:
                    hidden = policy.hidden(self.model, batch)
                    batch.per_token["reference"] = policy.log_probs(self.model, hidden, batch, self.args)

    def evaluate(self) -> dict[str, float]:
        """What the likeliest answers to held-out prompts are like; `loss` is their reward, negative, if any has one."""
        held_out, processes = self.plan.sources.held_out, self.processes
        mine = range(processes.rank, len(held_out), processes.size)
        answers = self._likeliest([held_out[i].tokens for i in mine])
        parts = self.plan.rewards.score([self._asked(held_out, i, one) for i, one in zip(mine, answers, strict=True)])
        sums = self._figures(answers, parts, self.plan.rewards.total(parts), 1)
        found = means(sums, processes.all_reduce)
        return {"loss": -found["reward"], **found} if "reward" in found else found

    def _likeliest(self, prompts: Sequence[list[int]]) -> list[Completion]:
        """The greedy answer to each prompt."""
        chat, most, found = self.plan.chat, self.args.max_new_tokens, []
        with unpacked.merged_if(self.dense, self.model):
            for some in self._parts(prompts, 1):
                answers = generate(self.model, some, chat.stops, most, on_token=lambda *_: self._raise_if_stopped())
                for ids in answers:  # prompts leave room for the most tokens
                    ended = len(ids) < most
                    found.append(Completion([*ids, chat.end_of_turn] if ended else ids, ended=ended))
        return found


def scored(rewards: Sequence[float]) -> list[float]:
    """Those that are not NaN."""
    return [reward for reward in rewards if not math.isnan(reward)]


def _mean(rewards: Sequence[float]) -> tuple[float, int]:
    its = scored(rewards)
    return sum(its), len(its)
