"""Upload a saved folder to the hub. The token is the client's own: HF_TOKEN, or that of `hf auth login`."""

import os
from collections.abc import Sequence
from pathlib import Path

from lora.adapter import passport, store, value_head
from lora.errors import BadEnvironment, BadInput, say
from lora.export.card import FILE, HUB_ID

ADAPTER = (*passport.ADAPTER, FILE)  # not settings, data or checkpoints


def check_name(repo: str) -> None:
    """Raises BadInput where `repo` is no name of a repository."""
    if not HUB_ID.fullmatch(repo):
        raise BadInput(f"wrong --push in the command line: {repo!r} is no name on the hub. Give owner/name")


def push(folder: Path, repo: str, names: Sequence[str] = ("*",)) -> str:
    """Upload the files of those names, to a new private repository where there is none yet; returns its address.

    Raises BadEnvironment where the hub refuses or does not answer.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub as hub  # slow to import

    try:
        address = hub.HfApi().create_repo(repo, private=True, exist_ok=True)
        hub.HfApi().upload_folder(
            repo_id=repo, folder_path=folder, allow_patterns=list(names), commit_message=f"Upload {Path(folder).name}"
        )
    except Exception as error:  # the HTTP client's own classes differ between versions
        if isinstance(error, OSError) and error.filename:  # a file, not the network
            raise
        why = (str(error).splitlines() or [""])[0].rstrip(".: ") or type(error).__name__
        fix = "Set HF_TOKEN to a token that may write, look at the name, or try later"
        raise BadEnvironment(f"upload failed in hub {repo}: {why}. {fix}") from None
    return str(address)


def push_adapter(folder: Path, repo: str) -> str:
    """`push` of an adapter that can be read. Its passport stays here if it names a folder of this machine."""
    config, papers = store.read_config(folder), passport.read(folder) or {}
    store.read_tensors(folder)
    value_head.read(folder)
    private = papers and Path(papers["base"]["name"]).is_absolute()
    if Path(config.base).is_absolute():
        say(f"note     {store.CONFIG} will tell the base's place on this machine to all who may read it: {config.base}")
    template = passport.template_of(folder)  # which may lie in the tokenizer's files
    names = dict.fromkeys((*ADAPTER, *([Path(template).name] if template else [])))
    return push(folder, repo, [name for name in names if not (private and name == store.PASSPORT)])
