"""The language model in a folder of a larger one: the same as in a folder of its own, and what stays behind is said."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lora import files
from lora.errors import BadInput
from lora.pretrained import ModelFolder, find, load_model, write_model
from tests.helpers import same, some_tokens, tiny_config, tiny_model
from tests.mutation import mutation
from tests.pretrained.test_prequantised import in_float8
from tests.pretrained.test_pretrained import EMBEDDING, HEAD, folder_of, problems_of, tensors_of

QWEN35 = {
    "model_type": "qwen3_5_text", "head_dim": 8, "num_hidden_layers": 4, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 6, "rope_theta": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                        "mrope_section": [1, 1, 0], "mrope_interleaved": True},
}  # fmt: skip
MINISTRAL = {
    "model_type": "ministral3", "head_dim": 8, "rope_theta": None,
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                        "original_max_position_embeddings": 64, "llama_4_scaling_beta": 0.1},
}  # fmt: skip
GEMMA3 = {"model_type": "gemma3_text", "head_dim": 8, "tie_word_embeddings": True, "sliding_window": 16}
NEW, OLD = ("model.language_model.", "lm_head."), ("language_model.model.", "language_model.lm_head.")
GEMMA4 = {
    "model_type": "gemma4_text", "head_dim": 8, "global_head_dim": 12, "tie_word_embeddings": True, "rope_theta": None,
    "num_hidden_layers": 4, "sliding_window": 16, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 6,
    "vocab_size_per_layer_input": 140, "num_key_value_heads": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
LARGER = {  # a larger model: the config of its language model, how it calls that model's tensors, its other tensors
    "qwen3_5": (QWEN35, NEW, {
        "model.visual": ["patch_embed.proj.weight", "blocks.0.attn.qkv.bias", "merger.linear_fc1.weight"],
        "mtp": ["fc.weight", "layers.0.self_attn.q_proj.weight"],
    }),
    "mistral3": (MINISTRAL, OLD, {
        "vision_tower": ["patch_conv.weight", "transformer.layers.0.attention.q_proj.weight"],
        "multi_modal_projector": ["linear_1.weight", "norm.weight"],
    }),
    "gemma4": (GEMMA4, NEW, {
        "model.vision_tower": ["patch_embedder.input_proj.weight"], "model.audio_tower": ["output_proj.weight"],
        "model.embed_vision": ["embedding_projection.weight"], "model.embed_audio": ["embedding_projection.weight"],
    }),
    "gemma3": (GEMMA3, OLD, {
        "vision_tower": ["vision_model.embeddings.patch_embedding.weight"],
        "multi_modal_projector": ["mm_input_projection_weight"],
    }),
}  # fmt: skip


def larger_folder(path: Path, kind: str, shards: int = 1, change=lambda tensors: tensors, **outer) -> Path:
    """A folder of a larger model around the tiny one of its kind."""
    text, (stem, head), others = LARGER[kind]
    tensors = {
        (head if name == HEAD else stem) + name.removeprefix("lm_head." if name == HEAD else "model."): tensor
        for name, tensor in tensors_of(tiny_model(torch.float32, **text)).items()
    }
    tensors |= {f"{part}.{name}": torch.ones(3) for part, names in others.items() for name in names}
    folder_of(path, change(tensors), shards)
    config = {"architectures": ["Larger"], "model_type": kind, "vision_config": {"hidden_size": 3, "model_type": "vit"}}
    config |= {"text_config": tiny_config(**text), "image_token_id": 5} | outer
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return path


def plain_of(path: Path, kind: str) -> Path:
    text = LARGER[kind][0]
    return folder_of(path, tensors_of(tiny_model(torch.float32, **text)), **text)


@mutation(
    "lora/pretrained/wrapped.py",
    'rest if not part or rest.startswith("lm_head.")',
    "rest if not part",
    case="mistral3-1",
)
@mutation("lora/pretrained/wrapped.py", "text | outer | named", "outer | named", case="qwen3_5-1")
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", LARGER)
def test_the_language_model_is_that_of_a_folder_of_its_own(tmp_path, kind, shards):
    folder, plain = (
        ModelFolder(larger_folder(tmp_path / "m", kind, shards)),
        ModelFolder(plain_of(tmp_path / "p", kind)),
    )
    assert folder.header == plain.header
    model, alone = load_model(folder), load_model(plain)
    assert same(tensors_of(model), tensors_of(alone))
    assert torch.equal(model(some_tokens()), alone(some_tokens()))
    said = ", ".join(f"{part} ({len(names)} tensors)" for part, names in sorted(LARGER[kind][2].items()))
    assert folder.described == f"folder {tmp_path / 'm'}, without {said}"
    assert plain.described == f"folder {tmp_path / 'p'}"


@pytest.mark.parametrize("kind", LARGER)
def test_it_is_written_as_a_model_of_its_own(tmp_path, kind):
    folder = ModelFolder(larger_folder(tmp_path / "m", kind, eos_token_id=[2, 7]))
    (tmp_path / "new").mkdir()
    write_model(folder, tmp_path / "new", lambda name, tensor: tensor)
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["model_type"] == LARGER[kind][0]["model_type"] and "text_config" not in config
    assert config["eos_token_id"] == [2, 7]
    assert config["architectures"][0].endswith("ForCausalLM") and "vision_config" not in config
    new = ModelFolder(tmp_path / "new")
    assert new.described == f"folder {tmp_path / 'new'}" and new.header == folder.header
    assert same(tensors_of(load_model(new)), tensors_of(load_model(folder)))


@mutation("lora/pretrained/wrapped.py", 'found[0].rstrip(".") if found else', 'found[0].rstrip(".") if True else')
def test_keys_and_values_that_no_layer_of_gemma_4_uses_are_left_out(tmp_path):
    idle = {f"model.language_model.layers.{i}.self_attn.{part}.weight": torch.ones(3)
            for i in (2, 3) for part in ("k_proj", "v_proj", "k_norm")}  # fmt: skip
    folder = ModelFolder(larger_folder(tmp_path / "m", "gemma4", change=lambda tensors: tensors | idle))
    assert "without keys and values that no layer uses (6 tensors), model.audio_tower (1 tensors)" in folder.described
    assert same(tensors_of(load_model(folder)), tensors_of(load_model(ModelFolder(plain_of(tmp_path / "p", "gemma4")))))


STRANGE = {  # a tensor -> what is said of it
    "model.language_model.layers.0.strange.weight": "extra tensor in M:model.layers.0.strange.weight: ",
    "adapter.weight": "extra tensor in M:adapter.weight: ",
    "visual_prompt.weight": "extra tensor in M:visual_prompt.weight: ",
    "model.layers.0.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight, too. Download it again",
    "language_model.lm_head.weight": "lm_head.weight, too. Download it again",
}


@mutation("lora/pretrained/wrapped.py", "if own in names:", "if False:", case="language_model.lm_head.weight")
@mutation("lora/pretrained/wrapped.py", "embed_audio)\\.|mtp", "embed_audio)|mtp", case="visual_prompt.weight")
@pytest.mark.parametrize("name", STRANGE)
def test_tensors_that_belong_to_no_known_part_are_refused(tmp_path, name):
    path = larger_folder(tmp_path / "m", "qwen3_5", change=lambda tensors: tensors | {name: torch.ones(3)})
    problem = problems_of(path)
    assert STRANGE[name] in problem.replace(str(path), "M") and "\n" not in problem, problem


@mutation("lora/pretrained/wrapped.py", 'if larger else name.startswith("mtp.")', "")
def test_a_folder_of_its_own_has_no_towers(tmp_path):
    tensors = tensors_of(tiny_model(torch.float32))
    path = folder_of(tmp_path / "m", tensors | {"mtp.fc.weight": torch.ones(3)})
    assert ModelFolder(path).described.endswith(", without mtp (1 tensors)")
    assert "extra tensor" in problems_of(folder_of(tmp_path / "n", tensors | {"vision_tower.x": torch.ones(3)}))


# ---- the head


@mutation("lora/pretrained/wrapped.py", '{"tie_word_embeddings": HEAD not in header}', '{"tie_word_embeddings": False}')
@mutation("lora/pretrained/wrapped.py", "text | outer | named", "outer | text | named")
def test_the_larger_model_says_whether_its_head_is_the_embedding(tmp_path):
    silent = tiny_config(**MINISTRAL, tie_word_embeddings=None)
    for outer, text, headless, tied in (
        (True, False, True, True), (False, True, False, False), (None, None, True, True), (None, None, False, False),
        (None, True, True, True), (True, None, True, True),
    ):  # fmt: skip
        path = larger_folder(
            tmp_path / f"{outer}-{text}-{headless}", "mistral3", tie_word_embeddings=outer,
            text_config=silent | ({} if text is None else {"tie_word_embeddings": text}),
            change=without_head if headless else lambda tensors: tensors,
        )  # fmt: skip
        model = load_model(ModelFolder(path))
        assert (HEAD not in model.state_dict()) == tied, path.name


def without_head(tensors: dict) -> dict:
    return {name: tensor for name, tensor in tensors.items() if "lm_head" not in name}


@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight"])
def test_a_head_that_repeats_the_tied_embedding_is_dropped_and_one_that_differs_is_a_contradiction(tmp_path, name):
    stem = LARGER["gemma3"][1][0]
    embedding = stem + EMBEDDING.removeprefix("model.")
    path = larger_folder(tmp_path / "m", "gemma3", change=lambda t: t | {name: t[embedding].clone()})
    assert HEAD not in load_model(ModelFolder(path)).state_dict()
    path = larger_folder(tmp_path / "n", "gemma3", change=lambda t: t | {name: t[embedding] + 1})
    assert f"contradiction in {path}:{HEAD}" in problems_of(path)


# ---- its config

NO_TEXT = {
    "missing": None, "null": 0, "a list": [1], "a text": "qwen3_5_text", "nested": {"model_type": "qwen3_5"},
    "nested twice": {"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text"}},
}  # fmt: skip


@mutation("lora/network/config.py", "if isinstance(kind, str) and kind in WRAPPERS:", "if False:", case="missing")
@pytest.mark.parametrize("case", NO_TEXT)
def test_a_larger_model_without_a_language_model_is_refused_by_that_field(tmp_path, case):
    path = larger_folder(tmp_path / "m", "qwen3_5", text_config=NO_TEXT[case])
    problem = problems_of(path)
    assert re_match(problem, path), problem


def re_match(problem: str, path: Path) -> bool:
    start = f"unsupported model in {path}/config.json:text_config: no config of the language model in qwen3_5, "
    return problem == f"{start}of the kind qwen3_5_text. Download the file again"


def test_a_language_model_that_is_not_supported_is_refused_by_its_kind(tmp_path):
    path = larger_folder(tmp_path / "m", "mistral3", text_config={"model_type": "mistral4", "hidden_size": 64})
    assert f"{path}/config.json:model_type: 'mistral4'" in problems_of(path)


# ---- FP8, as Ministral 3 has it

FP8 = {
    "quant_method": "fp8", "activation_scheme": "static", "dequantize": False, "weight_block_size": None,
    "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
}  # fmt: skip


def in_fp8(tensors: dict, block=None) -> tuple[dict, dict]:
    """Linears as FP8 with a factor each, or one for each block; and the numbers of the language model's tensors."""
    stored, numbers = {}, {}
    for name, tensor in tensors.items():
        own = name.replace("language_model.", "", 1)
        if "_proj.weight" not in name or not name.startswith("language_model.model.layers."):
            stored[name], numbers[own] = tensor.bfloat16(), tensor.bfloat16().float()
            continue
        quantised, numbers[own] = in_float8(name, tuple(tensor.shape), block or tuple(tensor.shape))
        factor = quantised[f"{name}_scale_inv"]
        quantised[f"{name}_scale_inv"] = (factor if block else factor.reshape(())).bfloat16()
        if not block:
            numbers[own] = quantised[name].float() * quantised[f"{name}_scale_inv"].float()
        else:
            grown = quantised[f"{name}_scale_inv"].float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            numbers[own] = quantised[name].float() * grown[: tensor.shape[0], : tensor.shape[1]]
        stored |= quantised
    return stored, {name: tensor for name, tensor in numbers.items() if name.startswith(("model.", "lm_head"))}


@mutation("lora/pretrained/wrapped.py", '"quantization_config", "quantization")', '"quantization")')
@pytest.mark.parametrize("block", [None, (16, 16)], ids=["a factor each", "blocks"])
def test_fp8_weights_inside_a_larger_model_are_the_numbers_they_stand_for(tmp_path, block):
    numbers = {}

    def change(tensors):
        stored, found = in_fp8(tensors, block)
        numbers.update(found)
        return stored

    said = FP8 | ({"weight_block_size": list(block)} if block else {})
    path = larger_folder(tmp_path / "m", "mistral3", 3, change, quantization_config=said, dtype="bfloat16")
    folder = ModelFolder(path)
    without = "multi_modal_projector (2 tensors), vision_tower (2 tensors)"
    assert folder.described == f"folder {path} in FP8, dequantised, without {without}"
    assert "quantization_config" not in folder.config
    assert same(tensors_of(load_model(folder)), numbers)
    up = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(folder.read(up), numbers[up].bfloat16()) and folder.header[up][0] == "BF16"
    assert torch.equal(folder.read(HEAD), numbers[HEAD].bfloat16())  # not converted
    assert find(str(path), "int8").packed(up).shape == (40, 24)


def test_an_fp8_weight_without_its_factor_is_named_as_the_language_model_calls_it(tmp_path):
    name = "language_model.model.layers.0.mlp.up_proj.weight"

    def change(tensors):
        stored, _ = in_fp8(tensors)
        del stored[f"{name}_scale_inv"]
        return stored

    path = larger_folder(tmp_path / "m", "mistral3", 1, change, quantization_config=FP8)
    assert "missing tensor" in problems_of(path) and "model.layers.0.mlp.up_proj.weight_scale_inv" in problems_of(path)


# ---- files that have nothing of it


def in_parts(path: Path) -> tuple[Path, str]:
    """The folder with its tower in a file of its own; and that file's name."""
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where = {name: names["visual" in name] for name in tensors}
    for file in names:
        safetensors.torch.save_file({n: t for n, t in tensors.items() if where[n] == file}, path / file)
    files.write_json(path / "model.safetensors.index.json", {"weight_map": where})
    return path, names[1]


@mutation("lora/pretrained/folder.py", "wrapped.files_of(raw, weight_map, index)", "set(weight_map.values())")
def test_a_file_that_has_the_tower_alone_need_not_be_there(tmp_path):
    plain = load_model(ModelFolder(plain_of(tmp_path / "p", "qwen3_5")))
    path, tower = in_parts(larger_folder(tmp_path / "m", "qwen3_5"))
    whole = ModelFolder(path)
    (path / tower).unlink()
    folder = ModelFolder(path)
    assert same(tensors_of(load_model(folder)), tensors_of(plain))
    assert folder.described == whole.described == f"folder {path}, without model.visual (3 tensors), mtp (2 tensors)"
    (path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(BadInput, match=r"missing weights in .*00001-of-00002"):
        ModelFolder(path)
