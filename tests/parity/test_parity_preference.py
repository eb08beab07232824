"""TRL as referee: losses of pairs, judged answers and scores, with the gradients of every weight, on the same ids.

LORA_PARITY=1 makes a missing trl a failure; without it the file is skipped. Its own trainers compute, in float32.
"""

import copy
import os
from functools import cache

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

if os.environ.get("LORA_PARITY") == "1":
    import datasets
    import transformers
    import trl
else:
    transformers, trl = pytest.importorskip("transformers"), pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")

from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference
from trl.trainer.reward_trainer import DataCollatorForPreference as DataCollatorForScores

from lora import pretrained
from lora.adapter import value_head
from lora.data.batch import Linked, collate
from lora.methods import dpo, kto, reward, sft
from lora.methods.answers import log_probs
from lora.methods.objective import Objective, measure
from tests import cli
from tests.helpers import close, far
from tests.methods.linked import judged, pairs, scored, settings

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
TOL, PAD, BETA = 1e-5, 0, 0.3
TEXTS = {"prompt": ["What?"], "chosen": ["Yes."], "rejected": ["No."]}  # a trainer wants rows; none is used here
JUDGED = {"prompt": ["What?", "Why?"], "completion": ["Yes.", "No."], "label": [True, False]}
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


# ---- the same weights on both sides ----------------------------------------------------------------------------------


@cache
def tokenizer():
    found = transformers.AutoTokenizer.from_pretrained(cli.model_folder())
    found.pad_token = "<|endoftext|>"
    return found


def theirs(kind=transformers.AutoModelForCausalLM, moved: bool = False, **how):
    """transformers' model of the tiny folder; `moved` is another one nearby, of which references are made."""
    model = kind.from_pretrained(cli.model_folder(), dtype=torch.float32, **how).train()
    random = torch.Generator().manual_seed(1)
    for p in model.parameters() if moved else ():
        p.data += 0.02 * torch.randn(p.shape, generator=random)
    return model


def ours(moved: bool = False):
    """Our model with the weights of `theirs`, all of which train."""
    base = pretrained.find(str(cli.model_folder()))
    model = pretrained.load_model(base, torch.float32, torch.device("cpu"))
    model.load_state_dict(theirs(moved=moved).state_dict(), strict=True)
    return model.requires_grad_().train()


@torch.no_grad()
def compared(items):
    """Items with the log-probabilities of the model nearby as their reference."""
    model = ours(moved=True)
    each = [tuple(log_probs(model, collate([item])).tolist()) for item in items]
    return [Linked(item.examples, {**item.known, "reference": one}) for item, one in zip(items, each, strict=True)]


def split(example):
    """Prompt and answer, as lists of ids without the one that pads."""
    first = example.trained.index(True)
    return example.tokens[:first], example.tokens[first:]


def some(make, count=6):
    """Examples without the token that their collators pad with."""

    def clean(example):
        return example._replace(tokens=[token or 1 for token in example.tokens])

    return [item._replace(examples=tuple(map(clean, item.examples))) for item in make(count)]


def quiet(config, folder, **how):
    """Settings of a trainer that only computes."""
    calm = {"use_cpu": True, "report_to": "none", "bf16": False, "gradient_checkpointing": False}
    return config(output_dir=str(folder), disable_tqdm=True, **calm, **how)


def same(model, loss, their_model, their_loss, names=None) -> bool:
    """The same loss, and the same gradient of every weight, however small it is beside others."""
    loss.backward(), their_loss.backward()
    mine, other = dict(model.named_parameters()), dict(their_model.named_parameters())
    names = names or {name: name for name in other}
    gradients = [
        torch.cat([part[n].grad.flatten() for n in by]) for part, by in ((mine, names.values()), (other, names))
    ]
    assert far(gradients[1], torch.zeros_like(gradients[1]), TOL)
    return close(loss.detach(), their_loss.detach(), TOL) and close(*gradients, TOL)


def our_loss(method, model, items, args) -> torch.Tensor:
    objective = Objective(method, model, args)
    [batch] = objective.prepare([collate(items)])
    return objective(batch) / len(items)


# ---- pairs -----------------------------------------------------------------------------------------------------------


def dpo_trainer(folder, **how):
    args = quiet(trl.DPOConfig, folder, beta=BETA, max_length=None, **how)
    rows = datasets.Dataset.from_dict(TEXTS)
    return trl.DPOTrainer(theirs(), theirs(moved=True), args, train_dataset=rows, processing_class=tokenizer())


def their_pairs(items) -> dict:
    rows = [[split(example) for example in item.examples] for item in items]
    return DataCollatorForPreference(PAD)(
        [{"prompt_ids": c[0], "chosen_ids": c[1], "rejected_ids": r[1]} for c, r in rows]
    )


THEIR_LOSSES = ["sigmoid", "ipo", "hinge", "robust", "sigmoid_norm", "apo_zero"]


@pytest.mark.parametrize("loss", THEIR_LOSSES)
def test_losses_of_pairs_and_their_gradients_are_those_of_trl(tmp_path, loss):
    smoothing = ("--label-smoothing", 0.2) if loss == "robust" else ()
    args, items = settings("dpo", "--loss", loss, "--beta", BETA, *smoothing), some(pairs)
    trainer = dpo_trainer(tmp_path, loss_type=[loss], label_smoothing=0.2 if smoothing else 0.0)
    their_loss = trainer.compute_loss(trainer.model, their_pairs(items))
    model = ours()
    assert same(model, our_loss(dpo, model, compared(items), args), trainer.model, their_loss)


def test_the_rewards_margin_and_accuracy_of_a_batch_are_those_that_trl_logs(tmp_path):
    items = some(pairs)
    trainer = dpo_trainer(tmp_path)
    trainer.compute_loss(trainer.model, their_pairs(items))
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    found = measure(dpo, ours().eval(), [collate(compared(items))], settings("dpo", "--beta", BETA))
    for mine, name in {"reward_chosen": "rewards/chosen", "reward_rejected": "rewards/rejected",
                       "reward_margin": "rewards/margins", "accuracy": "rewards/accuracies",
                       "log_prob_chosen": "logps/chosen", "log_prob_rejected": "logps/rejected"}.items():  # fmt: skip
        assert found[mine] == pytest.approx(logged[name], rel=1e-5, abs=1e-4), name


@pytest.mark.parametrize("which", [0, 3])
def test_cdpo_is_trls_aot_where_there_is_but_one_pair_to_sort(tmp_path, which):
    items = some(pairs)[which : which + 1]
    trainer = dpo_trainer(tmp_path, loss_type=["aot"], label_smoothing=0.2)
    their_loss = trainer.compute_loss(trainer.model, their_pairs(items))
    args, model = settings("dpo", "--loss", "cdpo", "--beta", BETA, "--label-smoothing", 0.2), ours()
    assert same(model, our_loss(dpo, model, compared(items), args), trainer.model, their_loss)


def test_the_weight_of_sft_is_that_of_trl_where_its_mean_over_tokens_is_that_of_one_answer(tmp_path):
    items = some(pairs)[1:2]
    trainer = dpo_trainer(tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.4])
    their_loss = trainer.compute_loss(trainer.model, their_pairs(items))
    args, model = settings("dpo", "--beta", BETA, "--sft-weight", 0.4), ours()
    assert same(model, our_loss(dpo, model, compared(items), args), trainer.model, their_loss)


# ---- pairs without a reference ---------------------------------------------------------------------------------------


def labelled(items) -> dict:
    """A batch as ORPO's and CPO's trainers take it."""
    batch = {}
    for side, name in enumerate(("chosen", "rejected")):
        rows = [item.examples[side] for item in items]
        ids = [torch.tensor(example.tokens) for example in rows]
        labels = [one.where(torch.tensor(e.trained), torch.tensor(-100)) for one, e in zip(ids, rows, strict=True)]
        batch[f"{name}_input_ids"] = pad_sequence(ids, True, PAD)
        batch[f"{name}_attention_mask"] = pad_sequence([torch.ones_like(one) for one in ids], True, 0)
        batch[f"{name}_labels"] = pad_sequence(labels, True, -100)
    return batch


def test_orpo_and_its_gradients_are_those_of_trl_whose_likelihood_spans_prompt_and_answer(tmp_path):
    """TRL's first term is the mean loss over all tokens of prompts and chosen answers; ours, and the paper's, that over
    each answer. So theirs stands in the place of ours here, by our own sft on whole documents."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    config = quiet(ORPOConfig, tmp_path, beta=BETA, max_length=64)
    rows = datasets.Dataset.from_dict(TEXTS)
    trainer = ORPOTrainer(theirs(), config, train_dataset=rows, processing_class=tokenizer())
    items = some(pairs)
    their_loss = trainer.compute_loss(trainer.model, labelled(items))
    args, model = settings("dpo", "--loss", "orpo", "--beta", BETA), ours()
    answers = log_probs(model, collate(items)) / torch.tensor(collate(items).counts)
    whole = collate([i.examples[0]._replace(trained=[True] * len(i.examples[0].tokens)) for i in items])
    total, count, _ = sft.loss(model, whole)
    loss = our_loss(dpo, model, items, args) + answers[::2].mean() + total / count
    assert same(model, loss, trainer.model, their_loss)


@pytest.mark.parametrize(("gamma", "alpha"), [(0.0, 0.0), (0.7, 0.0), (0.7, 0.4)])
def test_simpo_and_its_gradients_are_those_of_trl(tmp_path, gamma, alpha):
    """With a weight of sft (TRL's cpo_alpha) on a single pair: TRL takes the mean over all tokens of a batch."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    how = {"loss_type": "simpo", "simpo_gamma": gamma, "cpo_alpha": alpha, "beta": 2.0}
    config, rows = quiet(CPOConfig, tmp_path, max_length=64, **how), datasets.Dataset.from_dict(TEXTS)
    trainer = CPOTrainer(theirs(), config, train_dataset=rows, processing_class=tokenizer())
    items = some(pairs)[:1] if alpha else some(pairs)
    their_loss = trainer.compute_loss(trainer.model, labelled(items))
    args, model = settings("dpo", "--loss", "simpo", "--margin", gamma, "--sft-weight", alpha), ours()
    assert same(model, our_loss(dpo, model, items, args), trainer.model, their_loss)


# ---- judged answers, and scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["there", "back"])
def test_kto_and_its_gradients_are_those_of_trl(tmp_path, way):
    """Back is the way on which answers become likelier, so that z is not 0."""
    models = theirs(moved=way == "back"), theirs(moved=way == "there")
    config = quiet(trl.KTOConfig, tmp_path, beta=BETA, desirable_weight=1.3, undesirable_weight=0.7, max_length=None,
                   per_device_train_batch_size=2)  # fmt: skip
    rows = datasets.Dataset.from_dict(JUDGED)
    trainer = trl.KTOTrainer(*models, config, train_dataset=rows, processing_class=tokenizer())
    items = some(judged)
    batch = []
    for item in items:
        (prompt, answer), (_, other) = map(split, item.examples)
        batch.append({"prompt_ids": prompt, "completion_ids": answer, "KL_completion_ids": other,
                      "label": bool(item.known["good"][0])})  # fmt: skip
    their_loss = trainer.compute_loss(trainer.model, DataCollatorForUnpairedPreference(PAD)(batch))
    model, reference = ours(), ours()
    model.load_state_dict(copy.deepcopy(models[0].state_dict())), reference.load_state_dict(models[1].state_dict())
    with torch.no_grad():
        each = [tuple(log_probs(reference, collate([item])).tolist()) for item in items]
    items = [item._replace(known={**item.known, "reference": one}) for item, one in zip(items, each, strict=True)]
    args = settings("kto", "--beta", BETA, "--good-weight", 1.3, "--bad-weight", 0.7)
    objective = Objective(kto, model, args)
    [laid] = objective.prepare([collate(items)])
    kl = trainer._metrics["train"]["kl"][-1]
    assert laid.known["z"][0].item() == pytest.approx(kl, rel=1e-5, abs=1e-5) and (kl > 0.1) == (way == "back")
    assert same(model, objective(laid) / len(items), trainer.model, their_loss)


@pytest.mark.parametrize(("center", "margins"), [(None, False), (0.05, False), (0.05, True)])
def test_the_loss_of_scores_and_its_gradients_are_those_of_trl(tmp_path, center, margins):
    """Their score is a Linear without a bias, read at the last token; ours ends with the end of turn there, too."""
    kind = transformers.AutoModelForSequenceClassification
    their_model = theirs(kind, num_labels=1, pad_token_id=PAD)
    their_model.score.weight.data = torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
    config = quiet(trl.RewardConfig, tmp_path, center_rewards_coefficient=center, max_length=None)
    rows = datasets.Dataset.from_dict({"chosen": ["Yes."], "rejected": ["No."]})
    trainer = trl.RewardTrainer(their_model, config, train_dataset=rows, processing_class=tokenizer())
    items, margin = some(pairs), [0.3 * i if margins else 0.0 for i in range(6)]
    batch = [
        {"chosen_ids": i.examples[0].tokens, "rejected_ids": i.examples[1].tokens} | ({"margin": m} if margins else {})
        for i, m in zip(items, margin, strict=True)
    ]
    their_loss = trainer.compute_loss(trainer.model, DataCollatorForScores(PAD)(batch))
    model = ours()
    value_head.add(model, 32).summary.weight.data.copy_(their_model.score.weight.data)
    items = [scored(i._replace(known={"margin": (m, m)})) for i, m in zip(items, margin, strict=True)]
    args = settings("reward", *(("--center", center) if center else ()))
    names = {name: name for name, _ in trainer.model.named_parameters() if name != "score.weight"}
    names["score.weight"] = "v_head.summary.weight"
    assert same(model, our_loss(reward, model, items, args), trainer.model, their_loss, names)
