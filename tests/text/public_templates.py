"""How the templates of public model families work, each retold in a few lines: their turns, ends, switches, ways with
thoughts, and the parts of jinja that they use. None is the real file.
"""

from functools import cache
from typing import NamedTuple

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from lora.text.chat import Chat
from lora.text.template import ChatTemplate
from lora.text.tokenizer import Tokenizer
from tests.text.test_template import CORPUS, LINES

ASK = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
TURN = "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
SPLIT = (  # a thought beside the answer, or one at the beginning of its content
    "{%- set thought, said = m.reasoning_content or '', m.content %}{%- if '</think>' in said and not thought %}"
    "{%- set thought = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set said = said.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
)
LAST_QUESTION = (  # counted from the end; an answer after it is the one that is being given
    "{%- set ns = namespace(open=true, last=messages|length - 1) %}{%- for m in messages[::-1] %}"
    "{%- if ns.open and m.role == 'user' and not m.content.startswith('<tool_response>') %}"
    "{%- set ns.open, ns.last = false, messages|length - 1 - loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- if ns.open %}{{- raise_exception('No user query found in messages.') }}{%- endif %}"
)
OPENED = "{{- '<think>\n\n</think>\n\n' if enable_thinking is defined and enable_thinking is false else '<think>\n' }}"
QWEN35 = (  # Qwen3.5: prompts with a thought begun, and writes an empty one where an answer has none
    "{%- macro text(content) %}{%- if content is string %}{{- content }}{%- elif content is none or content is "
    "undefined %}{{- '' }}{%- else %}{%- for part in content %}{%- if part.type == 'image' %}"
    "{{- '<|image_pad|>' }}{%- else %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}{%- endmacro %}"
    + LAST_QUESTION
    + "{%- for m in messages %}{%- set content = text(m.content)|trim %}{%- if m.role == 'assistant' %}"
    + SPLIT.replace("m.content", "content")
    + "{%- if (preserve_thinking is defined and preserve_thinking is true) or loop.index0 > ns.last %}"
    "{{- '<|im_start|>assistant\n<think>\n' + thought|trim + '\n</think>\n\n' + said }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + said }}{%- endif %}{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    + ASK
    + OPENED
    + "{%- endif %}"
)
QWEN38 = (  # Qwen3.8: knows thoughts beside the answer only, and keeps those of all turns
    "{%- if enable_thinking is undefined or enable_thinking is true %}"
    "{%- set effort = reasoning_effort|default('xhigh') %}{%- if effort not in ('xhigh', 'medium', 'low') %}"
    "{{- raise_exception('Unexpected reasoning effort ' ~ effort) }}{%- endif %}"
    "{%- if effort == 'low' %}{{- '<|im_start|>system\nBe quick.<|im_end|>\n' }}{%- endif %}{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set thought = '' %}"
    "{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}{%- endif %}"
    "{{- '<|im_start|>assistant\n<think>\n' + thought|trim + '\n</think>\n\n' + m.content|trim + '<|im_end|>\n' }}"
    "{%- else %}" + TURN + "{%- endif %}{%- endfor %}" + ASK + OPENED + "{%- endif %}"
)
MINICPM5 = (  # a BOS, and a switch of three values: the prompt opens a thought, closes one, or leaves that to the model
    "{{- bos_token }}"
    + LAST_QUESTION
    + "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    + SPLIT
    + "{{- '<|im_start|>assistant\n' }}{%- if thought and loop.index0 > ns.last %}"
    "{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{%- endif %}{{- said + '<|im_end|>\n' }}"
    "{%- else %}" + TURN + "{%- endif %}{%- endfor %}" + ASK + "{%- if enable_thinking is defined %}"
    "{%- if enable_thinking %}{{- '<think>\n' }}{%- else %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
    "{%- endif %}"
)
MINISTRAL3 = (  # a system turn of its own, thoughts as parts of the content, and no prompt but the end of the question
    "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}"
    "{{- '[SYSTEM_PROMPT]' + messages[0]['content'] + '[/SYSTEM_PROMPT]' }}{%- set rest = messages[1:] %}"
    "{%- else %}{{- '[SYSTEM_PROMPT]Think like this:[THINK]so[/THINK]then answer.[/SYSTEM_PROMPT]' }}"
    "{%- set rest = messages %}{%- endif %}{%- for m in rest %}"
    "{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('Not in turn') }}{%- endif %}"
    "{%- if m['role'] == 'user' %}{{- '[INST]' + m['content'] + '[/INST]' }}{%- else %}"
    "{%- if m['content'] is string %}{{- m['content'] }}{%- else %}{%- for block in m['content'] %}"
    "{%- if block['type'] == 'text' %}{{- block['text'] }}{%- elif block['type'] == 'thinking' %}"
    "{{- '[THINK]' + block['thinking'] + '[/THINK]' }}{%- endif %}{%- endfor %}{%- endif %}{{- eos_token }}{%- endif %}"
    "{%- endfor %}"
)
PHI4 = (  # <|end|> ends a turn, and eos_token the text
    "{% for m in messages %}{% if m['role'] == 'system' and 'tools' in m and m['tools'] is not none %}"
    "{{ '<|system|>' + m['content'] + '<|tool|>' + m['tools'] + '<|/tool|><|end|>' }}{% else %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
GRANITE3 = (  # the date, JSON in a role, and a switch that only another system turn tells of
    "{%- if messages[0]['role'] == 'system' %}{%- set system, rest = messages[0]['content'], messages[1:] %}"
    "{%- else %}{%- set system = 'Today: ' + strftime_now('%B %d, %Y') + '.' %}{%- if documents %}"
    "{%- set system = system + ' Use the documents.' %}{%- elif thinking %}{%- set system = system + ' Think.' %}"
    "{%- endif %}{%- set rest = messages %}{%- endif %}"
    "{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\n' }}{%- for m in rest %}"
    "{{- '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] + '<|end_of_text|>\n' }}"
    "{%- if loop.last and add_generation_prompt %}{{- '<|start_of_role|>assistant' }}"
    "{%- if controls %}{{- ' ' + controls | tojson() }}{%- endif %}{{- '<|end_of_role|>' }}{%- endif %}{%- endfor %}"
)
GRANITE4 = (
    "{%- set ns = namespace(tools='', system='You are helpful.') %}{%- if tools %}{%- for tool in tools %}"
    "{%- set ns.tools = ns.tools + '\n' + (tool | tojson) %}{%- endfor %}{%- endif %}"
    "{%- if messages[0].role == 'system' and messages[0].content %}"
    "{%- set ns.system = messages[0].content %}{%- endif %}"
    "{{- '<|start_of_role|>system<|end_of_role|>' + ns.system + ns.tools + '<|end_of_text|>\n' }}"
    "{%- for m in messages %}{%- set content = namespace(val=m.content if m.content is string else '') %}"
    "{%- if m.role == 'user' or (m.role == 'system' and not loop.first) or m.role == 'assistant' %}"
    "{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + content.val + '<|end_of_text|>\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"
)
LFM25 = (  # a BOS, marks of other tools round answers, thoughts under a name of their own
    "{{- bos_token -}}{%- set keep = preserve_thinking | default(false) -%}{%- set ns = namespace(last=-1) -%}"
    "{%- for m in messages -%}{%- if m['role'] == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\n' -}}{%- set content = m['content'] -%}"
    "{%- if content is not string -%}{%- set content = content | tojson -%}{%- endif -%}"
    "{%- if m['role'] == 'assistant' -%}{%- generation -%}{%- if keep or loop.index0 > ns.last -%}"
    "{%- if m.thinking is defined -%}{{- '<think>' + m.thinking + '</think>' -}}{%- endif -%}"
    "{%- elif '</think>' in content -%}{%- set content = content.split('</think>')[-1] | trim -%}{%- endif -%}"
    "{{- content + '<|im_end|>\n' -}}{%- endgeneration -%}{%- else -%}{{- content + '<|im_end|>\n' -}}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
GEMMA4 = (  # the answers' role is "model"; what is thought stands in a channel
    "{%- set enable_thinking = enable_thinking | default(false) -%}{{- bos_token -}}{%- set rest = messages -%}"
    "{%- if enable_thinking or messages[0]['role'] in ['system', 'developer'] -%}{{- '<|turn>system\n' -}}"
    "{%- if enable_thinking -%}{{- '<|think|>\n' -}}{%- endif -%}{%- if messages[0]['role'] == 'system' -%}"
    "{{- messages[0]['content'] | trim -}}{%- set rest = messages[1:] -%}{%- endif -%}{{- '<turn|>\n' -}}{%- endif -%}"
    "{%- set turn = namespace(last=-1) -%}{%- for i in range(rest | length) -%}{%- if rest[i]['role'] == 'user' -%}"
    "{%- set turn.last = i -%}{%- endif -%}{%- endfor -%}{%- for m in rest -%}"
    "{{- '<|turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' -}}"
    "{%- set thought = m.get('reasoning') or m.get('reasoning_content') -%}"
    "{%- if thought and loop.index0 > turn.last -%}"
    "{{- '<|channel>thought\n' + thought + '\n<channel|>' -}}{%- endif -%}"
    "{%- set captured -%}{{- m['content'] | trim -}}{%- endset -%}{{- captured + '<turn|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|turn>model\n' -}}EMPTY{%- endif -%}"
)
GEMMA4_LARGE = GEMMA4.replace(
    "EMPTY", "{%- if not enable_thinking -%}{{- '<|channel>thought\n<channel|>' -}}{%- endif -%}"
)
OLMO3 = (
    "{{- bos_token }}{%- if not tools is defined %}{%- set tools = none %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = 'You are helpful.' %}{%- endif %}"
    "{{- '<|im_start|>system\n' + system }}{%- if tools is not none and tools | length > 0 %}{{- tools | tojson }}"
    "{%- else %}{{- ' You have no functions.' }}{%- endif %}{{- '<|im_end|>\n' }}{%- for m in messages %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content|trim + '<|im_end|>\n' }}{%- endfor %}" + ASK + "{%- endif %}"
)
EXAONE4 = (  # its names are a dict, its loop is over numbers; a thought is written where two switches agree
    "{%- if not skip_think is defined %}{%- set skip_think = true %}{%- endif %}"
    "{%- set role = {'user': '[|user|]\n', 'assistant': '[|assistant|]\n', 'system': '[|system|]\n'} %}"
    "{%- for i in range(messages | length) %}{%- set m = messages[i] %}{%- if m.role not in role %}"
    "{{- raise_exception('Unknown role: ' ~ m.role) }}{%- endif %}{{- role[m.role] }}{%- if m.role != 'assistant' %}"
    "{{- m.content + '[|endofturn|]\n' -}}{%- continue %}{%- endif %}"
    + SPLIT
    + "{%- if not skip_think and loop.last and thought %}{{- '<think>\n' + thought + '\n</think>\n\n' }}"
    "{%- else %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{{- said.strip() + '[|endofturn|]\n' -}}{% endfor %}"
    "{%- if add_generation_prompt %}{{- role['assistant'] }}{%- if enable_thinking is defined and enable_thinking is "
    "true %}{{- '<think>\n' }}{%- else %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
ERNIE45 = (  # no control token but at both ends
    "{%- if not cls_token is defined -%}{%- set cls_token = '<|begin_of_sentence|>' -%}{%- endif -%}"
    "{%- if not sep_token is defined -%}{%- set sep_token = '<|end_of_sentence|>' -%}{%- endif -%}{{- cls_token -}}"
    "{%- for m in messages -%}{%- if m['role'] == 'user' -%}{{- 'User: ' + m['content'] + '\n' -}}"
    "{%- elif m['role'] == 'assistant' -%}{{- 'Assistant: ' + m['content'] + sep_token -}}"
    "{%- else -%}{{- m['content'] + '\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'Assistant: ' -}}{%- endif -%}"
)
HUNYUAN = (  # its end of turn is a placeholder, and another one ends a text that prompts for nothing
    "{% set rest = messages[1:] if messages[0]['role'] == 'system' else messages %}<｜hy_begin▁of▁sentence｜>"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}<｜hy_place▁holder▁no▁3｜>{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}<｜hy_User｜>{{ m['content'] }}{% else %}"
    "<｜hy_Assistant｜>{{ m['content'] }}<｜hy_place▁holder▁no▁2｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜hy_Assistant｜>{% else %}<｜hy_place▁holder▁no▁8｜>{% endif %}"
)
HUNYUAN_MOE = (  # a question ends with the prompt, and a switch writes behind anything, prompt or not
    "{% for m in messages %}{{ '<|startoftext|>' + m.content + '<|extra_0|>' if m.role == 'user' else m.content + "
    "('<|extra_4|>' if m.role == 'system' else '<|eos|>') }}{% endfor %}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n' }}{%- endif %}"
)
SEED_OSS = (  # names its own tokens, and says how long to think
    "{%- set bos_token, eos_token = '<seed:bos>', '<seed:eos>' -%}"
    "{%- if not thinking_budget is defined %}{%- set thinking_budget = -1 -%}{%- endif -%}"
    "{%- set gears, ns = {0: 0, 512: 128, 1024: 256}, namespace(interval=None) -%}"
    "{%- for k, v in gears | dictsort -%}{%- if ns.interval is none and thinking_budget <= k -%}"
    "{%- set ns.interval = v -%}{%- endif -%}{%- endfor -%}{%- for m in messages if m.role == 'system' %}"
    "{{- bos_token + 'system\n' + m.content + eos_token }}{%- endfor %}{%- if thinking_budget > 0 %}"
    "{{- bos_token + 'system\nThink within ' ~ thinking_budget ~ ', reflect every ' ~ ns.interval ~ eos_token }}"
    "{%- endif %}{%- for m in messages if m.role != 'system' %}{{- bos_token + m.role }}{%- if m.role == 'assistant' %}"
    "{%- if m.reasoning_content is defined and m.reasoning_content | trim | length > 0 %}"
    "{{- '\n<seed:think>' + m.reasoning_content | trim + '</seed:think>' }}{%- endif %}"
    "{{- '\n' + m.content | trim + eos_token }}{%- else %}{{- '\n' + m.content + eos_token }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- bos_token + 'assistant\n' }}{%- if thinking_budget == 0 %}"
    "{{- '<seed:think>\n<seed:cot_budget_reflect>No budget.</seed:cot_budget_reflect>\n</seed:think>' }}{%- endif %}"
    "{%- endif %}"
)
R1_0528 = (  # the prompt stands already behind every question, and no answer has its thought
    "{% set ns = namespace(system='', asked=false) %}{%- for m in messages if m['role'] == 'system' %}"
    "{% set ns.system = ns.system + m['content'] %}{%- endfor %}{{ bos_token }}{{ ns.system }}{%- for m in messages %}"
    "{% set content = m['content'] %}{%- if m['role'] == 'user' %}{%- set ns.asked = true -%}"
    "{{ '<｜User｜>' + content + '<｜Assistant｜>' }}{%- elif m['role'] == 'assistant' %}{%- set ns.asked = false -%}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ content + '<｜end▁of▁sentence｜>' }}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt and not ns.asked %}{{ '<｜Assistant｜>' }}{% endif %}"
)

TAGS = ("<think>", "</think>")  # tokens, but no control tokens
CONTROL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<s>", "</s>", "[INST]", "[/INST]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[THINK]", "[/THINK]", "<|system|>", "<|user|>", "<|assistant|>",
    "<|end|>", "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|startoftext|>", "<bos>", "<eos>",
    "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>", "[BOS]", "[|system|]", "[|user|]",
    "[|assistant|]", "[|endofturn|]", "<|begin_of_sentence|>", "<|end_of_sentence|>",
    "<｜hy_begin▁of▁sentence｜>", "<｜hy_User｜>", "<｜hy_Assistant｜>", "<｜hy_place▁holder▁no▁2｜>",
    "<｜hy_place▁holder▁no▁3｜>", "<｜hy_place▁holder▁no▁8｜>", "<|extra_0|>", "<|extra_4|>", "<|eos|>",
    "<seed:bos>", "<seed:eos>", "<seed:think>", "</seed:think>", "<seed:cot_budget_reflect>",
    "</seed:cot_budget_reflect>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>",
]  # fmt: skip


class Public(NamedTuple):
    """A family's template, the `bos_token` and `eos_token` of its tokenizer, and what its switches are set to."""

    source: str
    bos: str
    eos: str
    arguments: dict


ON, OFF = {"enable_thinking": True}, {"enable_thinking": False}
CHATML = ("<|endoftext|>", "<|im_end|>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
GRANITE = ("<|end_of_text|>", "<|end_of_text|>")
PUBLIC = {
    "qwen3_5": Public(QWEN35, *CHATML, {}),
    "qwen3_5 off": Public(QWEN35, *CHATML, OFF),
    "qwen3_6 preserve": Public(QWEN35, *CHATML, {"preserve_thinking": True}),
    "qwen3_8": Public(QWEN38, *CHATML, {}),
    "qwen3_8 low": Public(QWEN38, *CHATML, {"reasoning_effort": "low"}),
    "qwen3_8 off": Public(QWEN38, *CHATML, OFF),
    "minicpm5": Public(MINICPM5, "<s>", "<|im_end|>", {}),
    "minicpm5 on": Public(MINICPM5, "<s>", "<|im_end|>", ON),
    "minicpm5 off": Public(MINICPM5, "<s>", "<|im_end|>", OFF),
    "ministral3": Public(MINISTRAL3, "<s>", "</s>", {}),
    "phi4": Public(PHI4, "<|endoftext|>", "<|endoftext|>", {}),
    "granite3": Public(GRANITE3, *GRANITE, {}),
    "granite3 thinking": Public(GRANITE3, *GRANITE, {"thinking": True, "controls": {"length": "short"}}),
    "granite4": Public(GRANITE4, *GRANITE, {}),
    "lfm2_5": Public(LFM25, "<|startoftext|>", "<|im_end|>", {}),
    "lfm2_5 preserve": Public(LFM25, "<|startoftext|>", "<|im_end|>", {"preserve_thinking": True}),
    "gemma4": Public(GEMMA4.replace("EMPTY", ""), "<bos>", "<eos>", {}),
    "gemma4 on": Public(GEMMA4.replace("EMPTY", ""), "<bos>", "<eos>", ON),
    "gemma4 large": Public(GEMMA4_LARGE, "<bos>", "<eos>", {}),
    "olmo3": Public(OLMO3, *CHATML, {}),
    "exaone4": Public(EXAONE4, "[BOS]", "[|endofturn|]", {}),
    "exaone4 on": Public(EXAONE4, "[BOS]", "[|endofturn|]", ON | {"skip_think": False}),
    "ernie4_5": Public(ERNIE45, "<s>", "</s>", {}),
    "hunyuan": Public(HUNYUAN, "<｜hy_begin▁of▁sentence｜>", "<｜hy_place▁holder▁no▁2｜>", {}),
    "hunyuan moe": Public(HUNYUAN_MOE, "<|startoftext|>", "<|eos|>", {}),
    "hunyuan moe off": Public(HUNYUAN_MOE, "<|startoftext|>", "<|eos|>", OFF),
    "seed_oss": Public(SEED_OSS, "<seed:bos>", "<seed:eos>", {}),
    "seed_oss 512": Public(SEED_OSS, "<seed:bos>", "<seed:eos>", {"thinking_budget": 512}),
    "seed_oss 0": Public(SEED_OSS, "<seed:bos>", "<seed:eos>", {"thinking_budget": 0}),
    "r1_0528": Public(R1_0528, *DEEPSEEK, {}),
}


@cache
def tokenizer_json(control: tuple[str, ...] = tuple(CONTROL)) -> bytes:
    """Byte-level BPE with these control tokens."""
    fast = FastTokenizer(models.BPE())
    split = pre_tokenizers.Split(LINES, "isolated")
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=550 + len(control), special_tokens=[*control], initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(CORPUS, trainer)
    fast.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return fast.to_str().encode()


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_json())


@cache
def chat(name: str) -> Chat:
    source, bos, eos, arguments = PUBLIC[name]
    template = ChatTemplate(source, {"bos_token": bos, "eos_token": eos}, "here", arguments=arguments)
    return Chat(tokenizer(), template, [tokenizer().id(eos)])
