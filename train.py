"""Fine-tune an open chat model with LoRA.

python train.py                                     a new identity for a 135M model, in about two minutes
python train.py --data chats.jsonl --model owner/name --rank 32 --epochs 2
"""

from lora.errors import quiet_imports, run

quiet_imports(__name__)

import shlex
import sys
from contextlib import closing
from datetime import date
from math import ceil
from pathlib import Path

import torch

from data_gen import self_cognition
from lora import device as machine
from lora import files, settings
from lora.adapter import passport, store
from lora.adapter.inject import choose, disabled, inject, lora_layers
from lora.data import batch, preview
from lora.data.encode import joined
from lora.data.sources import lint_report, numbered, read_sources
from lora.errors import BadInput, StopFlag, Stopped, say
from lora.model import download, pretrained
from lora.model.sample import generate
from lora.train import memory
from lora.train.evaluate import mean_loss
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
    if s.check:
        return lint_report(s, download.dataset_file)

    # ---- where the result goes: everything that can be wrong is found before the model is loaded
    out = out_folder(s)
    if s.preview is None:
        files.check_out(out, s.overwrite, WROTE)
        say(f"run      {out}")
    device = machine.choose_device(s.device)
    dtype, why_dtype = machine.choose_dtype(s.dtype, device)

    # ---- the base model on disk, its tokenizer and template, the examples
    checkpoint = pretrained.find(s.model)
    say(f"model    {checkpoint.described}")
    system = False if s.no_system else s.system
    chat = pretrained.load_chat(checkpoint, system, s.template, date.fromisoformat(s.date))
    empty = pretrained.empty_model(checkpoint)
    try:
        targets = choose(empty, s.target)
    except ValueError as error:
        raise BadInput(f"wrong --target in the command line: {error}. Give one of these, or all") from None
    s.max_len = min(s.max_len or empty.config.max_position_embeddings, empty.config.max_position_embeddings)
    made = None if s.data else self_cognition.conversations(NAME, AUTHOR, seed=s.seed)
    sources, weights, replays, held_out = read_sources(s, chat, download.dataset_file, made)
    examples = joined([*sources, *(source for source, _ in replays)])

    # ---- the plan
    per_epoch = ceil(sum(map(len, sources)) / s.batch_size)
    if s.max_steps is None:
        s.epochs = s.epochs or max(3, ceil(LEAST_STEPS / per_epoch))
    total = s.max_steps or s.epochs * per_epoch
    s.lr = s.lr or round(LR_TIMES_WIDTH / empty.config.hidden_size, 6)
    s.dtype, s.device = str(dtype).removeprefix("torch."), device.type
    warmup = int(s.warmup if s.warmup >= 1 else s.warmup * total)
    tokens, trained = len(examples.tokens), int(examples.trained.sum())
    step_tokens = batch.tokens_per_step([p.lengths for p in sources], s.batch_size, weights,
                                        [(p.lengths, share) for p, share in replays])  # fmt: skip
    per_step = s.batch_size + ceil(sum(share for _, share in replays) * s.batch_size)
    expected = memory.expected(empty, targets, s, examples.lengths, per_step)
    if s.preview is not None:
        preview.show(examples, s.preview, chat.tokenizer)
        for name, value in preview.numbers(examples, step_tokens, expected).items():
            print(f"{name}: {value}")
        return 0
    in_base = sum(p.numel() for p in empty.parameters())
    in_adapter = sum(s.rank * sum(empty.get_submodule(path).weight.shape) for path in targets)
    say(f"base     {in_base / 1e6:,.1f} M parameters in {s.dtype} on {s.device} ({why_dtype})")
    share = 100 * in_adapter / (in_base + in_adapter)
    say(f"adapter  {in_adapter / 1e6:,.2f} M parameters, {share:.2f} % of all, rank {s.rank}, {len(targets)} linears")
    say(f"examples {len(examples):,}, {tokens:,} tokens, {trained:,} trained ({100 * trained / tokens:.0f} %)")
    epochs = f"{total / per_epoch:.3g} epochs"
    say(f"plan     {total} steps of {s.batch_size} examples, about {step_tokens:,} tokens; {epochs}")
    say(f"memory   about {expected / 1e9:.1f} GB at the most")

    # ---- load, patch, and hear what it says before
    model = pretrained.load_model(checkpoint, dtype, device)
    torch.manual_seed(s.seed)
    inject(model, s.rank, s.alpha, s.dropout, s.target, getattr(torch, s.adapter_dtype))
    questions = some_prompts(sources[0].kept) if s.data else QUESTIONS
    with disabled(model):
        before = answers(model, chat, questions)

    def objective(b: batch.Batch) -> torch.Tensor:
        hidden = model.trunk(b.tokens, b.lengths)  # (T, D)
        return summed_loss(hidden[b.trained], model.head_weight, b.targets[b.trained])

    def held_out_loss() -> float:
        batches = batch.micro_batches(held_out, s.micro_tokens, device)
        return mean_loss(objective, batches)

    # ---- train
    if held_out:
        say(f"eval     loss {held_out_loss():.4f} before, {len(held_out)} examples")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=s.lr, weight_decay=s.weight_decay, fused=device.type != "mps")
    model.train()
    with (
        files.new_folder(out, s.overwrite) as folder,
        closing(Record(folder / "metrics.jsonl", total)) as record,
        StopFlag().listening() as stop,
    ):
        files.write_json(folder / "settings.json", settings.to_save(settings.TRAIN, s))
        shares = [(len(source), share) for source, share in replays]
        steps = batch.steps([len(source) for source in sources], s.batch_size, s.seed, total, weights, shares)
        for step, indices in enumerate(steps):
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
        spoken = {"system": system, "date": s.date}
        papers = passport.make(checkpoint.name, checkpoint.header, checkpoint.read, lora_layers(model), spoken)
        files.write_bytes(folder / passport.TEMPLATE, chat.template.source.encode())
        store.save(model, folder, checkpoint.hub_id, papers, "CAUSAL_LM")
    say(f"saved    {out} after {len(record.rows)} steps, {record.rows[-1]['seconds']:.0f} s, "
        f"peak memory {machine.peak_memory(device) / 1e9:.2f} GB")  # fmt: skip
    if held_out and not stop.code:
        say(f"eval     loss {held_out_loss():.4f} after, {len(held_out)} examples")
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
    name = Path(numbered(s.data[0])[0]).name.split(".")[0] if s.data else "self-introduction"
    number, out = 1, Path("weights") / (name or "adapter")
    while out.exists():
        number += 1
        out = out.with_name(f"{name or 'adapter'}-{number}")
    return out


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
