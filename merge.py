"""Write base + adapter as a plain model folder that other programs load; or make one adapter of others, or of a model.

python merge.py --adapter weights/self-introduction --out weights/nimbus       with a receipt of what that changed
python merge.py --adapter weights/self-introduction --push owner/name          the adapter itself, to the hub
python merge.py --combine weights/a:0.7 weights/b:-0.3 --out weights/c         0.7 a - 0.3 b, exactly, or cut to --rank
python merge.py --extract BASE TUNED --rank 16 --out weights/c                 what a full fine-tune changed
"""

from lora.errors import quiet_imports, run

quiet_imports(__name__)

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

from generate import encode, load_chat, prompts_in
from lora import device as machine
from lora import files, flags, folders, settings
from lora.adapter import passport, store
from lora.adapter.inject import lora_layers
from lora.adapter.merge import merged_weight
from lora.errors import BadInput, BadNumbers, say
from lora.model import pretrained
from lora.model.template import ChatTemplate
from lora.run import card, derive, push, receipt


def story(argv) -> int:
    s = settings.resolve(flags.MERGE, argv, __doc__)
    way = derive.way(s)
    if way == "combine":
        return derive.combine(s)
    if way == "extract":
        return derive.extract(s)
    if s.push is not None:
        push.check_name(s.push)
        if s.adapter is not None and s.out is None:
            print(push.push_adapter(Path(s.adapter), s.push))
            return 0
    uses = {"adapter": "read", "out": "write"}
    missing = [f"missing --{flag} in the command line: it says where to {use}. Add it" for flag, use in uses.items()
               if getattr(s, flag) is None]  # fmt: skip
    if missing:
        raise BadInput(*missing)
    out = Path(s.out)
    folders.check_out(out, s.overwrite, ("config.json",))
    store.read_config(s.adapter)
    checkpoint = pretrained.find(s.model or passport.base_of(s.adapter))
    say(f"model    {checkpoint.described}")
    sources = [Path(s.adapter), *([checkpoint.path] if hasattr(checkpoint, "path") else [])]
    derive.check_apart(out, sources)

    # ---- on `meta` the base has no memory; only the adapter's tensors are real
    model = pretrained.empty_model(checkpoint)
    store.load(model, s.adapter)
    layers = {f"{path}.weight": layer for path, layer in lora_layers(model).items()}
    if not s.no_verify:
        passport.verify(s.adapter, checkpoint.name, checkpoint.header, checkpoint.read, lora_layers(model))
    device, prompts = machine.choose_device(s.device), texts(checkpoint, model, s)
    if prompts:
        receipt.check_room(model, machine.free_memory(device))
    dtype = None if s.dtype == "auto" else getattr(torch, s.dtype)
    bar = tqdm(total=len(checkpoint.header), desc="merging", unit="tensor", leave=False, disable=None)

    @torch.no_grad()
    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        """W + ΔW for a target, rounded once to the dtype to write; other tensors as they are."""
        bar.update()
        if name in layers:
            tensor = merged_weight(tensor, layers[name].delta(tensor), dtype)
        tensor = tensor.to(dtype or tensor.dtype)
        if not torch.isfinite(tensor).all():
            fix = "Use --dtype float32, or another adapter"
            raise BadNumbers(f"not finite in {name}: the merged weight does not fit {tensor.dtype}. {fix}")
        return tensor

    template = passport.template_of(s.adapter)
    source = files.read_bytes(template, pretrained.TEMPLATE_LIMIT) if template else b""
    ChatTemplate(source.decode("utf-8-sig", "replace"), where=template or "")  # it can be read
    with folders.new_folder(out, s.overwrite) as folder:
        pretrained.write_model(checkpoint, folder, change, dtype)
        if template:  # the one it was trained with
            files.write_bytes(folder / passport.TEMPLATE, source)
        bar.close()
        lines = []
        if prompts:
            written = pretrained.FolderCheckpoint(folder, str(out))
            found = receipt.make(checkpoint, s.adapter, written, prompts, device)
            lines = receipt.rows(found)
            print(receipt.table(lines))
            receipt.check(found, s.tolerance, out, s.adapter)
            receipt.write(folder, found, s.tolerance)
        card.write_merged(folder, out.name, checkpoint, card.made_in(s.adapter), lines)
    system = ((passport.read(s.adapter) or {}).get("chat") or {}).get("system")
    if isinstance(system, str):
        text = " ".join(system.split())[:100]
        say(f"note     it was trained with this system turn, which a merged model does not remember: {text}")
    elif system is False:
        say("note     it was trained without a system turn; the template may add its own: give --no-system")
    say(f"saved    {out}, {len(layers)} of {len(checkpoint.header)} tensors merged")
    if s.push is not None:
        print(push.push(out, s.push))
    return 0


def texts(checkpoint, model, s) -> list[list[int]]:
    """Ids of what the receipt compares: --prompts, or ordinary conversations; none where there is to be no receipt."""
    how = SimpleNamespace(template=None, system=None, no_system=False, date=None, no_verify=s.no_verify)
    if "tokenizer.json" not in checkpoint.files():
        say(f"note     there is no receipt: {checkpoint.name} has no tokenizer.json")
        return []
    if passport.template_of(s.adapter) is None:
        try:
            pretrained.load_chat(checkpoint)
        except BadInput:
            how.template = "plain"  # a base model has none
    chat = load_chat(checkpoint, s.adapter, how)  # which compares it with the adapter's passport
    if s.no_receipt:
        return []
    if s.prompts is None:
        return receipt.ordinary(chat, model.config.max_position_embeddings)
    return [encode(model, chat, messages, where) for messages, where in prompts_in(s.prompts)]


def main(argv=None) -> int:
    return run(story, argv)


if __name__ == "__main__":
    sys.exit(main())
