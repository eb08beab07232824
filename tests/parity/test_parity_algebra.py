"""PEFT as referee of combined adapters: it reads them, and its own exact way of combining gives the same.

LORA_PARITY=1 makes a missing transformers or peft a failure; without it the file is skipped.
"""

import os

import pytest
import torch

from lora.adapter.variants import RsLoRALinear
from tests import cli
from tests.adapters import write_adapter
from tests.helpers import close, far

if os.environ.get("LORA_PARITY") == "1":
    import peft
    import transformers
else:
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
TOL = 2e-5


def base():
    return transformers.AutoModelForCausalLM.from_pretrained(cli.model_folder(), dtype=torch.float32)


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("patterns", [False, True], ids=["one rank", "rank_pattern"])
def test_peft_reads_a_combined_adapter_as_its_own_exact_combination(tmp_path, patterns):
    write_adapter(tmp_path / "a", 1, rank=4)
    targets = ("attention", "down_proj") if patterns else ("all",)
    write_adapter(tmp_path / "b", 2, rank=3, alpha=5, kind=RsLoRALinear, targets=targets)
    done = cli.call("merge", "--combine", "a:0.7", "b:-0.4", "--out", "c", cwd=tmp_path)
    assert done.code == 0, done.err
    ours = logits(peft.PeftModel.from_pretrained(base(), tmp_path / "c"))
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "a", adapter_name="a")
    alone = logits(theirs)
    theirs.load_adapter(tmp_path / "b", adapter_name="b")
    if patterns:  # PEFT combines only what is on the same modules: there the two ΔW are added as they are
        model = base()
        for name, weight in (("a", 0.7), ("b", -0.4)):
            theirs.set_adapter(name)
            for path, layer in theirs.base_model.model.named_modules():
                if hasattr(layer, "lora_A") and name in layer.lora_A:
                    model.get_submodule(path).weight.data += weight * layer.get_delta_weight(name)
        assert close(ours, logits(model), TOL)
    else:
        theirs.add_weighted_adapter(["a", "b"], [0.7, -0.4], "c", combination_type="cat")
        theirs.set_adapter("c")
        assert close(ours, logits(theirs), TOL)
    assert far(ours, logits(base()), TOL) and far(ours, alone, TOL)
