"""Random mutations of bytes, of JSON, of headers and of chat templates, for bench/mutated_inputs.py."""

import copy
import json
import random
import struct

NUMBERS = (0, 1, -1, 2, 3, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1, 10**30)
VALUES = (
    None, True, False, *NUMBERS, 0.5, -0.0, 1e-300, 1e308, float("inf"), float("nan"), "", "a", " ", "\x00",
    "é", "\ud800",
    "a" * 5000, "../../etc/passwd", "/dev/zero", "<|im_end|>", "{{ 1 }}", "float16", "F8_E4M3", "llama",
    "qwen3", "gemma2",
    "1e999", [], [[]], {}, [0], [None], ["a", 1], {"a": None}, {"role": "user"}, [1] * 3000,
)  # fmt: skip
KEYS = (
    "messages", "text", "role", "content", "from", "value", "system", "weight", "train", "tools", "images", "thinking",
    "rope_scaling", "rope_parameters", "quantization_config", "auto_map", "eos_token_id", "tie_word_embeddings",
    "head_dim", "sliding_window", "layer_types", "rank_pattern", "modules_to_save", "target_modules", "layers_pattern",
    "use_dora", "bias", "peft_type", "chat_template", "added_tokens_decoder", "__class__", "",
)  # fmt: skip
ROWS = [
    json.dumps(row).encode()
    for row in (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "c"},
        {"instruction": "a", "input": "b", "output": "c", "history": [["d", "e"]], "system": "f"},
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        {"question": "a", "answer": "b"},
        {"text": "a document of some words, which is trained as it stands"},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {"role": "assistant", "content": "b", "weight": 1},
            ],
            "tools": [],
        },
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "<|im_start|>a"},
                {"role": "assistant", "content": "<think>x</think>b", "train": False},
                {"role": "user", "content": "c"},
                {"role": "assistant", "content": "d"},
            ]
        },
    )
]
CHAT = '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "%s"}]'
PAIRS = [  # of every shape in docs/data.md
    row.encode()
    for row in (
        '{"prompt": "hi", "chosen": "yes", "rejected": "no", "margin": 0.5}',
        f'{{"prompt": "hi", "chosen": {CHAT % "yes"}, "rejected": {CHAT % "no"}, "score_chosen": 2}}',
        f'{{"chosen": {CHAT % "yes"}, "rejected": {CHAT % "no"}}}',
        '{"chosen": "\\n\\nHuman: hi\\n\\nAssistant: yes", "rejected": "\\n\\nHuman: hi\\n\\nAssistant: no"}',
        '{"chosen": "hi there\\nyes", "rejected": "hi there\\nno"}',
        '{"instruction": "hi", "input": "you", "history": [["a", "b"]], "chosen": "yes", "rejected": "no"}',
        '{"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "yes"}, '
        '"rejected": {"from": "gpt", "value": "no"}}',
        '{"input": {"messages": [{"role": "user", "content": "hi"}]}, "preferred_output": [{"role": "assistant", '
        '"content": "yes"}], "non_preferred_output": [{"role": "assistant", "content": "no"}]}',
        '{"history": "hi", "human_ref_A": "yes", "human_ref_B": "no", "labels": 1}',
        '{"prompt": "hi", "response_0": "yes", "response_1": "no", "better_response_id": 0}',
        f'{{"messages": {CHAT % "yes"}, "rejected_response": "no"}}',
        f'{{"messages": {CHAT % "yes"}, "kto_tag": true}}',
        '{"prompt": "hi", "completion": "no", "label": false}',
    )
]
PROMPTS = [
    row.encode()
    for row in (
        '{"prompt": "what is 3 * 4?", "a": 3, "b": 4, "tools": [], "level": [1, {"x": null}]}',
        '{"prompt": [{"role": "system", "content": "c"}, {"role": "user", "content": "hi"}], "answer": "yes"}',
        '{"question": "hi", "answer": "yes", "reasoning": "why", "score": 2, "label": false}',
        '{"q": "hi", "a": 3}',
        '{"instruction": "hi", "input": "you", "history": [["a", "b"]], "system": "c", "output": "yes"}',
        f'{{"messages": {CHAT % "yes"}, "nums": [1, 2], "target": 3}}',
        '{"conversations": [{"from": "human", "value": "hi"}], "system": "c"}',
    )
]

# ---- bytes -----------------------------------------------------------------------------------------------------------


def data(given: bytes, chosen: random.Random, size: int | None = None) -> bytes:
    """Some changes within the first `size` bytes: bits, spans, numbers that a reader may trust; or a shorter file."""
    found = bytearray(given)
    for _ in range(chosen.choice((1, 1, 1, 2, 4, 16))):
        at = chosen.randrange(max(1, min(size or len(found), len(found))))
        span = chosen.choice((1, 1, 2, 4, 8, 64))
        match chosen.randrange(7):
            case 0:
                found[at : at + 1] = bytes([(found[at] if at < len(found) else 0) ^ 1 << chosen.randrange(8)])
            case 1:
                del found[at : at + span]
            case 2:
                found[at:at] = found[at : at + span]
            case 3:
                found[at : at + span] = chosen.randbytes(span)
            case 4 | 5:
                at -= at % 4 if chosen.random() < 0.5 else 0
                kind, bits = chosen.choice((("<I", 32), ("<Q", 64)))
                number = struct.pack(kind, chosen.choice(NUMBERS) % 2**bits)
                found[at : at + len(number)] = number
            case 6:
                if chosen.random() < 0.3:
                    del found[at:]
    return bytes(found)


def safetensors(given: bytes, chosen: random.Random) -> bytes:
    """The JSON header by its structure, with its length set anew; or bytes of length and header."""
    size = struct.unpack("<Q", given[:8])[0]
    if chosen.random() < 0.4:
        return data(given, chosen, 8 + size)
    changed = json_text(given[8 : 8 + size], chosen)
    return struct.pack("<Q", len(changed)) + changed + given[8 + size :]


def text(given: bytes, chosen: random.Random) -> bytes:
    """Lines by lines, or bytes by bytes."""
    lines = given.split(b"\n")
    if chosen.random() < 0.5:
        return data(given, chosen)
    at, other = chosen.randrange(len(lines)), chosen.choice(lines)
    match chosen.randrange(4):
        case 0:
            del lines[at]
        case 1:
            lines[at] = other
        case 2:
            lines.insert(at, other)
        case 3:
            lines[at] = json_text(lines[at], chosen)
    return b"\n".join(lines)


# ---- JSON ------------------------------------------------------------------------------------------------------------


def json_text(given: bytes, chosen: random.Random) -> bytes:
    """One to three nodes changed; sometimes the bytes, or very deep nesting."""
    try:
        value = json.loads(given)
    except ValueError:
        return data(given, chosen)
    if (draw := chosen.random()) < 0.15:
        return data(given, chosen)
    if draw < 0.17:
        return b"[" * 10**5 + given
    for _ in range(chosen.choice((1, 1, 1, 2, 3))):
        value = changed(value, chosen)
    return json.dumps(value, ensure_ascii=chosen.random() < 0.5).encode("utf-8", "surrogatepass")


def paths(value: object, path: tuple = ()):
    """The way to every node; of long lists, to some."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for i, (key, child) in enumerate(children):
        if i < 40 or i % 97 == 0:
            yield from paths(child, (*path, key))


def other(chosen: random.Random) -> object:
    return copy.deepcopy(chosen.choice(VALUES))  # it may be changed in its turn


def changed(value: object, chosen: random.Random) -> object:
    """A value of which one node is another, gone, moved or nested."""
    path = chosen.choice(list(paths(value)))
    if not path:
        return chosen.choice([value, value, [value], {"a": value}, other(chosen)])
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    key, old = path[-1], parent[path[-1]]
    match chosen.randrange(8):
        case 0 | 1 | 2:
            parent[key] = other(chosen)
        case 3:
            del parent[key]
        case 4:
            if isinstance(parent, dict):
                parent[chosen.choice(KEYS)] = chosen.choice((copy.deepcopy(old), other(chosen)))
            else:
                parent.insert(key, chosen.choice((copy.deepcopy(old), other(chosen))))
        case 5:
            parent[key] = [old]
        case 6:
            if isinstance(old, bool | None) or not isinstance(old, int | float):
                parent[key] = str(old)
            else:
                parent[key] = chosen.choice((-old, old + 1, old * 2, old / 3, str(old), old - 1))
        case 7:
            if isinstance(parent, dict):
                parent[chosen.choice(KEYS)] = parent.pop(key)
            else:
                parent.reverse()
    return value


# ---- chat templates --------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}",
    "{{ '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}",
    "{% endif %}", "{% for m in messages %}", "{{ '<|im_start|>' + m.role + '\n' }}", "{% if m.role == 'assistant' %}",
    "{{ m.content.split('</think>')[-1] }}", "{% else %}", "{{ m.content | trim }}", "{% endif %}",
    "{{ '<|im_end|>' + '\n' }}", "{% endfor %}", "{% if add_generation_prompt %}", "{{ '<|im_start|>assistant\n' }}",
    "{% endif %}",
)  # fmt: skip
PIECES = (
    "{% for i in range(10**9) %}", "{% for i in range(3) %}", "{{ ''.__class__.__mro__ }}", "{{ messages * 10**8 }}",
    "{{ 'a' * 10**9 }}", "{{ raise_exception('no') }}", "{{ m.content[::-1] }}", "{{ bos_token }}", "{{ eos_token }}",
    "{% set ns = namespace(x=0) %}", "{% set ns.x = ns.x + 1 %}", "{{ messages[-1].content }}",
    "{{ messages[99].role }}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "{{ m | tojson }}", "{{ strftime_now('%Y') }}", "{# ", "#}",
    "{{ undefined_name }}", "{{ m.content.upper() }}", "{%- ", "-%}", "{{", "}}", "{% break %}", "{% generation %}",
    "{{ 2 ** 10 ** 9 }}", "{{ [].append(1) }}", "{{ m.update({'content': 'x'}) }}", "{{ '%999999999d' % 1 }}", "\x00",
    "{{ ('a' | center(10**9)) }}", "{{ m.content.replace('', 'a' * 10**6) }}", "{{ lipsum(10**5) }}",
    "{{ loop.index }}",
    "{{ (messages | list) == messages }}", "{{ '<|im_end|>' }}", "{{ messages | map(attribute='content') | join }}",
    "{% include 'x' %}", "{% import 'os' as os %}", "{{ cycler('a').next() }}", "{{ joiner }}", "{{ dict(a=1) }}",
)  # fmt: skip


def template(chosen: random.Random) -> bytes:
    """A template of ChatML's kind, pieces of which are gone, moved, repeated or others."""
    pieces = list(TEMPLATE)
    for _ in range(chosen.choice((1, 1, 2, 3, 6))):
        at = chosen.randrange(len(pieces) or 1)
        match chosen.randrange(5):
            case 0:
                del pieces[at : at + 1]
            case 1 | 2:
                pieces.insert(at, chosen.choice(PIECES))
            case 3:
                pieces.insert(chosen.randrange(len(pieces) + 1), pieces[at] if pieces else "")
            case 4:
                pieces = [data("".join(pieces).encode(), chosen).decode(errors="replace")]
    return "".join(pieces).encode()
