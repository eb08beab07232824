"""Every flag of the commands after train.py: a typed class for each command, inherited from a class for each group."""

# ruff: noqa: RUF009

from dataclasses import dataclass
from typing import ClassVar

from lora.adapter.passport import QUANT
from lora.run.settings import TEMPLATE_ARG
from lora.settings import ABOVE_0_UP_TO_1, DATE, FROM_0_BELOW_1, Settings, between, flag, one_of

# fmt: off


def quant_flag():
    return flag(
        None, "pack the base's Linears on reading: none, nf4, int8, or keep the blocks of its file; as in training",
        one_of("none", *QUANT))


@dataclass
class Chat(Settings, group="chat"):
    """How a trained model is spoken to, with adapters or without."""

    one_of_two: ClassVar = (("system", "no_system"),)

    template: str | None = flag(None, "chat template: chatml, alpaca, qa, plain or a file; an adapter brings its own")
    system: str | None = flag(None, "system turn; without it as in training, or as the chat template decides")
    no_system: bool = flag(False, "no system turn, not even the template's own")
    template_arg: list[str] | None = flag(
        None, "switches of the chat template, as enable_thinking=false; values are JSON or text; as in training",
        TEMPLATE_ARG)
    date: str | None = flag(
        None, "what today is, for templates that ask; as in training", DATE)


@dataclass
class Hardware(Settings, group="hardware"):
    """Where a trained model computes."""

    device: str = flag("auto", "where to compute", one_of("auto", "cpu", "cuda", "mps"))
    dtype: str = flag("auto", "dtype of the model", one_of("auto", "bfloat16", "float32"))


@dataclass
class Sampling(Settings, group="answers"):
    """How answers are drawn."""

    max_new_tokens: int = flag(256, "longest answer", between(1, 10**6))
    temperature: float = flag(0.0, "0 takes the likeliest token", between(0, 100))
    top_k: int = flag(0, "draw from the k likeliest; 0 is all", between(0, 2**24))
    top_p: float = flag(1.0, "draw from the likeliest that sum to p", ABOVE_0_UP_TO_1)
    min_p: float = flag(0.0, "drop tokens below this share of the best", FROM_0_BELOW_1)
    repetition_penalty: float = flag(1.0, "above 1 makes repetition unlikely", between(0.01, 100))
    seed: int = flag(0, "seed of the drawing", between(0, 2**62))
    batch_size: int | None = flag(
        None, "prompts answered at once; 16 without it, and 32 requests with --serve", between(1, 4096))


@dataclass
class GenerateSettings(Hardware, Chat, Sampling, group="model"):
    """generate.py"""

    model: str | None = flag(None, "folder, hub id, .gguf file or smollm2-135m-instruct; an adapter remembers its own")
    quant: str | None = quant_flag()
    adapter: list[str] | None = flag(
        None, "folder of an adapter; of several, for a chat that switches or for --compare")
    no_verify: bool = flag(False, "use an adapter on another base than it was trained on")
    compare: bool = flag(False, "answers of the base and of every adapter side by side")
    serve: str | None = flag(None, "[HOST:]PORT of an OpenAI-compatible server; 127.0.0.1 without a host")
    feedback: str = flag("weights/feedback", "what the page of --serve is told of answers goes to "
        "NAME-pairs.jsonl, for --method dpo, and NAME-judged.jsonl, for kto")
    no_feedback: bool = flag(False, "the page of --serve asks for no judgement and writes nothing")
    api_key: list[str] | None = flag(None, "keys that --serve asks for; or the variable LORA_API_KEY")
    prompt: str | None = flag(None, "one prompt, or - for stdin; without --prompt and --prompts, a chat")
    prompts: str | None = flag(None, "file with a prompt a line, or conversation rows; answered in batches")
    prompt_key: str | None = flag(None, "key of the prompt in rows of another shape")
    out: str | None = flag(None, "JSONL file for the answers to --prompts or of --compare; stdout without it")


@dataclass
class EvaluateSettings(Hardware, Chat, group="evaluation"):
    """evaluate.py"""

    model: str | None = flag(None, "folder, hub id, .gguf file or smollm2-135m-instruct; an adapter remembers its own")
    quant: str | None = quant_flag()
    adapter: list[str] | None = flag(None, "folders of adapters, each a column beside the base")
    no_verify: bool = flag(False, "use adapters on another base than they were trained on")
    data: list[str] | None = flag(None, "files of conversations, FILE or hub:owner/name/FILE; or --task")
    method: str | None = flag(
        None, "what the rows of --data are, as train.py learns from them: conversations, pairs for dpo and reward, "
        "judged answers for kto; reward where there is a value head, else sft", one_of("sft", "dpo", "kto", "reward"))
    beta: float | None = flag(
        None, "of dpo and kto: rewards are so many times what changed since the base; 0.1 without it",
        between(1e-6, 1e3))
    prompt_key: str | None = flag(None, "key of the question in rows of another shape; with --response-key")
    response_key: str | None = flag(None, "key of the answer in rows of another shape")
    leading_answers: str = flag(
        "error", "an answer before the first question: drop it, or keep it as context", one_of("error", "drop", "keep"))
    control_tokens: bool = flag(
        False, "read the control tokens that documents spell as tokens; an adapter remembers it")
    task: str | None = flag(None, "a task that makes its own held-out rows and grades answers", one_of("multiply"))
    rows: int | None = flag(None, "so many rows; all of --data, 60 of --task", between(1, 10**6))
    digits: int = flag(2, "of multiply: numbers have up to so many digits", between(1, 9))
    style: str = flag("terse", "of multiply: how it is worked out", one_of("article", "terse"))
    lang: str = flag("en", "of multiply: language of questions and article lines", one_of("en", "zh"))
    seed: int = flag(0, "of multiply: which pairs", between(0, 2**62))
    no_generate: bool = flag(False, "losses and retention only")
    max_new_tokens: int | None = flag(None, "longest answer; 1.5 longest targets, 48 at least", between(1, 10**6))
    retention: str | None = flag(None, "conversations for the meter of forgetting; those of the project without it")
    no_retention: bool = flag(False, "do not measure forgetting")
    out: str | None = flag(None, "JSON file for all figures, settings and faults")
    predictions: str | None = flag(
        None, "folder for a JSONL file a column, of answers or scores; FILE.predictions beside --out FILE.json")
    batch_size: int = flag(16, "rows answered at once", between(1, 4096))
    micro_tokens: int = flag(2048, "tokens in memory at once, for losses", between(1, 2**24))


@dataclass
class MergeSettings(Settings, group="merging"):
    """merge.py"""

    adapter: str | None = flag(None, "folder of an adapter to merge into its base")
    combine: list[str] | None = flag(
        None, "or adapters to make one of, FOLDER or FOLDER:WEIGHT; weights may be negative")
    extract: list[str] | None = flag(
        None, "or a base and a model fine-tuned from it, to make an adapter of the difference")
    rank: int | None = flag(None, "largest rank in the adapter that --combine or --extract makes", between(1, 65536))
    energy: float | None = flag(None, "or the share of every ΔW's squared singular values to keep", ABOVE_0_UP_TO_1)
    model: str | None = flag(None, "the base, where it is not where the adapter remembers it")
    quant: str | None = quant_flag()
    onto: str | None = flag(
        None, "another base of the same structure to add ΔW to, as the 16-bit original of a quantised one; without it "
        "the base of the training as it was packed, dequantised: equal to what was trained")
    no_verify: bool = flag(False, "use another base than the adapter was trained on")
    out: str | None = flag(None, "new folder of the merged model or of the adapter, or FILE.gguf")
    format: str = flag("folder", "a model folder, or one GGUF file for llama.cpp", one_of("folder", "gguf"))
    gguf_type: str | None = flag(
        None, "how matrices are stored; f16 without it, f32 in an adapter alone", one_of("f32", "f16", "bf16", "q8_0"))
    adapter_only: bool = flag(False, "the adapter alone as GGUF, for the GGUF file of its base")
    overwrite: bool = flag(False, "replace an earlier result")
    dtype: str = flag(
        "auto", "dtype to write; the base's own by default", one_of("auto", "bfloat16", "float16", "float32"))
    push: str | None = flag(
        None, "upload to owner/name on the hub, made as a private one: the merged model, or without --out the adapter")
    tolerance: float | None = flag(
        None, "the merged model may be off by such a share of what the adapter changed, in mean KL: 0.01, "
        "and 1 with --onto, where it must be nearer to the adapted model than the base alone is", between(0, 1e9))
    prompts: str | None = flag(None, "what is compared: a prompt a line, or conversation rows; ours without it")
    no_receipt: bool = flag(False, "do not compare; for models that do not fit into memory in float32")
    device: str = flag("auto", "where to compare", one_of("auto", "cpu", "cuda", "mps"))
