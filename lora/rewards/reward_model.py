"""A reward model: an adapter with a value head, on the base that is in memory already.

A conversation is the prompt's turns and the answer, with the chat template and the system turn of the reward model's own
training. The score is the value at the end of turn, as `Session.score` gives it.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lora import pretrained
from lora.adapter import sets, store, value_head
from lora.data.batch import micro_batches
from lora.errors import BadInput, say
from lora.inference import several
from lora.inference.session import load_chat
from lora.network.decoder import Model
from lora.rewards.spec import FORMS, Spec
from lora.text.chat import Chat, Example


class RewardModel:
    def __init__(self, spec: Spec, micro_tokens: int):
        self.name, self.weight, self.folder = spec.name, spec.weight, spec.target
        self.micro_tokens = micro_tokens
        self.chat: Chat | None = None

    def problems(self, base: pretrained.ModelFiles, verify: bool = True) -> Iterator[str]:
        """What is wrong with the folder, for a policy on this base; and learn to read its conversations."""
        folder = Path(self.folder)
        line = f"wrong --reward in {self.folder}:"
        if not folder.is_dir():
            yield f"{line} there is no such task, function or folder. Give {FORMS}"
        elif not (folder / store.CONFIG).exists() and (folder / "config.json").exists():
            why = "it is a whole model, and a reward model here is an adapter on the base of the policy"
            yield f"{line} {why}. Give the adapter that was merged into it"
        elif not value_head.has(folder):
            yield f"{line} it has no {value_head.FILE}, so it scores nothing. Give one made by --method reward"
        else:
            try:
                several.dry_load(pretrained.empty_model(base), self.folder, base, verify)
                say(f"reward   {self.name}: {self.folder}")
                self.chat = load_chat(base, self.folder, verify=verify)
            except BadInput as error:
                yield from error.problems

    def load(self, model: Model, base: pretrained.ModelFiles) -> None:
        """Read the adapter; its layers stand around the Linears of `model`, which is left as it was."""
        self.model, self.adapter = model, sets.read(model, self.folder, base.read)

    @torch.no_grad()
    def score(self, asked) -> list[float | None]:
        """Raises BadInput for a conversation that the model has no room for."""
        conversations = [[*one.messages, {"role": "assistant", "content": one.text}] for one in asked]
        examples = [self._example(found) for found in self.chat.tokenize_all(conversations, "last")]
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].tokens))
        values: list[float | None] = [None] * len(examples)
        with sets.in_place(self.model, self.adapter):
            found = [v for b in self._batches([examples[i] for i in order]) for v in self._values(b).tolist()]
        for i, value in zip(order, found, strict=True):
            values[i] = value
        return values

    def _example(self, found) -> Example:
        """A conversation up to its end of turn; what would follow that is trained, so that `Batch.trained` says where
        each conversation ends."""
        if isinstance(found, BadInput):
            raise found
        end = found[-1].answers[-1][1]
        limit = self.model.config.max_position_embeddings
        if end > limit:
            why = f"{end} tokens with its template, the model has room for {limit}"
            raise BadInput(f"too long in {self.folder}: a completion has {why}. Lower --max-new-tokens or --max-len")
        return Example([*found[-1].tokens[:end], 0], [False] * end + [True])

    def _batches(self, examples: list[Example]):
        return micro_batches(examples, self.micro_tokens, self.model.device)

    def _values(self, batch) -> Tensor:
        """The value at the end of every conversation, (R,)"""
        hidden = self.model.trunk(batch.tokens, batch.lengths)[batch.trained]  # (R, D)
        return value_head.of(self.model)(hidden)
