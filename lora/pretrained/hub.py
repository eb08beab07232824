"""Models and data files from the hub, by huggingface_hub, in its standard cache. Pickles are never fetched.

One request with a time limit comes first: huggingface_hub itself tries for 20 s and more where nothing answers.
"""

import os
from contextlib import contextmanager
from pathlib import Path

from lora import files
from lora.adapter import value_head
from lora.errors import BadEnvironment, BadInput, LoraError, Refused
from lora.network.config import ModelConfig
from lora.pretrained import prequantised, wrapped

CONFIGS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model",
    "LICENSE", value_head.FILE,
)  # fmt: skip

INDEX = "model.safetensors.index.json"


class HubSilent(BadEnvironment):
    """The hub gave no answer: no network, offline mode, a time-out, or an error of its own."""


def hub_model(repo: str, seconds: float = 10.0) -> Path:
    """The folder of a hub model in the cache; without an answer from the hub, what the cache already has."""
    try:
        return fetch(repo, probe(repo, seconds))
    except HubSilent as silent:
        return _cached(silent, repo, "config.json").parent


def dataset_file(name: str, seconds: float = 10.0) -> Path:
    """`hub:owner/name/file.jsonl`, a file of a dataset repository, in the cache; any other name as a path."""
    if not name.startswith("hub:"):
        return Path(name)
    parts = name.removeprefix("hub:").split("/")
    if len(parts) < 3 or not all(parts) or ".." in parts:
        raise BadInput(f"wrong name in {name}: expected hub:owner/name/file. Give the file, too")
    repo, file = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        info = probe(repo, seconds, "dataset")
        if file not in (sibling.rfilename for sibling in info.siblings):
            raise BadInput(f"no file in {name}: the data set {repo} has no {file}. Check the name")
        with _one_line(repo, name):
            return Path(_library().hf_hub_download(repo, file, repo_type="dataset"))
    except HubSilent as silent:
        return _cached(silent, repo, file, repo_type="dataset")


def probe(repo: str, seconds: float, kind: str = "model"):
    """Does the hub answer? Its description of a repository: the commit and the files. One request, no retry.

    Raises HubSilent, or BadInput where the hub answers and says no.
    """
    hub, (what, local) = _library(), {"model": ("model", "folder"), "dataset": ("data set", "file")}[kind]
    if hub.constants.HF_HUB_OFFLINE:
        raise HubSilent(f"no {what} in hub {repo}: HF_HUB_OFFLINE is set. Unset it, or give a local {local}")
    try:
        return hub.HfApi().repo_info(repo, repo_type=kind, files_metadata=kind == "model", timeout=seconds)
    except hub.errors.GatedRepoError:
        raise BadInput(_gated(repo)) from None
    except hub.errors.RepositoryNotFoundError:
        raise BadInput(f"no {what} in hub {repo}: no such repository, or it is private. Check the name") from None
    except hub.errors.HFValidationError as error:
        raise BadInput(f"no {what} in hub {repo}: {_why(error)}. Check the name") from None
    except Exception as error:  # the HTTP client's own classes differ between versions
        fix = f"Try later, or give a local {local}"
        raise HubSilent(f"no {what} in hub {repo}: it does not answer ({_why(error)}). {fix}") from None


def fetch(repo: str, info) -> Path:
    """The cache's folder of a model, with the files that we read, at the commit of `info`."""
    with _one_line(repo, f"hub {repo}"):
        names, raw = wanted(repo, info), {}
        if "config.json" in names:  # what is not supported is said before its weights are fetched
            raw = files.read_json(Path(_library().hf_hub_download(repo, "config.json", revision=info.sha)))
            ModelConfig.from_json(prequantised.plain(wrapped.text_config(raw)), f"{repo}/config.json")
        if INDEX in names:
            names += shards(repo, info, raw)
        folder = Path(_library().snapshot_download(repo, revision=info.sha, allow_patterns=names))
    main = folder.parents[1] / "refs" / "main"  # what the cache answers with offline: only what is complete
    main.parent.mkdir(exist_ok=True)
    files.write_bytes(main, info.sha.encode())
    return folder


def wanted(repo: str, info) -> list[str]:
    """The files of a repository that we read: its small files, and one form of its weights, or the index of its shards.
    A repository may have them several times: in one file beside shards, and for other programs."""
    names = [file.rfilename for file in info.siblings]
    small = [name for name in CONFIGS if name in names]
    if value_head.PICKLED in names and value_head.FILE not in names:
        raise value_head.pickled(f"hub {repo}: {value_head.PICKLED}")
    if "model.safetensors" in names:
        return [*small, "model.safetensors"]
    if INDEX in names:
        return [*small, INDEX]
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        raise Refused(
            f"pickle in hub {repo}: it has no safetensors, and pickled weights are never opened. Choose another"
        )
    raise BadInput(f"no weights in hub {repo}: there is no model.safetensors. Choose another model")


def shards(repo: str, info, raw: dict) -> list[str]:
    """The shards that have tensors of the model, or of the language model in a larger one."""
    weight_map = files.read_json(Path(_library().hf_hub_download(repo, INDEX, revision=info.sha))).get("weight_map")
    weight_map = weight_map if isinstance(weight_map, dict) else {}  # what is wrong is said by who reads it
    weight_map = {name: file for name, file in weight_map.items() if isinstance(file, str)}
    found = wrapped.files_of(raw, weight_map, f"hub {repo}")
    return [file.rfilename for file in info.siblings if file.rfilename in found and "/" not in file.rfilename]


def _cached(silent: HubSilent, repo: str, file: str, **kind) -> Path:
    """A file that was fetched earlier; raises `silent` where there is none."""
    try:
        return Path(_library().hf_hub_download(repo, file, local_files_only=True, **kind))
    except Exception:
        raise silent from None


@contextmanager
def _one_line(repo: str, where: str):
    """What goes wrong in a download becomes one of our errors; a full disk stays an OSError."""
    try:
        yield
    except LoraError:
        raise
    except _library().errors.GatedRepoError:  # its description may be open to all
        raise BadInput(_gated(repo)) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        why = _why(error)
        raise BadEnvironment(f"download failed in {where}: {why}. Run again; what has arrived is kept") from None


def _library():
    """huggingface_hub, imported when first needed (it is slow to import)."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub
    import huggingface_hub.constants
    import huggingface_hub.errors

    return huggingface_hub


def _why(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__


def _gated(repo: str) -> str:
    return f"no access to hub {repo}: the repository is gated. Accept its licence on its page and set HF_TOKEN"
