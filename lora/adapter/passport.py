"""Which base an adapter belongs to, and how it came about: `passport.json`, beside the adapter, compared on loading.

base.name             what --model was
base.structure        sha256 over the names, shapes and dtypes of all its tensors
base.patched          sha256 over the bytes of the tensors the adapter changes, before --quant
base.quant            how --quant packed them: nf4, int8, keep; not there without it
chat.system           the system turn of rows without one: a text, null as the template decides, false for none
chat.date             what templates that ask were told
chat.template_args    what the template's switches were set to; not there without any
chat.control_tokens   true where documents were read with the control tokens that they spell; else not there
tokenizer.file        sha256 of tokenizer.json
tokenizer.vocabulary  sha256 over what each id stands for
template              sha256 of the chat template, which lies beside it as `chat_template.jinja`
data                  sha256 over all examples, in order, and how sources are mixed
settings              sha256 over the settings that decide what is learned, and the number of steps planned
step                  how many steps it has learned
method                ppo, whose value head foresees rewards and scores nothing; not there for others
Adapters that are older have none of the last six, and those made elsewhere no passport: nothing is compared then.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from lora import files
from lora.adapter import store, value_head
from lora.adapter.inject import disabled
from lora.adapter.layer import LoRALinear
from lora.errors import BadInput, say

FORMAT, TEMPLATE = 1, "chat_template.jinja"
QUANT = ("nf4", "int8", "keep")
TOKENIZERS_TEMPLATE = ("chat_template.json", "tokenizer_config.json")  # what PEFT's users have in its place
ADAPTER = (TEMPLATE, store.CONFIG, store.PASSPORT, value_head.FILE, store.WEIGHTS)  # the weights last: then it is whole
UNUSED = re.compile(r"\[PAD\d+\]")  # ids without a token, as llama.cpp's converter names them


def structure(header: dict[str, tuple[str, tuple[int, ...]]]) -> str:
    lines = (f"{name} {dtype} {list(shape)}\n" for name, (dtype, shape) in sorted(header.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def contents(read: Callable[[str], torch.Tensor], names: Iterable[str]) -> str:
    """sha256 over the named tensors as they are stored, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode() + b"\0")
        digest.update(read(name).contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(header: dict, read: Callable[[str], torch.Tensor]) -> str:
    """sha256 over a whole base: names, shapes, dtypes and bytes of all its tensors."""
    return hashlib.sha256(f"{structure(header)} {contents(read, header)}".encode()).hexdigest()


def of_text(text: str) -> str:
    """sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def vocabulary(tokenizer) -> str:
    """sha256 over what each id stands for, however the tokenizer comes to its ids."""
    tokens = ((i, tokenizer.token(i)) for i in range(tokenizer.size))
    return of_text("".join(f"{i} {token}\n" for i, token in tokens if token and not UNUSED.fullmatch(token)))


class Base(Protocol):
    """What of `pretrained.ModelFiles` is written down; `original` are the files before --quant."""

    name: str
    quant: str | None
    original: "Base"
    header: dict[str, tuple[str, tuple[int, ...]]]
    read: Callable[[str], torch.Tensor]


def make(base: Base, paths: Iterable[str], chat: dict | None = None, **marks: str | dict) -> dict:
    """The passport of an adapter on the Linears at `paths`, trained with this `chat`; `marks` of `fingerprints`."""
    patched = contents(base.original.read, (f"{path}.weight" for path in paths))
    found = {"name": base.name, "structure": structure(base.header), "patched": patched}
    found |= {"quant": base.quant} if base.quant else {}
    return {"format": FORMAT, "base": found, "chat": chat or {}, **marks}


def fingerprints(tokenizer, template: str, data: str, settings: dict) -> dict:
    """What the passport says of a training but for its base; `data` is the fingerprint of the examples."""
    return {
        "tokenizer": {"file": tokenizer.fingerprint, "vocabulary": vocabulary(tokenizer)},
        "template": of_text(template),
        "data": data,
        "settings": of_text(json.dumps(settings, sort_keys=True)),
    }


def of_policy(folder: str | Path) -> bool:
    """Was it trained by ppo? Then its value head, if it has one, is none of a reward model."""
    return (read(folder) or {}).get("method") == "ppo"


def _is_date(value: object) -> bool:
    try:
        return value is None or str(date.fromisoformat(value)) == value
    except (ValueError, TypeError):
        return False


def read(folder: str | Path) -> dict | None:
    """The passport in an adapter's folder, or None: adapters made elsewhere have none. Raises BadInput."""
    path = Path(folder) / store.PASSPORT
    if not path.exists():
        return None
    passport = files.read_json(path)
    base = passport.get("base")
    if passport.get("format") != FORMAT:
        why = f"{passport.get('format')!r}, this program knows {FORMAT}"
        raise BadInput(f"unknown passport in {path}:format: {why}. Use a newer version")
    if not isinstance(base, dict) or not all(isinstance(base.get(k), str) for k in ("name", "structure", "patched")):
        raise BadInput(
            f"broken passport in {path}:base: name, structure and patched are needed. Train the adapter again"
        )
    if base.get("quant") not in (None, *QUANT):
        why = f"{base['quant']!r} is none of {', '.join(QUANT)}"
        raise BadInput(f"broken passport in {path}:base: quant {why}. Use a newer version")
    chat = passport.setdefault("chat", {})
    if not isinstance(chat, dict) or not isinstance(chat.get("system") or "", str) or not _is_date(chat.get("date")):
        raise BadInput(f"broken passport in {path}:chat: system is no text or date no date. Train the adapter again")
    template_args, control_tokens = chat.get("template_args", {}), chat.get("control_tokens", False)
    if not isinstance(template_args, dict) or not isinstance(control_tokens, bool):
        why = "template_args is no object or control_tokens not true or false"
        raise BadInput(f"broken passport in {path}:chat: {why}. Train the adapter again")
    tokenizer, template = passport.get("tokenizer", {"file": "", "vocabulary": ""}), passport.get("template", "")
    marks = isinstance(tokenizer, dict) and [tokenizer.get("file"), tokenizer.get("vocabulary"), template]
    if not marks or not all(isinstance(mark, str) for mark in marks):
        why = "it or the template has no fingerprint"
        raise BadInput(f"broken passport in {path}:tokenizer: {why}. Train the adapter again")
    return passport


def base_of(folder: Path) -> str:
    """The base an adapter was made on, by its passport or its config. Raises BadInput where neither says."""
    config, passport = store.read_config(folder), read(folder)
    base = passport["base"]["name"] if passport else config.base
    if not base:
        raise BadInput(f"no base in {Path(folder) / store.CONFIG}: the adapter does not say which. Give --model")
    return base


def quant_of(folder: Path) -> str | None:
    """How the base of an adapter was packed in its training, as --quant says it."""
    return ((read(folder) or {}).get("base") or {}).get("quant")


def packing(asked: str | None, folder: Path | None) -> str | None:
    """How a base is to be packed: as `asked`, where "none" is not at all, or else as in the adapter's training."""
    quant = asked or (quant_of(folder) if folder else None)
    return None if quant == "none" else quant


def numbers(quant: str | None) -> str | None:
    """The packing that gives a base other numbers than its file has; blocks that are kept have those of the file."""
    return None if quant == "keep" else quant


def template_of(folder: Path) -> str | None:
    """The file of the chat template that an adapter was trained with; None where it brings none. Other programs write
    it into the tokenizer's files, which count as they do beside a model."""
    paths = (Path(folder) / name for name in (TEMPLATE, *TOKENIZERS_TEMPLATE))
    return next((str(path) for path in paths if path.exists() and files.read_template(path) is not None), None)


def verify(folder: Path, base: Base, paths: Iterable[str], stored: store.Read | None = None) -> None:
    """Compare the adapter in `folder` with a base. The same model from another source only warns. `stored` gives
    weights as they are in the base's files, as `held_or_read` does; without it they are read.

    Raises BadInput for another base, or another packing of it.
    """
    passport = read(folder)
    if passport is None:
        return
    its, path = passport["base"], Path(folder) / store.PASSPORT
    same_structure = its["structure"] == structure(base.header)
    if same_structure and numbers(its.get("quant")) != numbers(base.quant):
        its_form, form = (quant or "16 bit" for quant in (its.get("quant"), base.quant))
        why = f"the adapter was trained on {its['name']} in {its_form}, this is {base.name} in {form}"
        fix = f"Give --quant {its.get('quant') or 'none'}, or --no-verify to insist"
        raise BadInput(f"wrong base in {path}: {why}. {fix}")
    patched = (f"{p}.weight" for p in paths)
    if same_structure and its["patched"] == contents(stored or base.original.read, patched):
        return
    if same_structure and its["name"] == base.name:
        say(
            f"warning: {base.name} has other weights than the adapter in {folder} was trained on (another source of it)"
        )
        return
    what, fix = "other weights" if same_structure else "other tensors", f"Give --model {its['name']}, or --no-verify to"
    why = f"the adapter was trained on {its['name']}; {base.name} has {what}. {fix} insist"
    raise BadInput(f"wrong base in {path}: {why}")


def held_or_read(base: Base, layers: dict[str, LoRALinear]) -> store.Read:
    """Gives the weights under layers as they are in the base's files: from memory, where they are so there, too."""

    def weight(name: str) -> torch.Tensor:
        linear, dtype = layers[name.removesuffix(".weight")].base, files.DTYPES.get(base.original.header[name][0])
        if type(linear) is nn.Linear and (linear.weight.device.type, linear.weight.dtype) == ("cpu", dtype):
            return linear.weight.detach()
        return base.original.read(name)

    return weight


def verify_chat(folder: Path, name: str, tokenizer, template: str, insist: bool = False) -> None:
    """Compare what an adapter was trained to read with a base's tokenizer and the chat template that is to be used.

    Another template warns, and so does a tokenizer that only cuts text in another way. One whose ids stand for other
    tokens raises BadInput unless `insist`: the adapter would read other words than it was taught.
    """
    passport = read(folder) or {}
    known = passport.get("tokenizer")
    if known and known["file"] != tokenizer.fingerprint:
        same_ids = known["vocabulary"] == vocabulary(tokenizer)
        if not same_ids and not insist:
            why = f"in {name} ids stand for other tokens than the adapter was trained on"
            fix = f"Give --model {passport['base']['name']}, or --no-verify to insist"
            raise BadInput(f"wrong tokenizer in {Path(folder) / store.PASSPORT}: {why}. {fix}")
        what = "may cut text in another way than" if same_ids else "has other tokens than"
        say(f"warning: the tokenizer of {name} {what} the one the adapter in {folder} was trained with")
    if passport.get("template") not in (None, of_text(template)):
        say(f"warning: the adapter in {folder} was trained with another chat template than the one used here")


@torch.no_grad()
def changes(model: nn.Module, logits: Callable[[], torch.Tensor]) -> bool:
    """Are `logits()` other than those of the base? They are not where an adapter was not trained, or where what it
    learned is too small for the dtype."""
    with disabled(model):
        before = logits()
    return not torch.equal(before, logits())


def warn_unchanged(folder: Path) -> None:
    say(f"warning: the adapter in {folder} changes nothing: the logits are those of the base, bit for bit")
