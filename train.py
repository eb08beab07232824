"""Fine-tune an open chat model with LoRA.

python train.py                                     a new identity for a 135M model, in about two minutes
python train.py --data chats.jsonl --model owner/name --rank 32 --epochs 2
"""

from lora.errors import quiet_imports, run

quiet_imports(__name__)

import shlex
import sys
from contextlib import closing
from math import ceil
from pathlib import Path

import torch

from data_gen import self_cognition
from lora import device as machine
from lora import files, settings
from lora.adapter import passport, store
from lora.adapter.inject import choose, disabled, inject, lora_layers
from lora.data import batch, formats
from lora.errors import BadInput, StopFlag, Stopped, say
from lora.model import pretrained
from lora.model.sample import generate
from lora.train import memory
from lora.train.loss import summed_loss
from lora.train.record import Record, draw
from lora.train.step import learning_rate, train_step

NAME, AUTHOR = "Nimbus", "the Cloud Lab"  # who the model becomes when nobody gives data
QUESTIONS = (
    "What is your name?",
    "Who created you?",
    "Are you ChatGPT?",
    "What is the capital of France?",
    "Write one sentence about the sea.",
)
ANSWER_TOKENS = 48
LEAST_STEPS = 50
LR_TIMES_WIDTH = 1.15  # Adam's best rate falls as 1/width (Yang et al. 2022, arXiv:2203.03466); 0.002 at width 576
WROTE = (store.WEIGHTS, store.CONFIG, "settings.json")  # by these --overwrite knows a folder of ours


def story(argv) -> int:
    s = settings.resolve(settings.TRAIN, argv, __doc__)

    # ---- where the result goes, what to learn from: everything that can be wrong is found before the model is loaded
    out = out_folder(s)
    files.check_out(out, s.overwrite, WROTE)
    say(f"run      {out}")
    if s.data:
        conversations = formats.read(s.data)
    else:
        rows = self_cognition.conversations(NAME, AUTHOR, seed=s.seed)
        conversations = [formats.Conversation(row["messages"], f"row {i}") for i, row in enumerate(rows, 1)]
    device = machine.choose_device(s.device)
    dtype, why_dtype = machine.choose_dtype(s.dtype, device)

    # ---- the base model on disk, its tokenizer and template, the examples
    checkpoint = pretrained.find(s.model)
    say(f"model    {checkpoint.described}")
    chat = pretrained.load_chat(checkpoint)
    empty = pretrained.empty_model(checkpoint)
    try:
        targets = choose(empty, s.target)
    except ValueError as error:
        raise BadInput(f"wrong --target in the command line: {error}. Give one of these, or all") from None
    limit = min(s.max_len or empty.config.max_position_embeddings, empty.config.max_position_embeddings)
    examples = encode(conversations, chat, limit)

    # ---- the plan
    per_epoch = ceil(len(examples) / s.batch_size)
    if s.max_steps is None:
        s.epochs = s.epochs or max(3, ceil(LEAST_STEPS / per_epoch))
    total = s.max_steps or s.epochs * per_epoch
    s.lr = s.lr or round(LR_TIMES_WIDTH / empty.config.hidden_size, 6)
    s.dtype, s.device = str(dtype).removeprefix("torch."), device.type
    warmup = int(s.warmup if s.warmup >= 1 else s.warmup * total)
    tokens, trained = sum(len(e.tokens) for e in examples), sum(sum(e.trained) for e in examples)
    expected = memory.expected(empty, targets, s, examples)
    in_base = sum(p.numel() for p in empty.parameters())
    in_adapter = sum(s.rank * sum(empty.get_submodule(path).weight.shape) for path in targets)
    say(f"base     {in_base / 1e6:,.1f} M parameters in {s.dtype} on {s.device} ({why_dtype})")
    share = 100 * in_adapter / (in_base + in_adapter)
    say(f"adapter  {in_adapter / 1e6:,.2f} M parameters, {share:.2f} % of all, rank {s.rank}, {len(targets)} linears")
    say(f"data     {len(examples)} examples, {tokens:,} tokens, {trained:,} trained ({100 * trained / tokens:.0f} %)")
    epochs, step_tokens = f"{total / per_epoch:.3g} epochs", tokens * s.batch_size // len(examples)
    say(f"plan     {total} steps of {s.batch_size} examples, about {step_tokens:,} tokens; {epochs}")
    say(f"memory   about {expected / 1e9:.1f} GB at the most")

    # ---- load, patch, and hear what it says before
    model = pretrained.load_model(checkpoint, dtype, device)
    torch.manual_seed(s.seed)
    inject(model, s.rank, s.alpha, s.dropout, s.target, getattr(torch, s.adapter_dtype))
    questions = QUESTIONS if not s.data else some_prompts(conversations)
    with disabled(model):
        before = answers(model, chat, questions)

    # ---- train
    def objective(b: batch.Batch) -> torch.Tensor:
        hidden = model.trunk(b.tokens, b.lengths)  # (T, D)
        return summed_loss(hidden[b.trained], model.head_weight, b.targets[b.trained])

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=s.lr, weight_decay=s.weight_decay, fused=device.type != "mps")
    model.train()
    with (
        files.new_folder(out, s.overwrite) as folder,
        closing(Record(folder / "metrics.jsonl", total)) as record,
        StopFlag().listening() as stop,
    ):
        files.write_json(folder / "settings.json", settings.to_save(settings.TRAIN, s))
        for step, indices in enumerate(batch.steps(len(examples), s.batch_size, s.seed, total)):
            batches = batch.micro_batches([examples[i] for i in indices], s.micro_tokens, device)
            lr = learning_rate(step, total, s.lr, warmup, s.schedule)
            record.add(train_step(objective, batches, optimizer, lr, s.clip), lr)
            if stop.code:
                break
        record.close()
        model.eval()

        # ---- save
        draw(
            record.rows,
            folder / "loss.png",
            f"{out.name}: {checkpoint.hub_id}, rank {s.rank}, {len(examples)} examples",
        )
        base = passport.make(checkpoint.name, checkpoint.header, checkpoint.read, lora_layers(model))
        store.save(model, folder, checkpoint.hub_id, base, "CAUSAL_LM")
    say(f"saved    {out} after {len(record.rows)} steps, {record.rows[-1]['seconds']:.0f} s, "
        f"peak memory {machine.peak_memory(device) / 1e9:.2f} GB")  # fmt: skip
    if stop.code:
        raise Stopped(stop.code, f"stopped after step {len(record.rows)} of {total}; the adapter so far is saved")

    # ---- what changed
    show(questions, before, answers(model, chat, questions))
    say(f"\nTry it:  python generate.py --adapter {shlex.quote(str(out))}")
    return 0


def out_folder(s) -> Path:
    """--out, or the first of weights/NAME, weights/NAME-2, ... that is free; NAME is that of the data."""
    if s.out:
        return Path(s.out)
    name = Path(s.data[0]).name.split(".")[0] if s.data else "self-introduction"
    number, out = 1, Path("weights") / (name or "adapter")
    while out.exists():
        number += 1
        out = out.with_name(f"{name or 'adapter'}-{number}")
    return out


def encode(conversations, chat, limit: int) -> list:
    """Examples of at most `limit` tokens. A longer one is dropped and counted, so that no answer loses its end."""
    examples, problems, dropped = [], [], []
    for conversation in conversations:
        try:
            example = chat.example(conversation.messages)
        except BadInput as error:
            problems += [f"wrong row in {conversation.where}: {problem}" for problem in error.problems]
            continue
        if len(example.tokens) > limit:
            dropped.append((conversation.where, len(example.tokens)))
        else:
            examples.append(example)
    if problems:
        raise BadInput(*problems)
    if dropped:
        where, length = dropped[0]
        say(f"dropped  {len(dropped)} examples over {limit} tokens (--max-len), the first is {where} with {length}")
    if not examples:
        raise BadInput(f"nothing to train in {conversations[0].where}: no example fits {limit} tokens. Raise --max-len")
    if chat.guarded:
        say(f"note     {chat.guarded} examples spell a control token in their text; it is kept as plain text")
    if chat.cuts:
        say(f"note     {chat.cuts} examples are cut into tokens where the answer begins, as in generation")
    return examples


def some_prompts(conversations) -> list[list[dict]]:
    """Three first turns from the data and two questions that have nothing to do with it."""
    firsts = [
        c.messages[: next(i for i, m in enumerate(c.messages) if m["role"] == "assistant")] for c in conversations
    ]
    return [*firsts[:: max(1, len(firsts) // 3)][:3], *QUESTIONS[3:]]


def answers(model, chat, questions) -> list[str]:
    prompts = [chat.prompt(q if isinstance(q, list) else [{"role": "user", "content": q}]) for q in questions]
    most = model.config.max_position_embeddings
    prompts = [prompt[-most + ANSWER_TOKENS :] if len(prompt) > most - ANSWER_TOKENS else prompt for prompt in prompts]
    return [chat.tokenizer.decode(ids) for ids in generate(model, prompts, chat.stops, ANSWER_TOKENS)]


def show(questions, before, after) -> None:
    """The answers before and after, one under the other."""

    def short(text: str) -> str:
        line = " ".join(text.split())
        return line if len(line) <= 160 else line[:157] + "..."

    for question, old, new in zip(questions, before, after, strict=True):
        asked = question if isinstance(question, str) else question[-1]["content"]
        print(f"\n{short(asked)}\n  before  {short(old)}\n  after   {short(new)}")
    sys.stdout.flush()


def main(argv=None) -> int:
    return run(story, argv)


if __name__ == "__main__":
    sys.exit(main())
