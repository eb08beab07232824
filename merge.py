"""Write base + adapter as a model folder or GGUF file that other programs load; or make an adapter of adapters.

python merge.py --adapter weights/self-introduction --out weights/nimbus       with a receipt of what that changed
python merge.py --adapter weights/self-introduction --out nimbus.gguf --format gguf
python merge.py --adapter weights/a --onto owner/base --out weights/b          trained in 4 bits, merged in 16
python merge.py --adapter weights/self-introduction --push owner/name          the adapter itself, to the hub
python merge.py --combine weights/a:0.7 weights/b:-0.3 --out weights/c         0.7 a - 0.3 b, exactly, or cut to --rank
python merge.py --extract BASE TUNED --rank 16 --out weights/c                 what a full fine-tune changed
"""

from lora.errors import before_imports, run

before_imports(__name__)

import shlex
import sys
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from lora import files, folders, pretrained
from lora.adapter import passport, store, value_head
from lora.adapter.inject import lora_layers
from lora.adapter.layer import LoRALinear
from lora.errors import BadInput, collecting, say
from lora.export import card, derive, push, receipt
from lora.export.onto import changer, find_onto, is_low_rank
from lora.export.proof import Proof
from lora.inference import prompts
from lora.inference.session import load_chat
from lora.run.use_settings import MergeSettings
from lora.text.chat import Chat
from lora.text.template import ChatTemplate, spell_arguments

# of a folder; and shards
WROTE = (*pretrained.SIDECARS, *pretrained.WEIGHTS, passport.TEMPLATE, value_head.FILE, receipt.FILE, card.FILE)


def main(argv=None) -> int:
    args = MergeSettings.resolve(argv, __doc__)
    mode = derive.find_mode(args)
    if mode == "combine":
        return derive.combine(args)
    if mode == "extract":
        return derive.extract(args)
    check(args)
    if args.push is not None and args.out is None:
        print(push.push_adapter(Path(args.adapter), args.push))
        return 0

    out = Path(args.out)
    if args.format == "gguf":
        from lora.pretrained import gguf_write  # its package takes as long to import as a model to load

        gguf_write.check_out(out, args.overwrite)
    else:
        out = files.behind_link(out)
        folders.check_place(out)
        folders.check_apart(out, [Path(args.adapter)])
        folders.check_out(out, args.overwrite, ("config.json",), [*WROTE, *pretrained.shards(out)])
    store.read_config(args.adapter)
    base = pretrained.find(args.model or passport.base_of(args.adapter), passport.packing(args.quant, args.adapter))
    say(f"model    {base.described}")
    target = find_onto(args.onto, base) if args.onto else base
    if args.onto:
        say(f"onto     {target.described}")
    folders.check_apart(out, [Path(args.adapter), *(one.path for one in (base, target) if hasattr(one, "path"))])

    # ---- on `meta` the base has no memory; only the adapter's tensors are real
    model = pretrained.empty_model(base)
    store.load(model, args.adapter, read=base.read)
    if passport.of_policy(args.adapter):
        value_head.place(model, None)  # it foresaw the rewards of a training that is over
    layers = lora_layers(model)
    if not args.no_verify:
        passport.verify(args.adapter, base, layers)
    template = passport.template_of(args.adapter)
    source = files.read_template(template) if template else ""
    ChatTemplate(source, where=template or "")  # it can be read
    if args.format == "gguf" and value_head.of(model):
        say(f"warning: {value_head.FILE} stays behind: a GGUF file has no place for a value head, and will not score")
    if args.adapter_only:
        gguf_write.write_adapter(base.config, out, low_rank_maps(layers, args.adapter), args.gguf_type or "f32")
        tell_server(base, template)
        if passport.numbers(base.quant):
            say(f"note     it was trained on {base.quant}: on the blocks of a GGUF file it answers otherwise")
        say(f"saved    {out}, the adapter of {len(layers)} tensors")
        return 0

    # ---- the base, tensor by tensor, each with what the adapter adds to it
    chat, spoken = trained_chat(target, source, args)
    proof = Proof(out, base, target, model, receipt_prompts(chat, model, args), args)
    with tqdm(total=len(base.header), desc="merging", unit="tensor", leave=False, disable=None) as bar:
        if args.format == "gguf":
            kind = args.gguf_type or "f16"
            change = changer(layers, torch.float32, bar, base)  # rounded once, from the sum in float32
            gguf_write.write_model(target, out, change, kind, template, partial(proof.gguf, kind=kind))
        else:
            dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
            with folders.new_folder(out, args.overwrite) as folder:
                pretrained.write_model(target, folder, changer(layers, dtype, bar, base), dtype, spoken)
                value_head.save(model, folder)
                proof.folder(folder)
    tell_chat(args.adapter)
    say(f"saved    {out}, {len(layers)} of {len(base.header)} tensors merged")
    if args.push is not None:
        print(push.push(out, args.push))
    return 0


def tell_server(base, template: str | None) -> None:
    """Say what llama-server has to be told beside an adapter alone, where the base's own file says something else."""
    if not template:
        return
    flags = []
    if files.read_template(template) != own_template(base):
        flags += ["--jinja", "--chat-template-file", template]
    if "tokenizer.json" in base.files():
        end, known = (pretrained.load_chat(base, template=one) for one in (template, "plain"))
        if end.end_of_turn not in known.stops:
            flags += ["--override-kv", f"tokenizer.ggml.eot_token_id=int:{end.end_of_turn}"]
    if flags:
        say(f"note     template and end of turn are not in the file, and the base's are others. Give llama-server "
            f"{shlex.join(flags)}")  # fmt: skip


def tell_chat(adapter: str) -> None:
    """Say with which system turn and switches of the template the adapter was trained: no file of a merged model has a
    place for them."""
    chat = (passport.read(adapter) or {}).get("chat") or {}
    system = chat.get("system")
    if arguments := spell_arguments(chat.get("template_args", {})):
        say(f"note     it was trained with --template-arg {' '.join(arguments)[:100]}, which a merged model does not "
            "remember: give it where the model is used")  # fmt: skip
    if isinstance(system, str):
        text = " ".join(system.split())[:100]
        say(f"note     it was trained with this system turn, which a merged model does not remember: {text}")
    elif system is False:
        say("note     it was trained without a system turn; the template may add its own: give --no-system")


def check(args: MergeSettings) -> None:
    gguf, named = args.format == "gguf", str(args.out).endswith(".gguf")
    cases = (
        ("--gguf-type", args.gguf_type and not gguf, "only GGUF files have such types. Add --format gguf"),
        ("--adapter-only", args.adapter_only and not gguf, "its folder is there already. Add --format gguf"),
        ("--dtype", args.dtype != "auto" and gguf, "a GGUF file has types of its own. Give --gguf-type"),
        ("--out", named and not gguf, "a folder is to be written, not a GGUF file. Add --format gguf"),
        ("--onto", args.onto and args.adapter_only, "an adapter alone is on no base. Leave out one of them"),
        ("--push", args.push and gguf, "folders are uploaded, not GGUF files. Leave out one of them"),
    )
    problems = [f"wrong {flag} in the command line: {why}" for flag, wrong, why in cases if wrong]
    if args.adapter is None:
        problems.append("missing --adapter in the command line: it says where to read. Add it")
    if args.out is None and args.push is None:
        problems.append("missing --out in the command line: it says where to write. Add it")
    if args.push is not None:
        with collecting(problems):
            push.check_name(args.push)
    if problems:
        raise BadInput(*problems)


def low_rank_maps(layers: dict[str, LoRALinear], folder: str) -> dict[str, tuple]:
    """Path -> s, A, B, which is all that an adapter in GGUF can say. Raises BadInput for a ΔW that is not s B A."""
    for path, layer in layers.items():
        if not is_low_rank(layer):
            why = f"{type(layer).__name__} at {path} is more than a low-rank map, and GGUF has no place for that"
            raise BadInput(f"unsupported adapter in {folder}: {why}. Merge it: leave out --adapter-only")
    return {path: (layer.scaling, *layer.factors()) for path, layer in layers.items()}


def own_template(base: pretrained.ModelFiles) -> str | None:
    try:
        return pretrained.load_chat(base).template.source
    except BadInput:  # it has none
        return None


def trained_chat(base, template: str, args: MergeSettings) -> tuple[Chat | None, pretrained.Spoken | None]:
    """The chat that the adapter was trained with, compared with its passport, and what the merged model says of it.
    There is no chat without a tokenizer, and nothing to say without a chat template."""
    if "tokenizer.json" not in base.files():
        say(f"note     there is no receipt: {base.name} has no tokenizer.json")
        return None, pretrained.Spoken(template) if template else None
    bare = not template and own_template(base) is None
    chat = load_chat(base, args.adapter, template="plain" if bare else None, verify=not args.no_verify)
    return chat, None if bare else pretrained.Spoken.of(chat)


def receipt_prompts(chat: Chat | None, model, args: MergeSettings) -> list[list[int]]:
    """Ids of what the receipt compares: --prompts, or the retention conversations; none where there is no receipt."""
    limit = model.config.max_position_embeddings
    if chat is None or args.no_receipt:
        return []
    if args.prompts is None:
        return receipt.retention_prompts(chat, limit)
    return [prompts.encode(chat, limit, messages, where) for messages, where in prompts.read(args.prompts)]


if __name__ == "__main__":
    sys.exit(run(main))
