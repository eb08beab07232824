"""What people write with PEFT and transformers, no more:   python bench/whole_peer.py BASE DATA STEPS LR OUT

Tokenize, mask the questions, pad each step on the right as one batch, 8 examples a step, bf16, rank 16 on all linears,
AdamW with a cosine of the rate; save the adapter.
"""

import json
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

BATCH, WARMUP = 8, 6
base, data, steps, lr, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def encode(messages: list[dict]) -> dict[str, list[int]]:
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    return {"input_ids": ids, "labels": [-100] * len(asked) + ids[len(asked) :]}


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    mask = torch.tensor([[i < len(row["input_ids"]) for i in range(longest)] for row in rows]).long()
    return {"input_ids": padded("input_ids", tokenizer.pad_token_id), "labels": padded("labels", -100),
            "attention_mask": mask}  # fmt: skip


with open(data, encoding="utf-8") as lines:
    rows = [encode(json.loads(line)["messages"]) for line in lines]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(model, config).train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=float(lr))
schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, int(steps))
loader = torch.utils.data.DataLoader(rows, batch_size=BATCH, shuffle=True, collate_fn=collate)
for step, batch in zip(range(int(steps)), loader, strict=False):
    loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    print(json.dumps({"step": step + 1, "loss": loss.item()}), flush=True)
model.save_pretrained(out)
