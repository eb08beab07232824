"""Adapters as other programs write them: read as what they are, or refused in one line that names the case."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora.adapter import peft_tensors, store
from lora.adapter.inject import lora_layers
from lora.errors import BadInput, Refused
from lora.network.config import ModelConfig
from lora.network.decoder import Model
from tests.adapter.test_store import change_config, change_tensors, refused, saved
from tests.helpers import patched, randomise, same, snapshot, some_tokens, tiny_model
from tests.mutation import mutation
from tests.network.test_families import family_config

PREFIX = "base_model.model."


def rename(folder, change) -> None:
    tensors = load_file(folder / store.WEIGHTS)
    save_file({change(name): tensor for name, tensor in tensors.items()}, folder / store.WEIGHTS)


def loads_as(folder, model, base=None, **how) -> bool:
    """The adapter in `folder` on the base of `model` is that of `model`, bit for bit."""
    again = base or tiny_model(torch.float32)
    store.load(again, folder, **how)
    return same(snapshot(again), snapshot(model))


# ---- names -----------------------------------------------------------------------------------------------------------

SPELLINGS = {
    "the adapter is called default": lambda name: name.replace(".weight", ".default.weight"),
    "the adapter is called my-lora": lambda name: name.replace(".weight", ".my-lora.weight"),
    "no prefix": lambda name: name.removeprefix(PREFIX),
    "the prefix twice": lambda name: PREFIX + name,
    "DistributedDataParallel": lambda name: f"module.{name}",
    "DeepSpeed, an adapter's name": lambda name: f"module.{name}".replace(".weight", ".default.weight"),
    "a compiled model": lambda name: f"_orig_mod.{name}",
    "a compiled model inside": lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "FSDP round every block": lambda name: name.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
    "checkpointing": lambda name: name.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
    "without .weight": lambda name: name.removesuffix(".weight"),
}


@mutation("lora/adapter/peft_tensors.py", "(\\.(?!bias$)[^.]+)??(", "(")
@mutation("lora/adapter/peft_tensors.py", "(base_model\\.model|module|", "(module|", case="lora-the prefix twice")
@mutation("lora/adapter/peft_tensors.py", "|_orig_mod|", "|", case="lora-a compiled model")
@mutation(
    "lora/adapter/peft_tensors.py",
    "_(fsdp|checkpoint)_wrapped_module",
    "_fsdp_wrapped_module",
    case="lora-checkpointing",
)
@pytest.mark.parametrize("change", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_is_the_same_however_its_tensors_are_called(tmp_path, change, kind):
    model = saved(tmp_path, ("all",)) if kind == "lora" else saved_dora(tmp_path)
    rename(tmp_path, change)
    assert loads_as(tmp_path, model)
    change_config(tmp_path, target_modules=".*(q|k|v|o|gate|up|down)_proj")
    assert loads_as(tmp_path, model)


def saved_dora(folder):
    from lora.adapter.inject import inject
    from lora.adapter.variants import DoRALinear
    from tests.helpers import randomise_adapter

    inject(model := tiny_model(torch.float32), 5, 8, kind=DoRALinear)
    store.save(randomise_adapter(model), folder, "some/model")
    return model


@mutation("lora/adapter/peft_tensors.py", "        elif ours in called:", "        elif False:")
def test_two_adapters_in_one_file_are_not_taken_for_one(tmp_path):
    saved(tmp_path)
    change_tensors(tmp_path, lambda t: t.update({k.replace(".weight", ".b.weight"): v + 1 for k, v in t.items()}))
    problems = refused(tmp_path)
    assert len(problems) == 8 and all("is there twice. Keep one adapter in a file" in p for p in problems)


def test_a_path_that_looks_like_a_wrappers_is_kept(tmp_path):
    from torch import nn

    from lora.adapter.inject import inject

    def nested():
        return nn.ModuleDict({"module": nn.ModuleDict({"fc": nn.Linear(3, 3)}), "fc": nn.Linear(3, 3)})

    inject(model := nested(), 2, 4, targets=["module.fc"])
    store.save(model, tmp_path)
    store.load(again := nested(), tmp_path)
    assert set(lora_layers(again)) == {"module.fc"}


# ---- what this model holds as several Linears ------------------------------------------------------------------------


def phi3(kind="phi3"):
    return randomise(Model(ModelConfig.from_json(family_config(kind)))).float().requires_grad_(False).eval()


@mutation("lora/adapter/peft_tensors.py", 'if not end.startswith("lora_A"):', "if False:")
@mutation(
    "lora/adapter/peft_tensors.py", "rows = tensor.split(sizes)", "rows = tensor.split(sizes[::-1])", case="names-phi3"
)
@pytest.mark.parametrize("kind", ["phi3", "baichuan", "glm4"])
@pytest.mark.parametrize("form", ["names", "pattern", "ranks"])
def test_an_adapter_of_fused_linears_adds_the_same_numbers(tmp_path, kind, form):
    """Of Phi-3's qkv_proj and gate_up_proj: ΔW is B A, and the rows of q, k and v are rows of B."""
    model, fused = phi3(kind), peft_tensors.fused(phi3(kind))
    assert {whole.rsplit(".", 1)[-1] for whole, _ in fused} <= {"qkv_proj", "gate_up_proj", "W_pack"} and fused
    random, tensors, deltas = torch.Generator().manual_seed(0), {}, {}
    ranks = {"gate_up_proj": 3} if form == "ranks" else {}
    for whole, parts in fused:
        linears = [model.get_submodule(part) for part in parts]
        r = ranks.get(whole.rsplit(".", 1)[-1], 4)
        A = torch.randn(r, linears[0].in_features, generator=random)
        B = torch.randn(sum(linear.out_features for linear in linears), r, generator=random)
        tensors |= {f"{PREFIX}{whole}.lora_A.weight": A, f"{PREFIX}{whole}.lora_B.weight": B}
        deltas[whole] = 6 / r * B @ A
    names = sorted({whole.rsplit(".", 1)[-1] for whole, _ in fused})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": names, "rank_pattern": ranks}
    if form == "pattern":
        config["target_modules"] = f".*({'|'.join(names)})"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / store.WEIGHTS)
    store.load(model, tmp_path)
    layers = lora_layers(model)
    assert set(layers) == {part for _, parts in fused for part in parts}
    for whole, parts in fused:
        got = torch.cat([layers[part].delta() for part in parts])
        assert torch.allclose(got, deltas[whole], rtol=1e-6, atol=1e-6) and got.norm() > 1
    store.save(model, tmp_path / "again")
    store.load(again := phi3(kind), tmp_path / "again")
    assert same(snapshot(again), snapshot(model))


def test_a_fused_tensor_of_another_size_is_refused_by_its_name(tmp_path):
    whole, _ = peft_tensors.fused(phi3())[0]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["qkv_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({f"{PREFIX}{whole}.lora_B.weight": torch.ones(7, 4)}, tmp_path / store.WEIGHTS)
    problems = refused(tmp_path, model=phi3())
    assert any(f":{PREFIX}{whole}.lora_B.weight: " in problem for problem in problems)


# ---- whole tensors beside the adapter --------------------------------------------------------------------------------

HEAD = peft_tensors.HEAD


def with_tensors(folder, **tensors):
    change_tensors(folder, lambda there: there.update(tensors))


@mutation("lora/adapter/peft_tensors.py", "same_numbers(file.read(name), ours.cpu(), read is not None)", "True")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["loaded", "read", "meta"])
def test_the_bases_head_that_peft_saves_beside_an_adapter_on_it_must_be_this_models(tmp_path, dtype, of, how):
    """In whatever dtype it was saved: of a bf16 head float16 keeps all but what is below its smallest numbers."""
    model = patched(tiny_model(of), targets=("lm_head", "q_proj"))
    head = model.lm_head.base.weight
    head[:, :3] *= 1e-6
    store.save(model, tmp_path, "some/model")
    with_tensors(tmp_path, **{HEAD: head.to(dtype)})

    def base():
        again = tiny_model(of)
        again.lm_head.weight[:, :3] *= 1e-6
        return again

    read = None if how == "loaded" else base().state_dict().get
    place = "meta" if how == "meta" else "cpu"
    store.load(again := base().to(place), tmp_path, read=read)
    assert set(lora_layers(again)) == set(lora_layers(model))
    wrong = head.clone()
    wrong[5, 7] *= 1.01
    for other in (wrong, head.flip(0), head[1:]):
        with_tensors(tmp_path, **{HEAD: other.to(dtype).contiguous()})
        with pytest.raises(BadInput) as caught:
            store.load(base().to(place), tmp_path, read=read)
        [problem] = caught.value.problems
        assert problem.startswith(f"another head in {tmp_path / store.WEIGHTS}:{HEAD}: ")


@mutation("lora/adapter/peft_tensors.py", "        elif model is None and name == HEAD:", "        elif False:")
def test_an_adapter_is_read_without_its_base_as_well_and_the_bases_head_is_no_part_of_it(tmp_path):
    """As it is before it is uploaded."""
    saved(tmp_path, ("lm_head", "q_proj"))
    expected = store.read_tensors(tmp_path)
    with_tensors(tmp_path, **{HEAD: torch.ones(131, 24)})
    assert same(store.read_tensors(tmp_path), expected) and len(expected) == 6
    rename(tmp_path, SPELLINGS["no prefix"])  # PEFT would not find them
    with pytest.raises(BadInput, match="extra tensor"):
        store.read_tensors(tmp_path)


@pytest.mark.parametrize("through", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_copy_is_known_through_every_way_of_rounding_and_a_trained_one_is_none(kept, through):
    ours = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) / 50
    copy = ours.to(through).to(kept)
    assert peft_tensors.same_numbers(copy, ours, exact=True)
    trained = copy.clone()
    trained[0, 0] = trained[0, 0] * (1 + 2 * torch.finfo(kept).eps)
    assert not peft_tensors.same_numbers(trained, ours, exact=True)


COPIES = {  # names in the file -> of which tensor
    "modules_to_save": {
        f"{PREFIX}lm_head.weight": "lm_head",
        f"{PREFIX}model.embed_tokens.weight": "model.embed_tokens",
    },
    "a state_dict": {
        f"{PREFIX}lm_head.modules_to_save.default.weight": "lm_head",
        f"{PREFIX}lm_head.original_module.weight": "lm_head",
        f"{PREFIX}model.layers.0.self_attn.q_proj.base_layer.weight": "model.layers.0.self_attn.q_proj",
    },
}  # fmt: skip


@mutation(
    "lora/adapter/peft_config.py", 'if key == "modules_to_save" and value and has_copies(value, folder):', "if False:"
)
@pytest.mark.parametrize("copies", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_whole_tensors_that_repeat_the_bases_are_no_reason_to_refuse_an_adapter(tmp_path, copies, dtype, tied):
    model = patched(tiny_model(torch.float32, tie_word_embeddings=tied), targets=("q_proj", "v_proj"))
    store.save(model, tmp_path, "some/model")
    base = tiny_model(torch.float32, tie_word_embeddings=tied)
    modules = {path: base.get_submodule(path) for path in copies.values() if not tied or path != "lm_head"}
    modules.setdefault("lm_head", base.model.embed_tokens)
    with_tensors(tmp_path, **{name: modules[path].weight.detach().to(dtype).clone() for name, path in copies.items()})
    change_config(tmp_path, modules_to_save=["lm_head"])
    assert loads_as(tmp_path, model, base)
    name = next(iter(copies))
    with_tensors(tmp_path, **{name: modules[copies[name]].weight.detach().to(dtype) + 0.01})
    [problem] = refused(tmp_path, model=tiny_model(torch.float32, tie_word_embeddings=tied))
    assert problem.startswith(
        f"extra tensor in {tmp_path / store.WEIGHTS}:{name}: it brings a tensor other than the base"
    )
    assert "Merge it into its base with PEFT" in problem and "Remove" not in problem


def test_an_embedding_with_rows_for_added_tokens_is_named_as_such(tmp_path):
    saved(tmp_path)
    with_tensors(tmp_path, **{f"{PREFIX}model.embed_tokens.weight": torch.zeros(133, 24)})
    [problem] = refused(tmp_path)
    assert "a whole tensor of 133 rows, the base has 131: tokens were added to it. Merge it into its base" in problem


# ---- what the config says --------------------------------------------------------------------------------------------


@mutation(
    "lora/adapter/store.py",
    '{"none": (), "lora_only": paths, "all": known}',
    '{"none": (), "lora_only": (), "all": ()}',
)
@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_that_a_model_has_not_were_not_trained(tmp_path, bias):
    model = saved(tmp_path)
    change_config(tmp_path, bias=bias)
    assert loads_as(tmp_path, model)
    base = {"attention_bias": True}
    store.save(patched(tiny_model(torch.float32, **base), targets=("q_proj",)), tmp_path / "b", "some/model")
    change_config(tmp_path / "b", bias=bias)
    [problem] = refused(tmp_path / "b", model=tiny_model(torch.float32, **base))
    assert problem.startswith(f"unsupported adapter in {tmp_path / 'b/adapter_config.json'}:bias: '{bias}' is not impl")
    model = patched(tiny_model(torch.float32, **base), targets=("up_proj",))
    store.save(model, tmp_path / "c", "some/model")
    change_config(tmp_path / "c", bias="lora_only")  # those of other Linears were not
    assert loads_as(tmp_path / "c", model, tiny_model(torch.float32, **base))
    with_tensors(tmp_path, **{f"{PREFIX}model.layers.0.self_attn.q_proj.bias": torch.ones(24)})
    [problem] = refused(tmp_path)
    assert "q_proj.bias: biases are never trained here. Merge it" in problem


@mutation("lora/adapter/peft_config.py", 'if "peft_type" not in raw and raw.keys() &', "if False and raw.keys() &")
@pytest.mark.parametrize("field", ["fine_tune_type", "lora_parameters"])
def test_an_mlx_adapter_is_refused_in_one_line(tmp_path, field):
    config = {"adapter_path": "adapters", "batch_size": 4, "num_layers": 16, "seed": 0, "train": True, "iters": 100}
    config |= {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != field}))
    save_file({"model.layers.0.self_attn.q_proj.lora_a": torch.ones(24, 8)}, tmp_path / "adapters.safetensors")
    [problem] = refused(tmp_path)
    assert "it is MLX's" in problem and "mlx_lm.fuse" in problem


@mutation("lora/adapter/peft_tensors.py", '    if "lm_head" in name and is_tied(model):', "    if False:")
@pytest.mark.parametrize("targets", [("lm_head",), ("lm_head", "q_proj")], ids=str)
def test_an_adapter_on_a_head_that_is_the_embedding_is_refused_as_such(tmp_path, targets):
    saved(tmp_path, targets)
    problems = refused(tmp_path, model=tiny_model(torch.float32, tie_word_embeddings=True))
    assert len(problems) == 2 and all("this model's head is its embedding" in problem for problem in problems)


def test_an_adapter_of_an_embedding_is_refused_with_the_way(tmp_path):
    saved(tmp_path)
    with_tensors(tmp_path, **{f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.ones(5, 131)})
    [problem] = refused(tmp_path)
    assert "it adapts an embedding, which is not implemented. Merge it into its base with PEFT" in problem


@mutation("lora/adapter/peft_tensors.py", 'folder.glob("adapter*")', 'folder.glob("adapter_model*")')
@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_0.pt", "adapters.npz"])
def test_a_pickled_adapter_is_refused_with_the_way(tmp_path, name):
    saved(tmp_path)
    (tmp_path / store.WEIGHTS).rename(tmp_path / name)
    [problem] = refused(tmp_path, Refused)
    assert str(tmp_path / name) in problem and "load it with PEFT where you trust it, and save_pretrained" in problem


def test_an_answer_of_an_adapter_under_other_names_is_its_own(tmp_path):
    """The names decide nothing else: logits, too, are the same bits."""
    model = saved(tmp_path, ("all",))
    rename(tmp_path, SPELLINGS["DeepSpeed, an adapter's name"])
    again = tiny_model(torch.float32)
    store.load(again, tmp_path)
    assert torch.equal(again(some_tokens()), model(some_tokens()))
    assert not torch.equal(again(some_tokens()), tiny_model(torch.float32)(some_tokens()))
