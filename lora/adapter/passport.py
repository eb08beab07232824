"""Which base an adapter belongs to: `passport.json`, written beside the adapter and compared on loading.

base.name         what --model was
base.structure    sha256 over the names, shapes and dtypes of all its tensors
base.patched      sha256 over the bytes of the tensors the adapter changes
chat.system       the system turn of rows without one: a text, null as the template decides, false for none
chat.date         what templates that ask were told
The chat template itself lies beside it, as `chat_template.jinja`.
"""

import hashlib
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path

import torch

from lora import files
from lora.adapter import store
from lora.errors import BadInput, say

FORMAT, TEMPLATE = 1, "chat_template.jinja"


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


def make(
    name: str, header: dict, read: Callable[[str], torch.Tensor], paths: Iterable[str], chat: dict | None = None
) -> dict:
    """The passport of an adapter on the Linears at `paths`, trained with this `chat`."""
    patched = contents(read, (f"{path}.weight" for path in paths))
    base = {"name": name, "structure": structure(header), "patched": patched}
    return {"format": FORMAT, "base": base, "chat": chat or {}}


def _is_date(value: object) -> bool:
    try:
        return value is None or str(date.fromisoformat(value)) == value
    except (ValueError, TypeError):
        return False


def read(folder: Path) -> dict | None:
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
    chat = passport.setdefault("chat", {})
    if not isinstance(chat, dict) or not isinstance(chat.get("system") or "", str) or not _is_date(chat.get("date")):
        raise BadInput(f"broken passport in {path}:chat: system is no text or date no date. Train the adapter again")
    return passport


def base_of(folder: Path) -> str:
    """The base an adapter was made on, by its passport or its config. Raises BadInput where neither says."""
    config, passport = store.read_config(folder), read(folder)
    base = passport["base"]["name"] if passport else config.base
    if not base:
        raise BadInput(f"no base in {Path(folder) / store.CONFIG}: the adapter does not say which. Give --model")
    return base


def template_of(folder: Path) -> str | None:
    """The file of the chat template that an adapter was trained with; None where it brings none."""
    path = Path(folder) / TEMPLATE
    return str(path) if path.exists() else None


def verify(folder: Path, name: str, header: dict, read_tensor: Callable, paths: Iterable[str]) -> None:
    """Compare the adapter in `folder` with a base. The same model from another source only warns.

    Raises BadInput for another base.
    """
    passport = read(folder)
    if passport is None:
        return
    base, path = passport["base"], Path(folder) / store.PASSPORT
    fix = f"Give --model {base['name']}, or --no-verify to insist"
    same_structure = base["structure"] == structure(header)
    if same_structure and base["patched"] == contents(read_tensor, (f"{p}.weight" for p in paths)):
        return
    if same_structure and base["name"] == name:
        say(f"warning: {name} has other weights than the adapter in {folder} was trained on (another source of it)")
        return
    what = "other weights" if same_structure else "other tensors"
    raise BadInput(f"wrong base in {path}: the adapter was trained on {base['name']}; {name} has {what}. {fix}")
