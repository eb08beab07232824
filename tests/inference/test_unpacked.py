"""A packed base answers the same whether there is room for plain Linears or not, and takes the memory it is said to."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora import device as machine
from lora import pretrained
from lora.adapter import store
from lora.adapter.inject import lora_layers
from lora.adapter.variants import DoRALinear
from lora.inference import several, unpacked
from lora.inference.generate import generate
from lora.inference.session import open_session, open_sessions
from lora.ops.fast_decoding import for_decoding
from lora.quant import nf4
from lora.quant.linear import QuantLinear
from lora.run.rollouts import Rollouts
from tests import cli
from tests.adapters import deltas, write_adapter
from tests.helpers import close, far
from tests.methods.linked import prompts_file, rewarded
from tests.mutation import mutation
from tests.quantised_files import PACKINGS, base_path, trained_on, write_models, write_packed_adapter
from tests.scripts.test_commands import ok

ROOM, NO_ROOM = 2**60, 0
PROMPTS = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]]
TOKENS = torch.arange(3, 60)
ON_CPU = {"device": "cpu", "dtype": "float32", "max_new_tokens": 12}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    write_models(folder)
    for quant in PACKINGS:
        write_packed_adapter(folder, quant, quant)
    write_packed_adapter(folder, "other", "nf4", seed=2)
    write_packed_adapter(folder, "dora", "nf4", seed=3, kind=DoRALinear)
    write_adapter(folder / "plain", 4, model=folder / "model")
    return folder


def has_room(monkeypatch, free):
    monkeypatch.setattr(machine, "free_memory", lambda device: free)


def packed(model) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


def answers(model):
    return generate(model, PROMPTS, set(), 12)


def reference(work, adapter, quant):
    """The base of a training as it was packed, with the adapter beside it."""
    model = pretrained.load_model(trained_on(work, quant))
    if adapter:
        store.load(model, work / adapter)
    return model


# ---- the decision ----------------------------------------------------------------------------------------------------


@mutation("lora/inference/unpacked.py", "SHARE * copies", "copies")
@given(st.integers(0, 30_000), st.integers(1, 3))
def test_plain_linears_are_chosen_where_they_fit_into_half_of_the_free_memory(free, copies):
    sizes = {(64, 32): torch.bfloat16, (16, 8): torch.float32}
    linears = [QuantLinear(nf4.pack(shape, [torch.ones(shape)]), None, dtype) for shape, dtype in sizes.items()]
    model = torch.nn.Sequential(*linears)
    assert unpacked.dense_bytes(model) == 2 * 64 * 32 + 4 * 16 * 8
    assert unpacked.fits(model, free, copies) == (copies * (2 * 64 * 32 + 4 * 16 * 8) <= free / 2)


def test_without_anything_packed_there_is_always_room_and_unknown_memory_is_not_taken(work):
    plain = pretrained.load_model(str(work / "model"))
    assert unpacked.fits(plain, 0) and unpacked.fits(plain, None)
    assert not unpacked.fits(reference(work, None, "nf4"), None)


# ---- a session -------------------------------------------------------------------------------------------------------


@mutation(
    "lora/inference/unpacked.py",
    "plain_linear(module, module.weight)",
    "plain_linear(module, module.weight * 1.01)",
    case="room-base",
)
@mutation("lora/inference/unpacked.py", "    merge_and_unload(model)\n", "", case="room-nf4")
@mutation(
    "lora/ops/fast_decoding.py",
    "any(m.drops or not isinstance(m.stored, Tensor) for m in modules)",
    "any(m.drops for m in modules)",
    case="no room-nf4",
)
@pytest.mark.parametrize("adapter", [*PACKINGS, "dora", "base"])
@pytest.mark.parametrize("free", [ROOM, NO_ROOM], ids=["room", "no room"])
def test_greedy_answers_are_those_of_the_trained_model_with_room_and_without(work, monkeypatch, capsys, free, adapter):
    has_room(monkeypatch, free)
    quant, folder = adapter if adapter in PACKINGS else "nf4", None if adapter == "base" else work / adapter
    if adapter == "base":
        session = open_session(work / "model", quant="nf4", **ON_CPU)
    else:
        session = open_session(adapter=folder, **ON_CPU)
    trained = reference(work, folder and adapter, quant)
    assert close(session.model(TOKENS), trained(TOKENS), 1e-5)
    assert answers(session.model) == answers(trained)
    assert far(pretrained.load_model(str(work / "model"))(TOKENS), trained(TOKENS), 1e-5)

    said = "the base stays packed" in capsys.readouterr().err
    if free == ROOM:
        assert not packed(session.model) and not lora_layers(session.model) and not said
    else:
        assert len(packed(session.model)) == 14 and len(lora_layers(session.model)) == (0 if adapter == "base" else 14)
        with for_decoding(session.model.groups()):
            assert not any("joined" in vars(module) for module in session.model.model.modules())  # would hold dq(W)
        assert said


# ---- several ---------------------------------------------------------------------------------------------------------


@mutation(
    "lora/inference/session.py",
    "partial(sets.switch, name, merged)",
    "partial(sets.switch, name, True)",
    case="no room",
)
@mutation(
    "lora/inference/several.py",
    "return pretrained.find(model, passport.packing(asked, first))",
    "return pretrained.find(model, asked)",
    case="room",
)
@pytest.mark.parametrize("free", [ROOM, NO_ROOM], ids=["room", "no room"])
def test_several_adapters_share_the_packed_base_and_its_column_is_that_base(work, monkeypatch, free):
    has_room(monkeypatch, free)
    adapters = [str(work / name) for name in ("nf4", "dora", "other")]
    sessions = open_sessions(None, adapters, **ON_CPU)
    for name in ("base", "nf4", "dora", "other", "base", "nf4"):
        sessions[name].before()
        trained = reference(work, None if name == "base" else name, "nf4")
        assert close(sessions[name].model(TOKENS), trained(TOKENS), 1e-5)
        assert answers(sessions[name].model) == answers(trained)
        assert len(packed(sessions[name].model)) == (0 if free == ROOM else 14)


@mutation(
    "lora/inference/several.py",
    "passport.numbers(quant) != passport.numbers(trained[first])",
    "False",
)
def test_adapters_of_different_packings_are_refused_by_name_each_in_a_line(work, tmp_path):
    names = [work / name for name in ("nf4", "int8", "plain", "other")]
    several_ways = (
        ("generate", "--adapter", *names, "--compare", "--prompt", "Hello."),
        ("evaluate", "--adapter", *names, "--data", cli.data_file()),
        ("merge", "--combine", *names, "--out", "sum"),
    )
    for command, *argv in several_ways:
        done = cli.call(command, *argv, cwd=tmp_path)
        assert done.code == 2 and [error.split(": ")[1] for error in done.errors] == [
            f"different packings in {work / 'int8'}",
            f"different packings in {work / 'plain'}",
        ]
        assert "nf4 was trained on nf4, this on int8" in done.errors[0] and "this on 16 bit" in done.errors[1]
    base = several.find_base(str(work / "model"), "int8", [str(name) for name in names])
    assert base.quant == "int8"  # as asked; each adapter is then compared with it


def test_kept_blocks_and_the_same_file_dequantised_are_one_packing(work, tmp_path):
    write_adapter(tmp_path / "wide", model=work / "q4.gguf")
    base = several.find_base(None, None, [str(tmp_path / "wide"), str(work / "keep")])
    assert base.quant is None
    assert several.find_base(None, None, [str(work / "keep"), str(tmp_path / "wide")]).quant == "keep"


# ---- the commands ----------------------------------------------------------------------------------------------------


def no_room():
    machine.free_memory = lambda device: 0


def test_generate_packs_a_base_without_an_adapter(work, tmp_path):
    for quant in PACKINGS:
        argv = ("--model", base_path(work, quant), "--quant", quant, "--prompt", "What is 1 and 2?")
        with_room, without = (cli.ask(*argv, cwd=tmp_path, before=before) for before in (lambda: None, no_room))
        assert ok(with_room) == ok(without) and ok(with_room).strip()
        assert "stays packed" in without.err and "stays packed" not in with_room.err


@mutation("evaluate.py", "with unpacked.merged_if(dense, model):", "with unpacked.merged_if(True, model):", case="keep")
@pytest.mark.parametrize("adapter", ["nf4", "keep"])
def test_evaluate_scores_the_same_with_room_and_without(work, tmp_path, adapter):
    def watched():
        """No room, and a merged weight is an error."""
        no_room()
        from lora.adapter import merge

        merge.merged_weight = None

    argv = ("--adapter", work / adapter, "--data", cli.data_file(), "--rows", 4, "--max-new-tokens", 8, *cli.ON_CPU)
    found = {}
    for name, before in (("room", lambda: None), ("none", watched)):
        done = cli.call("evaluate", *argv, "--out", f"{name}.json", cwd=tmp_path, before=before)
        assert done.code == 0, done.err
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())["figures"]
        found[f"{name} texts"] = (tmp_path / f"{name}.predictions/{adapter}.jsonl").read_text()
    assert found["room texts"] == found["none texts"]
    for column, figures in found["room"].items():
        assert figures == pytest.approx(found["none"][column], rel=1e-4, abs=1e-6)


# ---- sampling in a training ------------------------------------------------------------------------------------------


def test_a_policy_samples_the_same_answers_with_room_and_without(work, tmp_path):
    rows = {}
    for name, before in (("room", lambda: None), ("none", no_room)):
        inputs = ("--model", work / "model", "--quant", "nf4", "--data", prompts_file(), "--out", name)
        how = ("--method", "grpo", "--max-steps", 2, "--batch-size", 3, "--rank", 4, "--lr", 0.01, *cli.ON_CPU)
        done = cli.call("train", *inputs, *how, *rewarded("grpo"), cwd=tmp_path, before=before)
        assert done.code == 0, done.err
        assert ("stays packed" in done.err) == (name == "none")
        rows[name] = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    for one, other in zip(rows["room"], rows["none"], strict=True):
        for key in ("reward", "entropy", "length"):
            assert one[key] == pytest.approx(other[key], rel=1e-3)


@mutation(
    "lora/run/rollouts.py",
    "self.carried.setdefault(MERGED, int(unpacked.fits(self.model, free)))",
    "self.carried[MERGED] = int(unpacked.fits(self.model, free))",
)
def test_a_resumed_run_samples_as_it_did_before_whatever_memory_is_free(work):
    run, model = object.__new__(Rollouts), reference(work, "nf4", "nf4")
    for first, then in ((ROOM, NO_ROOM), (NO_ROOM, ROOM)):
        run.model, run.carried = model, {}
        before = run._fits(first)
        run.carried = json.loads(json.dumps(run.carried))
        assert run._fits(then) == before == (first == ROOM)
    run.model, run.carried = pretrained.load_model(str(work / "model")), {}
    assert run._fits(NO_ROOM) and run.carried == {}  # nothing is packed


# ---- adapters made of others -----------------------------------------------------------------------------------------


@mutation(
    "lora/export/derive.py",
    "find_base(args.model, None, adapters, args.no_verify)",
    "pretrained.find(args.model or adapters[0])",
)
def test_a_combined_adapter_is_one_of_the_same_packing(work, tmp_path):
    ok(cli.call("merge", "--combine", f"{work / 'nf4'}:0.5", f"{work / 'other'}:-1", "--out", "sum", cwd=tmp_path))
    theirs, ours = (json.loads((at / "passport.json").read_text())["base"] for at in (work / "nf4", tmp_path / "sum"))
    assert ours == theirs and ours["quant"] == "nf4"
    one, two, sums = (deltas(at, work / "model") for at in (work / "nf4", work / "other", tmp_path / "sum"))
    assert all(close(sums[path], 0.5 * one[path] - two[path], 1e-6) for path in sums)
    assert ok(cli.ask("--adapter", "sum", "--prompt", "Hello.", cwd=tmp_path)) is not None
