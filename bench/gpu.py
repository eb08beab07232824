"""How fast is training on a GPU against PEFT + transformers?   python bench/gpu.py [--shape 7b] [--workload short]

Two shapes with random weights (speed does not depend on values): Qwen2.5-0.5B and -7B. Two workloads: documents of
4,096 tokens, all of them trained, and chats of 50 to 300, of which 30 to 50 % are. Sides, each in fresh processes in
the order 1 2 3 4 5 5 4 3 2 1:

    ours, compiled    with --compile, and plain as it is without
    B0                PEFT as people run it: adapters cast to float32, padded to the longest in the order given
    B1                PEFT tuned: no cast, sorted, FlashAttention 2 where it is installed
    B2                B1 under torch.compile, with Liger's kernels where they are installed

All get the same base, adapter and examples in every step, and the same tokens in memory at once, halved until they fit.
Loss and gradient of the first step must agree with ours, or the speed of a side is void. MFU counts useful FLOPs
only: 4 (P + H ρ) a token for frozen products with P weights in the blocks and H in the head, of which a share ρ is
used, 6 for an adapter's, and 7 T for causal attention, forward and backward; over the device's nominal peak, and over
the rate of a large product measured here. One shape and workload take under 10 minutes; what is measured is written at
once, to bench/results/gpu.json. `--smoke` runs all of it on a tiny shape, on a CPU too, where compilers only trace.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.gpu_sides import RANK, WARM_UP, has, make_steps, trained_in  # noqa: E402
from lora import files  # noqa: E402
from lora.text.chat import Example  # noqa: E402

RESULT = ROOT / "bench" / "results" / "gpu.json"
SIDES = ("compiled", "B2", "plain", "B1", "B0")
MICRO_TOKENS = 16384
BOUNDS = {"loss": 2e-3, "norm": 2e-2, "1 - cosine": 2e-3}  # in bfloat16; the smoke run's float32 gets a hundredth
QWEN = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu"}
SHAPES = {  # config.json of Qwen/Qwen2.5-0.5B and -7B, and a toy
    "0.5b": QWEN | {
        "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "7b": QWEN | {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "tiny": QWEN | {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
WORKLOADS = {  # examples a step, their lengths, the share that is trained
    "packed": {"examples": 8, "lengths": (4096, 4096), "trained": (1.0, 1.0)},
    "short": {"examples": 170, "lengths": (50, 300), "trained": (0.3, 0.5)},
}
PEAKS = {  # dense bf16 FLOP/s, by the makers' data sheets; the first name that the device's contains
    "B200": 2250e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


def flops(c: dict, examples: list[Example]) -> float:
    """Useful ones of a step, see above."""
    d = c["hidden_size"] // c["num_attention_heads"]
    q, kv = d * c["num_attention_heads"], d * c["num_key_value_heads"]
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    linears = [(hidden, q), (hidden, kv), (hidden, kv), (q, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]
    frozen, adapter = (sum(f(*sides) for sides in linears) for f in (lambda a, b: a * b, lambda a, b: RANK * (a + b)))
    tokens, squares = sum(len(e.tokens) for e in examples), sum(len(e.tokens) ** 2 for e in examples)
    blocks = c["num_hidden_layers"] * (tokens * (4 * frozen + 6 * adapter) + 7 * squares * q)
    return blocks + 4 * trained_in(examples) * hidden * c["vocab_size"]


def matmul_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a square product, over about half a second."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    for count in (3, 20):  # warm, then measured
        wait()
        start = time.perf_counter()
        for _ in range(count):
            a @ b
        wait()
    return 20 * 2 * size**3 / (time.perf_counter() - start)


def child(folder: Path, job: dict, limit: float) -> dict:
    """One side in a process; {"failed": why} where it ends badly."""
    told, answer, gradients = (folder / name for name in ("job.json", "answer.json", "gradients.safetensors"))
    answer.unlink(missing_ok=True)
    files.write_json(told, job | {"gradients": str(gradients)})
    command = [sys.executable, str(ROOT / "bench" / "gpu_sides.py"), str(told), str(answer)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    environment |= {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}  # lengths vary: for all sides alike
    quiet = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    try:
        done = subprocess.run(command, timeout=limit, **quiet)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {limit:.0f} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no word"])[-1][:300]}
    return files.read_json(answer) | {"gradient": load_file(gradients)}


def parity(run: dict, reference: dict) -> dict[str, float]:
    """What sides differ by in the first step: loss, gradient norm, the cosine of the whole gradient, and that of the
    tensor that differs most."""
    a, b = run["rows"][0], reference["rows"][0]
    products = {}  # per tensor: x·x, y·y, x·y
    for name, y in reference["gradient"].items():
        x, y = run["gradient"][name].double().flatten(), y.double().flatten()
        products[name] = [(x @ x).item(), (y @ y).item(), (x @ y).item()]

    def apart(xx, yy, xy) -> float:
        return 1 - xy / (xx * yy) ** 0.5

    return {
        "loss": abs(a["loss"] / b["loss"] - 1),
        "norm": abs(a["norm"] / b["norm"] - 1),
        "1 - cosine": apart(*map(sum, zip(*products.values(), strict=True))),
        "worst tensor": max(apart(*three) for three in products.values()),
    }


def measure(name: str, config: dict, workload, chosen, keep) -> dict:
    """All sides of one shape and workload; `keep(result)` after each process."""
    end, bounds = time.monotonic() + chosen.seconds, BOUNDS
    same = {"config": config, "device": chosen.device, "seconds": chosen.timed, "steps": WARM_UP + chosen.steps}
    if chosen.smoke:
        workload = workload | {"examples": 6, "lengths": [n // 16 for n in workload["lengths"]]}
        bounds = {name: bound / 100 for name, bound in bounds.items()}
        same |= {"dtype": "float32", "compiler": {"backend": "aot_eager"}, "micro_tokens": 512}
    else:
        same |= {"dtype": "bfloat16", "compiler": {}, "micro_tokens": MICRO_TOKENS}
    steps = make_steps(workload, config["vocab_size"], WARM_UP + chosen.steps)
    work_done = [flops(config, step) for step in steps]
    tokens, trained = [sum(len(e.tokens) for e in step) for step in steps], [trained_in(step) for step in steps]
    rate = matmul_rate(chosen.device, getattr(torch, same["dtype"]), 256 if chosen.smoke else 8192)
    torch.cuda.empty_cache()  # the children need it
    result = {
        "matmul TFLOP/s": rate / 1e12, "peak TFLOP/s": chosen.peak and chosen.peak / 1e12,
        "tokens": tokens[WARM_UP:], "trained": trained[WARM_UP:],
        "runs": {side: [] for side in chosen.side}, "parity": {},
    }  # fmt: skip
    reference = None
    with tempfile.TemporaryDirectory() as folder:
        for side in [*chosen.side, *reversed(chosen.side)][: len(chosen.side) * chosen.rounds]:
            left = end - time.monotonic()
            runs = result["runs"][side]
            if left < 10 or (runs and "failed" in runs[-1]):
                continue
            run = child(Path(folder), same | {"side": side, "workload": workload}, left)
            if "failed" not in run:
                reference = reference or run
                found = parity(run, reference)
                result["parity"].setdefault(side, found)
                if any(not found[key] <= bound for key, bound in bounds.items()):
                    run = {"failed": "void: " + ", ".join(f"{key} {value:.1e}" for key, value in found.items())}
            print(f"run       {name}: {side}, {run.get('failed') or said(run)}", flush=True)
            runs.append({key: value for key, value in run.items() if key != "gradient"})
            result["sides"] = {side: summary(runs, result, work_done) for side, runs in result["runs"].items()}
            keep(result)
    return result


def said(run: dict) -> str:
    return f"{median(row['seconds'] for row in run['rows'][WARM_UP:]):.3f} s a step, {run['peak GB']:.1f} GB"


def summary(runs: list[dict], result: dict, work_done: list[float]) -> dict | None:
    """A side's row of the table; None where there is none."""
    good = [run for run in runs if "failed" not in run]
    if not good:
        return None
    timed = [list(enumerate(run["rows"][WARM_UP:])) for run in good]
    rows = [(i, row["seconds"]) for run in timed for i, row in run]
    speed = median(work_done[WARM_UP + i] / seconds for i, seconds in rows)
    return {
        "tokens/s": median(result["tokens"][i] / seconds for i, seconds in rows),
        "trained/s": median(result["trained"][i] / seconds for i, seconds in rows),
        "MFU %": result["peak TFLOP/s"] and 100 * speed / 1e12 / result["peak TFLOP/s"],
        "of matmul %": 100 * speed / 1e12 / result["matmul TFLOP/s"],
        "peak GB": max(run["peak GB"] for run in good),
        "micro tokens": min(run["micro tokens"] for run in good),
        "first step s": median(run["first step s"] for run in good),
        "seconds": {i: median(s for j, s in rows if j == i) for i, _ in rows},
    }


def show(name: str, result: dict) -> None:
    heads = ("tokens/s", "trained/s", "MFU %", "of matmul %", "peak GB", "micro tokens", "first step s")
    print(f"\n{name}\n{'':10}" + "".join(f"{head:>14}" for head in heads) + "   time over compiled's")
    fastest = result["sides"].get("compiled")
    for side, row in result["sides"].items():
        if not row:
            why = result["runs"][side][-1]["failed"] if result["runs"][side] else "no time was left"
            print(f"{side:10}  {why}")
            continue
        cells = "".join(f"{row[head]:14,.1f}" if row[head] is not None else f"{'':14}" for head in heads)
        both = row["seconds"].keys() & fastest["seconds"].keys() if fastest else ()
        ratios = [row["seconds"][i] / fastest["seconds"][i] for i in both]
        print(f"{side:10}{cells}" + (f"   {spread(ratios)}" if ratios else ""))
    print(flush=True)


def spread(values: list[float]) -> str:
    """The median, and the quartiles."""
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=("0.5b", "7b"), default=["0.5b", "7b"])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--side", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--steps", type=int, default=12, help="timed steps of a process, at the most")
    parser.add_argument("--timed", type=float, default=8.0, help="seconds of timed steps, at the most")
    parser.add_argument("--rounds", type=int, default=2, choices=(1, 2), help="processes a side")
    parser.add_argument("--seconds", type=float, default=540.0, help="for one shape and workload")
    parser.add_argument("--out", type=Path, help=f"file of results; {RESULT.relative_to(ROOT)} without it")
    parser.add_argument("--smoke", action="store_true", help="does it run at all? A tiny shape, two steps")
    chosen = parser.parse_args(argv)
    chosen.device = "cuda" if torch.cuda.is_available() else "cpu"
    if chosen.device == "cpu" and not chosen.smoke:
        raise SystemExit("no CUDA device is here; --smoke shows on a CPU whether the program runs")
    device = torch.cuda.get_device_name() if chosen.device == "cuda" else "cpu"
    chosen.peak = next((peak for name, peak in PEAKS.items() if name in device), None)
    if chosen.smoke:
        chosen.shape, chosen.steps = ["tiny"], 2
    out = chosen.out or (None if chosen.smoke else RESULT)
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    head = {"device": device, **versions, "flash_attn": has("flash_attn"), "liger": has("liger_kernel")}
    print(", ".join(f"{key} {value}" for key, value in head.items()), flush=True)
    for shape in chosen.shape:
        for workload in chosen.workload:
            name = f"{shape} {workload}"

            def keep(result, name=name):
                if out:
                    known = files.read_json(out) if out.exists() else {}
                    files.write_json(out, known | {name: head | result})

            show(name, measure(name, SHAPES[shape], WORKLOADS[workload], chosen, keep))


if __name__ == "__main__":
    main()
