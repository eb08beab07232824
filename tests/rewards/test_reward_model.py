"""A reward model beside the policy, on one base: its scores are those of a session, the policy is left as it was."""

import shutil
from types import SimpleNamespace

import pytest
import torch

import lora
from lora import pretrained
from lora.adapter import store
from lora.adapter.inject import lora_layers
from lora.adapter.value_head import add
from lora.errors import BadInput, Refused
from lora.rewards import Asked, parse
from lora.rewards.reward_model import RewardModel
from tests import cli
from tests.adapters import write_adapter, write_head
from tests.helpers import bits
from tests.mutation import mutation

HOW = {"device": "cpu", "dtype": "float32"}
OTHER_TEMPLATE = cli.CHATML.replace("{{ m.role }}", "<{{ m.role }}>")
TEXTS = ("It is 3.", "Ask somebody else, please.", "  spaces \n", "<|im_end|> no", "A long answer. " * 9)


def turns(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


PROMPTS = (turns("What is 1 and 2?"), turns("Hello.", "Hi!", "And 2 and 2?"))
ASKED = [Asked({}, prompt, text, 0) for prompt in PROMPTS for text in TEXTS]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    write_head(write_adapter(folder / "judge", 1, system="Be brief.", template=OTHER_TEMPLATE), 1)
    write_head(write_adapter(folder / "other", 2, rank=8, targets=("q_proj", "mlp")), 2)
    write_adapter(folder / "talker", 3)
    cli.write_model(folder / "base2", seed=1)
    write_head(write_adapter(folder / "stranger", 4, model=folder / "base2"), 4)
    return folder


def ready(folder, micro_tokens: int = 100, **flags) -> RewardModel:
    """A reward model whose folder has been looked at."""
    base = pretrained.find(str(cli.model_folder()))
    args = SimpleNamespace(micro_tokens=micro_tokens, no_verify=False, full=False, **flags)
    part = RewardModel(parse(str(folder)), args, base, pretrained.empty_model(base))
    problems = [*part.problems([])]
    if problems:
        raise BadInput(*problems)
    return part


def policy(work):
    """A policy on the same base: an adapter that trains, and a value head of its own."""
    model = pretrained.load_model(str(cli.model_folder()))
    store.load(model, work / "talker")
    for layer in lora_layers(model).values():
        layer.lora_A.requires_grad_(), layer.lora_B.requires_grad_()
    add(model, model.config.hidden_size)
    return model.train()


@pytest.mark.parametrize("name", ["judge", "other"])
@pytest.mark.parametrize("micro_tokens", [1, 100, 10_000])
@mutation(
    "lora/rewards/reward_model.py",
    "return [value for _, value in sorted(zip(order, found, strict=True))]",
    "return found",
    case="1-judge",
)
@mutation(
    "lora/rewards/reward_model.py",
    "Example([*ids, 0]",
    "Example([*ids]",
    case="100-other",
)
@mutation(
    "lora/rewards/reward_model.py",
    "load_chat(self.base, self.folder, verify=verify)",
    "load_chat(self.base, None, verify=verify)",
    case="100-judge",
)
def test_a_score_is_the_number_that_a_session_gives(work, name, micro_tokens):
    session = lora.open(adapter=work / name, **HOW)
    expected = [session.score([*a.messages, {"role": "assistant", "content": a.text}]) for a in ASKED]
    part = ready(work / name, micro_tokens)
    part.load(policy(work))
    found = part.score(ASKED)
    assert found == pytest.approx(expected, abs=1e-5) and max(found) - min(found) > 1e-2


@mutation(
    "lora/rewards/reward_model.py",
    "with sets.in_place(self.model, self.adapter):",
    "if not sets.put_in(self.model, self.adapter):",
)
def test_scoring_leaves_the_policy_as_it_was(work):
    model, tokens = policy(work), torch.arange(3, 40)
    weights = {name: p for name, p in model.named_parameters()}
    trains = [name for name, p in weights.items() if p.requires_grad]
    before = model.head(model.trunk(tokens))
    parts = [ready(work / "judge"), ready(work / "other")]
    for part in parts:
        part.load(model)
    first = [part.score(ASKED) for part in parts]
    assert [part.score(ASKED) for part in parts] == first
    assert torch.equal(bits(model.head(model.trunk(tokens))), bits(before))
    now = dict(model.named_parameters())
    assert now.keys() == weights.keys() and all(now[name] is p for name, p in weights.items())
    assert [name for name, p in now.items() if p.requires_grad] == trains
    assert model.training and all(layer.base.weight is parts[0].adapter.layers[path].base.weight
                                  for path, layer in lora_layers(model).items())  # fmt: skip


@pytest.mark.parametrize("text", ["", " \n", "<|im_start|>"])
@mutation(
    "lora/rewards/reward_model.py",
    "yield [*self.chat.prompt(one.messages), self.chat.end_of_turn]",
    "yield self.chat.prompt(one.messages)",
)
def test_an_empty_answer_is_scored_at_its_end_of_turn(work, text):
    model, part = policy(work), ready(work / "other")
    part.load(model)
    [found] = part.score([Asked({}, PROMPTS[1], text, 1)])
    session = lora.open(adapter=work / "other", **HOW)
    ids = [*session.encode(PROMPTS[1]), session.chat.end_of_turn]
    with torch.no_grad():
        expected = session.model.v_head(session.model.trunk(torch.tensor(ids)))[-1].item()
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_conversation_that_is_too_long_is_refused(work):
    part = ready(work / "other")
    part.load(policy(work))
    with pytest.raises(BadInput, match=r"^too long in \S+: a completion has \d+ tokens .* Lower --max-new-tokens"):
        part.score([ASKED[0], Asked({}, PROMPTS[0], "word " * 3000, 3000)])


@mutation("lora/rewards/reward_model.py", "several.dry_load(self.empty, self.folder, self.base, verify)", "pass")
def test_a_folder_that_is_no_reward_model_of_this_base_is_refused_before_the_model_is_loaded(work, tmp_path):
    def refused(folder, **flags) -> str:
        with pytest.raises(BadInput) as caught:
            ready(folder, **flags)
        return str(caught.value)

    done = cli.call("merge", "--adapter", work / "judge", "--out", tmp_path / "merged", "--no-receipt", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "it is a whole model" in (found := refused(tmp_path / "merged")) and "Give the adapter" in found
    assert "no such task, function or folder. Give multiply, countdown, format" in refused(tmp_path / "multipli")
    assert "no value_head.safetensors, so it scores nothing" in refused(work / "talker")
    assert "no value_head.safetensors" in refused(tmp_path)
    assert "wrong base in" in refused(work / "stranger")
    shutil.copytree(work / "judge", tmp_path / "broken")
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"12345")
    assert "broken" in refused(tmp_path / "broken")
    shutil.copytree(work / "talker", tmp_path / "pickled")
    (tmp_path / "pickled" / "value_head.bin").write_bytes(b"")
    with pytest.raises(Refused):
        ready(tmp_path / "pickled")


def test_a_reward_model_and_a_base_that_is_trained_exclude_each_other(work):
    args = SimpleNamespace(micro_tokens=1, no_verify=False, full=True)
    [problem] = RewardModel(parse(str(work / "judge")), args, None, None).problems([])
    assert "which --full changes" in problem
