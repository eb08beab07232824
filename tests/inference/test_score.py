"""A reward model scores: in Python as in training, merged as beside its base, each adapter by its own head."""

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora
from lora import pretrained
from lora.adapter import store
from lora.data.batch import collate
from lora.data.encode import encode
from lora.data.formats import Conversation
from lora.errors import BadInput
from lora.inference import several
from lora.inference.session import load_chat, open_sessions
from lora.methods import reward
from tests import cli
from tests.adapters import write_adapter, write_head
from tests.mutation import mutation
from tests.scripts.test_commands import ok

HOW = {"device": "cpu", "dtype": "float32"}
CHOSEN, REJECTED = (
    [{"role": "user", "content": "What is 1 and 2?"}, {"role": "assistant", "content": text}]
    for text in ("It is 3.", "Ask somebody else, please.")
)
LONG = [*CHOSEN, {"role": "user", "content": "And 2 and 2?"}, {"role": "assistant", "content": "4"}]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    for seed, name in enumerate("ab", 1):
        write_head(write_adapter(folder / name, seed), seed)
    write_adapter(folder / "talker", 3)
    ok(cli.call("merge", "--adapter", "a", "--out", "merged", "--dtype", "float32", "--no-receipt", cwd=folder))
    return folder


def as_trained(folder) -> list[float]:
    """Both scores of the pair as training computes them, the adapter beside its base."""
    base = pretrained.find(str(cli.model_folder()))
    model = pretrained.load_model(base)
    store.load(model, folder)
    pair = Conversation(CHOSEN, "here", rejected=REJECTED, margin=0.0)
    examples = encode([pair], load_chat(base, folder), 256, kind=reward.KIND)
    with torch.no_grad():
        return reward.scores(model, collate(list(examples))).tolist()


@mutation("lora/inference/session.py", "tokens = torch.tensor(chat.tokens[:end]", "tokens = torch.tensor(chat.tokens")
def test_a_score_in_python_is_what_training_computed(work):
    chat, expected = lora.open(adapter=work / "a", **HOW), as_trained(work / "a")
    found = [chat.score(CHOSEN), chat.score(REJECTED)]
    assert found == pytest.approx(expected, abs=1e-5) and abs(found[0] - found[1]) > 1e-2
    assert isinstance(found[0], float) and chat.messages == []
    assert abs(chat.score(LONG) - chat.score(CHOSEN)) > 1e-3


@mutation("merge.py", "        value_head.save(model, folder)\n", "")
@mutation("lora/pretrained/load.py", "value_head.place(model, value_head.of_base(base, model))", "pass")
def test_a_merged_model_has_the_head_beside_it_and_scores_as_its_adapter_does(work):
    assert (work / "merged/value_head.safetensors").read_bytes() == (work / "a/value_head.safetensors").read_bytes()
    assert lora.open(work / "merged", **HOW).score(CHOSEN) == pytest.approx(as_trained(work / "a")[0], abs=1e-5)
    assert lora.load_model(str(work / "merged")).v_head.summary.weight.dtype == torch.float32


@mutation("lora/adapter/value_head.py", "if base.header.keys() >= SHAPES.keys():", "if False:")
def test_a_head_among_the_weights_as_trl_wrote_it_opens(work, tmp_path):
    folder = shutil.copytree(work / "merged", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors") | load_file(folder / "value_head.safetensors")
    (folder / "value_head.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert lora.open(folder, **HOW).score(CHOSEN) == lora.open(work / "merged", **HOW).score(CHOSEN)


@mutation("lora/inference/session.py", "    if head is None:", "    if False:")
@mutation("lora/inference/session.py", 'messages[-1]["role"] != "assistant"', "False", case="no answer")
@mutation("lora/inference/session.py", "if end > limit:", "if False:", case="too long")
@pytest.mark.parametrize("case", ["no value head", "no answer", "too long"])
def test_what_cannot_be_scored_is_one_line(work, case):
    chat = lora.open(adapter=work / ("talker" if case == "no value head" else "a"), **HOW)
    long = [CHOSEN[0], {"role": "assistant", "content": "word " * 300}]
    messages = {"no value head": CHOSEN, "no answer": CHOSEN[:1], "too long": long}[case]
    with pytest.raises(BadInput, match=case) as raised:
        chat.score(messages)
    assert len(raised.value.problems) == 1
    if case == "no answer":
        with pytest.raises(BadInput, match=case):
            chat.score([])


@mutation("lora/inference/several.py", "        value_head.place(self.model, head)\n", "")
@mutation("lora/adapter/sets.py", "    value_head.place(model, adapter.head)", "    pass")
def test_of_several_adapters_each_has_its_own_head_or_none(work):
    sessions = open_sessions(None, [str(work / name) for name in ("a", "talker", "b")], **HOW)
    alone = {name: lora.open(adapter=work / name, **HOW).score(CHOSEN) for name in "ab"}
    assert abs(alone["a"] - alone["b"]) > 1e-2
    for name in ("a", "b", "talker", "base", "b", "a", "base"):
        if name in alone:
            assert sessions[name].score(CHOSEN) == pytest.approx(alone[name], abs=1e-6)
        else:
            with pytest.raises(BadInput, match="no value head"):
                sessions[name].score(CHOSEN)
    empty = pretrained.empty_model(base := pretrained.find(str(cli.model_folder())))
    several.dry_load(empty, work / "a", base)
    assert not hasattr(empty, "v_head")


def test_generate_says_that_a_reward_model_scores_and_it_still_talks(work):
    for which in (("--adapter", "a"), ("--model", "merged")):
        done = cli.ask(*which, "--prompt", "Hello.", cwd=work)
        assert done.code == 0 and done.out.strip()
        assert re.search(r"note     \S+ is a reward model: evaluate.py, or score\(\) in Python", done.err)
    assert "reward model" not in cli.ask("--adapter", "talker", "--prompt", "Hello.", cwd=work).err


# ---- where the head goes ---------------------------------------------------------------------------------------------


@mutation("lora/export/derive.py", "value_head.place(model, shared_head(adapters, model))", "pass")
def test_a_sum_of_adapters_takes_the_one_head_along_and_refuses_two(work, tmp_path):
    ok(done := cli.call("merge", "--combine", work / "a", f"{work / 'talker'}:0.5", "--out", "sum", cwd=tmp_path))
    assert f"head     the value head of {work / 'a'} goes along" in done.err
    assert (tmp_path / "sum/value_head.safetensors").read_bytes() == (work / "a/value_head.safetensors").read_bytes()
    assert "It is a reward model" not in (tmp_path / "sum/README.md").read_text()  # nobody knows how it was trained
    refused = cli.call("merge", "--combine", work / "a", work / "b", "--out", "two", cwd=tmp_path)
    assert refused.code == 2 and len(refused.errors) == 1 and "different value heads" in refused.err
    assert not (tmp_path / "two").exists()


@mutation("lora/export/derive.py", "value_head.place(model, value_head.of_base(tuned, model))", "pass")
def test_what_a_full_fine_tune_changed_brings_its_head(work, tmp_path):
    ok(cli.call("merge", "--extract", cli.model_folder(), work / "merged", "--rank", 4, "--out", "x", cwd=tmp_path))
    assert lora.open(adapter=tmp_path / "x", **HOW).score(CHOSEN) == pytest.approx(as_trained(work / "a")[0], abs=1e-2)


@mutation("merge.py", 'if args.format == "gguf" and value_head.of(model):', "if False:")
@pytest.mark.parametrize("alone", [(), ("--adapter-only",)], ids=["model", "adapter"])
def test_a_gguf_file_has_no_place_for_a_head_and_that_is_said(work, tmp_path, alone):
    argv = ("--out", "x.gguf", "--format", "gguf", *alone)
    ok(done := cli.call("merge", "--adapter", work / "a", *argv, cwd=tmp_path))
    assert "warning: value_head.safetensors stays behind: a GGUF file has no place for a value head" in done.err
    ok(done := cli.call("merge", "--adapter", work / "talker", *argv, "--overwrite", cwd=tmp_path))
    assert "value_head" not in done.err


@mutation("merge.py", "passport.TEMPLATE, value_head.FILE, receipt", "passport.TEMPLATE, receipt")
def test_a_merged_model_with_a_head_is_replaced_by_one_without(work, tmp_path):
    shutil.copytree(work / "merged", tmp_path / "out")
    ok(cli.call("merge", "--adapter", work / "talker", "--out", "out", "--overwrite", "--no-receipt", cwd=tmp_path))
    assert not (tmp_path / "out/value_head.safetensors").exists()


@mutation("lora/export/receipt.py", "        value_head.place(model, None)\n", "")
def test_a_receipt_is_made_of_a_reward_model_too(work, tmp_path):
    out = ok(cli.call("merge", "--adapter", work / "a", "--out", "out", cwd=tmp_path))
    assert "lost of what the adapter changed" in out and (tmp_path / "out/value_head.safetensors").exists()
