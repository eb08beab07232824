"""What the model of step 0 says of every answer is computed once, kept in the run's folder, and believed only as it was
written for these examples."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora import files, pretrained
from lora.adapter import store
from lora.data import formats
from lora.data.batch import collate
from lora.data.encode import encode
from lora.methods.answers import log_probs
from lora.run.reference import FILE
from tests import cli
from tests.helpers import close, far
from tests.methods.linked import data_of, pairs_file
from tests.mutation import mutation
from tests.run.test_resume import copy_of, go_on, kill_before_step, metrics, ordinary, result

RUN = ("--max-steps", 4, "--batch-size", 3, "--micro-tokens", 90, "--save-every", 2, "--lr", 0.01, *cli.ON_CPU)
ADAPTER = ("--rank", 4, "--dropout", 0.2)
NOTE = "is not that of these examples; the reference is computed again"


def train(*argv, cwd, method="dpo", **how):
    inputs = ("--model", cli.model_folder(), "--method", method, "--data", data_of(method), "--out", "out")
    return cli.call("train", *inputs, *RUN, *argv, cwd=cwd, **how)


def resume(*argv, cwd, passes: int | None = 0, **how):
    """The resumed run; so many passes it made for a reference (None: some)."""
    path = cwd / "passes"
    path.unlink(missing_ok=True)

    def count():
        from lora.run import reference

        whole = reference.log_probs

        def counted(*given):
            path.write_text(f"{path.read_text() if path.exists() else ''}x")
            return whole(*given)

        reference.log_probs = counted

    done = go_on(*argv, cwd=cwd, before=count, **how)
    made = len(path.read_text()) if path.exists() else 0
    assert (made > 0) if passes is None else (made == passes), done.err
    return done


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of four steps that nobody interrupts, and a folder beside it for its adapter."""
    folder = tmp_path_factory.mktemp("whole")
    done = train(*ADAPTER, cwd=folder)
    assert done.code == 0, done.err
    return folder / "out"


def by_hand(adapter=None, method="dpo", kind="pair") -> torch.Tensor:
    """log p of every answer of the file, one at a time, under the base or an adapter of it."""
    base = pretrained.find(str(cli.model_folder()))
    model, chat = pretrained.load_model(base, torch.float32, torch.device("cpu")), pretrained.load_chat(base)
    if adapter:
        store.load(model, adapter)
    model.eval()
    found = encode(formats.scan([data_of(method)], kind=kind), chat, 256, kind=kind)
    with torch.no_grad():
        each = [[log_probs(model, collate([type(i)((e,), {})])).item() for e in i.examples] for i in found]
    return torch.tensor(each, dtype=torch.float64)


@mutation("lora/run/reference.py", "found[torch.from_numpy(mine)] =", "found[torch.arange(len(mine))] =")
def test_the_file_has_the_log_probability_of_both_sides_of_every_pair_under_the_base(whole):
    tensors = load_file(whole / FILE)
    assert tensors.keys() == {"train"} and tensors["train"].shape == (9, 2)
    assert tensors["train"].dtype == torch.float64
    assert close(tensors["train"], by_hand(), 1e-5) and far(tensors["train"], by_hand().flip(1), 1e-5)
    assert files.Safetensors(whole / FILE).metadata.keys() == {"data", "values"}


def test_judged_answers_have_theirs_too_and_those_of_other_questions(tmp_path):
    done = train(method="kto", cwd=tmp_path)
    assert done.code == 0, done.err
    assert close(load_file(tmp_path / "out" / FILE)["train"], by_hand(method="kto", kind="judged"), 1e-5)


@mutation(
    "lora/run/reference.py",
    "found = Reference.read(resumed.run, data.hexdigest()) if resumed else None",
    "found = None",
)
def test_a_resumed_run_reads_the_reference_and_computes_none(tmp_path, whole):
    copy_of(whole, tmp_path / "out", 2)
    done = resume(cwd=tmp_path)
    assert done.code == 0 and NOTE not in done.err, done.err
    assert result(tmp_path / "out", 4) == result(whole, 4)
    assert (tmp_path / "out" / FILE).read_bytes() == (whole / FILE).read_bytes()


def delete(path):
    path.unlink()


def edit_a_value(path):
    tensors, marks = load_file(path), files.Safetensors(path).metadata
    tensors["train"][3, 1] += 0.25
    save_file(tensors, path, marks)


def cut_it_short(path):
    path.write_bytes(path.read_bytes()[:-9])


def other_examples(path):
    tensors, marks = load_file(path), files.Safetensors(path).metadata
    save_file(tensors, path, marks | {"data": "0" * 64})


@mutation("lora/run/reference.py", "return found if whole else None", "return found", case="edit_a_value")
@mutation(
    "lora/run/reference.py",
    'file.metadata == {"data": data, "values"',
    'file.metadata | {"data": data} == {"data": data, "values"',
    case="other_examples",
)
@pytest.mark.parametrize("damage", [delete, edit_a_value, cut_it_short, other_examples], ids=lambda f: f.__name__)
def test_a_reference_that_is_gone_or_not_as_it_was_written_is_computed_again_with_a_note(tmp_path, whole, damage):
    copy_of(whole, tmp_path / "out", 2)
    damage(tmp_path / "out" / FILE)
    done = resume(cwd=tmp_path, passes=None)
    assert done.code == 0 and done.err.count(NOTE) == 1, done.err
    assert result(tmp_path / "out", 4) == result(whole, 4)
    assert (tmp_path / "out" / FILE).read_bytes() == (whole / FILE).read_bytes()


@mutation(
    "lora/run/reference.py",
    "step_0 = disabled(model) if resumed and not args.init_adapter",
    "step_0 = disabled(model) if False",
)
@pytest.mark.parametrize("words", [("--dora",), ("--init", "pissa")], ids=" ".join)
def test_computed_again_it_is_that_of_the_base_whatever_the_adapter_is_before_its_values_are_read(tmp_path, words):
    assert train(*words, cwd=tmp_path, before=kill_before_step(4)).code == 137
    before = load_file(tmp_path / "out" / FILE)["train"]
    (tmp_path / "out" / FILE).unlink()
    done = resume(cwd=tmp_path, passes=None)
    assert done.code == 0, done.err
    after = load_file(tmp_path / "out" / FILE)["train"]
    assert close(before, by_hand(), 1e-4) and close(after, by_hand(), 1e-5)


def test_held_out_pairs_have_a_reference_of_their_own_which_other_rows_do_not_fit(tmp_path):
    rows = pairs_file().read_text().splitlines(keepends=True)
    for name, part in (("a.jsonl", rows[:4]), ("b.jsonl", rows[4:])):
        (tmp_path / name).write_text("".join(part))
    held_out = ("--eval-every", 2, "--retention", ordinary())
    assert train("--eval-data", "a.jsonl", *held_out, cwd=tmp_path).code == 0
    first = load_file(tmp_path / "out" / FILE)
    assert first["held_out"].shape == (4, 2) and close(first["held_out"], by_hand()[:4], 1e-5)
    assert metrics(tmp_path / "out")[0]["eval_loss"] == pytest.approx(0.693147, abs=1e-6)
    shutil.rmtree(tmp_path / "out/checkpoints/000004")
    done = resume("--eval-data", "b.jsonl", cwd=tmp_path, passes=None)
    assert done.code == 0 and NOTE in done.err, done.err
    second = load_file(tmp_path / "out" / FILE)
    assert torch.equal(second["train"], first["train"]) and close(second["held_out"], by_hand()[4:], 1e-5)


# ---- a run that starts from an adapter -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def second(tmp_path_factory, whole):
    """A run of dpo that starts from the adapter of another one, with both in one folder."""
    folder = tmp_path_factory.mktemp("second")
    shutil.copytree(whole, folder / "first")
    done = train("--init-adapter", "first", cwd=folder)
    assert done.code == 0, done.err
    return folder


def test_the_reference_of_a_run_from_an_adapter_is_the_model_with_that_adapter(second):
    found = load_file(second / "out" / FILE)["train"]
    assert close(found, by_hand(second / "first"), 1e-5) and far(found, by_hand(), 1e-5)
    assert metrics(second / "out")[0]["loss"] == pytest.approx(0.693147, abs=1e-6)


@mutation(
    "lora/run/reference.py",
    "            trainable.restore(Path(args.init_adapter))",
    "            trainable.restore(resumed.path if resumed else Path(args.init_adapter))",
)
def test_it_is_computed_again_from_that_adapter_where_it_is_gone(tmp_path, second):
    shutil.copytree(second, tmp_path / "x")
    place = tmp_path / "x"
    shutil.rmtree(place / "out/checkpoints/000004")
    (place / "out" / FILE).unlink()
    done = resume(cwd=place, passes=None)
    assert done.code == 0 and NOTE in done.err, done.err
    assert result(place / "out", 4) == result(second / "out", 4)
    assert (place / "out" / FILE).read_bytes() == (second / "out" / FILE).read_bytes()


def test_without_that_adapter_the_reference_is_still_read_and_computed_again_it_cannot_be(tmp_path, second):
    shutil.copytree(second, tmp_path / "x")
    place = tmp_path / "x"
    shutil.rmtree(place / "first")
    shutil.rmtree(place / "out/checkpoints/000004")
    done = resume(cwd=place)
    assert done.code == 0, done.err
    assert result(place / "out", 4)[:2] == result(second / "out", 4)[:2]
    (place / "out" / FILE).unlink()
    done = resume(cwd=place)
    assert done.code == 2 and "first" in done.errors[0] and len(done.errors) == 1, done.err


# ---- runs without one ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("--loss", "simpo"), ("--loss", "orpo"), ("--method", "reward")], ids=" ".join)
def test_what_compares_with_nothing_computes_and_writes_no_reference(tmp_path, words):
    def none():
        from lora.run import reference

        reference.log_probs = None

    done = train(*words, "--max-steps", 2, cwd=tmp_path, before=none)
    assert done.code == 0 and not (tmp_path / "out" / FILE).exists(), done.err


def test_every_weight_may_train_against_the_reference_of_the_base_and_go_on(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    assert train("--full", cwd=tmp_path / "a").code == 0
    assert train("--full", cwd=tmp_path / "b", before=kill_before_step(4)).code == 137
    assert close(load_file(tmp_path / "a/out" / FILE)["train"], by_hand(), 1e-5)
    for damage in (False, True):
        shutil.copytree(tmp_path / "b", tmp_path / f"c{damage}")
        place = tmp_path / f"c{damage}"
        if damage:
            (place / "out" / FILE).unlink()
        done = resume(cwd=place, passes=None if damage else 0)
        assert done.code == 0, done.err
        assert metrics(place / "out") == metrics(tmp_path / "a/out")
        name = "model.safetensors"
        assert (place / "out" / name).read_bytes() == (tmp_path / "a/out" / name).read_bytes()
