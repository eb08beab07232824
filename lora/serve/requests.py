"""What a client asks, as OpenAI's API has it: a body of `/v1/chat/completions` or `/v1/completions` read into `Asked`.

A field that would change the answer is honoured or refused by name; what has no effect on it is passed over.
https://platform.openai.com/docs/api-reference/chat
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lora.inference.generate import Sampling

# Fields that change nothing here, whatever they say.
WITHOUT_EFFECT = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "tool_choice",
}  # fmt: skip
# Fields that are not implemented, and the values with which they ask for nothing.
NEUTRAL = {
    "frequency_penalty": (None, 0), "presence_penalty": (None, 0), "logit_bias": (None, {}),
    "logprobs": (None, False, 0), "top_logprobs": (None, 0), "tools": (None, []), "functions": (None, []),
    "function_call": (None, "none"), "response_format": (None, {"type": "text"}), "modalities": (None, ["text"]),
    "audio": (None,), "prediction": (None,), "reasoning_effort": (None,), "web_search_options": (None,),
    "verbosity": (None,), "suffix": (None, ""), "echo": (None, False), "best_of": (None, 1),
}  # fmt: skip
SAMPLED = ("temperature", "top_p", "seed", "top_k", "min_p", "repetition_penalty")  # the last three as vLLM has them
MOST_STOPS, LONGEST_STOP = 16, 1000
MOST_ANSWERS = 32  # to one request: n times the prompts


class Wrong(Exception):
    """An answer with a status other than 200, in OpenAI's form."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict:
        kind = {401: "authentication_error", 503: "overloaded_error", 500: "server_error"}.get(self.status)
        kind = kind or "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass
class Asked:
    """A request that is right: `prompts` are conversations, or texts or ids of `/v1/completions`."""

    model: str
    prompts: list
    sampling: Sampling
    most: int | None  # tokens of an answer; None where the request does not say
    stop: list[str] = field(default_factory=list)
    count: int = 1  # answers for each prompt
    stream: bool = False
    include_usage: bool = False


class Body:
    """Reads fields of a request. Raises Wrong, which names the field."""

    def __init__(self, raw: object):
        if not isinstance(raw, dict):
            raise Wrong(400, "The body is not a JSON object.")
        self.raw = raw

    def get(self, name: str, kinds: type | tuple[type, ...], what: str, default=None):
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise Wrong(400, f"{name} is not {what}.", name)
        return value

    def number(self, name: str, low: float, high: float, kinds=(int, float)) -> float | None:
        what = f"{'a whole number' if kinds is int else 'a number'} from {low:g} to {high:g}"
        value = self.get(name, kinds, what)
        if value is not None and not low <= value <= high:  # false for NaN, too
            raise Wrong(400, f"{name} is not {what}.", name)
        return value

    def refuse_others(self, known: set[str]) -> None:
        for name, value in self.raw.items():
            if name in NEUTRAL:
                if not any(is_same(value, neutral) for neutral in NEUTRAL[name]):
                    raise Wrong(400, f"{name} is not supported here. Leave it out.", name, "unsupported_parameter")
            elif name not in known and name not in WITHOUT_EFFECT:
                raise Wrong(400, f"{name} is no parameter that is known here. Leave it out.", name, "unknown_parameter")


def is_same(value: object, neutral: object) -> bool:
    """Equal, where 0 and 0.0 are one and false is another."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


COMMON = {"model", "stream", "stream_options", "stop", "max_tokens", "n", *SAMPLED}


def read_chat(raw: object, usual: Sampling) -> Asked:
    """A body of `/v1/chat/completions`."""
    body = Body(raw)
    body.refuse_others(COMMON | {"messages", "max_completion_tokens"})
    messages = body.get("messages", list, "a list of messages")
    if not messages:
        raise Wrong(400, "messages is missing: give at least one.", "messages")
    turns = [turn(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if turns[-1]["role"] != "user":
        raise Wrong(400, "The last message is not the user's: there is nothing to answer.", "messages")
    most = [body.number(name, 1, 10**6, int) for name in ("max_completion_tokens", "max_tokens")]
    return asked(body, usual, [turns], most[0] or most[1])


def read_text(raw: object, usual: Sampling) -> Asked:
    """A body of `/v1/completions`."""
    body = Body(raw)
    body.refuse_others(COMMON | {"prompt"})
    given = body.get("prompt", (str, list), "a text, a list of token ids, or a list of these")
    if given is None or given == []:
        raise Wrong(400, "prompt is missing.", "prompt")
    prompts = [given] if isinstance(given, str) or all(type(part) is int for part in given) else given
    for prompt in prompts:
        if not isinstance(prompt, str) and not (
            isinstance(prompt, list) and prompt and all(type(i) is int for i in prompt)
        ):
            raise Wrong(400, "prompt is not a text, a list of token ids, or a list of these.", "prompt")
    return asked(body, usual, prompts, body.number("max_tokens", 1, 10**6, int))


def asked(body: Body, usual: Sampling, prompts: list, most: int | None) -> Asked:
    limits = {
        "temperature": (0, 100), "top_p": (1e-9, 1), "seed": (-(2**63), 2**63 - 1, int), "top_k": (-1, 2**24, int),
        "min_p": (0, 1 - 1e-9), "repetition_penalty": (0.01, 100),
    }  # fmt: skip
    given = {name: body.number(name, *limits[name]) for name in SAMPLED}
    given = {name: value for name, value in given.items() if value is not None}
    given["seed"] = given.get("seed", secrets.randbits(62)) % 2**62  # torch's generator takes no negative ones
    given["top_k"] = max(0, given.get("top_k", usual.top_k))
    stop = body.get("stop", (str, list), "a text or a list of texts", [])
    stop = [stop] if isinstance(stop, str) else stop
    if len(stop) > MOST_STOPS or not all(isinstance(text, str) and 0 < len(text) <= LONGEST_STOP for text in stop):
        raise Wrong(400, f"stop is not up to {MOST_STOPS} texts of 1 to {LONGEST_STOP} characters.", "stop")
    stream = body.get("stream", bool, "true or false", False)
    options = body.get("stream_options", dict, "an object", {})
    known = {"include_usage", "include_obfuscation"}
    if options and not (stream and options.keys() <= known and all(isinstance(on, bool) for on in options.values())):
        raise Wrong(400, "stream_options takes include_usage, true or false, with stream.", "stream_options")
    model = body.get("model", str, "the name of a model")
    if model is None:
        raise Wrong(400, "model is missing: /v1/models lists those that are here.", "model")
    count = body.number("n", 1, MOST_ANSWERS, int) or 1
    if count * len(prompts) > MOST_ANSWERS:
        why = f"{count * len(prompts)} answers to one request, and {MOST_ANSWERS} are the most. Ask several times."
        raise Wrong(400, why, "n" if len(prompts) == 1 else "prompt")
    return Asked(
        model, prompts, replace(usual, **given), most, stop, count, stream, options.get("include_usage", False)
    )


def turn(message: object, where: str) -> dict:
    """A message as `lora` has it: {"role": system, user or assistant, "content": a text}."""
    if not isinstance(message, Mapping):
        raise Wrong(400, f"{where} is not an object with role and content.", where)
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in ("system", "user", "assistant"):
        raise Wrong(400, f"{where}.role is not system, user or assistant.", f"{where}.role")
    for name, value in message.items():
        if name not in ("role", "content") and value not in (None, [], ""):
            raise Wrong(400, f"{where}.{name} is not supported here. Leave it out.", f"{where}.{name}")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part_text(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise Wrong(400, f"{where}.content is not a text.", f"{where}.content")
    return {"role": role, "content": content}


def part_text(part: object, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else None
    raise Wrong(400, f"{where} is no text; {kind or 'what it is'} is not supported here.", where)
