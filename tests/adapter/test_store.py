"""An adapter on disk: nothing is lost, nothing of ours is in PEFT's files, and nothing wrong is loaded."""

import copy
import json
import os
import pickle
import signal
import struct

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from lora import files
from lora.adapter import passport, peft_config, store
from lora.adapter.inject import inject, lora_layers
from lora.adapter.merge import merge
from lora.adapter.targets import linears
from lora.errors import BadInput, LoraError, Refused
from tests.helpers import far, patched, randomise, same, snapshot, some_tokens, tiny_model
from tests.mutation import mutation

# What PEFT 0.21 writes for LoraConfig(r=8, target_modules=[...]) and nothing else
PEFT_DEFAULTS = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None,
    "base_model_name_or_path": "some/model", "bias": "none", "corda_config": None, "ensure_weight_tying": False,
    "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "kasa_config": None, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0,
    "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core", "modules_to_save": None,
    "monteclora_config": None, "peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 5,
    "rank_pattern": {}, "revision": None, "target_modules": ["q_proj", "v_proj"], "target_parameters": None,
    "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_bdlora": None, "use_dora": False,
    "use_qalora": False, "use_rslora": False, "velora_config": None,
}  # fmt: skip
# The fields PEFT itself needs to read a folder: its own names, none of ours
PEFT_FIELDS = set(PEFT_DEFAULTS)

MODULES = {
    **{f"self_attn.{name}_proj": size for name, size in (("q", (24, 24)), ("k", (12, 24)), ("v", (12, 24)))},
    **{"self_attn.o_proj": (24, 24), "mlp.gate_proj": (40, 24), "mlp.up_proj": (40, 24), "mlp.down_proj": (24, 40)},
}  # of tests.helpers.tiny_config: path in a block -> (out, in)


def adapter_of(model):
    return {name: tensor for name, tensor in snapshot(model).items() if "lora_" in name}


def saved(folder, targets=("q_proj", "v_proj"), dtype=torch.float32, **arguments):
    """A patched tiny model, saved in `folder`."""
    model = patched(tiny_model(torch.float32), targets=targets, dtype=dtype, **arguments)
    store.save(model, folder, "some/model")
    return model


def change_config(folder, **fields):
    path = folder / store.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder, change):
    tensors = load_file(folder / store.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / store.WEIGHTS)


def refused(folder, kind=BadInput, model=None):
    """The problems with which loading is refused; checks that the model stayed as it was."""
    model = model or tiny_model(torch.float32).requires_grad_(True).train()
    before, classes = snapshot(model), [(type(m), m.training) for m in model.modules()]
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(kind) as caught:
        store.load(model, folder)
    assert same(before, snapshot(model)) and classes == [(type(m), m.training) for m in model.modules()]
    assert trainable == [p.requires_grad for p in model.parameters()]
    assert all(str(folder) in problem and "\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


# ---- round trip ------------------------------------------------------------------------------------------------------


@mutation(
    "lora/adapter/store.py",
    '{f"{PREFIX}{path}.{name}": tensor for path,',
    '{f"{PREFIX}{path}.{name}": tensor.half() for path,',
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "targets", [("all",), ("q_proj",), ("mlp", "lm_head"), ("model.layers.1.mlp.up_proj",)], ids=str
)
def test_loading_gives_back_every_bit(tmp_path, targets, dtype):
    model = saved(tmp_path, targets, dtype, rank=3, alpha=7.5, dropout=0.125)
    other = tiny_model(torch.float32)
    config = store.load(other, tmp_path, dtype)
    assert same(adapter_of(model), adapter_of(other)) and torch.equal(model(some_tokens()), other(some_tokens()))
    assert (config.rank, config.alpha, config.dropout, config.base) == (3, 7.5, 0.125, "some/model")
    for layer in lora_layers(other).values():
        assert (layer.rank, layer.alpha, layer.dropout) == (3, 7.5, 0.125)
    assert far(other(some_tokens()), tiny_model(torch.float32)(some_tokens()), 2e-5)


@mutation("lora/adapter/store.py", 'metadata={"format": "pt"}', 'metadata={"format": "pt", "at": str(id(model))}')
@pytest.mark.parametrize("alpha", [8, 7.5], ids=str)
@pytest.mark.parametrize("dropout", [0, 0.0, 0.125], ids=str)
def test_saving_what_was_loaded_gives_the_same_bytes(tmp_path, alpha, dropout):
    saved(tmp_path / "one", ("all",), alpha=alpha, dropout=dropout)
    other = tiny_model(torch.float32)
    config = store.load(other, tmp_path / "one")
    store.save(other, tmp_path / "two", config.base)
    for name in (store.CONFIG, store.WEIGHTS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    saved(tmp_path / "three", ("all",), alpha=alpha, dropout=dropout, seed=2)
    assert (tmp_path / "one" / store.WEIGHTS).read_bytes() != (tmp_path / "three" / store.WEIGHTS).read_bytes()


def test_tensors_are_converted_to_the_dtype_asked_for(tmp_path):
    model, other = saved(tmp_path), tiny_model(torch.float32)
    store.load(other, tmp_path, torch.bfloat16)
    for name, tensor in adapter_of(other).items():
        assert torch.equal(tensor, adapter_of(model)[name].bfloat16())


@mutation(
    "lora/adapter/store.py",
    '"cpu" if layer.lora_A.is_meta else layer.lora_A.device',
    "layer.lora_A.device",
)
def test_an_adapter_on_a_base_without_memory_is_real(tmp_path):
    """merge.py patches a model on `meta` and merges tensor by tensor."""
    model, other = saved(tmp_path, ("all",)), tiny_model(torch.float32).to("meta")
    store.load(other, tmp_path)
    assert same(adapter_of(model), adapter_of(other))
    layers = lora_layers(other)
    assert all(layer.base.weight.is_meta and layer.lora_A.requires_grad for layer in layers.values())
    assert all(torch.equal(layers[path].delta(), layer.delta()) for path, layer in lora_layers(model).items())


def test_saving_while_merged_saves_the_same(tmp_path):
    model = saved(tmp_path / "one")
    merge(model)
    store.save(model, tmp_path / "two", "some/model")
    for name in (store.CONFIG, store.WEIGHTS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


class Nested(nn.Module):
    """Names that are suffixes of each other, at the top and below, one called `base` and one like a group."""

    def __init__(self):
        super().__init__()
        self.fc, self.base, self.mlp = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.a = nn.ModuleDict({"fc": nn.Linear(3, 3), "base": nn.Linear(3, 3)})
        self.b = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"fc": nn.Linear(3, 3), "a": nn.ModuleDict()}))
        self.b[1]["a"]["fc"] = nn.Linear(3, 3)

    def forward(self, x):
        for linear in (m for m in self.modules() if isinstance(m, nn.Linear)):
            x = x + linear(x)
        return x


@mutation(
    "lora/adapter/peft_config.py",
    """        if not any(path_endswith(path, *names) for path in unpatched):
            return sorted(names)""",
    """        if not names & set(unpatched):
            return sorted(names)""",
)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chosen=st.sets(st.sampled_from(sorted(linears(Nested()))), min_size=1))
@example(chosen={"fc"})
@example(chosen={"a.base"})
@example(chosen={"a.fc", "fc"})
def test_any_choice_of_linears_comes_back(tmp_path, chosen):
    model, other = Nested(), Nested()
    inject(model, 2, 4, targets=[f"re:{path.replace('.', '[.]')}" for path in chosen])
    store.save(model, tmp_path)
    store.load(other, tmp_path)
    assert set(lora_layers(model)) == set(lora_layers(other)) == chosen
    assert same(adapter_of(model), adapter_of(other))


# ---- what is written -------------------------------------------------------------------------------------------------


@mutation("lora/adapter/peft_tensors.py", 'PREFIX = "base_model.model."', 'PREFIX = "base_model."')
def test_keys_and_shapes_are_those_of_peft(tmp_path):
    saved(tmp_path, ("all",), rank=3)
    expected = {}
    for i in range(2):
        for path, (wide, narrow) in MODULES.items():
            name = f"base_model.model.model.layers.{i}.{path}"
            expected |= {f"{name}.lora_A.weight": (3, narrow), f"{name}.lora_B.weight": (wide, 3)}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}


@mutation("lora/adapter/peft_config.py", '"inference_mode": True,', '"inference_mode": True, "lora_version": 1,')
def test_config_holds_what_peft_needs_and_nothing_of_ours(tmp_path):
    model = patched(tiny_model(torch.float32), 3, 7.5, 0.125, ["attention"])
    store.save(model, tmp_path, "some/model", {"format": 1, "base": {}})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config.keys() <= PEFT_FIELDS
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == "some/model"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 7.5, 0.125)
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert json.loads((tmp_path / "passport.json").read_text()) == {"format": 1, "base": {}}
    assert set(load_file(tmp_path / store.WEIGHTS)) == {
        f"base_model.model.{name}.weight" for name in adapter_of(model)
    }  # no other tensor either


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["all"], ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        (["q_proj", "lm_head"], ["lm_head", "q_proj"]),
        (["layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
        (["up_proj", "re:.*0.*k_proj"], ["model.layers.0.mlp.up_proj", "model.layers.0.self_attn.k_proj",
                                         "model.layers.1.mlp.up_proj"]),
    ],
    ids=str,
)  # fmt: skip
def test_target_modules_are_last_names_or_else_whole_paths(targets, expected):
    assert peft_config.target_modules(patched(tiny_model(torch.float32), targets=targets)) == expected


@mutation(
    "lora/files.py",
    '        with open(aside, "wb") as file:',
    '        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:',
)
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002], ids=oct)
def test_modes_of_files_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        store.save(patched(tiny_model(torch.float32)), tmp_path / "out", "", {"format": 1})
    finally:
        os.umask(before)
    for name in (store.WEIGHTS, store.CONFIG, store.PASSPORT):
        assert (tmp_path / "out" / name).stat().st_mode & 0o777 == 0o666 & ~umask


@mutation("lora/files.py", ' and start[8:9] != b"{"', "")
@pytest.mark.parametrize("size", [0x0280, 0x0380, 0x0480, 0x0580])
def test_a_header_whose_length_looks_like_a_pickle_is_none(tmp_path, size):
    """The file begins with the length of its header, and 80 04 are also the first bytes of a pickle."""
    path = tmp_path / "x.safetensors"
    room = size - len(json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, separators=(",", ":")))
    files.write_safetensors(path, {"x" * (room // 8 * 8 + 1): ("F32", (1,))}, lambda name: torch.ones(1))
    assert path.read_bytes()[:2] == size.to_bytes(2, "little") and len(files.Safetensors(path).header) == 1


def test_layers_that_differ_cannot_be_saved_as_one_adapter(tmp_path):
    model = patched(tiny_model(torch.float32))
    next(iter(lora_layers(model).values())).dropout = 0.5
    with pytest.raises(ValueError, match="differ"):
        store.save(model, tmp_path / "out")
    with pytest.raises(ValueError, match="no LoRA layers"):
        store.save(tiny_model(torch.float32), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- wrong tensors ---------------------------------------------------------------------------------------------------


@mutation(
    "lora/adapter/store.py",
    "for name in sorted(expected.keys() | tensors.keys()):",
    "for name in sorted(tensors.keys()):",
)
@mutation(
    "lora/adapter/store.py",
    "elif tuple(tensors[name].shape) != expected[name]:",
    "elif sorted(tensors[name].shape) != sorted(expected[name]):",
)
def test_one_error_lists_every_missing_extra_and_misshapen_tensor(tmp_path):
    saved(tmp_path)
    name = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight".format

    def change(tensors):
        del tensors[name(0, "q", "A")], tensors[name(1, "v", "B")]
        tensors[name(0, "k", "A")], tensors[name(2, "q", "B")] = torch.zeros(5, 24), torch.zeros(24, 5)
        tensors[name(1, "q", "A")], tensors[name(0, "v", "B")] = torch.zeros(24, 5), torch.zeros(12, 4)

    change_tensors(tmp_path, change)
    problems = refused(tmp_path)
    expected = [
        ("extra", name(0, "k", "A"), ""),
        ("missing", name(0, "q", "A"), ""),
        ("wrong", name(0, "v", "B"), "shape (12, 4), expected (12, 5)"),
        ("wrong", name(1, "q", "A"), "shape (24, 5), expected (5, 24)"),
        ("missing", name(1, "v", "B"), ""),
        ("extra", name(2, "q", "B"), ""),
    ]
    assert len(problems) == len(expected)
    for problem, (what, tensor, shapes) in zip(problems, expected, strict=True):
        assert problem.startswith(f"{what} tensor in {tmp_path / store.WEIGHTS}:{tensor}: ") and shapes in problem


@mutation(
    "lora/adapter/store.py",
    "        meant = {path for path, called in known.items() if",
    "        meant |= {path for path, called in known.items() if",
)
def test_tensors_of_a_linear_that_no_target_names_are_extra(tmp_path):
    """PEFT would drop them; then the adapter would compute something else than it says."""
    saved(tmp_path)
    names = [f"base_model.model.model.layers.1.self_attn.k_proj.lora_{m}.weight" for m in "AB"]
    extra = dict(zip(names, (torch.ones(5, 24), torch.ones(12, 5)), strict=True))
    change_tensors(tmp_path, lambda tensors: tensors.update(extra))
    problems = refused(tmp_path)
    assert len(problems) == 2 and all(p.startswith("extra tensor") for p in problems)
    change_config(tmp_path, target_modules=["q_proj", "k_proj", "v_proj"])
    problems = refused(tmp_path)
    assert len(problems) == 2 and all("missing tensor" in p and "layers.0.self_attn.k_proj" in p for p in problems)


@pytest.mark.parametrize("path", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"])
def test_a_target_named_without_any_tensor_is_missing(tmp_path, path):
    saved(tmp_path)
    names = [f"base_model.model.{path}.lora_{m}.weight" for m in "AB"]
    change_tensors(tmp_path, lambda tensors: [tensors.pop(name) for name in names])
    problems = refused(tmp_path)
    assert len(problems) == 2 and all(f"missing tensor in {tmp_path / store.WEIGHTS}:{n}: " in p
                                      for n, p in zip(names, problems, strict=True))  # fmt: skip


@mutation(
    "lora/adapter/peft_tensors.py",
    "elif ours is None or (model is None and name != PREFIX + ours):",
    "elif False:",
)
@mutation(
    "lora/adapter/store.py",
    """    config = read_config(folder)
    names = """,
    """    config = read_config(folder); model.requires_grad_(False)
    names = """,
)
@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.base.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "weight",
    ],
)
def test_a_tensor_that_is_no_adapters_is_refused(tmp_path, name):
    saved(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update({name: torch.zeros(24, 24)}))
    [problem] = refused(tmp_path)
    assert problem.startswith(f"extra tensor in {tmp_path / store.WEIGHTS}:{name}: ")


@mutation(
    "lora/adapter/peft_tensors.py",
    "if not torch.isfinite(tensors[ours]).all():",
    "if torch.isnan(tensors[ours]).all():",
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, bad):
    saved(tmp_path)
    names = sorted(load_file(tmp_path / store.WEIGHTS))[-2:]

    def change(tensors):
        for name in names:
            tensors[name][-1, -1] = bad

    change_tensors(tmp_path, change)
    problems = refused(tmp_path)
    assert len(problems) == 2 and all(
        f":{name}: values that are not finite" in p for name, p in zip(names, problems, strict=True)
    )


def test_a_dtype_we_do_not_compute_with_is_refused(tmp_path):
    saved(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update({k: t.to(torch.int8) for k, t in tensors.items()}))
    assert all("dtype I8 is not supported" in problem for problem in refused(tmp_path))


def test_an_adapter_of_another_architecture_says_what_the_model_has(tmp_path):
    saved(tmp_path)
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    [problem] = refused(tmp_path, model=model)
    assert "match nothing" in problem and "has 0, 2" in problem and "some/model" in problem


def test_an_adapter_of_a_wider_model_is_refused_by_shape(tmp_path):
    saved(tmp_path)
    problems = refused(tmp_path, model=tiny_model(torch.float32, hidden_size=36, head_dim=4))
    assert len(problems) == 4 and all("expected (5, 36)" in problem for problem in problems)


def test_a_patched_model_is_not_patched_again_by_loading(tmp_path):
    model = saved(tmp_path)
    before = snapshot(model)
    with pytest.raises((LoraError, ValueError)):
        store.load(model, tmp_path)
    assert same(before, snapshot(model))


# ---- wrong files -----------------------------------------------------------------------------------------------------


def executes(tmp_path):
    """A pickle that leaves a trace if anybody opens it."""

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    return Evil()


@mutation(
    "lora/adapter/peft_tensors.py",
    'raise Refused(f"pickle in {pickles[0]}',
    'raise BadInput(f"pickle in {pickles[0]}',
)
@mutation("lora/files.py", 'b"\\x80\\x05", b"PK\\x03\\x04")', 'b"\\x80\\x05")')
@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.safetensors"])
@pytest.mark.parametrize("how", ["pickle-2", "pickle-4", "pickle-5", "torch"])
def test_pickles_are_refused_unopened(tmp_path, name, how):
    folder = tmp_path / "adapter"
    saved(folder)
    (folder / store.WEIGHTS).unlink()
    if how == "torch":
        torch.save(executes(tmp_path), folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(executes(tmp_path), int(how[-1])))
    [problem] = refused(folder, Refused)
    assert problem.startswith(f"pickle in {folder / name}") and Refused.code == 5
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("missing", [store.WEIGHTS, store.CONFIG])
def test_a_missing_file_is_named(tmp_path, missing):
    saved(tmp_path)
    (tmp_path / missing).unlink()
    [problem] = refused(tmp_path)
    assert problem.startswith("missing adapter in ") and missing in problem


def test_a_folder_above_the_adapter_is_hinted_down(tmp_path):
    saved(tmp_path / "run" / "checkpoints" / "step-10")
    [problem] = refused(tmp_path / "run")
    assert f"Did you mean {tmp_path / 'run' / 'checkpoints' / 'step-10'}?" in problem
    [problem] = refused(tmp_path / "nowhere")
    assert problem.startswith(f"missing adapter in {tmp_path / 'nowhere'}")


def header_and_data(folder):
    data = (folder / store.WEIGHTS).read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


def lying(folder, lie):
    """Rewrite the safetensors file with a header changed by `lie`."""
    header, data = header_and_data(folder)
    header = lie(header) or header
    text = json.dumps(header).encode()
    (folder / store.WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)


def first(header):
    return header[min(name for name in header if name != "__metadata__")]


LIES = {
    "larger shape": lambda h: first(h).update(shape=[5, 10**6]),
    "enormous shape": lambda h: first(h).update(shape=[2**62, 2**62]),
    "negative shape": lambda h: first(h).update(shape=[-5, -24]),
    "shape of text": lambda h: first(h).update(shape=["5", "24"]),
    "offsets behind the end": lambda h: first(h).update(data_offsets=[0, 10**15]),
    "offsets backwards": lambda h: first(h).update(data_offsets=[480, 0]),
    "overlapping tensors": lambda h: {k: e | {"data_offsets": [0, 480]} for k, e in h.items() if k != "__metadata__"},
    "unknown dtype": lambda h: first(h).update(dtype="F99"),
    "smaller dtype": lambda h: first(h).update(dtype="F16"),
    "no dtype": lambda h: first(h).pop("dtype") and None,
    "a list": lambda h: [h],
    "empty": lambda h: {"a": {}},
    "no tensors": lambda h: {"__metadata__": {}},
    "metadata of numbers": lambda h: h.update(__metadata__={"format": 1}),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_a_lying_header_is_bad_input(tmp_path, lie):
    saved(tmp_path)
    lying(tmp_path, lie)
    refused(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**40, 2**63, 2**64 - 1], ids=str)
def test_a_lying_header_length_is_bad_input(tmp_path, length):
    saved(tmp_path)
    path = tmp_path / store.WEIGHTS
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    refused(tmp_path)


def test_a_git_lfs_pointer_is_told_as_such(tmp_path):
    saved(tmp_path)
    (tmp_path / store.WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    [problem] = refused(tmp_path)
    assert "git lfs pull" in problem


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An adapter of under 2 KB, the model it fits, and where to write a damaged one."""
    folder, model = tmp_path_factory.mktemp("small"), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).eval()
    inject(twin := copy.deepcopy(model), 2, 4, targets=["0", "1"])
    store.save(twin, folder)
    return folder, randomise(model)


def loads_or_refuses(folder, model):
    """Loading ends well or with a LoraError; whatever else comes is a failure. Says which."""
    model = copy.deepcopy(model)
    before = snapshot(model)
    try:
        store.load(model, folder)
    except LoraError as error:
        assert 2 <= error.code <= 5 and error.problems and same(before, snapshot(model))
        return False
    layers = lora_layers(model)
    assert layers and all(torch.isfinite(t).all() for t in adapter_of(model).values())
    return True


@mutation(
    "lora/files.py",
    "except (SafetensorError, OSError, ValueError, OverflowError, TypeError) as error:",
    "except OSError as error:",
)
def test_every_truncation_is_bad_input(small, tmp_path):
    folder, model = small
    data = (folder / store.WEIGHTS).read_bytes()
    (tmp_path / store.CONFIG).write_bytes((folder / store.CONFIG).read_bytes())
    for length in range(len(data)):
        (tmp_path / store.WEIGHTS).write_bytes(data[:length])
        with pytest.raises(BadInput):
            store.load(model, tmp_path)
    assert not lora_layers(model)
    (tmp_path / store.WEIGHTS).write_bytes(data + b"\0")
    assert not loads_or_refuses(tmp_path, model)


FUZZ = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])


@mutation(
    "lora/files.py",
    "except (SafetensorError, OSError, ValueError, OverflowError, TypeError) as error:",
    "except OSError as error:",
)
@FUZZ
@given(flips=st.lists(st.tuples(st.integers(0, 2**31), st.integers(1, 255)), min_size=1, max_size=4), cut=st.booleans())
def test_flipped_bytes_load_or_are_refused(small, tmp_path, flips, cut):
    folder, model = small
    data = bytearray((folder / store.WEIGHTS).read_bytes())
    for place, mask in flips:
        data[place % len(data)] ^= mask
    if cut:
        del data[flips[0][0] % len(data) :]
    (tmp_path / store.CONFIG).write_bytes((folder / store.CONFIG).read_bytes())
    (tmp_path / store.WEIGHTS).write_bytes(data)
    assert loads_or_refuses(tmp_path, model) <= (not cut)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["0", ".*", "("]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@FUZZ
@given(fields=st.dictionaries(st.sampled_from(sorted(PEFT_FIELDS)) | st.text(max_size=5), JSON, max_size=3))
@example(fields={"lora_dropout": 1})
@example(fields={"lora_alpha": float("nan")})
@example(fields={"lora_alpha": float("inf")})
@example(fields={"r": True})
@example(fields={"target_modules": "a{99999999999}"})
@example(fields={"target_modules": [["0"]]})
@example(fields={"layers_to_transform": "0"})
@example(fields={"exclude_modules": "("})
@example(fields={"layers_pattern": "(", "layers_to_transform": [0]})
@example(fields={"rank_pattern": {"0": 7}})
@example(fields={"\x1b[2J\n": 1})
def test_any_config_loads_or_is_refused(small, tmp_path, fields):
    folder, model = small
    for name in (store.CONFIG, store.WEIGHTS):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    change_config(tmp_path, **fields)
    loads_or_refuses(tmp_path, model)


@FUZZ
@given(data=st.binary(max_size=40), place=st.integers(0, 2**31))
def test_any_bytes_as_config_load_or_are_refused(small, tmp_path, data, place):
    folder, model = small
    text = (folder / store.CONFIG).read_bytes()
    place %= len(text)
    (tmp_path / store.WEIGHTS).write_bytes((folder / store.WEIGHTS).read_bytes())
    (tmp_path / store.CONFIG).write_bytes(text[:place] + data + text[place + len(data) :])
    loads_or_refuses(tmp_path, model)


@mutation(
    "lora/adapter/peft_config.py",
    "    if isinstance(targets, str) and targets:",
    "    if isinstance(targets, str) and (re.fullmatch(targets, 'model.layers.0.self_attn.q_proj') or targets):",
)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern"])
@pytest.mark.parametrize(
    "pattern", [r"(\w+\.?\w*)+!", "(" * 5000, "a{99999999999}", "["], ids=["endless", "deep", "long", "broken"]
)
def test_a_pattern_in_a_file_can_neither_hang_nor_crash(tmp_path, field, pattern):
    """A regular expression from a stranger; the first one takes longer than the universe on a path of 30 letters."""
    saved(tmp_path)
    change_config(tmp_path, layers_to_transform=[0], **{field: pattern})

    def too_long(number, frame):
        raise AssertionError("the pattern was run")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, 3)
    try:
        loads_or_refuses(tmp_path, tiny_model(torch.float32))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("text", ["[]", "null", "{", '{"r": 1} x', "[" * 100000, "\ufeff[]", ""], ids=lambda t: t[:8])
def test_broken_config_is_bad_input(tmp_path, text):
    saved(tmp_path)
    (tmp_path / store.CONFIG).write_text(text)
    [problem] = refused(tmp_path)
    assert "JSON" in problem


# ---- fields ----------------------------------------------------------------------------------------------------------

CHANGES_THE_MATHS = [
    ("fan_in_fan_out", True),
    ("modules_to_save", ["lm_head"]),
    ("bias", "some"),
    ("lora_bias", True),
    ("init_lora_weights", "pissa"),
    ("init_lora_weights", "pissa_niter_16"),
    ("init_lora_weights", "olora"),
    ("init_lora_weights", "loftq"),
    ("init_lora_weights", "corda"),
    ("init_lora_weights", "lora_ga"),
    ("layer_replication", [[0, 1], [0, 2]]),
    ("trainable_token_indices", [1]),
    ("target_parameters", ["experts.weight"]),
    ("alora_invocation_tokens", [1, 2]),
    ("arrow_config", {"top_k": 3}),
    ("use_qalora", True),
    ("use_bdlora", {"nblocks": 2}),
    ("megatron_config", {"a": 1}),
    ("peft_type", "IA3"),
    ("peft_type", "ADALORA"),
    ("peft_type", ""),
    ("a_field_of_the_future", 1),
    ("another", "yes"),
]


@mutation(
    "lora/adapter/peft_config.py", "if key not in HARMLESS and not any(", 'if key.startswith("use_") and not any('
)
@mutation(
    "lora/adapter/peft_config.py",
    '"init_lora_weights": (True,',
    '"init_lora_weights": ("pissa", "olora", "loftq", True,',
)
@pytest.mark.parametrize(("field", "value"), CHANGES_THE_MATHS, ids=str)
def test_a_field_that_changes_the_maths_is_refused_by_name(tmp_path, field, value):
    saved(tmp_path)
    change_config(tmp_path, **(PEFT_DEFAULTS | {field: value}))
    [problem] = refused(tmp_path)
    assert problem.startswith(f"unsupported adapter in {tmp_path / store.CONFIG}:{field}: {value!r} is not implemented")


def test_all_such_fields_are_listed_in_one_error(tmp_path):
    saved(tmp_path)
    fields = dict(CHANGES_THE_MATHS)
    change_config(tmp_path, **fields)
    problems = refused(tmp_path)
    assert len(problems) == len(fields) and all(any(f":{field}: " in p for p in problems) for field in fields)


@mutation("lora/adapter/peft_config.py", '"megatron_core", "qalora_group_size",', '"qalora_group_size",')
def test_a_full_default_config_of_peft_is_accepted(tmp_path):
    model = saved(tmp_path, alpha=8)
    (tmp_path / store.CONFIG).write_text(json.dumps(PEFT_DEFAULTS))
    other = tiny_model(torch.float32)
    config = store.load(other, tmp_path)
    assert same(adapter_of(model), adapter_of(other)) and config.targets == ("q_proj", "v_proj")


@pytest.mark.parametrize("field", ["r", "lora_alpha", "target_modules", "peft_type"])
def test_a_config_without_a_needed_field_is_refused_by_name(tmp_path, field):
    saved(tmp_path)
    config = {key: value for key, value in PEFT_DEFAULTS.items() if key != field}
    (tmp_path / store.CONFIG).write_text(json.dumps(config))
    assert any(f":{field}: " in problem for problem in refused(tmp_path))


@mutation(
    "lora/adapter/peft_config.py",
    "((int, float), 0, 1 - 1e-9)",
    "((int, float), -1, 1 - 1e-9)",
)
@mutation(
    "lora/adapter/peft_config.py",
    "RANK, ALPHA, DROPOUT = ((int,), 1, 65536)",
    "RANK, ALPHA, DROPOUT = ((int, float), 1, 65536)",
)
@pytest.mark.parametrize(
    ("field", "value"),
    [("r", 0), ("r", 2.0), ("r", "5"), ("r", True), ("lora_alpha", 0), ("lora_alpha", -1), ("lora_alpha", "8"),
     ("lora_dropout", 1.5), ("lora_dropout", -0.1), ("lora_dropout", 1.0), ("target_modules", []),
     ("target_modules", [1]), ("target_modules", ""), ("target_modules", 5), ("target_modules", None)],
    ids=str,
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_field(tmp_path, field, value):
    saved(tmp_path)
    change_config(tmp_path, **{field: value})
    [problem] = refused(tmp_path)
    assert f"{store.CONFIG}:{field}: " in problem


# ---- passport --------------------------------------------------------------------------------------------------------


class Stored:
    """The tensors of a model, as a checkpoint offers them."""

    quant = None

    def __init__(self, name, seed=0, **overrides):
        self.name, self.tensors = name, tiny_model(torch.bfloat16, seed, **overrides).state_dict()
        self.original = self
        self.header = {name: ("BF16", tuple(tensor.shape)) for name, tensor in self.tensors.items()}

    def read(self, name):
        return self.tensors[name]


PATHS = [f"model.layers.{name}_proj" for name in ("0.self_attn.q", "1.mlp.up", "1.self_attn.q")]


@pytest.fixture
def with_passport(tmp_path):
    base = Stored("some/model")
    value = passport.make(base, PATHS)
    store.save(patched(tiny_model(torch.float32), targets=PATHS), tmp_path, base.name, value)
    assert passport.read(tmp_path) == value
    return tmp_path


def verify(folder, base, paths=PATHS):
    passport.verify(folder, base, paths)


def test_the_base_of_an_adapter_passes_under_any_name_and_in_any_order(with_passport, capsys):
    verify(with_passport, Stored("some/model"))
    verify(with_passport, Stored("/elsewhere/copy"), PATHS[::-1])
    assert capsys.readouterr().err == ""


@mutation("lora/adapter/passport.py", 'if same_structure and its["name"] == base.name:', "if same_structure:")
def test_a_base_with_other_weights_is_refused(with_passport):
    with pytest.raises(BadInput, match=r"trained on some/model; other/model has other weights.*--model some/model"):
        verify(with_passport, Stored("other/model", seed=1))


@mutation(
    "lora/adapter/passport.py",
    ".reshape(-1).view(torch.uint8).numpy().data)",
    ".reshape(-1)[:-1].view(torch.uint8).numpy().data)",
)
@pytest.mark.parametrize("path", PATHS)
def test_one_changed_value_in_a_patched_tensor_is_noticed(with_passport, path):
    base = Stored("other/model")
    value = base.tensors[f"{path}.weight"][-1, -1]
    value.copy_(torch.nextafter(value, value.new_tensor(9.0)))
    with pytest.raises(BadInput, match="other weights"):
        verify(with_passport, base)


@mutation(
    "lora/adapter/passport.py",
    """for name in sorted(names):
        digest.update(name.encode() + b"\\0")""",
    "for name in sorted(names, key=lambda name: read(name).double().sum().item()):",
)
def test_swapped_tensors_are_noticed(with_passport):
    base = Stored("other/model")
    one, two = (f"{path}.weight" for path in PATHS[::2])
    base.tensors[one], base.tensors[two] = base.tensors[two], base.tensors[one]
    with pytest.raises(BadInput, match="other weights"):
        verify(with_passport, base)


@mutation("lora/adapter/passport.py", '("cpu", dtype):', '("cpu", linear.weight.dtype):')
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_weights_in_memory_are_compared_where_they_are_those_of_the_file(with_passport, monkeypatch, dtype):
    base, model = Stored("other/model"), tiny_model(dtype)
    model.load_state_dict(base.tensors)
    read, seen = base.read, []
    monkeypatch.setattr(base, "read", lambda name: seen.append(name) or read(name))
    layers = lora_layers(patched(model, targets=PATHS))
    stored = passport.held_or_read(base, layers)
    passport.verify(with_passport, base, layers, stored)
    assert len(seen) == (0 if dtype == torch.bfloat16 else len(PATHS))
    with torch.no_grad():
        layers[PATHS[1]].base.weight[0, 0] += 1
    if dtype == torch.bfloat16:
        with pytest.raises(BadInput, match="other weights"):
            passport.verify(with_passport, base, layers, stored)


def test_a_tensor_the_adapter_does_not_touch_may_differ(with_passport, capsys):
    base = Stored("other/model")
    base.tensors["model.embed_tokens.weight"] += 1
    verify(with_passport, base)
    assert capsys.readouterr().err == ""


@mutation("lora/adapter/passport.py", 'if same_structure and its["name"] == base.name:', 'if its["name"] == base.name:')
@pytest.mark.parametrize("name", ["some/model", "other/model"])
@pytest.mark.parametrize(
    "overrides", [{"vocab_size": 137}, {"num_hidden_layers": 3}, {"attention_bias": True}], ids=str
)
def test_a_base_of_another_structure_is_refused_even_under_the_same_name(with_passport, name, overrides):
    with pytest.raises(BadInput, match=f"{name} has other tensors"):
        verify(with_passport, Stored(name, **overrides))


@mutation("lora/adapter/passport.py", '(f"{name} {dtype} {list(shape)}\\n"', '(f"{name} {list(shape)}\\n"')
def test_a_base_of_another_dtype_is_another_structure(with_passport):
    base = Stored("some/model")
    base.header = {name: ("F32", shape) for name, (_, shape) in base.header.items()}
    with pytest.raises(BadInput, match="other tensors"):
        verify(with_passport, base)


@mutation("lora/adapter/passport.py", 'if same_structure and its["name"] == base.name:', "if False:")
def test_the_same_model_from_another_source_only_warns(with_passport, capsys):
    verify(with_passport, Stored("some/model", seed=1))
    err = capsys.readouterr().err
    assert err.startswith("warning: some/model has other weights") and err.count("\n") == 1


@mutation(
    "lora/adapter/passport.py",
    """    if not path.exists():
        return None
""",
    "",
)
def test_an_adapter_without_passport_passes(tmp_path):
    saved(tmp_path)
    assert passport.read(tmp_path) is None
    verify(tmp_path, Stored("any/model", vocab_size=7))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"format": 2, "base": {}}, "unknown passport.*2, this program knows 1"),
        ({"format": "1"}, "unknown passport"),
        ({}, "unknown passport"),
        ({"format": 1}, "broken passport"),
        ({"format": 1, "base": []}, "broken passport"),
        ({"format": 1, "base": {"name": "x", "structure": "y"}}, "broken passport"),
        ({"format": 1, "base": {"name": "x", "structure": "y", "patched": 3}}, "broken passport"),
        ([], "wrong JSON"),
    ],
    ids=str,
)
def test_a_broken_passport_is_bad_input(tmp_path, value, message):
    saved(tmp_path)
    (tmp_path / store.PASSPORT).write_text(json.dumps(value))
    with pytest.raises(BadInput, match=message):
        verify(tmp_path, Stored("some/model"))
