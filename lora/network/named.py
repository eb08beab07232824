"""Modules whose parts the hub calls otherwise in some families."""

from collections.abc import Mapping

from torch import nn


class HubNamed(nn.Module):
    """Its code says `self.o_proj` everywhere; `names` says that this family's files, and so its modules and adapters,
    have `out_proj`."""

    names: Mapping[str, str] = {}

    def __init__(self, names: Mapping[str, str]):
        super().__init__()
        self.__dict__["names"] = names

    def __getattr__(self, name: str):
        return super().__getattr__(self.names.get(name, name))

    def __setattr__(self, name: str, value) -> None:
        super().__setattr__(self.names.get(name, name), value)
