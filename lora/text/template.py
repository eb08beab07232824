"""A chat template: a jinja program that writes a conversation as the model was taught to read it."""

from collections.abc import Sequence
from datetime import date

import jinja2

from lora.errors import BadInput, Refused
from lora.text import sandbox
from lora.text.sandbox import why

OUTPUT = 16 * 2**20  # characters that one rendering may write
FROZEN_DATE = date(2025, 1, 1)  # what `strftime_now` says by default, so that a prompt is the same tomorrow

BUILT_IN = {  # for base models, which have none; `eos_token` ends an answer
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca; a system turn takes the place of the first line
    "alpaca": "{% if messages[0].role != 'system' %}Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '### Response:\n' + m.content + eos_token + '\n\n' }}"
    "{% elif m.role == 'user' %}{{ '### Instruction:\n' + m.content + '\n\n' }}"
    "{% else %}{{ m.content + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
    # the marks are not written twice where the data has them already
    "qa": "{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ '答：' + m.content.removeprefix('答：') + eos_token + '\n' }}"
    "{% elif m.role == 'user' %}{{ '问：' + m.content.removeprefix('问：') + '\n' }}"
    "{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '答：' }}{% endif %}",
    "plain": "{% for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else '') + '\n' }}{% endfor %}",
}


class ChatTemplate:
    """A jinja template with the special token strings it may use. `where` names its file in errors, `today` is what
    `strftime_now` believes."""

    def __init__(
        self, source: str, tokens: dict[str, str] | None = None, where: str = "chat template", today: date = FROZEN_DATE
    ):
        self.source, self.tokens, self.where = source, tokens or {}, where
        try:
            with sandbox.limits():
                self._template = sandbox.environment(today).from_string(source)
        except sandbox.Forbidden as error:
            raise self._refused(error) from None
        except Exception as error:
            raise BadInput(f"broken chat template in {where}: {why(error)}. Repair or replace it") from None

    def render(self, messages: Sequence[dict], generate: bool = False) -> str:
        """The conversation as one string; with `generate` it ends where an answer begins.

        Raises BadInput with the order of roles; Refused where the template breaks out of the sandbox or its limits.
        """
        roles = "/".join(message["role"] for message in messages[:8])
        if sum(len(message["content"]) for message in messages) > OUTPUT // 2:
            raise BadInput(f"a conversation of over {OUTPUT >> 21} M characters. Cut it")
        try:
            with sandbox.limits():
                copies = [dict(message) for message in messages]
                text = self._template.render(
                    messages=copies, tools=None, documents=None, add_generation_prompt=generate, **self.tokens
                )
                text.encode()  # half a surrogate pair is no character
        except sandbox.Forbidden as error:
            raise self._refused(error) from None
        except (sandbox.TemplateError, jinja2.TemplateError, RecursionError) as error:
            raise BadInput(f"chat template in {self.where}: {why(error)} (turns: {roles}). Change the turns") from None
        except Exception as error:  # of any kind: nothing but the template's own code runs here
            raise BadInput(f"chat template in {self.where}: {why(error)} (turns: {roles}). Repair it") from None
        if len(text) > OUTPUT:
            raise self._refused(f"it wrote over {OUTPUT >> 20} MB")
        return text

    def _refused(self, reason: object) -> Refused:
        return Refused(f"chat template in {self.where}: {reason}. Replace it by one you trust")
