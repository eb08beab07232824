"""transformers as referee of full fine-tuning: the same losses and weights, and it opens the folder. LORA_PARITY=1."""

import pytest
import torch

from lora.data.batch import micro_batches
from lora.pretrained import load_model
from lora.run.trainable import AllWeights
from lora.train.step import train_step
from tests.helpers import close, far, objective_of, snapshot, some_tokens, tiny_config
from tests.parity.test_parity_model import pair, transformers
from tests.run.test_full import EXAMPLES, train


@pytest.mark.parametrize("shape", [{"tie_word_embeddings": True}, {}, {"model_type": "qwen2"}])
def test_five_steps_equal_those_of_transformers(shape):
    """In float32, AdamW on every weight, right-padded with its own loss: losses and weights within 1e-5."""
    ours, theirs = pair(tiny_config(**shape), seed=3)
    before, batches = snapshot(ours), micro_batches(EXAMPLES, 12)
    masters = AllWeights(ours, torch.float32)
    optimizer = torch.optim.AdamW(masters.parameters.values(), weight_decay=0.1)
    expected = torch.optim.AdamW(theirs.train().parameters(), lr=1e-3, weight_decay=0.1)
    longest = max(len(e.tokens) for e in EXAMPLES)
    ids, mask, labels = (torch.full((len(EXAMPLES), longest), fill) for fill in (0, 0, -100))
    for row, e in enumerate(EXAMPLES):
        n = len(e.tokens)
        ids[row, :n], mask[row, :n] = torch.tensor(e.tokens), 1
        labels[row, :n] = torch.tensor(e.tokens).where(torch.tensor(e.trained), -100)
    for _ in range(5):
        result = train_step(objective_of(ours), batches, optimizer, 1e-3)
        masters.sync_model()
        loss = theirs(input_ids=ids, attention_mask=mask, labels=labels).loss
        expected.zero_grad()
        loss.backward()
        expected.step()
        assert close(torch.tensor(result.loss), loss, 1e-5)
    for name, weight in theirs.state_dict().items():
        if name in before:
            assert close(ours.state_dict()[name], weight, 1e-5) and far(before[name], weight, 1e-5), name


def test_transformers_opens_the_folder_and_computes_the_same(tmp_path):
    done = train("out", cwd=tmp_path)
    assert done.code == 0, done.err
    tokens = some_tokens(40, 300)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert close(theirs(tokens[None]).logits[0], load_model(str(tmp_path / "out"))(tokens), 1e-4)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
