"""Combined adapters are the sum of their ΔW, cut ones the nearest of their rank, extracted ones what tuning changed."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from lora.adapter import algebra
from lora.adapter.inject import lora_layers, patch
from lora.adapter.layer import LoRALinear
from lora.adapter.merge import unload
from lora.adapter.variants import DoRALinear, PiSSALinear, RsDoRALinear, RsLoRALinear
from tests import cli
from tests.adapters import deltas, write_adapter
from tests.helpers import close, far, patched, randomise, randomise_adapter, some_tokens, tiny_model
from tests.mutation import mutation
from tests.scripts.test_bad_input import FORM, MORE

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CALM = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}  # other work may share the machine
Q0 = "model.layers.0.self_attn.q_proj"


def random_factors(rank, seed=0, out=11, in_=7):
    random = torch.Generator().manual_seed(seed)
    shapes = (rank, in_), (out, rank)
    return tuple(torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes)


# ---- combine ---------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(7, 11), nn.Linear(5, 3)


ADAPTERS = st.tuples(
    st.floats(-3, 3),
    st.integers(1, 9),
    st.floats(0.5, 64),
    st.sampled_from([LoRALinear, RsLoRALinear]),
    st.sampled_from([("a",), ("b",), ("a", "b")]),
)


@mutation("lora/adapter/algebra.py", "weight * B for weight, _, B in of", "B for weight, _, B in of")
@settings(max_examples=40, **CALM)
@given(st.lists(ADAPTERS, min_size=1, max_size=4), st.integers(0, 1000))
def test_combining_equals_summing_delta_in_float64(adapters, seed):
    """Any weights, ranks, alphas, rsLoRA or not, on any of the modules."""
    model = randomise(Two().double(), seed)
    terms, sums, ranks = [], {}, {}
    for weight, rank, alpha, kind, paths in adapters:
        patch(model, {path: kind(model.get_submodule(path), rank, alpha, dtype=torch.float64) for path in paths})
        randomise_adapter(model, seed := seed + 1)
        for path, layer in lora_layers(model).items():
            scaling = alpha / (rank**0.5 if kind is RsLoRALinear else rank)
            delta = weight * scaling * torch.einsum("or,ri->oi", layer.lora_B.data, layer.lora_A.data)
            sums[path], ranks[path] = sums.get(path, 0) + delta, ranks.get(path, 0) + rank
        terms.append((weight, {path: algebra.folded(layer) for path, layer in lora_layers(model).items()}))
        unload(model)
    algebra.patch(model, algebra.combine(terms), torch.float64)
    layers = lora_layers(model)
    assert {path: layer.rank for path, layer in layers.items()} == ranks
    assert all(layer.scaling == 1 and close(layer.delta(), sums[path], 1e-12) for path, layer in layers.items())


def recombined(model, *weights, dtype=torch.float64):
    """The model with its own adapter as many times as there are weights."""
    maps = {path: algebra.folded(layer) for path, layer in lora_layers(model).items()}
    unload(model)
    algebra.patch(model, algebra.combine([(weight, maps) for weight in weights]), dtype)
    return model


@mutation("lora/adapter/algebra.py", "layer.scaling * B.double()", "B.double()")
@pytest.mark.parametrize("alpha", [5, 8])
def test_one_adapter_at_weight_1_is_itself(alpha):
    tokens = some_tokens()
    base = tiny_model()(tokens)
    model = patched(tiny_model(), alpha=alpha)
    adapter = model(tokens)
    assert close(recombined(model, 1)(tokens), adapter, 1e-12) and far(adapter, base, 1e-12)


def test_an_adapter_less_itself_is_the_base():
    tokens = some_tokens()
    base = tiny_model()(tokens)
    model = recombined(patched(tiny_model()), 1, -1)
    assert close(model(tokens), base, 1e-12)
    assert far(recombined(patched(tiny_model()), 1, 1)(tokens), base, 1e-12)


def test_pissa_adds_up_with_its_start_subtracted_and_dora_does_not():
    layer = PiSSALinear(randomise(nn.Linear(7, 11).double()), 3, 5, dtype=torch.float64)
    layer.lora_A.data *= 1.5
    A, B = algebra.folded(layer)
    delta = 5 / 3 * (layer.lora_B @ layer.lora_A - layer.start_B @ layer.start_A)
    assert close(B @ A, delta, 1e-12) and far(delta, torch.zeros_like(delta), 1e-12)
    kinds = (LoRALinear, RsLoRALinear, PiSSALinear, DoRALinear, RsDoRALinear)
    assert [algebra.is_low_rank(kind) for kind in kinds] == [True, True, True, False, False]


# ---- cut -------------------------------------------------------------------------------------------------------------

SHAPES = st.tuples(st.integers(1, 12), st.integers(2, 12), st.integers(2, 12), st.integers(0, 10**6))


@settings(max_examples=40, **CALM)
@given(SHAPES, st.integers(1, 13))
def test_a_cut_map_is_the_nearest_of_its_rank(shape, rank):
    """Eckart & Young: its error is the tail of the singular values, here numpy's of the whole matrix."""
    r, out, in_, seed = shape
    A, B = random_factors(r, seed, out, in_)
    delta = B @ A
    values = np.linalg.svd(delta.numpy(), compute_uv=False)
    tail = float(np.sqrt((values[rank:] ** 2).sum()))
    for svd in (algebra.svd_of_product(A, B), algebra.svd_of_matrix(delta)):
        cut = algebra.cut(svd, rank)
        assert cut.A.shape == (len(cut.A), in_) and cut.B.shape == (out, len(cut.A))
        assert len(cut.A) <= min(rank, out, in_)
        for error in (cut.lost, (delta - cut.B @ cut.A).norm().item()):
            assert abs(error - tail) <= 1e-12 * max(1, values[0])
        assert abs(cut.norm - delta.norm().item()) <= 1e-12 * max(1, values[0])


@mutation("lora/adapter/algebra.py", "S.square().cumsum(0)", "S.cumsum(0)")
@settings(max_examples=40, **CALM)
@given(SHAPES, st.floats(0.01, 1))
def test_energy_keeps_the_least_rank_with_that_share(shape, energy):
    r, out, in_, seed = shape
    A, B = random_factors(r, seed, out, in_)
    delta = B @ A
    values = np.linalg.svd(delta.numpy(), compute_uv=False) ** 2
    cut = algebra.cut(algebra.svd_of_product(A, B), energy=energy)
    kept, slack = len(cut.A), 1e-12 * values.sum()
    assert values[:kept].sum() >= energy * values.sum() - slack
    assert kept == 1 or values[: kept - 1].sum() < energy * values.sum() + slack


def test_cutting_forms_no_matrix_larger_than_the_factors(monkeypatch):
    seen, real = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda x, **how: seen.append(x.shape) or real(x, **how))
    A, B = random_factors(6, out=500, in_=400)
    svd = algebra.svd_of_product(A, B)
    assert seen == [(6, 6)] and close(svd.U * svd.S @ svd.Vh, B @ A, 1e-12)


def test_the_share_that_is_lost_is_that_of_all_maps_and_of_the_worst():
    cuts = {"a": algebra.Cut(None, None, 4.0, 1.0), "b": algebra.Cut(None, None, 3.0, 2.0)}
    total, worst, most = algebra.share_lost(cuts)
    assert (worst, most) == ("b", 2 / 3) and abs(total - 5**0.5 / 5) < 1e-6
    assert algebra.share_lost({"z": algebra.Cut(None, None, 0.0, 0.0)}) == (0, "z", 0)


def test_a_map_of_zeros_is_cut_to_rank_1():
    cut = algebra.cut(algebra.svd_of_product(torch.zeros(3, 7).double(), torch.zeros(5, 3).double()), energy=0.99)
    assert (cut.A.shape, cut.B.shape, cut.norm, cut.lost) == ((1, 7), (5, 1), 0, 0)


# ---- merge.py --combine ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Adapters of one base, as different as they come, and one of another base."""
    folder = tmp_path_factory.mktemp("algebra")
    write_adapter(folder / "a", 1, rank=4, alpha=6)
    write_adapter(folder / "b", 2, rank=3, alpha=5, kind=RsLoRALinear, targets=("attention",))
    write_adapter(folder / "c:2", 3, rank=1, alpha=1, targets=("q_proj",), system="Be brief.")
    cli.write_model(folder / "other", seed=1)
    write_adapter(folder / "dora", 6, kind=DoRALinear)
    write_adapter(folder / "stranger", 4, model=folder / "other")
    return folder


def merge(work, *argv, out, code=0, **how):
    done = cli.call("merge", *argv, "--out", out, cwd=work, **how)
    assert done.code == code, done.err
    return done


def total(work, *terms):
    """Σ w ΔW of adapters on disk."""
    sums = {}
    for name, weight in terms:
        for path, delta in deltas(work / name).items():
            sums[path] = sums.get(path, 0) + weight * delta
    return sums


def same_deltas(found, expected, tol=1e-6):
    assert found.keys() == expected.keys()
    return all(close(found[path], expected[path], tol) for path in expected)


@mutation("lora/export/derive.py", "(name, None) if Path(name).is_dir() else numbered(name)", "numbered(name)")
def test_combined_adapters_on_disk_are_the_weighted_sum(work, tmp_path):
    out = tmp_path / "out"
    done = merge(work, "--combine", "a:0.7", "b:-1", "--combine", "c:2:1e-1", "c:2", out=out)
    expected = total(work, ("a", 0.7), ("b", -1), ("c:2", 0.1), ("c:2", 1))
    assert same_deltas(deltas(out), expected)
    config = json.loads((out / CONFIG).read_text())
    ranks = {path: (4 + 3 * ("self_attn" in path) + 2 * ("q_proj" in path)) for path in expected}
    found = {path: config["r"] for path in expected} | config["rank_pattern"]
    assert found == ranks and config["rank_pattern"] == config["alpha_pattern"] and config["r"] == config["lora_alpha"]
    assert "adapter  0.7 × a, rank 4, 14 linears" in done.err and "adapter  -1 × b, rank 3, 8 linears" in done.err
    assert "ranks 4 to 9, 14 linears" in done.err and sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert "different system turns" in done.err and "templates" not in done.err
    assert (out / "chat_template.jinja").read_text() == cli.CHATML
    assert json.loads((out / "passport.json").read_text())["chat"] == {}


def test_a_combined_adapter_answers_as_the_one_it_was_made_of(work, tmp_path):
    done = merge(work, "--combine", "a", out=tmp_path / "same")
    assert "warning" not in done.err
    chat = [json.loads((folder / "passport.json").read_text())["chat"] for folder in (tmp_path / "same", work / "a")]
    assert chat[0] == chat[1]
    answers = [cli.ask("--adapter", folder, "--prompt", "Hello.", cwd=work) for folder in ("a", tmp_path / "same")]
    assert [done.code for done in answers] == [0, 0] and answers[0].out == answers[1].out
    base = cli.ask("--model", cli.model_folder(), "--prompt", "Hello.", cwd=work)
    merge(work, "--combine", "a", "a:-1", out=tmp_path / "none")
    none = cli.ask("--adapter", tmp_path / "none", "--prompt", "Hello.", cwd=work)
    assert none.out == base.out != answers[0].out


@pytest.mark.parametrize(("how", "shown"), [(("--rank", 2), 2), (("--energy", 0.6), None)], ids=["rank", "energy"])
def test_a_combined_adapter_is_cut_as_asked_and_the_loss_is_said(work, tmp_path, how, shown):
    done = merge(work, "--combine", "a", "b", *how, out=tmp_path / "out")
    expected, found = total(work, ("a", 1), ("b", 1)), deltas(tmp_path / "out")
    lost, norm, ranks = 0, 0, {}
    for path, delta in expected.items():
        U, S, Vh = np.linalg.svd(delta.numpy(), full_matrices=False)
        ranks[path] = shown or 1 + int((np.cumsum(S**2) < 0.6 * (S**2).sum()).sum())
        best = torch.tensor(U[:, : ranks[path]] * S[: ranks[path]] @ Vh[: ranks[path]])
        assert close(found[path], best, 1e-6) and far(found[path], delta, 1e-6)
        lost, norm = lost + (S[ranks[path] :] ** 2).sum(), norm + (S**2).sum()
    said = re.search(r"cut      (\S+) % of ΔW is lost, as .*; most in (\S+), (\S+) %\n", done.err)
    assert abs(float(said[1]) - 100 * (lost / norm) ** 0.5) < 0.01 * float(said[1]) and float(said[3]) > float(said[1])
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert {path: config["r"] for path in ranks} | config.get("rank_pattern", {}) == ranks


def test_templates_that_differ_are_left_out_and_said(work, tmp_path):
    write_adapter(tmp_path / "d", 5, template=cli.CHATML + " ")
    done = merge(work, "--combine", "a", tmp_path / "d", out=tmp_path / "out")
    assert "different templates; none is kept" in done.err and not (tmp_path / "out/chat_template.jinja").exists()


def test_an_adapter_without_a_passport_is_taken_with_a_warning(work, tmp_path):
    shutil.copytree(work / "a", tmp_path / "e")
    (tmp_path / "e/passport.json").unlink()
    done = merge(work, "--combine", tmp_path / "e", "a", out=tmp_path / "out")
    assert f"warning: {tmp_path / 'e'} has no passport" in done.err


def test_a_combination_replaces_only_an_adapter(work, tmp_path):
    out = tmp_path / "out"
    merge(work, "--combine", "a", out=out)
    merge(work, "--combine", "b", "--overwrite", out=out)
    assert same_deltas(deltas(out), deltas(work / "b"))
    (out / "notes.txt").write_text("mine")
    before = cli.tree(tmp_path)
    assert "notes.txt in it is not of this program" in merge(work, "--combine", "a", "--overwrite", out=out, code=2).err
    assert cli.tree(tmp_path) == before


# ---- merge.py --extract ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(work):
    """A full fine-tune: base + a, in float32, then a norm changed as well."""
    done = cli.call("merge", "--adapter", "a", "--out", "tuned", "--dtype", "float32", cwd=work)
    assert done.code == 0, done.err
    return work / "tuned"


def test_extracting_a_merged_adapter_at_its_rank_gives_it_back(work, tuned, tmp_path):
    done = merge(work, "--extract", cli.model_folder(), tuned, "--rank", 4, out=tmp_path / "out")
    assert same_deltas(deltas(tmp_path / "out"), deltas(work / "a")) and "warning" not in done.err
    assert float(re.search(r"cut      (\S+) %", done.err)[1]) < 1e-3  # what rounding W + ΔW to float32 left
    theirs = cli.ask("--model", tuned, "--prompt", "Hello.", cwd=work)
    ours = cli.ask("--adapter", tmp_path / "out", "--prompt", "Hello.", cwd=work)
    assert ours.code == 0 and "warning" not in ours.err and ours.out == theirs.out
    assert (tmp_path / "out/chat_template.jinja").read_text() == cli.CHATML


def change(folder, **tensors):
    weights = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        weights[name] = value(weights[name])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def everything_changed(folder):
    """A copy of the base in which every tensor is another one."""
    cli.write_model(folder)
    random = torch.Generator().manual_seed(7)
    names = load_file(folder / "model.safetensors")
    return change(folder, **dict.fromkeys(names, lambda t: (t + 0.1 * torch.randn(t.shape, generator=random)).float()))


@mutation("lora/export/derive.py", "W_tuned.double() - W.double()", "W.double() - W_tuned.double()")
def test_extracting_at_full_rank_is_exact_and_names_what_an_adapter_cannot_hold(tmp_path):
    folder = everything_changed(tmp_path / "tuned")
    done = merge(tmp_path, "--extract", cli.model_folder(), folder, "--rank", 1000, out="out")
    base, after = (load_file(f / "model.safetensors") for f in (cli.model_folder(), folder))
    linear = {name for name in base if "_proj" in name or "lm_head" in name}
    found = deltas(tmp_path / "out")
    assert same_deltas(found, {n.removesuffix(".weight"): after[n].double() - base[n].double() for n in linear})
    assert "cannot hold what changed outside the Linears' weights: " in done.err
    assert "model.embed_tokens.weight" in done.err and "layernorm.weight and 1 more" in done.err
    half = merge(tmp_path, "--extract", cli.model_folder(), folder, "--energy", 0.5, out="half")
    share = float(re.search(r"cut      (\S+) %", half.err)[1])
    assert 30 < share <= 100 * 0.5**0.5
    assert sum(t.numel() for t in load_file(tmp_path / "half" / WEIGHTS).values()) < 0.5 * sum(
        t.numel() for t in load_file(tmp_path / "out" / WEIGHTS).values()
    )


@mutation("lora/export/derive.py", "        if name in VOCABULARY and model", "        if False and model")
@mutation("lora/export/derive.py", "            if resized:", "            if False:")
@pytest.mark.parametrize("rows", [307, 290], ids=["added", "cut"])
@pytest.mark.parametrize("tied", [False, True])
def test_extracting_leaves_the_vocabulary_of_a_model_with_other_rows_and_names_it(tmp_path, rows, tied):
    """Tokens were added before it was tuned: the Linears are extracted, and where the rest went is said."""
    base, folder = (cli.write_model(tmp_path / name, tie_word_embeddings=tied) for name in ("base", "tuned"))
    random, names = torch.Generator().manual_seed(7), load_file(folder / "model.safetensors")
    vocabulary = [name for name in names if "embed_tokens" in name or "lm_head" in name]
    resized = dict.fromkeys(vocabulary, lambda t: torch.cat([t, t])[:rows].contiguous())
    noise = {n: lambda t: t + 0.1 * torch.randn(t.shape, generator=random) for n in names if "_proj" in n}
    change(folder, **resized, **noise)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
    done = merge(tmp_path, "--extract", "base", "tuned", "--rank", 1000, out="out")
    before, after = (load_file(path / "model.safetensors") for path in (base, folder))
    linear = {name for name in names if "_proj" in name}
    expected = {name.removesuffix(".weight"): after[name].double() - before[name].double() for name in linear}
    assert same_deltas(deltas(tmp_path / "out", base), expected) and len(expected) == 14
    assert len(vocabulary) == 2 - tied
    for name in vocabulary:
        assert f"{name} ({rows} rows, the base has 300)" in done.err
    assert "tokens that only the tuned model knows mean nothing to the base with this adapter" in done.err


def test_extracting_never_holds_two_models(work, tuned, tmp_path):
    """Tensors are counted as they are read, and again when nobody holds them any more."""

    watch = cli.counted_reads(tmp_path / "most")
    merge(work, "--extract", cli.model_folder(), tuned, "--rank", 1, out=tmp_path / "out", before=watch)
    most, total = map(int, (tmp_path / "most").read_text().split())
    assert most <= 4 and total >= 2 * 21 + 14  # a pair, while the pair before it is let go; and the passport


# ---- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "nothing": ((), r"missing --adapter in .*\n.*missing --out"),
    "no out": (("--combine", "a"), r"missing --out in the command line: it says where to write"),
    "an adapter too": (("--combine", "a", "--adapter", "a"), r"contradiction in .*: --adapter and --combine"),
    "both": (("--combine", "a", "--extract", "a", "b"), r"contradiction in .*: --combine and --extract"),
    "both limits": (("--combine", "a", "--rank", 2, "--energy", 0.5), r"contradiction in .*: --rank and --energy"),
    "a rank alone": (("--adapter", "a", "--rank", 2), r"contradiction in .*: --rank is not for --adapter\. Add --comb"),
    "a dtype": (("--combine", "a", "--dtype", "float16"), r"contradiction in .*: --dtype is not for --combine"),
    "a model": (("--extract", "a", "b", "--rank", 1, "--model", "x"), r": --model is not for --extract\. Leave"),
    "one model": (("--extract", "a", "--rank", 1), r"wrong --extract in the command line: 1 models\. Give BASE TUNED"),
    "no rank": (("--extract", "a", "b"), r"missing --rank in the command line: the difference has full rank"),
    "rank 0": (("--combine", "a", "--rank", 0), r"wrong --rank in the command line: '0' is out of range"),
    "energy 0": (("--combine", "a", "--energy", 0), r"wrong --energy in the command line: '0' is out of range"),
    "energy 2": (("--combine", "a", "--energy", 2), r"wrong --energy in the command line: '2' is out of range"),
    "weight 0": (("--combine", "a:0"), r"wrong --combine in .*'a:0' has a weight out of range"),
    "no weight": (("--combine", "a:inf", "b:1e9"), r"'a:inf' has a weight out of range.*\n.*'b:1e9' has a weight"),
    "no number": (("--combine", "a:x", "b:nan", "a:"), r"adapter in a:x: .*\n.*in b:nan: .*\n.*in a:: "),
    "not there": (("--combine", "nowhere:0.5", "gone"), r"missing adapter in nowhere: .*\n.*missing adapter in gone: "),
    "DoRA": (("--combine", "a", "dora"), r"wrong --combine in dora/adapter_config\.json: use_dora: such adapters do "
             r"not add up\. Merge it, then use --extract"),
    "another base": (("--combine", "a", "stranger"), r"different bases in stranger: a was trained on /.*model, this on "
                     r"/.*other\. "),
    "another base, one named": (("--combine", "a", "stranger", "--model", "other"), r"wrong base in a/passport\.json: "
                                r"the adapter was trained on /.*model; /.*other has other weights"),
    "no model": (("--extract", "nowhere", "other", "--rank", 1), r"no model in nowhere"),
    "the same model": (("--extract", "other", "other", "--rank", 1), r"nothing to extract in .*: their Linears are"),
    "models of two sizes": (("--extract", "other", "wide", "--rank", 1), r"different models in \S+ and \S+"
                            r": lm_head\.weight is \(300, 32\) and \(300, 64\)"),
    "NaN": (("--extract", "other", "broken", "--rank", 1), r"wrong tensor in .*broken:.*q_proj.*not finite"),
    "only norms": (("--extract", "other", "norms", "--rank", 1), r"nothing to extract in .*, only model"),
    "out is read": (("--combine", "a", "--out", "a", "--overwrite"), r"wrong --out in a: it holds a, which is read"),
    "out is there": (("--combine", "b", "--out", "a"), r"wrong --out in a: the folder is not empty"),
    "out is a model": (("--combine", "b", "--out", "other", "--overwrite"), r"wrong --out in other: --overwrite"),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(work):
    cli.write_model(work / "wide", hidden_size=64)
    cli.write_model(work / "broken", seed=1)
    change(work / "broken", **{f"{Q0}.weight": lambda t: t * torch.nan})
    cli.write_model(work / "norms", seed=1)
    change(work / "norms", **{"model.norm.weight": lambda t: t * 2})
    return work


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_a_problem_and_changes_nothing(models, name):
    argv, pattern = BAD[name]
    before = cli.tree(models)
    out = () if "--out" in argv or name in ("nothing", "no out") else ("--out", "new")
    done = cli.call("merge", *argv, *out, cwd=models)
    print(done.err)
    assert done.code == 2 and "Traceback" not in done.err
    assert done.errors and all(FORM.fullmatch(line) or MORE.fullmatch(line) for line in done.errors)
    assert re.search(pattern, "\n".join(done.errors)) and cli.tree(models) == before


def test_adapters_of_two_bases_are_combined_where_one_insists(work, tmp_path):
    merge(work, "--combine", "a", "stranger", "--no-verify", out=tmp_path / "out")
    assert same_deltas(deltas(tmp_path / "out"), total(work, ("a", 1), ("stranger", 1)))


def test_a_sum_too_large_for_float32_is_refused(work, tmp_path):
    shutil.copytree(work / "a", tmp_path / "huge")
    weights = load_file(tmp_path / "huge" / WEIGHTS)
    weights[f"base_model.model.{Q0}.lora_B.weight"] *= 1e35
    save_file(weights, tmp_path / "huge" / WEIGHTS)
    done = merge(work, "--combine", f"{tmp_path}/huge:1e6", out=tmp_path / "out", code=4)
    assert re.fullmatch(r"error: not finite in \S+out: \S+q_proj\.lora_B has .*Use smaller weights", *done.errors)
    assert not (tmp_path / "out").exists()
