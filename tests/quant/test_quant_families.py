"""Every family learns on packed weights, read from its own files, what it learns on the numbers they stand for."""

import pytest
import torch

from lora import ops
from lora.adapter.inject import inject
from lora.network.families import FAMILIES
from lora.pretrained import find, load_model
from lora.quant.linear import QuantLinear
from tests.helpers import as_written, close, randomise_adapter, some_tokens
from tests.mutation import mutation
from tests.network.test_families import family_config, folder_of, model_of

MULTIPLES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "head_dim": 8,
             "num_key_value_heads": 8}  # fmt: skip
SHAPES = {"odd": {}, "whole blocks": MULTIPLES}


def config_of(kind: str, shape: str) -> dict:
    raw = family_config(kind, seed=1)
    return raw | {name: value for name, value in SHAPES[shape].items() if raw.get(name) is not None}


def learned(model) -> list[torch.Tensor]:
    """The loss of documents longer than any window, and the gradients of the same random adapter."""
    tokens = some_tokens(50, model.config.vocab_size)
    hidden = model.trunk(tokens, [31, 19])
    loss = ops.cross_entropy(hidden, model.head_weight, tokens.roll(-1), cap=model.config.final_logit_softcapping)
    return [loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


F32, BF16 = torch.float32, torch.bfloat16


@mutation("lora/pretrained/quantised.py", 'len(original.header[name][1]) == 2 and ".layers." in name',
          "len(original.header[name][1]) == 2", case="nf4-llama")  # fmt: skip
@mutation("lora/pretrained/quantised.py", "len(original.header[name][1]) == 2", "len(original.header[name][1]) > 1",
          case="nf4-lfm2")  # fmt: skip
@mutation("lora/pretrained/load.py", "QuantLinear(packed, model.get_submodule(path).bias, dtype)",
          "QuantLinear(packed, None, dtype)", case="nf4-qwen2")  # fmt: skip
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(
    ("quant", "shape", "dtype"),
    [("nf4", "odd", F32), ("nf4", "whole blocks", BF16), ("int8", "odd", BF16), ("int8", "whole blocks", F32)],
    ids=["nf4", "nf4 bf16", "int8 bf16", "int8"],
)
def test_loss_and_gradients_are_those_on_the_numbers_recomputed_and_as_written_too(tmp_path, dtype, quant, shape, kind):
    raw = config_of(kind, shape)
    folder = folder_of(model_of(raw, dtype=torch.float32), raw, tmp_path / "model")
    base = find(str(folder), quant)
    packed, dense = load_model(base, dtype), load_model(str(folder), dtype)
    dense.load_state_dict({name: base.read(name, dtype) for name in dense.state_dict()})
    linears = {path for path, module in packed.named_modules() if isinstance(module, QuantLinear)}
    every = {path for path, module in dense.named_modules() if type(module) is torch.nn.Linear}
    assert linears == {path for path in every if ".layers." in path}  # no head, no embedding, no convolution's kernel
    before = load_model(str(folder), dtype)
    for model in (packed, dense, before):
        torch.manual_seed(0)
        inject(model.train(), 3, 6)
        randomise_adapter(model)
    found, right = learned(packed), learned(dense)
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    assert not close(right[0], learned(before)[0], 1e-6)
    packed.checkpoint_activations = True
    assert all(torch.equal(a, b) for a, b in zip(learned(packed), right, strict=True))
    with as_written():
        assert all(torch.equal(a, b) for a, b in zip(learned(packed), learned(dense), strict=True))
