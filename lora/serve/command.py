"""`generate.py --serve`: open a base and its adapters, and serve them until it is stopped."""

import os
import sys
from collections.abc import Sequence

from lora import address, pretrained
from lora import device as machine
from lora.adapter.sets import AdapterSet, read
from lora.errors import BadInput, collecting, say
from lora.inference import several, unpacked
from lora.inference.generate import Sampling
from lora.inference.session import try_adapter
from lora.pretrained import default_model


def open_served(
    model: str | None,
    adapters: Sequence[str],
    keys: Sequence[str] = (),
    *,
    quant: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    verify: bool = True,
    slots: int = 32,
    max_new_tokens: int = 256,
    sampling: Sampling,
    **told,
):
    """A `Served` of a base and adapters of it, `told` as `load_chat` is. Raises LoraError for what cannot be used."""
    from lora.serve.app import Served  # which needs the packages of the extra `serve`
    from lora.serve.engine import Engine

    if adapters:
        base = several.find_base(model, quant, adapters, not verify)
    else:
        base = pretrained.find(model or default_model.NAME, quant)
    say(f"model    {base.described}")
    empty, chats, problems = pretrained.empty_model(base), {}, []
    names = several.column_names(adapters)
    for name, adapter in names.items():
        with collecting(problems):
            chats[name] = try_adapter(empty, name, adapter, base, verify, **told)
    if problems:
        raise BadInput(*dict.fromkeys(problems))
    place = machine.choose_device(device)
    net = pretrained.load_model(base, machine.choose_dtype(dtype, place)[0], place)
    unpacked.unpack(net, machine.free_memory(place))
    sets: dict[str, AdapterSet] = {
        name: read(net, adapter, base.read) for name, adapter in names.items() if adapter is not None
    }
    engine = Engine(net, sets, slots)
    return Served(engine, chats, several.BASE, base.described, sampling, max_new_tokens, tuple(keys))


def run(served, host: str, port: int) -> int:
    """Serve until Ctrl-C. Raises BadEnvironment for an address that is taken."""
    import uvicorn

    from lora.serve.app import application

    listener = address.listen(host, port)
    say(f"serving  {address.url(listener)}  ({', '.join(served.chats)}); Ctrl-C ends it")
    if not address.is_loopback(host) and not served.keys:
        say("note     anybody who reaches this address can use it: --api-key asks for a key")
    config = uvicorn.Config(
        application(served), log_level="warning", access_log=False, server_header=False, timeout_keep_alive=30,
        limit_concurrency=1000, h11_max_incomplete_event_size=64 * 1024, timeout_graceful_shutdown=2,
    )  # fmt: skip
    uvicorn.Server(config).run(sockets=[listener])
    return 0


def keys_of(flag: Sequence[str] | None) -> list[str]:
    """Those of --api-key, or of the variable LORA_API_KEY, where no list of processes shows them."""
    found = list(flag or ()) or list(filter(None, [os.environ.get("LORA_API_KEY")]))
    if any(not key.strip() for key in found):
        raise BadInput("empty key in --api-key: anybody would have it. Give a key, or leave the flag out")
    return found


def packages_missing() -> str | None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        where = f"{sys.executable} -m pip install 'lora[serve]'"
        return f"no package {error.name} for --serve: it is in the extra `serve`. Install it: {where}"
    return None
