"""Tiny models with weights that hide nothing, and how results are compared. Import as `from tests.helpers import ...`.

Default initialisation makes logits so small that an absolute tolerance accepts anything, so weights here are large,
norms and biases are not 1 and 0, and an adapter's ΔW has 5 to 50 % of its W's norm.
"""

from contextlib import contextmanager

import torch
from torch import nn

from lora import ops
from lora.adapter.inject import inject, lora_layers
from lora.methods import sft
from lora.network.config import ModelConfig
from lora.network.decoder import Model
from lora.text.chat import Chat, Example


def tiny_config(**overrides) -> dict:
    """A raw `config.json` of a Llama with odd sizes; an override of None removes the field."""
    config = {
        "model_type": "llama",
        "vocab_size": 131,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
    } | overrides
    return {key: value for key, value in config.items() if value is not None}


DELTAS = {  # overrides: the first layer is Gated DeltaNet
    "model_type": "qwen3_5_text", "full_attention_interval": 2, "linear_num_key_heads": 1, "linear_num_value_heads": 2,
    "linear_key_head_dim": 4, "linear_value_head_dim": 6, "head_dim": 8, "rope_theta": None,
}  # fmt: skip


def tiny_model(dtype: torch.dtype = torch.float64, seed: int = 0, **overrides) -> Model:
    """The decoder of `tiny_config(**overrides)` with random weights, in eval mode, nothing trainable."""
    model = Model(ModelConfig.from_json(tiny_config(**overrides)))
    return randomise(model.to(dtype), seed).requires_grad_(False).eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Any model's weights anew: Linears N(0, 2/in), embeddings N(0, 1), norms U(0.5, 1.5), biases N(0, 0.5²). The same
    seed gives the same values, up to rounding, in every dtype."""
    random = torch.Generator().manual_seed(seed)

    def fill(parameter, values):
        parameter.copy_(values.to(parameter.dtype))

    for module in model.modules():
        buffers = (pair for pair in module.named_buffers(recurse=False) if pair[0] == "layer_scalar")  # Gemma 4's
        for name, parameter in (*module.named_parameters(recurse=False), *buffers):
            normal = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
            if name == "bias":
                fill(parameter, 0.5 * normal)
            elif isinstance(module, nn.Embedding):
                fill(parameter, normal)
            elif parameter.dim() == 2:
                fill(parameter, normal * (2 / parameter.shape[1]) ** 0.5)
            else:
                fill(parameter, 0.5 + torch.rand(parameter.shape, generator=random, dtype=torch.float64))
    return model


@torch.no_grad()
def randomise_adapter(model: nn.Module, seed: int = 1) -> nn.Module:
    """Random A and B in every LoRALinear, B scaled so that ||s B A|| is 10 to 40 % of ||W||."""
    random = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        A, B = (torch.randn(p.shape, generator=random, dtype=torch.float64) for p in (layer.lora_A, layer.lora_B))
        A /= A.shape[1] ** 0.5
        share = 0.1 + 0.3 * torch.rand((), generator=random, dtype=torch.float64)
        B *= share * layer.base.weight.double().norm() / (layer.alpha / layer.rank * (B @ A).norm())
        layer.lora_A.copy_(A.to(layer.lora_A.dtype))
        layer.lora_B.copy_(B.to(layer.lora_B.dtype))
    return model


def patched(
    model: nn.Module, rank: int = 5, alpha: float = 8, dropout: float = 0.0, targets=("all",), dtype=None, seed: int = 1
) -> nn.Module:
    """`model` with random adapters on `targets`, of the dtype of its weights but at least float32."""
    dtype = dtype or torch.promote_types(next(model.parameters()).dtype, torch.float32)
    inject(model, rank, alpha, dropout, targets, dtype)
    return randomise_adapter(model, seed)


def some_tokens(count: int = 67, vocab: int = 131, seed: int = 2) -> torch.Tensor:
    return torch.randint(vocab, (count,), generator=torch.Generator().manual_seed(seed))


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """max|a - b| / max(1, max|b|), in float64; infinite where shapes or NaNs differ."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.detach().double(), b.detach().double()
    worst = ((a - b).abs().max() / b.abs().max().clamp(min=1)).item() if a.numel() else 0.0
    return worst if worst == worst else float("inf")


def close(a: torch.Tensor, b: torch.Tensor, tol: float) -> bool:
    """`assert close(a, b, tol)`: max|a - b| <= tol max(1, max|b|). A failure shows the error."""
    print(f"error {error(a, b):.3g}, tolerance {tol:.3g}, shapes {tuple(a.shape)} and {tuple(b.shape)}")
    return error(a, b) <= tol


def far(a: torch.Tensor, b: torch.Tensor, tol: float) -> bool:
    """`assert far(a, b, tol)`: a signal check, so different that a test within `tol` would notice: 100 tol or more."""
    print(f"error {error(a, b):.3g}, at least {100 * tol:.3g} is needed")
    return a.shape == b.shape and error(a, b) >= 100 * tol


def as_true_as(
    ours: torch.Tensor, theirs: torch.Tensor, truth: torch.Tensor, factor: float = 4, floor: float = 2**-20
) -> bool:
    """`assert as_true_as(ours, theirs, truth)`: our error is at most `factor` times theirs and `floor`.

    This compares float32 or bfloat16 where both sides round: how far rounding goes depends on the weights drawn and on
    the processor's order of summation, and `theirs` meets both. `truth` is formed in float64, by something that does
    not share what is to be proved. Two orders of summation of one formula stay within a factor of 4 (the largest in
    1,280 random models was 3.3); the floor is 16 roundings in float32.
    """
    mine, other = error(ours, truth), error(theirs, truth)
    print(f"error {mine:.3g}, theirs {other:.3g}, at most {factor * other + floor:.3g} is allowed")
    return mine <= factor * other + floor


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all tensors of a model, by name."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    """The same names, and under each the same dtype, shape and bits."""
    if before.keys() != after.keys():
        print("names differ:", sorted(before.keys() ^ after.keys()))
        return False
    differing = [
        name
        for name, tensor in before.items()
        if tensor.dtype != after[name].dtype
        or tensor.shape != after[name].shape
        or not torch.equal(bits(tensor), bits(after[name]))
    ]
    if differing:
        print("tensors that differ:", differing)
    return not differing


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, so that NaNs and signed zeros compare as what they are."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def random_example(prompt: int, answer: int, seed: int) -> Example:
    """Random tokens: `prompt` untrained ones, then `answer` trained ones."""
    return Example(some_tokens(prompt + answer, seed=seed).tolist(), [False] * prompt + [True] * answer)


def objective_of(model: Model):
    """The objective of `train.py`: a batch's loss, summed over its trained tokens."""
    return lambda batch: sft.loss(model, batch)[0]


def example_of(chat: Chat, messages: list[dict], train_on: str = "assistant") -> Example:
    """The one example of a conversation."""
    [laid] = chat.tokenize(messages, train_on)
    return laid.example(train_on == "all")


@contextmanager
def as_written():
    """Inside the block every formula runs as `lora.ops.plain` has it."""
    ops.use_plain()
    try:
        yield
    finally:
        ops.use_plain(False)
