"""Adapters on one base: switching leaves no trace, and each answers as it does alone."""

import json
import re
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lora import pretrained
from lora.adapter import store
from lora.adapter.inject import lora_layers
from lora.adapter.merge import merge_and_unload
from lora.adapter.variants import DoRALinear, RsLoRALinear
from lora.errors import BadInput, BadNumbers
from lora.inference import columns, several
from lora.inference.generate import generate
from tests import cli
from tests.adapters import write_adapter
from tests.helpers import error, far, same, snapshot
from tests.mutation import mutation
from tests.scripts.test_bad_input import FORM

CALM = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}  # other work may share the machine
OTHER_TEMPLATE = cli.CHATML.replace("{{ m.role }}", "<{{ m.role }}>")
PROMPTS = ["Hello.", "What is 1 and 2?", "Grüße, 世界! " * 3, "Bye."]
TOKENS = torch.arange(3, 60)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Adapters of one base that differ in all they can, and one of another base."""
    folder = tmp_path_factory.mktemp("several")
    write_adapter(folder / "a", 1, rank=4, system="Be brief.")
    write_adapter(folder / "b", 2, kind=RsLoRALinear, targets=("q_proj", "mlp"), template=OTHER_TEMPLATE, system=False)
    write_adapter(folder / "dora", 3, kind=DoRALinear, targets=("attention",))
    cli.write_model(folder / "other", seed=1)
    write_adapter(folder / "stranger", 4, model=folder / "other")
    (folder / "prompts").write_text("\n".join(PROMPTS))
    return folder


def load(dtype, work, *names):
    model = pretrained.load_model(str(cli.model_folder()), dtype)
    adapters = several.Several(model)
    for name in names or ("a", "b"):
        adapters.add(name, work / name)
    return model, adapters


# ---- switching -------------------------------------------------------------------------------------------------------


@mutation(
    "lora/inference/several.py",
    """        self._place(self.linears)  # this drops the sums of an adapter before
""",
    "",
)
@mutation(
    "lora/inference/several.py",
    "weight = merged_weight(layer.base.weight, layer.delta())",
    "weight = layer.base.weight.data.copy_(merged_weight(layer.base.weight, layer.delta()))",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("merged", [False, True], ids=["beside", "merged"])
def test_switching_from_a_to_b_to_a_is_bitwise_a_and_the_base_stays_the_base(work, dtype, merged):
    """Answers are generated in between, which lays weights of one input into one tensor."""
    plain = pretrained.load_model(str(cli.model_folder()), dtype)
    base, before = plain(TOKENS), snapshot(plain)
    model, adapters = load(dtype, work, "a", "b", "dora")
    assert same(snapshot(model), before)
    seen = {}
    for name in ("a", "b", "a", "dora", "base", "b", "b", "dora", "base", "a"):
        adapters.switch(name, merged)
        logits = model(TOKENS)
        answers = generate(model, [[5, 6, 7], [8, 9]], set(), 4)
        first = seen.setdefault(name, (logits, answers))
        assert torch.equal(first[0], logits) and first[1] == answers
        assert bool(lora_layers(model)) == (name != "base" and not merged)
    assert torch.equal(seen["base"][0], base)
    assert far(seen["a"][0], base, 1e-4) and far(seen["b"][0], base, 1e-4) and far(seen["a"][0], seen["b"][0], 1e-4)
    adapters.switch("base")
    assert same(snapshot(model), before)


def test_all_sets_share_the_linears_of_the_base(work):
    model, adapters = load(torch.float32, work)
    tensors = {path: linear.weight.data_ptr() for path, linear in adapters.linears.items()}
    for name in ("a", "b"):
        adapters.switch(name)
        layers = lora_layers(model)
        assert layers == adapters.sets[name].layers and layers
        assert all(layer.base is adapters.linears[path] for path, layer in layers.items())
        adapters.switch(name, merged=True)
        assert {path: linear.weight.data_ptr() for path, linear in adapters.linears.items()} == tensors
    assert {path: type(layer) for path, layer in adapters.sets["b"].layers.items()} == dict.fromkeys(
        adapters.sets["b"].layers, RsLoRALinear
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merged_set_has_the_bits_of_merging_and_unloading(work, dtype):
    alone = pretrained.load_model(str(cli.model_folder()), dtype)
    store.load(alone, work / "b")
    merge_and_unload(alone)
    model, adapters = load(dtype, work)
    adapters.switch("a", merged=True)
    adapters.switch("b", merged=True)
    assert same(snapshot(alone), snapshot(model)) and torch.equal(alone(TOKENS), model(TOKENS))
    assert not any(p.requires_grad for p in model.parameters())
    assert error(model(TOKENS), pretrained.load_model(str(cli.model_folder()), dtype)(TOKENS)) > 0.01


def test_a_sum_that_is_not_finite_leaves_the_base_in_place(work):
    model, adapters = load(torch.float32, work)
    adapters.switch("base")
    before = snapshot(model)
    for name in ("lora_A", "lora_B"):
        getattr(list(adapters.sets["a"].layers.values())[-1], name).data *= 1e20
    adapters.switch("b", merged=True)
    with pytest.raises(BadNumbers, match=r"^not finite in model\.layers\.1\.mlp\.down_proj: "):
        adapters.switch("a", merged=True)
    assert same(before, snapshot(model))
    with pytest.raises(KeyError):
        adapters.switch("c")


@mutation("lora/inference/several.py", "        if name in self.sets:", "        if False:")
@pytest.mark.parametrize("name", ["a", "base"])
def test_a_name_that_is_taken_is_refused_and_what_it_named_stays(work, name):
    _, adapters = load(torch.float32, work)
    adapters.switch("b")
    before = dict(adapters.sets)
    with pytest.raises(BadInput, match=f"wrong name in .*: '{name}', but .* is called so|so the model"):
        adapters.add(name, work / "b")
    assert adapters.sets == before and adapters.placed == ("b", False)


# ---- names and bases -------------------------------------------------------------------------------------------------


def test_columns_of_folders_with_one_name_are_numbered():
    names = several.column_names(["x/run", "y/run", "z/RUN/", "base"])
    assert names == {"base": None, "run": "x/run", "run-2": "y/run", "RUN-3": "z/RUN/", "base-2": "base"}


def test_one_base_under_two_names_is_one_where_the_passports_prove_it(work, tmp_path):
    copy = shutil.copytree(cli.model_folder(), tmp_path / "copy")
    write_adapter(tmp_path / "all", 5, model=copy)
    write_adapter(tmp_path / "some", 6, model=copy, targets=("mlp",))
    assert several.common_base([work / "a", tmp_path / "all"]) == str(cli.model_folder())
    for other in (tmp_path / "some", work / "stranger"):
        with pytest.raises(BadInput, match=r"different bases in .*: .* was trained on \S+model, this on "):
            several.common_base([work / "a", other])
        assert several.common_base([work / "a", other], insist=True) == str(cli.model_folder())
    done = compare(work, "--adapter", "a", tmp_path / "some", "--model", copy, "--prompt", "Hello.")
    assert done.code == 0, done.err


# ---- generate.py --compare -------------------------------------------------------------------------------------------


def compare(work, *argv, **how):
    return cli.ask("--compare", *argv, cwd=work, **how)


DRAWN = ("--temperature", 1.0, "--seed", 3, "--repetition-penalty", 1.2)


@mutation(
    "lora/inference/session.py", "Session(net, chat, *how, partial", "Session(net, chats[several.BASE], *how, partial"
)
@pytest.mark.parametrize("how", [(), DRAWN, ("--dtype", "bfloat16"), ("--system", "Hm.", "--batch-size", 3)], ids=str)
def test_columns_are_what_separate_runs_answer(work, tmp_path, how):
    done = compare(work, "--adapter", "a", "b", "--prompts", "prompts", "--out", tmp_path / "out.jsonl", *how)
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [list(row["predictions"]) for row in rows] == [["base", "a", "b"]] * len(PROMPTS)
    alone = {"base": ("--model", cli.model_folder()), "a": ("--adapter", "a"), "b": ("--adapter", "b")}
    found = {}
    for name, argv in alone.items():
        text = cli.ask(*argv, "--prompts", "prompts", *how, cwd=work).out
        found[name] = [json.loads(line)["prediction"] for line in text.splitlines()]
        assert found[name] == [row["predictions"][name] for row in rows]
    assert found["base"] != found["a"] != found["b"] != found["base"]


def test_the_table_has_a_column_a_model_below_each_prompt(work):
    done = compare(work, "--adapter", "a", "--prompt", "Hello.", "--max-new-tokens", 60, env={"COLUMNS": "62"})
    assert done.code == 0, done.err
    header, rule, prompt, *rest = done.out.splitlines()
    assert (header.split(), rule, prompt) == (["base", "a"], "-" * 62, "> Hello.")
    assert header.index("a", 5) == 32 and all(columns.cells(line) <= 62 for line in rest)
    alone = cli.ask("--adapter", "a", "--prompt", "Hello.", "--max-new-tokens", 60, cwd=work).out
    assert columns.wrapped(alone, 30)[0] in rest[0]


def test_an_adapter_may_be_given_again_instead_of_beside_the_first(work):
    both, again = (compare(work, *argv, "--prompt", "Hello.").out
                   for argv in (("--adapter", "a", "b"), ("--adapter", "a", "--adapter", "b")))  # fmt: skip
    assert both == again and both.split()[:3] == ["base", "a", "b"]


TEXTS = st.text(st.sampled_from("ab cd  \n\t世界é\u0301\x1b-"), max_size=80)


@settings(max_examples=60, **CALM)
@given(TEXTS, st.integers(2, 30))
def test_wrapping_keeps_every_character_within_the_width(text, room):
    lines = columns.wrapped(text, room)
    escaped = text.replace("\x1b", "\\x1b").replace("\t", " ")
    assert "".join("".join(lines).split()) == "".join(escaped.split())
    assert all(columns.cells(line) <= room and line.isprintable() for line in lines)


def test_lines_are_broken_at_spaces_where_there_are_some():
    assert columns.wrapped("one two three\n\n  four", 8) == ["one two", "three", "", "  four"]
    assert columns.wrapped("abcdefghij", 4) == ["abcd", "efgh", "ij"]
    assert columns.wrapped("世界世界", 5) == ["世界", "世界"]
    assert columns.table(["p"], {"base": ["世 a"], "b": ["c\nd"]}, 42) == "\n".join(
        ["base" + " " * 18 + "b", "-" * 42, "> p", "世 a" + " " * 18 + "c", " " * 22 + "d"]
    )


# ---- /adapter --------------------------------------------------------------------------------------------------------


def test_adapter_in_a_chat_switches_in_place_and_each_has_its_own_chat(work):
    """The first adapter answers at the start; a new conversation is that of a run of its own."""
    order = ("a", "b", "base", "a")
    stdin = "Hello.\n" + "".join(f"/reset\n/adapter {name}\nHello.\n" for name in order[1:])
    done = cli.ask("--adapter", "a", "b", cwd=work, stdin=stdin)
    assert done.code == 0, done.err
    alone = {name: cli.ask("--adapter", name, "--prompt", "Hello.", cwd=work).out for name in ("a", "b")}
    alone["base"] = cli.ask("--model", cli.model_folder(), "--prompt", "Hello.", cwd=work).out
    assert done.out == "".join(alone[name] for name in order) and len({*alone.values()}) == 3
    assert [line for line in done.err.splitlines() if line.startswith("(now")] == [
        f"(now {name}, of base, a, b)" for name in order[1:]
    ]


def test_a_conversation_goes_on_with_another_adapter(work):
    done = cli.ask("--adapter", "a", "b", "--no-system", cwd=work, stdin="Hello.\n/adapter b\nBye.\n")
    first = cli.ask("--adapter", "a", "--no-system", "--prompt", "Hello.", cwd=work).out
    talk = [("user", "Hello."), ("assistant", first[:-1]), ("user", "Bye."), ("assistant", "x")]
    (work / "talk.jsonl").write_text(cli.rows([talk]))
    row = json.loads(cli.ask("--adapter", "b", "--no-system", "--prompts", "talk.jsonl", cwd=work).out)
    assert done.out == first + row["prediction"] + "\n"


@pytest.mark.parametrize(
    ("adapters", "now"), [((), "base, of base"), (("a",), "a, of a"), (("a", "b"), "a, of base, a, b")]
)
def test_adapter_alone_or_with_an_unknown_name_lists_them(work, adapters, now):
    argv = ("--adapter", *adapters) if adapters else ("--model", cli.model_folder())
    done = cli.ask(*argv, cwd=work, stdin="/adapter\n/adapter nobody\n")
    assert (done.code, done.out) == (0, "") and done.err.count(f"(now {now})\n") == 2
    assert "no adapter nobody was given with --adapter\n" in done.err


# ---- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "several without --compare": (("--adapter", "a", "b", "--prompt", "x"), r"more than one --adapter\. Add --compare"),
    "no adapter": (("--compare", "--prompt", "x"), r"nothing to compare in .* Add --adapter FOLDER"),
    "no prompt": (("--compare", "--adapter", "a"), r"nothing to compare in .* Add --prompt TEXT or --prompts FILE"),
    "twice": (("--adapter", "a", "./a"), r"wrong --adapter in \./a: its folder is given twice\. Give it once"),
    "two missing": (("--adapter", "x", "a", "y"), r"missing adapter in x: .*\n.*missing adapter in y: "),
    "another base": (("--adapter", "a", "stranger"), r"different bases in stranger: a was trained on \S+model, this on "
                     r"\S+other\. Use adapters of one base"),
    "the wrong base": (("--adapter", "a", "b", "--model", "other"), r"wrong base in a/passport\.json: the adapter was "
                       r"trained on \S+model; \S+other has other weights\. .*\n.*wrong base in b/"),
    "NaN": (("--adapter", "a", "nan"), r"wrong tensor in nan/adapter_model\.safetensors:\S+lora_A\.weight: values"),
    "too long": (("--compare", "--adapter", "a", "b", "--prompt", "why? " * 300), r"prompt too long in --prompt: "),
    "a folder as --out": (("--compare", "--adapter", "a", "--prompt", "x", "--out", "a"), r"wrong --out in a: it is"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_a_problem_before_the_model_is_loaded(work, tmp_path, name):
    argv, pattern = BAD[name]
    if name == "NaN":
        shutil.copytree(work / "a", work / "nan")
        weights = load_file(work / "nan/adapter_model.safetensors")
        weights[min(weights)][0, 0] = torch.nan
        save_file(weights, work / "nan/adapter_model.safetensors")

    def before():
        pretrained.load_model = None

    tree = cli.tree(work)
    done = cli.ask(*argv, cwd=work, before=before)
    print(done.err)
    assert (done.code, done.out) == (2, "") and done.errors and all(FORM.fullmatch(line) for line in done.errors)
    assert re.search(pattern, "\n".join(done.errors)) and "Traceback" not in done.err and cli.tree(work) == tree


def test_an_adapter_of_another_base_is_taken_where_one_insists(work):
    done = compare(work, "--adapter", "a", "stranger", "--no-verify", "--prompt", "Hello.")
    assert done.code == 0 and done.out.split()[:3] == ["base", "a", "stranger"]
