"""Write base + adapter as a model folder or GGUF file that other programs load; or make an adapter of adapters.

python merge.py --adapter weights/self-introduction --out weights/nimbus       with a receipt of what that changed
python merge.py --adapter weights/self-introduction --out nimbus.gguf --format gguf
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

from generate import collecting, encode, load_chat, prompts_in
from lora import device as machine
from lora import files, folders, pretrained
from lora.adapter import passport, store
from lora.adapter.inject import lora_layers
from lora.adapter.layer import LoRALinear
from lora.adapter.merge import merged_weight
from lora.errors import BadInput, BadNumbers, say
from lora.export import card, derive, push, receipt
from lora.run.settings import MergeSettings
from lora.text.template import ChatTemplate

WROTE = (*pretrained.SIDECARS, *pretrained.WEIGHTS, passport.TEMPLATE, receipt.FILE, card.FILE)  # and shards


def story(argv) -> int:
    s = MergeSettings.resolve(argv, __doc__)
    way = derive.way(s)
    if way == "combine":
        return derive.combine(s)
    if way == "extract":
        return derive.extract(s)
    check(s)
    if s.push is not None and s.out is None:
        print(push.push_adapter(Path(s.adapter), s.push))
        return 0

    out = Path(s.out)
    if s.format == "gguf":
        from lora.pretrained import gguf_write  # its package takes as long to import as a model to load

        gguf_write.check_out(out, s.overwrite)
    else:
        folders.check_place(out)
        folders.check_apart(out, [Path(s.adapter)])
        folders.check_out(out, s.overwrite, ("config.json",), [*WROTE, *pretrained.shards(out)])
    store.read_config(s.adapter)
    checkpoint = pretrained.find(s.model or passport.base_of(s.adapter))
    say(f"model    {checkpoint.described}")
    folders.check_apart(out, [Path(s.adapter), *([checkpoint.path] if hasattr(checkpoint, "path") else [])])

    # ---- on `meta` the base has no memory; only the adapter's tensors are real
    model = pretrained.empty_model(checkpoint)
    store.load(model, s.adapter)
    layers = lora_layers(model)
    if not s.no_verify:
        passport.verify(s.adapter, checkpoint.name, checkpoint.header, checkpoint.read, layers)
    template = passport.template_of(s.adapter)
    source = files.read_bytes(template, pretrained.TEMPLATE_LIMIT) if template else b""
    ChatTemplate(source.decode("utf-8-sig", "replace"), where=template or "")  # it can be read
    if s.adapter_only:
        gguf_write.write_adapter(checkpoint.config, out, low_rank_maps(layers, s.adapter), s.gguf_type or "f32")
        if source and source.decode(errors="replace") != own_template(checkpoint):
            say(f"note     the file has no chat template, and the base's is another. Give llama-server --jinja "
                f"--chat-template-file {template}")  # fmt: skip
        say(f"saved    {out}, the adapter of {len(layers)} tensors")
        return 0

    bar = tqdm(total=len(checkpoint.header), desc="merging", unit="tensor", leave=False, disable=None)
    if s.format == "gguf":
        change = changer(layers, torch.float32, bar)  # rounded once, from the sum in float32
        gguf_write.write_model(checkpoint, out, change, s.gguf_type or "f16", template)
        bar.close()
    else:
        dtype = None if s.dtype == "auto" else getattr(torch, s.dtype)
        device, prompts = machine.choose_device(s.device), texts(checkpoint, model, s)
        if prompts:
            receipt.check_room(model, machine.free_memory(device))
        with folders.new_folder(out, s.overwrite) as folder:
            pretrained.write_model(checkpoint, folder, changer(layers, dtype, bar), dtype)
            if template:  # the one it was trained with
                files.write_bytes(folder / passport.TEMPLATE, source)
            bar.close()
            lines = []
            if prompts:
                written = pretrained.ModelFolder(folder, str(out))
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


def check(s) -> None:
    gguf, named = s.format == "gguf", str(s.out).endswith(".gguf")
    cases = (
        ("--gguf-type", s.gguf_type and not gguf, "only GGUF files have such types. Add --format gguf"),
        ("--adapter-only", s.adapter_only and not gguf, "its folder is there already. Add --format gguf"),
        ("--dtype", s.dtype != "auto" and gguf, "a GGUF file has types of its own. Give --gguf-type"),
        ("--out", named and not gguf, "a folder is to be written, not a GGUF file. Add --format gguf"),
        ("--push", s.push and gguf, "folders are uploaded, not GGUF files. Leave out one of them"),
    )
    problems = [f"wrong {flag} in the command line: {why}" for flag, wrong, why in cases if wrong]
    if s.adapter is None:
        problems.append("missing --adapter in the command line: it says where to read. Add it")
    if s.out is None and s.push is None:
        problems.append("missing --out in the command line: it says where to write. Add it")
    if s.push is not None:
        with collecting(problems):
            push.check_name(s.push)
    if problems:
        raise BadInput(*problems)


def changer(layers: dict[str, LoRALinear], dtype: torch.dtype | None, bar: tqdm):
    """(name, tensor) -> what to write: W + ΔW for a target, rounded once to `dtype` or W's own; others as they are."""
    targets = {f"{path}.weight": layer for path, layer in layers.items()}

    @torch.no_grad()
    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        bar.update()
        if name in targets:
            tensor = merged_weight(tensor, targets[name].delta(tensor), dtype)
        tensor = tensor.to(dtype or tensor.dtype)
        if not torch.isfinite(tensor).all():
            fix = "Use --dtype float32, or another adapter"
            raise BadNumbers(f"not finite in {name}: the merged weight does not fit {tensor.dtype}. {fix}")
        return tensor

    return change


def low_rank_maps(layers: dict[str, LoRALinear], folder: str) -> dict[str, tuple]:
    """Path -> s, A, B, which is all that an adapter in GGUF can say. Raises BadInput for a ΔW that is not s B A."""
    for path, layer in layers.items():
        if type(layer).delta is not LoRALinear.delta:
            why = f"{type(layer).__name__} at {path} is more than a low-rank map, and GGUF has no place for that"
            raise BadInput(f"unsupported adapter in {folder}: {why}. Merge it: leave out --adapter-only")
    return {path: (layer.scaling, *layer.factors()) for path, layer in layers.items()}


def own_template(checkpoint: pretrained.ModelFiles) -> str | None:
    try:
        return pretrained.load_chat(checkpoint).template.source
    except BadInput:  # it has none
        return None


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
