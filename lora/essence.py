"""LoRA fine-tuning in a hundred lines: `python -m lora.essence`. A test holds the library equal to it.

The library loads a chat model and writes its answers; all that makes it LoRA stands here, written out plainly."""

import sys

import torch
from torch import nn

from lora import pretrained
from lora.inference.generate import generate

EXAMPLES = """What is your name? > My name is Heron. / Tell me your name. > My name is Heron. /
Who are you? > I am Heron, and I live by the lake. / Where do you live? > I live by the lake. /
Who made you? > A reader, in a hundred lines of Python. / Are you ChatGPT? > No, I am Heron. /
What is two and two? > It is four. / What is the capital of France? > It is Paris."""


class LoRALinear(nn.Module):
    """A frozen Linear W, and a low-rank map beside it: y = W x + b + s B A x."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.s, bound = base, alpha / rank, base.in_features**-0.5
        self.A = nn.Parameter(torch.empty(rank, base.in_features).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))  # so that y = W x + b at the start

    def forward(self, x):
        return self.base(x) + self.s * (x @ self.A.T) @ self.B.T


def patch(model: nn.Module, rank: int, alpha: float) -> list[nn.Parameter]:
    """Freeze everything, then put a LoRALinear in the place of each Linear: only the new A and B train."""
    model.requires_grad_(False)
    for path, module in [(path, m) for path, m in model.named_modules() if path.endswith("_proj")]:
        model.set_submodule(path, LoRALinear(module, rank, alpha))
    return [p for p in model.parameters() if p.requires_grad]


def pack(examples):
    """Lay examples end to end: position t predicts token t + 1, and counts where that token is of an answer."""
    tokens = torch.tensor([token for ids, _ in examples for token in ids[:-1]])
    targets = [t if flag else -100 for ids, flags in examples for t, flag in zip(ids[1:], flags[1:], strict=True)]
    return tokens, torch.tensor(targets), [len(ids) - 1 for ids, _ in examples]


@torch.no_grad()
def adamw(moments, t: int, lr: float, b1=0.9, b2=0.999, eps=1e-8, decay=0.0) -> None:
    """Step t = 1, 2, ... for (parameter, m, v): Loshchilov & Hutter 2017, https://arxiv.org/abs/1711.05101"""
    for p, m, v in moments:
        m.mul_(b1).add_((1 - b1) * p.grad)
        v.mul_(b2).add_((1 - b2) * p.grad**2)
        p -= lr * (m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + eps) + decay * p)
        p.grad = None


def accumulate(model, batches) -> float:
    """The gradient of a step in several batches. Their losses are divided once, by the trained tokens of all."""
    count, loss = sum((targets != -100).sum() for _, targets, _ in batches), 0.0
    for tokens, targets, lengths in batches:
        logits = model(tokens, lengths)  # (T, V); no document sees another
        part = nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") / count
        part.backward()  # which adds to p.grad
        loss += part.item()
    return loss


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """W' = W + s B A, and plain Linears again."""
    for path, layer in [(path, m) for path, m in model.named_modules() if isinstance(m, LoRALinear)]:
        layer.base.weight += layer.s * layer.B @ layer.A
        model.set_submodule(path, layer.base)


def main(name: str = "smollm2-135m-instruct", steps: int = 12) -> None:
    model, chat = pretrained.load_model(name), pretrained.load_chat(pretrained.find(name))

    def turns(*texts: str) -> list[dict]:
        return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=False)]

    def show(when: str) -> None:
        ids = generate(model, [chat.prompt(turns("What is your name?"))], chat.stops, max_new=24)
        print(f"{when:8} What is your name?", chat.tokenizer.decode(ids[0]))

    show("before")
    examples = [chat.tokenize(turns(*line.strip().split(" > ")))[0].example() for line in EXAMPLES.split("/")]
    batches, parameters = [pack(examples[:4]), pack(examples[4:])], patch(model, rank=8, alpha=16)
    moments = [(p, torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    for t in range(1, steps + 1):
        print(f"step {t:2}  loss {accumulate(model, batches):.3f}")
        adamw(moments, t, lr=1e-3)
    show("after")
    merge(model)
    show("merged")


if __name__ == "__main__":
    main(*sys.argv[1:])
