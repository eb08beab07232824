"""A reward model: an adapter with a value head, on the base that is in memory already.

A conversation is the prompt's turns and the answer, with the chat template and the system turn of the reward model's
own training. The score is the value at the end of turn, as `Session.score` gives it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from lora.adapter import passport, sets, store, value_head
from lora.data.batch import micro_batches
from lora.errors import BadInput, say
from lora.inference import several
from lora.inference.session import load_chat
from lora.methods import reward
from lora.network.decoder import Model
from lora.pretrained import ModelFiles
from lora.rewards.part import Asked, Part, Row
from lora.rewards.spec import FORMS, Spec
from lora.text.chat import Chat, Example


class RewardModel(Part):
    def __init__(self, spec: Spec, args, base: ModelFiles, empty: Model):
        super().__init__(spec)
        self.folder, self.args, self.base, self.empty = spec.target, args, base, empty
        self.chat: Chat | None = None

    def problems(self, rows: Sequence[Row]) -> Iterator[str]:
        """What is wrong with the folder; and learn to write conversations as it reads them."""
        folder, line, verify = Path(self.folder), f"wrong --reward in {self.folder}:", not self.args.no_verify
        if not folder.is_dir():
            yield f"{line} there is no such task, function or folder. Give {FORMS}"
        elif not (folder / store.CONFIG).exists() and (folder / "config.json").exists():
            why = "it is a whole model, and a reward model here is an adapter on the base of the policy"
            yield f"{line} {why}. Give the adapter that was merged into it"
        elif not value_head.has(folder):
            yield f"{line} it has no {value_head.FILE}, so it scores nothing. Give one made by --method reward"
        elif passport.of_policy(folder):
            why = "it was trained by ppo, so its value head foresees rewards and scores nothing"
            yield f"{line} {why}. Give one made by --method reward"
        elif self.args.full:
            yield f"{line} it is an adapter on the base, which --full changes. Leave out one of them"
        else:
            say(f"reward   {self.name}: {self.folder}")
            several.dry_load(self.empty, self.folder, self.base, verify)
            self.chat = load_chat(self.base, self.folder, verify=verify)

    def load(self, model: Model) -> None:
        """Read the adapter: its layers stand around the Linears of `model`, which is left as it was."""
        self.model, self.adapter = model, sets.read(model, self.folder, self.base.read)

    @torch.no_grad()
    def score(self, asked: Sequence[Asked]) -> list[float | None]:
        """Raises BadInput for a conversation that the model has no room for."""
        examples = [self._example(ids) for ids in self._conversations(asked)]
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
        batches = micro_batches([examples[i] for i in order], self.args.micro_tokens, self.model.device)
        with sets.in_place(self.model, self.adapter):
            found = [value for batch in batches for value in reward.scores(self.model, batch).tolist()]
        return [value for _, value in sorted(zip(order, found, strict=True))]

    def _conversations(self, asked: Sequence[Asked]) -> Iterator[list[int]]:
        """The ids of every conversation, up to its end of turn. Templates are not asked to write an empty answer: a
        training never has one, but a model may give it."""
        conversations = [[*one.messages, {"role": "assistant", "content": one.text}] for one in asked]
        for one, found in zip(asked, self.chat.tokenize_all(conversations, "last"), strict=True):
            if not self.chat.tokenizer.control_pattern.sub("", one.text).strip():
                yield [*self.chat.prompt(one.messages), self.chat.end_of_turn]
            elif isinstance(found, BadInput):
                raise found
            else:
                yield found[-1].tokens[: found[-1].answers[-1][1]]

    def _example(self, ids: list[int]) -> Example:
        """Trained is the end of turn, where `reward.scores` reads; one token follows, which a batch leaves out."""
        limit = self.model.config.max_position_embeddings
        if len(ids) > limit:
            why = f"{len(ids)} tokens with its template, the model has room for {limit}"
            raise BadInput(f"too long in {self.folder}: a completion has {why}. Lower --max-new-tokens or --max-len")
        return Example([*ids, 0], [False] * (len(ids) - 1) + [True, False])
