"""transformers and PEFT as referees of every family: logits, training, answers, adapters both ways, merged folders.

Run with LORA_PARITY=1 it fails, not skips.
"""

import copy
import os
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

if os.environ.get("LORA_PARITY") == "1":
    import peft
    import transformers
else:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")

from lora.adapter import store
from lora.adapter.inject import lora_layers
from lora.adapter.peft_tensors import own_name
from lora.adapter.targets import find_targets, linears
from lora.data.batch import micro_batches
from lora.inference.generate import generate
from lora.inference.several import Several
from lora.pretrained import load_model
from lora.run.trainable import make_optimizer
from lora.text.chat import Example
from lora.train.step import flat, train_step
from tests import cli
from tests.adapters import write_adapter
from tests.helpers import close, far, objective_of, patched, randomise, some_tokens
from tests.mutation import mutation
from tests.network.test_families import NEW, family_config, folder_of, model_of
from tests.parity.test_parity_adapter import peft_patched, peft_paths
from tests.parity.test_parity_model import agree, pair, seen_as_they_say

REFEREED = [kind for kind in NEW if kind != "baichuan"]  # which transformers does not have
each = pytest.mark.parametrize("kind", REFEREED)

# ---- logits ----------------------------------------------------------------------------------------------------------


def documents(raw: dict, seed: int) -> tuple[list[torch.Tensor], list[int]]:
    """Documents of unequal lengths, the longest longer than windows, and the positions that they start at."""
    draw = random.Random(f"documents {seed}")
    lengths = [1, draw.randint(2, 6), draw.randint(40, 67), draw.randint(7, 30)]
    draw.shuffle(lengths)
    starts = [0, 0, 0, 0]
    starts[lengths.index(max(lengths))] = 5000 + 97 * seed
    return [some_tokens(n, raw["vocab_size"], seed + i) for i, n in enumerate(lengths)], starts


def one_by_one(reference, documents: list[torch.Tensor], starts: list[int]) -> torch.Tensor:
    return torch.cat([seen_as_they_say(reference, tokens, at) for tokens, at in zip(documents, starts, strict=True)])


@mutation("lora/network/rope_fields.py", "(turned / (turned - 2))", "(turned / turned)", case="0-hunyuan_v1_dense")
@mutation("lora/network/rope.py", "turns = torch.floor(positions.to(wide) / ", "turns = (positions.to(wide) / ",
          case="0-ministral3")  # fmt: skip
@each
@pytest.mark.parametrize("seed", range(25))
def test_logits_of_documents_in_one_batch_are_those_of_transformers_one_by_one(kind, seed):
    raw = family_config(kind, seed)
    ours, reference = pair(raw, seed)
    texts, starts = documents(raw, seed)
    positions = torch.cat([at + torch.arange(len(text)) for at, text in zip(starts, texts, strict=True)])
    found = ours(torch.cat(texts), [len(text) for text in texts], positions)
    assert found.std() > 0.5
    assert agree(found, reference, one_by_one, texts, starts)


# ---- training --------------------------------------------------------------------------------------------------------


DROPOUT = {"seed_oss": ("attention_dropout", "residual_dropout")}  # of the pretraining; the reference still draws it


def whole(model) -> tuple[str, ...]:
    """Names of targets that are Linears in the reference, too: no parts of a fused one."""
    fused = {part for _, parts in model.config.fused for part in parts}
    return tuple({path.rsplit(".", 1)[-1] for path in find_targets(model)} - fused)


def examples(raw: dict) -> list[Example]:
    """Two steps' worth, of which one in three tokens or all are trained."""
    draw = random.Random(7)
    made = []
    for seed in range(6):
        tokens = some_tokens(draw.randint(4, 40), raw["vocab_size"], seed).tolist()
        made.append(Example(tokens, [i > 0 and (seed % 2 == 0 or i % 3 == 0) for i in range(len(tokens))]))
    return made


def their_loss(model, example: Example) -> torch.Tensor:
    tokens = torch.tensor(example.tokens)
    labels = tokens.masked_fill(~torch.tensor(example.trained), -100)
    return F.cross_entropy(model(tokens[None]).logits[0, :-1], labels[1:], reduction="sum")


@mutation("lora/train/step.py", "part = objective(batch) / count", "part = objective(batch) / batch.count", case="lfm2")
@each
def test_five_steps_leave_the_losses_and_the_adapter_that_peft_and_adamw_leave(kind, tmp_path):
    """Ours in micro-batches of documents end to end, theirs one document at a time; weight decay, clipping."""
    raw = family_config(kind, 4) | {"rms_norm_eps": 1e-2} | dict.fromkeys(DROPOUT.get(kind, ()), 0.0)
    ours, reference = pair(raw, 4)
    patched(ours, targets=whole(ours)).train()
    store.save(ours, tmp_path, base="x", task="CAUSAL_LM")
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path, is_trainable=True).train()
    mine = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    named = {own_name(name, ("lora_A", "lora_B"), set()): p for name, p in theirs.named_parameters() if p.requires_grad}
    assert named.keys() == mine.keys()
    start = flat(mine.values())
    optimizer = make_optimizer(mine, SimpleNamespace(lr=0.0, weight_decay=0.1, lr_ratio_b=None), torch.device("cpu"))
    other = torch.optim.AdamW(named.values(), weight_decay=0.1)
    for step, lr in enumerate((5e-4, 1e-3, 1e-3, 5e-4, 2e-4)):
        chosen = [examples(raw)[i] for i in ((0, 1, 2), (3, 4, 5))[step % 2]]
        result = train_step(objective_of(ours), micro_batches(chosen, 50), optimizer, lr, max_norm=1.0)
        count, loss = sum(sum(example.trained) for example in chosen), 0.0
        for example in chosen:
            part = their_loss(theirs, example) / count
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        for group in other.param_groups:
            group["lr"] = lr
        other.step()
        other.zero_grad()
        assert abs(result.loss - loss) <= 1e-5 * loss and abs(result.grad_norm - norm) <= 1e-3 * norm
    assert far(flat(mine.values()), start, 1e-5)
    for name in mine:
        assert close(mine[name], named[name], 1e-4), name


# ---- answers ---------------------------------------------------------------------------------------------------------

NEW_TOKENS, TIE = 8, 1e-3


@torch.inference_mode()
def certain(model, prompt: list[int]) -> list[int]:
    """Their greedy answer to one prompt, up to where the two likeliest tokens are as good as tied."""
    tokens = torch.tensor([prompt])
    found = model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, do_sample=False,
        eos_token_id=None, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    best, second = torch.cat(found.logits).topk(2).values.unbind(-1)
    tied = (best - second < TIE).tolist()
    return found.sequences[0, len(prompt) :].tolist()[: tied.index(True) if True in tied else None]


@mutation("lora/network/short_convolution.py", "kernel.shape[1] - 1, before))", "kernel.shape[1] - 1))", case="lfm2")
@each
def test_greedy_answers_to_unequal_prompts_in_one_batch_are_theirs_to_each_alone(kind, tmp_path):
    """Of the base and of two adapters on it, beside it and merged; prompts from below to above a window's length."""
    raw = family_config(kind, 2)
    ours, reference = pair(raw, 2)
    prompts = [some_tokens(n, raw["vocab_size"], n).tolist() for n in (1, 4, 17, 30)]
    expected = {"base": [certain(reference, prompt) for prompt in prompts]}
    for name, seed in (("a", 1), ("b", 2)):
        adapted = patched(copy.deepcopy(ours), targets=whole(ours), seed=seed)
        store.save(adapted, tmp_path / name, base="x", task="CAUSAL_LM")
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path / "a", adapter_name="a")
    theirs.load_adapter(tmp_path / "b", "b")
    for name in ("a", "b"):
        theirs.set_adapter(name)
        expected[name] = [certain(theirs.eval(), prompt) for prompt in prompts]
    assert len({str(answers) for answers in expected.values()}) == 3
    assert sum(len(answer) for answers in expected.values() for answer in answers) > 0.8 * 3 * 4 * NEW_TOKENS
    sets = Several(ours)
    sets.add("a", tmp_path / "a")
    sets.add("b", tmp_path / "b")
    for name, merged in (("a", False), ("b", True), ("base", False), ("b", False), ("a", True)):
        sets.switch(name, merged)
        found = generate(ours, prompts, set(), NEW_TOKENS)
        assert [answer[: len(known)] for answer, known in zip(found, expected[name], strict=True)] == expected[name]


# ---- adapters and folders, both ways ---------------------------------------------------------------------------------


@mutation("lora/adapter/peft_tensors.py", "rows = tensor.split(sizes)", "rows = tensor.split(sizes)[::-1]",
          case="granitemoehybrid")  # fmt: skip
@each
def test_adapters_on_every_linear_go_to_peft_and_come_from_it(kind, tmp_path):
    """To PEFT where both have the Linears: ours have an A for each part of a fused one, its have one A for all."""
    raw = family_config(kind, 3)
    ours, reference = pair(raw, 3)
    tokens = some_tokens(40, raw["vocab_size"])
    before, another = ours(tokens), copy.deepcopy(ours)
    adapted = patched(copy.deepcopy(ours), targets=whole(ours))
    store.save(adapted, tmp_path / "ours", base="x", task="CAUSAL_LM")
    opened = peft.PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "ours").eval()
    assert peft_paths(opened) == set(lora_layers(adapted))
    assert agree(adapted(tokens), opened, seen_as_they_say, tokens) and far(before, adapted(tokens), 1e-5)

    theirs = peft_patched(reference, target_modules="all-linear")
    theirs.save_pretrained(tmp_path / "theirs")
    store.load(another, tmp_path / "theirs")
    assert set(lora_layers(another)) == linears(ours).keys() - {"lm_head"}
    assert agree(another(tokens), theirs, seen_as_they_say, tokens) and far(before, another(tokens), 1e-5)


def merged_by_the_command(base: Path, tmp_path: Path):
    """A random adapter on a folder, merged by merge.py: the model in transformers, and ours with the adapter."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(cli.model_folder() / name, base / name)
    write_adapter(tmp_path / "adapter", model=base)
    merged = ("--adapter", tmp_path / "adapter", "--out", tmp_path / "merged", "--dtype", "float32")
    done = cli.call("merge", *merged, cwd=tmp_path)
    assert done.code == 0, done.err
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype="auto", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours = load_model(str(base))
    store.load(ours, tmp_path / "adapter")
    return again.float().eval(), ours, done


@mutation("lora/pretrained/fused.py", "config.intermediate_size)", "config.hidden_size)", case="granitemoehybrid")
@pytest.mark.parametrize("kind", NEW)
def test_what_merge_py_writes_on_a_folder_of_theirs_loads_in_transformers_with_the_same_logits(tmp_path, kind):
    """Baichuan's base is not theirs; what is merged from it is a Llama."""
    raw = family_config(kind) | dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 300)
    ours, base = model_of(raw, 1, torch.float32), tmp_path / "base"
    if kind == "baichuan":
        folder_of(ours, raw, base)
    else:
        pair(raw, 1)[1].save_pretrained(base, max_shard_size="4KB")
        assert len(list(base.glob("*.safetensors"))) > 1
    merged, adapted, _ = merged_by_the_command(base, tmp_path)
    tokens = some_tokens(67, raw["vocab_size"])
    assert torch.equal(load_model(str(base))(tokens), ours(tokens))
    assert merged.config.model_type == ("llama" if kind == "baichuan" else kind)
    expected = seen_as_they_say(merged, tokens)
    assert close(adapted(tokens), expected, 1e-4) and far(ours(tokens), expected, 1e-4)


VISION = {
    "qwen3_5": {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 24,
                "num_position_embeddings": 16},
    "mistral3": {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
                 "num_attention_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14},
}  # fmt: skip


@pytest.mark.parametrize(("kind", "inside"), [("qwen3_5", "qwen3_5_text"), ("mistral3", "ministral3")])
def test_of_a_folder_that_sees_as_well_the_language_model_is_merged_and_the_rest_is_named(tmp_path, kind, inside):
    text = family_config(inside) | {"vocab_size": 300}
    parts = {"text_config": copy.deepcopy(text), "vision_config": VISION[kind]}
    config = transformers.AutoConfig.for_model(kind, tie_word_embeddings=False, **parts)
    whole = randomise(transformers.AutoModelForImageTextToText.from_config(config)).float().eval()
    whole.save_pretrained(tmp_path / "base")
    merged, adapted, done = merged_by_the_command(tmp_path / "base", tmp_path)
    assert re.search(r"without .*(visual|vision_tower) \(\d+ tensors\)", done.err)
    assert merged.config.model_type == inside
    tokens, ours = some_tokens(67, 300), load_model(str(tmp_path / "base"))
    assert agree(ours(tokens), whole, seen_as_they_say, tokens)
    assert close(adapted(tokens), seen_as_they_say(merged, tokens), 1e-4) and far(ours(tokens), adapted(tokens), 1e-4)
