"""Write base + adapter as a plain model folder, or as a GGUF file, that other programs load.

python merge.py --adapter weights/self-introduction --out weights/nimbus
python merge.py --adapter weights/self-introduction --out nimbus.gguf --format gguf
"""

from lora.errors import quiet_imports, run

quiet_imports(__name__)

import sys
from pathlib import Path

import torch
from tqdm import tqdm

from lora import files, flags, folders, settings
from lora.adapter import passport, store
from lora.adapter.inject import lora_layers
from lora.adapter.layer import LoRALinear
from lora.adapter.merge import merged_weight
from lora.errors import BadInput, BadNumbers, say
from lora.model import pretrained
from lora.model.template import ChatTemplate


def contradictions(s) -> list[str]:
    """Flags that do not go together, a line each."""
    gguf, named = s.format == "gguf", str(s.out).endswith(".gguf")
    cases = (
        ("--gguf-type", s.gguf_type and not gguf, "only GGUF files have such types. Add --format gguf"),
        ("--adapter-only", s.adapter_only and not gguf, "its folder is there already. Add --format gguf"),
        ("--dtype", s.dtype != "auto" and gguf, "a GGUF file has types of its own. Give --gguf-type"),
        ("--out", named and not gguf, "a folder is to be written, not a GGUF file. Add --format gguf"),
    )
    return [f"wrong {flag} in the command line: {why}" for flag, wrong, why in cases if wrong]


def low_rank_maps(layers: dict, folder: str) -> dict[str, tuple]:
    """Path -> s, A, B, which is all that an adapter in GGUF can say. Raises BadInput for a ΔW that is not s B A."""
    for path, layer in layers.items():
        if type(layer).delta is not LoRALinear.delta:
            why = f"{type(layer).__name__} at {path} is more than a low-rank map, and GGUF has no place for that"
            raise BadInput(f"unsupported adapter in {folder}: {why}. Merge it: leave out --adapter-only")
    return {path: (layer.scaling, layer.lora_A, layer.lora_B) for path, layer in layers.items()}


def own_template(checkpoint: pretrained.Checkpoint) -> str | None:
    try:
        return pretrained.load_chat(checkpoint).template.source
    except BadInput:  # it has none
        return None


def story(argv) -> int:
    s = settings.resolve(flags.MERGE, argv, __doc__)
    uses = {"adapter": "read", "out": "write"}
    missing = [f"missing --{flag} in the command line: it says where to {use}. Add it" for flag, use in uses.items()
               if getattr(s, flag) is None]  # fmt: skip
    if problems := missing + contradictions(s):
        raise BadInput(*problems)
    out, gguf = Path(s.out), None
    if s.format == "gguf":
        from lora.model import gguf_write as gguf  # its package takes as long to import as a model to load

        gguf.check_out(out, s.overwrite)
    else:
        folders.check_out(out, s.overwrite, ("config.json",))
    store.read_config(s.adapter)
    checkpoint = pretrained.find(s.model or passport.base_of(s.adapter))
    say(f"model    {checkpoint.described}")
    sources = [Path(s.adapter), *([checkpoint.path] if hasattr(checkpoint, "path") else [])]
    for source in sources:
        if out.resolve() == source.resolve() or out.resolve() in source.resolve().parents:
            raise BadInput(f"wrong --out in {out}: it holds {source}, which is read. Choose another name")

    # ---- on `meta` the base has no memory; only the adapter's tensors are real
    model = pretrained.empty_model(checkpoint)
    store.load(model, s.adapter)
    layers = {f"{path}.weight": layer for path, layer in lora_layers(model).items()}
    if not s.no_verify:
        passport.verify(s.adapter, checkpoint.name, checkpoint.header, checkpoint.read, lora_layers(model))
    template = passport.template_of(s.adapter)
    source = files.read_bytes(template, pretrained.TEMPLATE_LIMIT) if template else b""
    ChatTemplate(source.decode("utf-8-sig", "replace"), where=template or "")  # it can be read
    if s.adapter_only:
        maps = low_rank_maps(lora_layers(model), s.adapter)
        gguf.write_adapter(checkpoint.config, out, maps, s.gguf_type or "f32")
        if source and source.decode(errors="replace") != own_template(checkpoint):
            say(f"note     the file has no chat template, and the base's is another. Give llama-server --jinja "
                f"--chat-template-file {template}")  # fmt: skip
        say(f"saved    {out}, the adapter of {len(maps)} tensors")
        return 0
    dtype = torch.float32 if gguf else None if s.dtype == "auto" else getattr(torch, s.dtype)
    bar = tqdm(total=len(checkpoint.header), desc="merging", unit="tensor", leave=False, disable=None)

    @torch.no_grad()
    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        """W + ΔW for a target, rounded once to the dtype to write; other tensors as they are."""
        bar.update()
        if name in layers:
            tensor = merged_weight(tensor, layers[name].delta(), dtype)
        tensor = tensor.to(dtype or tensor.dtype)
        if not torch.isfinite(tensor).all():
            fix = "Use --dtype float32, or another adapter"
            raise BadNumbers(f"not finite in {name}: the merged weight does not fit {tensor.dtype}. {fix}")
        return tensor

    if gguf:  # rounded once, from the sum in float32
        gguf.write_model(checkpoint, out, change, s.gguf_type or "f16", template)
    else:
        with folders.new_folder(out, s.overwrite) as folder:
            pretrained.write_model(checkpoint, folder, change, dtype)
            if template:  # the one it was trained with
                files.write_bytes(folder / passport.TEMPLATE, source)
    bar.close()
    system = ((passport.read(s.adapter) or {}).get("chat") or {}).get("system")
    if isinstance(system, str):
        text = " ".join(system.split())[:100]
        say(f"note     it was trained with this system turn, which a merged model does not remember: {text}")
    elif system is False:
        say("note     it was trained without a system turn; the template may add its own: give --no-system")
    say(f"saved    {out}, {len(layers)} of {len(checkpoint.header)} tensors merged")
    return 0


def main(argv=None) -> int:
    return run(story, argv)


if __name__ == "__main__":
    sys.exit(main())
