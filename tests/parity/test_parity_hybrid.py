"""transformers as referee of Gated DeltaNet where both round. Run with LORA_PARITY=1 it fails, not skips."""

import os

import pytest
import torch

if os.environ.get("LORA_PARITY") == "1":
    import transformers
else:
    transformers = pytest.importorskip("transformers")

from lora.network.config import ModelConfig
from lora.network.delta import GatedDeltaNet
from lora.ops import fast_gated_delta, plain
from tests.helpers import DELTAS, as_true_as, randomise, tiny_config
from tests.mutation import mutation

transformers.logging.set_verbosity_error()
SIZES = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 24,
         "hidden_size": 48}  # fmt: skip


def gradients(form, given: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Outputs and gradients of `form`, every input in `dtype` but in float32 what stays wide."""
    given = [x.detach().to(dtype if x.dtype == torch.bfloat16 else torch.promote_types(dtype, x.dtype)) for x in given]
    given = [x.requires_grad_() for x in given]
    found = form(*given)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(5)).bfloat16()
    return [found, *torch.autograd.grad(found, given, weights.to(found.dtype))]


@mutation("lora/ops/fast_gated_delta.py", "self.dtype, self.layout = v.shape[1], wide(v.dtype),",
          "self.dtype, self.layout = v.shape[1], v.dtype,")  # fmt: skip
@pytest.mark.parametrize("seed", range(3))
def test_in_bfloat16_chunks_are_as_near_to_float64_as_the_references(seed):
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    random, T = torch.Generator().manual_seed(seed), 200

    def normal(*shape):
        return torch.nn.functional.silu(torch.randn(shape, generator=random)).bfloat16()

    given = [normal(T, 2, 32), normal(T, 2, 32), normal(T, 4, 24), -torch.rand(T, 4, generator=random),
             torch.rand(T, 4, generator=random).bfloat16()]  # fmt: skip

    def ours(*x, form=fast_gated_delta):
        return form.gated_delta(*x, [T])[0]

    def reference(*x):
        return torch_chunk_gated_delta_rule(*(y[None] for y in x), use_qk_l2norm_in_kernel=True)[0][0]

    truth = gradients(lambda *x: ours(*x, form=plain), given, torch.float64)
    found, theirs = (gradients(form, given, torch.bfloat16) for form in (ours, reference))
    decay = 4  # the gradient of log α, in float32; what it comes from is in bfloat16
    for i, row in enumerate(zip(found, theirs, truth, strict=True)):
        assert as_true_as(*row, floor=2**-9 if i == decay else 2**-20)


@pytest.mark.parametrize("seed", range(3))
def test_in_bfloat16_the_whole_layer_is_as_near_to_float64_as_the_references(seed):
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

    raw = tiny_config(**DELTAS | SIZES)
    ours = randomise(GatedDeltaNet(ModelConfig.from_json(raw), 0), seed).bfloat16()
    theirs = Qwen3_5GatedDeltaNet(transformers.AutoConfig.for_model(**raw), 0).bfloat16()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(150, 48, generator=torch.Generator().manual_seed(seed)).bfloat16()

    def run(layer, dtype):
        layer.to(dtype)
        return gradients(lambda x: layer(x, None, [150]) if layer is ours else layer(x[None])[0], [x], dtype)

    found, reference = run(ours, torch.bfloat16), run(theirs, torch.bfloat16)
    for row in zip(found, reference, run(ours, torch.float64), strict=True):
        assert as_true_as(*row)
