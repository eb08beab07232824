"""The shapes that bench/hybrid.py compares."""

import pytest
import torch

from bench import hybrid_sides
from lora.network.config import ModelConfig
from lora.network.decoder import Model
from tests.mutation import mutation


@mutation("bench/hybrid_sides.py", '"llama", 24, 1024, 5904,', '"llama", 24, 1024, 5600,')
def test_both_models_have_as_many_weights_layers_and_words():
    with torch.device("meta"):
        sides = [Model(ModelConfig.from_json(hybrid_sides.config(side, False))) for side in ("ours", "llama")]
    counts = [sum(p.numel() for p in model.parameters()) for model in sides]
    assert counts[0] == pytest.approx(counts[1], rel=0.003) and counts[0] == pytest.approx(0.752e9, rel=0.003)
    assert len({(len(m.model.layers), *m.model.embed_tokens.weight.shape) for m in sides}) == 1
    assert [m.config.mixers.count("attention") for m in sides] == [6, 24]
