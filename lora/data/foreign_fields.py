"""Fields of other trainers' data that change what is learned: honoured here, or refused by name; none is passed over.

They are those of OpenAI's fine-tuning, TRL, LLaMA-Factory, ms-swift, axolotl, XTuner, torchtune and NeMo, of rows and
of messages alike. A field that says nothing (null, "", [], {}) is as good as none.
"""

import re

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = {**ROLES, "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}

TRAINED = ("train", "training", "trainable", "do_train", "compute_loss", "loss", "loss_mask", "loss_scale",
           "loss_weight", "weight", "sample_weight")  # fmt: skip
NOT_TRAINED = ("masked", "is_masked", "ignore_loss", "no_loss")  # the other way round
GOOD = ("label", "kto_tag", "is_desirable", "desirable")  # true marks a good answer, false a bad one
MASKS = (*TRAINED, *NOT_TRAINED, *GOOD)
JUDGED = ("score", "reward", "rating", "is_correct", "correct", "finish_reason")  # rows by it; nobody trains by it
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thoughts", "thought", "think", "cot", "chain_of_thought")
MEDIA = re.compile("(image|img|video|audio|picture|photo)s?(_?(path|url|file|token|byte|base64)s?)?")

_TOOLS = ("and calls of tools are not trained here", "Write them into the text, or remove it")
_BESIDE = ("which is not trained here", "Put it into the content, or remove it")
_MEDIA = ("which a model of text does not see", "Remove the row, or describe it in the text")
_TOKENS = ("which is not read here", "Give the text, and remove it")
_TEMPLATE = ("which is for the chat template", "Remove it, and give --template-arg NAME=VALUE for the whole run")
_PART = ("and only whole answers are learned or left out", 'Remove it, or write "train": false')
_THOUGHTS = ("which would not be learned", 'Write the row as messages, with it as "reasoning_content" of the answer')
REFUSED = {
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call", "tool_call_id"), _TOOLS),
    **dict.fromkeys(("objects", "bbox", "pixel_values"), _MEDIA),
    **dict.fromkeys(("input_ids", "labels", "assistant_masks", "completion_mask"), _TOKENS),
    **dict.fromkeys(("chat_template_kwargs", "enable_thinking", "thinking_budget", "reasoning_effort"), _TEMPLATE),
    "chat_template": ("which is not used here", "Remove it, and give --template FILE for the whole run"),
    "documents": ("which would not be learned", "Put them into the question"),
    **dict.fromkeys(("train_detail", "training_detail", "mask"), _PART),
    **dict.fromkeys(("reasoning_details", "thinking_blocks", "refusal"), _BESIDE),
}
OF_A_ROW = REFUSED.keys() - {"refusal"}  # there it is what a data set knows of the row
# Of a row whose answers are not learned they are columns like others
OF_AN_ANSWER = {*MASKS, *JUDGED, *THOUGHTS, *(f for f, why in REFUSED.items() if why in (_TOKENS, _PART, _BESIDE))}
KNOWN = {"role", "content", "from", "value", *MASKS, *THOUGHTS, *REFUSED}  # of a message


def is_blank(value: object) -> bool:
    """Null, or a text of white space at most."""
    return value is None or (isinstance(value, str) and not value.strip())


def says_nothing(value: object) -> bool:
    return is_blank(value) or value in ([], {})


def sharegpt(turns: object) -> object:
    """ShareGPT's turns under the names of OpenAI's form; what are no turns as they are."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return turns
    return [{**turn, "role": turn.get("from", turn.get("role")), "content": turn.get("value", turn.get("content"))}
            for turn in turns]  # fmt: skip


def refused_in_row(row: dict, used: tuple = ()) -> str | None:
    """Why a row cannot be used, and what to do; `used` are keys that were named on the command line."""
    for field, value in row.items():
        if field in used or says_nothing(value):
            continue
        if field in THOUGHTS:
            return f"it has {field}, {'. '.join(_THOUGHTS)}"
        elif (field in OF_A_ROW or MEDIA.fullmatch(field)) and value not in ("[]", "{}"):  # written as JSON in a text
            return f"it has {field}, {'. '.join(REFUSED.get(field, _MEDIA))}"
    return None


def refused_in_message(message: dict, name: str) -> str | None:
    """Why a message cannot be used, and what to do."""
    for field, value in message.items():
        if (field in REFUSED or MEDIA.fullmatch(field)) and not says_nothing(value):
            return f"{name} has {field}, {'. '.join(REFUSED.get(field, _MEDIA))}"
    return None


def is_trained(fields: dict, name: str, used: tuple = ()) -> tuple[bool | None, str]:
    """What the masks of a row or message say (None: nothing), and the field that says so.

    Raises ValueError for one that is neither yes nor no, for two that differ, and for a bad answer.
    """
    said, by = None, ""
    for field in MASKS:
        value = fields.get(field)
        if value is None or field in used:
            continue
        if field in GOOD:
            if value is not True:
                why = "marks an answer that is not to be learned" if value is False else "is not learned"
                fix = f"Remove the row, or {field}" + ("; --method kto learns from both" if name == "it" else "")
                raise ValueError(f"{name} has {repr(value)[:40]} as {field}, which {why}. {fix}")
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            fix = "0 or 1" if field.endswith("weight") else "true or false"
            whole = "; a whole file has a weight as --data FILE:WEIGHT" if name == "it" else ""
            raise ValueError(f"{name} has {repr(value)[:40]} as {field}. Write {fix}{whole}")
        yes = bool(value) != (field in NOT_TRAINED)
        if said not in (None, yes):
            raise ValueError(f"{name} has {by} and {field}, which contradict each other. Remove one of them")
        said, by = yes, field
    return said, by


def thoughts(message: dict, name: str) -> str:
    """What an answer thinks before it is given, under whichever name. Raises ValueError."""
    found = {}
    for field in THOUGHTS:
        value = message.get(field)
        if says_nothing(value):
            continue
        if not isinstance(value, str):
            raise ValueError(f"{name} has {type(value).__name__} as {field}, expected text. Repair the line")
        found[value] = field
    if len(found) > 1:
        raise ValueError(f"{name} has {' and '.join(found.values())}, which differ. Remove one of them")
    return next(iter(found), "")


def unread(row: dict, messages: list[dict], used: tuple = ()) -> set[str]:
    """Fields with a value that nothing here reads: all of messages, and of the row those that judge its answer."""
    found = {field for field in JUDGED if field not in used and not says_nothing(row.get(field))}
    return found | {field for m in messages for field in m if field not in KNOWN and not says_nothing(m[field])}
