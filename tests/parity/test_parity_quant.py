"""bitsandbytes finds the same codes, scales and numbers, bit for bit; each reads what the other writes.

Needs transformers and bitsandbytes. With LORA_PARITY=1 it fails rather than skips. Compared is with bitsandbytes'
code in plain torch, which it keeps for what its kernels do not do: on some processors (AVX512) its kernel for a CPU
reads wrong scales where a row does not have whole blocks.
"""

import os

import pytest
import torch

if os.environ.get("LORA_PARITY") == "1":
    import transformers
    from bitsandbytes import functional as bnb
    from bitsandbytes.backends.default import ops as plain_bnb
else:
    pytest.skip("a referee's test: LORA_PARITY=1 runs it", allow_module_level=True)

from safetensors.torch import load_file, save_file

from lora.files import read_json, write_json
from lora.pretrained import ModelFolder, find, load_model, write_packed
from lora.quant import nf4
from tests.helpers import close, far, same, some_tokens, tiny_model
from tests.pretrained.test_pretrained import folder_of, tensors_of
from tests.quant.test_nf4 import KINDS, weight

SHAPES = [(32, 64), (7, 192), (300, 128), (64, 100), (5, 24), (3, 13), (1, 1), (257, 96)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def theirs(w: torch.Tensor, kind: str = "nf4", block: int = 64, nested: bool = False):
    return bnb.quantize_4bit(w, blocksize=block, quant_type=kind, compress_statistics=nested)


def numbers(codes: torch.Tensor, state, dtype: torch.dtype) -> torch.Tensor:
    """What bitsandbytes' own formula makes of its codes."""
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = codes.view(torch.uint8).reshape(-1)
    return plain_bnb._dequantize_4bit_compute(codes, absmax, state.code, state.blocksize, state.shape, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_scales_and_numbers_are_those_of_bitsandbytes(dtype, kind, shape):
    w = weight(kind, shape, seed=3).to(dtype)
    w = w.where(torch.isfinite(w), torch.finfo(dtype).max)  # of the huge ones in float16
    codes, state = theirs(w)
    packed = nf4.pack(shape, [w], nested=False)
    assert torch.equal(packed.codes, codes.reshape(-1))
    largest = state.absmax.where(state.absmax > nf4.TINY, 0)  # of zeros in a last block that is not whole it is TINY
    assert torch.equal(packed.absmax, largest)
    for to in DTYPES:
        assert torch.equal(packed.dequantise(to), numbers(codes, state, to))


def test_what_lies_between_two_values_goes_where_bitsandbytes_puts_it():
    """Where rounding decides: a quotient in place of the product with a reciprocal would choose another code."""
    scales = 1 + torch.rand(4096, generator=torch.Generator().manual_seed(0))
    middles = (nf4.TABLE[1:] + nf4.TABLE[:-1]) / 2 * scales[:, None]
    around = [middles, middles.nextafter(middles + 1), middles.nextafter(middles - 1), scales[:, None]]
    w = torch.cat([*around, torch.zeros(4096, 18)], 1)  # (4096, 64)
    assert torch.equal(nf4.pack(w.shape, [w]).codes, theirs(w, nested=True)[0].reshape(-1))


@pytest.mark.parametrize("shape", [*SHAPES, (1000, 192)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_scales_in_eight_bits_are_those_of_bitsandbytes(kind, shape):
    w = weight(kind, shape, seed=4)
    codes, state = theirs(w, nested=True)
    packed = nf4.pack(shape, [w])
    assert torch.equal(packed.codes, codes.reshape(-1)) and torch.equal(packed.map, state.state2.code)
    if w.any() or w.numel() % 64 == 0:  # or else a scale is TINY, as above
        assert torch.equal(packed.absmax, state.absmax)
        assert torch.equal(packed.nested_absmax, state.state2.absmax)
        assert torch.equal(packed.mean, state.offset)
    for to in DTYPES:
        assert torch.equal(packed.dequantise(to), numbers(codes, state, to))


def test_the_code_of_a_scale_is_that_of_bitsandbytes_wherever_it_lies():
    scales = torch.cat([torch.linspace(-1, 1, 255 * 1000).view(1000, 255), torch.ones(1000, 1)], 1)  # of blocks of 256
    codes, state = bnb.quantize_blockwise(scales, blocksize=256)
    ours, largest = nf4.pack_scales(scales.view(-1))
    assert torch.equal(ours, codes.view(-1)) and torch.equal(largest, state.absmax)


def test_the_tables_are_those_of_bitsandbytes():
    assert torch.equal(nf4.TABLE, bnb.get_4bit_type("nf4", "cpu"))
    assert torch.equal(nf4.dynamic_map(), bnb.create_dynamic_map())


# ---- folders


def bnb_config(kind="nf4", nested=True, **more):
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested, **more
    )


def load_theirs(path, dtype, **more):
    """In training mode, in which bitsandbytes keeps its weights as they are in the file."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **more).train()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(some_tokens()[None]).logits[0].float()


def plain_folder(path, dtype=torch.bfloat16, **config):
    """A Llama with sizes that bitsandbytes' kernels know: whole blocks in each row."""
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 192, "intermediate_size": 256, **config}
    return folder_of(path, tensors_of(tiny_model(dtype, **config)), **config)


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize(("kind", "storage"), [("nf4", torch.uint8), ("fp4", torch.uint8), ("nf4", torch.bfloat16)])
@pytest.mark.parametrize("width", [192, 72])
def test_a_folder_that_they_write_is_read_bit_for_bit(tmp_path, width, kind, storage, nested):
    plain = plain_folder(tmp_path / "plain", hidden_size=width)
    config = bnb_config(kind, nested, bnb_4bit_quant_storage=storage)
    their = load_theirs(plain, torch.bfloat16, quantization_config=config)
    their.save_pretrained(tmp_path / "theirs")
    folder, kept = ModelFolder(tmp_path / "theirs"), find(str(tmp_path / "theirs"), "keep")
    linears = {
        f"{path}.weight": linear.weight for path, linear in their.named_modules() if "Linear4" in str(type(linear))
    }
    assert len(linears) == 14
    for name, linear in linears.items():
        assert folder.block_type(name) == kind.upper()
        assert torch.equal(folder.read(name, torch.float32), numbers(linear.data, linear.quant_state, torch.float32))
        assert torch.equal(kept.read(name), numbers(linear.data, linear.quant_state, torch.bfloat16))
    if width == 192 and kind == "nf4":
        assert close(load_model(kept)(some_tokens()), logits(load_theirs(tmp_path / "theirs", torch.float32)), 0.05)


def test_they_read_what_we_write_and_it_is_what_they_would_have_written(tmp_path):
    plain = plain_folder(tmp_path / "plain", torch.float32)
    write_packed(find(str(plain), "nf4"), tmp_path / "ours")
    ours = load_theirs(tmp_path / "ours", torch.float32)
    theirs = load_theirs(plain, torch.float32, quantization_config=bnb_config())
    theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs")]
    states = [{name: file.pop(name) for name in list(file) if "quant_state" in name} for file in files]
    assert same(*files)
    text = [{name: bytes(state.tolist()).decode().strip() for name, state in of.items()} for of in states]
    assert text[0] == text[1]
    model = load_model(find(str(tmp_path / "ours"), "keep"))
    assert close(logits(ours), model(some_tokens()), 1e-5)
    assert far(load_model(str(plain))(some_tokens()), model(some_tokens()), 1e-5)


def test_fp8_is_dequantised_to_the_numbers_that_transformers_finds(tmp_path):
    sizes = {"hidden_size": 384, "intermediate_size": 256, "num_key_value_heads": 6}
    plain = plain_folder(tmp_path / "plain", **sizes)
    tensors = load_file(plain / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.1
    said = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    path = folder_of(tmp_path / "fp8", tensors, quantization_config=said, **sizes)
    whole = transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=(128, 128))
    their = load_theirs(path, torch.float32, quantization_config=whole)
    assert same(tensors_of(load_model(str(path))), {name: tensor for name, tensor in their.state_dict().items()})


def test_a_mistral_3_folder_in_fp8_is_read_as_transformers_reads_its_language_model(tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64,
            "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}  # fmt: skip
    text = {"model_type": "ministral3", "vocab_size": 131, "hidden_size": 48, "intermediate_size": 80, "head_dim": 16,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope,
            "max_position_embeddings": 256}  # fmt: skip
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
              "num_attention_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    torch.manual_seed(0)
    path = tmp_path / "m"
    transformers.Mistral3ForConditionalGeneration(config).bfloat16().save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if "language_model" in name and name.endswith("_proj.weight")]:
        factor = tensors[name].float().abs().max() / 448
        tensors[name] = (tensors[name].float() / factor).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = factor.bfloat16()
        tensors[f"{name.removesuffix('weight')}activation_scale"] = torch.tensor(0.01, dtype=torch.bfloat16)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    skipped = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    said = {"quant_method": "fp8", "activation_scheme": "static", "dequantize": False, "weight_block_size": None}
    raw = read_json(path / "config.json") | {"quantization_config": said | {"modules_to_not_convert": skipped}}
    write_json(path / "config.json", raw)
    their = transformers.Mistral3ForConditionalGeneration.from_pretrained(path, dtype=torch.bfloat16)
    ours = load_model(str(path), torch.bfloat16)
    state = {
        name.replace("language_model.", ""): tensor
        for name, tensor in their.state_dict().items()
        if "language_model" in name or "lm_head" in name
    }
    assert same(tensors_of(ours), state) and len(state) == 21
    with torch.no_grad():
        expected = their.float()(some_tokens()[None]).logits[0]
    assert close(ours.float()(some_tokens()), expected, 1e-5)
