"""One side of bench/decode_speed.py in a process of its own:   python bench/decode_sides.py JOB.json RESULT.json

Each answers the job's prompts greedily, `new` tokens each whatever they are, and notes when every token of the batch is
there. `ours` is `lora.generate`; the peers are `generate` of transformers, with PEFT where the job names
an adapter, and llama.cpp.
"""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import machine  # noqa: E402
from bench.parts import take_turn  # noqa: E402
from lora import device, files  # noqa: E402
from lora.ops.fast_decoding import product  # noqa: E402


class Ours:
    def __init__(self, job):
        from lora import pretrained
        from lora.adapter import store
        from lora.inference import generate

        self.run, self.model = generate.generate, pretrained.load_model(job.base, torch.bfloat16)
        if job.adapter:
            store.load(self.model, job.adapter)

    def generate(self, prompts: list[list[int]], new: int, note) -> list[list[int]]:
        last = len(prompts) - 1
        return self.run(self.model, prompts, {-1}, new, on_token=lambda row, token: note() if row == last else None)


class Transformers:
    def __init__(self, job):
        import transformers

        self.model = transformers.AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.bfloat16).eval()
        self.options = {"do_sample": False, "pad_token_id": 0} | job.options
        if job.adapter:
            import peft

            self.model = peft.PeftModel.from_pretrained(self.model, job.adapter)
        self.model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new: int, note) -> list[list[int]]:
        ids = torch.tensor(prompts)  # (B, S), all of one length

        def stopping(ids, scores, **kwargs):
            note()
            return torch.zeros(len(ids), dtype=torch.bool)

        found = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, stopping_criteria=[stopping],
            **self.options,
        )  # fmt: skip
        return found[:, ids.shape[1] :].tolist()


class LlamaCpp:
    """On four bits a weight: another rounding of the model, so that only its speed is compared."""

    def __init__(self, job):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.cpuparams.n_threads = job.base, 256, job.threads
        params.verbosity = -1
        self.server = xllamacpp.Server(params)

    def timed(self, prompts: list[list[int]], new: int) -> dict:
        asked = {"prompt": prompts[0], "n_predict": new, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
        timings = self.server.handle_completions(asked)["timings"]
        first = timings["prompt_ms"] + timings["predicted_per_token_ms"]
        return {"rows": 1, "first s": first / 1e3, "rest s": timings["predicted_per_token_ms"] * (new - 1) / 1e3}


SIDES = {"ours": Ours, "transformers": Transformers, "llama.cpp": LlamaCpp}


def products(model, rows: int) -> float:
    """Seconds that the matrix products of a step take by themselves, q/k/v as one and gate/up as one."""
    weights = [torch.cat([linear.weight for linear in group]) for group in model.groups()]
    weights += [model.head_weight] * model.config.tie_word_embeddings  # else it is a group of its own
    inputs = {weight.shape[1]: torch.randn(rows, weight.shape[1], dtype=model.dtype) for weight in weights}
    times = []
    with torch.inference_mode(), device.few_rows(rows, model.device):
        for _ in range(8):
            start = time.perf_counter()
            for weight in weights:
                product(inputs[weight.shape[1]], weight)
            times.append(time.perf_counter() - start)
    return min(times)


def timed(side, prompts: list[list[int]], new: int) -> dict:
    """One batch: seconds to the first token of all rows, seconds from there to the last, and the answers."""
    if isinstance(side, LlamaCpp):
        return side.timed(prompts, new)
    stamps, start = [], time.perf_counter()
    answers = side.generate(prompts, new, lambda: stamps.append(time.perf_counter()))
    assert len(stamps) == new and all(len(answer) == new for answer in answers)
    return {"rows": len(prompts), "first s": stamps[0] - start, "rest s": stamps[-1] - stamps[0], "answers": answers}


def main(told: str, answer: str) -> None:
    job = SimpleNamespace(**files.read_json(Path(told)))
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    side = SIDES[job.program](job)
    timed(side, job.prompts[:1], 4)
    runs = []
    for rows in job.batches:
        take_turn()
        runs.append(timed(side, job.prompts[:rows], job.new))
    found = {"runs": runs}
    if job.products:
        found["products s"] = {str(rows): products(side.model, rows) for rows in set(job.batches)}
    files.write_json(Path(answer), found | {"peak": machine.peak()})


if __name__ == "__main__":
    main(*sys.argv[1:])
