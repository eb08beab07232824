"""Which teacher answers: a model behind an endpoint (`endpoint.py`), or a local model. `asking.py` has what both do."""

import hashlib
import math
import os
from argparse import SUPPRESS
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from data_gen.asking import Teacher, mend
from data_gen.endpoint import Endpoint
from data_gen.journal import Question, Reply
from lora import files
from lora.errors import BadInput

# ---- flags -----------------------------------------------------------------------------------------------------------


def flag_of(name: str, names: dict[str, str]) -> str:
    """The flag of a setting: as `names` has it, or else from the setting's own name."""
    return names.get(name, "--" + name.replace("_", "-"))


def add_flags(parser, who: str = "the teacher", names: dict[str, str] = {}) -> None:  # noqa: B006 (only read)
    """The flags that describe a teacher; those of the settings in `names` are called so."""
    group = parser.add_argument_group(who)

    def add(name: str, **how) -> None:
        group.add_argument(flag_of(name, names), dest=name, **how)

    add("base_url", metavar="URL", default=SUPPRESS, help="an OpenAI-compatible endpoint, http://localhost:8000/v1")
    add("teacher", metavar="NAME", default=SUPPRESS, help="the endpoint's name of the model")
    add("key_env", metavar="VARIABLE", default="OPENAI_API_KEY", help="environment variable that holds the key")
    add("local", metavar="MODEL", default=SUPPRESS, help="instead: a model folder, hub id or .gguf file")
    add("local_adapter", metavar="DIR", default=SUPPRESS, help="an adapter for --local")
    add("concurrency", type=int, default=8, metavar="N", help="requests at once; the batch size of --local")
    add("deadline", type=float, default=120.0, metavar="SECONDS",
        help="seconds a request may take, from start to last byte")  # fmt: skip
    add("answer_tokens", type=int, default=1024, metavar="N", help=f"most tokens of an answer by {who}")
    add("temperature", type=float, default=SUPPRESS, metavar="T",
        help=f"of what {who} draws; without it the endpoint's, or 0 of --local")  # fmt: skip
    told = "stop asking after so many"  # the journal does not know what earlier runs spent without an answer
    add("max_requests", type=int, default=SUPPRESS, metavar="N",
        help=f"{told} requests in all, with those behind earlier answers")  # fmt: skip
    add("max_tokens", type=int, default=SUPPRESS, metavar="N",
        help=f"{told} tokens in all, likewise; bytes where the endpoint does not tell")  # fmt: skip


def from_flags(args, names: dict[str, str] = {}, local_kind: type["Local"] | None = None) -> Teacher:  # noqa: B006
    """The teacher that the flags describe. Raises BadInput with everything that is wrong."""
    given, problems = vars(args), []

    def wrong(flag: str, why: str, fix: str) -> None:
        problems.append(f"wrong {flag} in the command line: {why}. {fix}")

    for name, low, high in (("concurrency", 1, 1024), ("deadline", 0, 86400), ("answer_tokens", 1, 2**31),
                            ("temperature", 0, 100), ("max_requests", 1, 2**62), ("max_tokens", 1, 2**62)):  # fmt: skip
        value = given.get(name)
        if value is not None and not (low <= value <= high and math.isfinite(value) and (value or name != "deadline")):
            wrong(flag_of(name, names), f"{value} is out of range", f"Give {low or 'more than 0'} to {high}"
                  if name == "deadline" else f"Give {low} to {high}")  # fmt: skip
    remote, local = "base_url" in given, "local" in given
    if remote == local:
        why = "both --base-url and --local" if remote else "neither --base-url nor --local"
        problems.append(f"wrong arguments in the command line: {why}. Give one of them")
    if remote:
        problems += _wrong_url(given["base_url"])
        if not given.get("teacher", "").strip():
            why = "--base-url needs the name of a model"
            problems.append(f"missing {flag_of('teacher', names)} in the command line: {why}. Add it")
    if local and "teacher" in given:
        wrong(flag_of("teacher", names), "it is the model of --base-url", "Leave it out")
    if "local_adapter" in given and not local:
        wrong("--local-adapter", "it belongs to --local", "Leave it out")
    key = os.environ.get(args.key_env, "").strip()
    if remote and not (key.isascii() and key.isprintable()):
        problems.append(f"wrong key in ${args.key_env}: it has characters that no key has. Set it again")
    if problems:
        raise BadInput(*problems)
    if local:
        return (local_kind or Local)(args)
    return Endpoint(args, key)


def _wrong_url(url: str) -> list[str]:
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True) and url.isprintable()
    except ValueError:
        fine = False
    if not fine:
        return ["wrong --base-url in the command line: no URL. Give one such as http://localhost:8000/v1"]
    if parts.username or parts.password or parts.query:
        why = "it holds a user name, a password or a query"
        return [f"wrong --base-url in the command line: {why}. Give the key by --key-env"]
    if parts.path.rstrip("/").endswith("/chat/completions"):
        return ["wrong --base-url in the command line: it ends in /chat/completions. Leave that out"]
    return []


# ---- a local model ---------------------------------------------------------------------------------------------------


class Local(Teacher):
    """A model of ours, a batch at a time. What is drawn for a question depends on the seed and the question's place."""

    def __init__(self, args):
        super().__init__(args)
        from lora import pretrained
        from lora.adapter import passport, store

        self._seed, self._adapter = getattr(args, "seed", 0), getattr(args, "local_adapter", None)
        self._checkpoint = pretrained.find(args.local, passport.packing(None, self._adapter))
        self.about = {"local": self._checkpoint.name, **self.about}
        if self.temperature:
            self.about["drawing"] = self._seed
        if self._adapter:
            store.read_config(self._adapter)
            weights = files.read_bytes(Path(self._adapter) / store.WEIGHTS, 2**40)
            self.about["adapter"] = hashlib.sha256(weights).hexdigest()[:16]

    def _load(self):
        from lora import device as machine
        from lora import pretrained
        from lora.adapter import passport, store
        from lora.adapter.inject import lora_layers
        from lora.adapter.merge import merge_and_unload
        from lora.inference.session import load_chat

        device = machine.choose_device("auto")
        model = pretrained.load_model(self._checkpoint, machine.choose_dtype("auto", device)[0], device)
        if not self._adapter:
            return model, pretrained.load_chat(self._checkpoint)
        store.load(model, self._adapter)
        base = self._checkpoint
        passport.verify(self._adapter, base, lora_layers(model))
        merge_and_unload(model)
        return model, load_chat(base, self._adapter)  # as it was trained

    def _changes(self, waiting: Iterator[tuple[int, Question]]) -> Iterator[None]:
        model, batch = None, []
        for place, question in waiting:
            if not self._may_ask():
                break
            if model is None:
                model, chat = self._load()
                most = model.config.max_position_embeddings
            ids = chat.prompt(question.messages)
            if len(ids) >= most:
                words = f"a prompt of {len(ids)} tokens, the model has room for {most}"
                self._lose(question, "prompt too long", words)
                yield
                continue
            self.requests += 1
            if batch and (len(batch) == self.concurrency or place != batch[-1][0] + 1):
                self._generate(model, chat, batch)
                batch = []
                yield
            batch.append((place, question, ids))
        if batch:
            self._generate(model, chat, batch)
            yield

    def _generate(self, model, chat, batch: list[tuple[int, Question, list[int]]]) -> None:
        """Answers to questions in neighbouring places: row i is drawn with the seed + its place."""
        from lora.inference.generate import Sampling, generate

        how = Sampling(self.temperature or 0.0, seed=self._seed + batch[0][0])
        answers = generate(model, [ids for _, _, ids in batch], chat.stops, self.answer_tokens, how)
        for (_, question, ids), answer in zip(batch, answers, strict=True):
            whole = len(answer) < self.answer_tokens and len(ids) + len(answer) < model.config.max_position_embeddings
            text = mend(chat.tokenizer.decode(answer))
            reply = Reply(question.key, text, "stop" if whole else "length", len(ids) + len(answer))
            self._keep(question, reply, 1)
