"""The Python API that talks: its answers are generate.py's, its pieces join to them, and it changes nothing global."""

import signal
import subprocess
import sys
import threading

import pytest
import torch

import lora
from lora.errors import BadInput, LoraError
from lora.inference import session
from lora.inference.session import open_sessions
from tests import cli
from tests.adapters import write_adapter
from tests.mutation import mutation

HOW = {"device": "cpu", "dtype": "float32", "max_new_tokens": 12}
DRAWN = {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 3}
TURN = {"role": "user", "content": "Hello."}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("session")
    write_adapter(folder / "a", 1, system="Be brief.")
    write_adapter(folder / "b", 2, system=False)
    return folder


@pytest.fixture
def chat(work):
    return lora.open(adapter=work / "a", **HOW)


def asked(work, text: str, *argv) -> str:
    """The answer of generate.py with the adapter `a`, without the line's end."""
    done = cli.ask("--adapter", "a", "--prompt", text, *argv, cwd=work)
    assert done.code == 0, done.err
    return done.out[:-1]


def as_flags(keywords: dict) -> list:
    return [word for name, value in keywords.items() for word in (f"--{name.replace('_', '-')}", value)]


# ---- answers ---------------------------------------------------------------------------------------------------------


@mutation("lora/inference/session.py", "store.load(net, adapter)", "store.read_config(adapter)", case="greedy")
@mutation(
    "lora/inference/session.py", "ids, sampling = self.encode(messages, where), replace(self.sampling, **sampling)",
    "ids, sampling = self.encode(messages, where), self.sampling", case="drawn",
)  # fmt: skip
@pytest.mark.parametrize("how", [{}, DRAWN], ids=["greedy", "drawn"])
def test_an_answer_is_that_of_generate_py(work, chat, how):
    expected = asked(work, "Hello.", *as_flags(how))
    assert chat("Hello.", **how) == expected and expected.strip()
    assert lora.open(adapter=work / "a", **HOW, **how)("Hello.") == expected
    assert lora.open(str(cli.model_folder()), work / "a", **HOW)([TURN], **how) == expected
    assert lora.open(cli.model_folder(), system="Be brief.", **HOW)("Hello.", **how) != expected


@mutation("lora/inference/session.py", "    if rest := decoder.end():", "    if rest := '':")
def test_streamed_pieces_join_to_the_answer_and_come_one_by_one(work, chat, monkeypatch):
    tokens = []
    real = session.stream_tokens

    def watched(*how):
        for pair in real(*how):
            tokens.append(pair)
            yield pair

    monkeypatch.setattr(session, "stream_tokens", watched)
    stream = chat.stream("Hello.")
    assert tokens == []
    pieces = [next(stream)]
    assert len(tokens) < 12  # the rest is not yet computed
    pieces += stream
    assert len(tokens) == 12 and "".join(pieces) == asked(work, "Hello.")
    monkeypatch.setattr(session, "stream_tokens", lambda *how: iter([(0, chat.chat.tokenizer.encode("é")[0])]))
    assert "".join(chat.stream([TURN])) == "\ufffd"  # the first of two bytes, which no second one followed


def test_answers_to_several_prompts_are_those_given_one_at_a_time(chat):
    prompts = ["Hello.", "What is 1 and 2?", [TURN, {"role": "assistant", "content": "Hi!"}, TURN]]
    found = list(chat.answers([chat.encode(prompt) for prompt in prompts], batch_size=2))
    assert found == [chat([{"role": "user", "content": p}] if isinstance(p, str) else p) for p in prompts]
    assert len(set(found)) == 3 and chat.messages == []


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(chat):
    one, two, other = (chat([TURN], temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert one == two != other


@mutation("lora/inference/generate.py", '0 < self.top_p <= 1, "above 0', 'self.top_p <= 1, "above 0', case="top_p-0")
@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("top_k", -1), ("top_p", 0), ("min_p", 1), ("repetition_penalty", 0), ("temprature", 1)],
)
def test_a_keyword_that_is_unknown_or_out_of_range_is_named(chat, name, value):
    with pytest.raises((ValueError, TypeError), match=name):
        chat("Hello.", **{name: value})
    with pytest.raises((ValueError, TypeError), match=name):
        lora.open("there is no such model", **{name: value})


# ---- the conversation ------------------------------------------------------------------------------------------------


@mutation("lora/inference/session.py", "            if goes_on:", "            if False:")
def test_a_conversation_goes_on_until_reset(work, chat):
    first, second = chat("Hello."), chat("Bye.")
    done = cli.ask("--adapter", "a", cwd=work, stdin="Hello.\nBye.\n")
    assert done.out == f"{first}\n{second}\n"
    assert [m["content"] for m in chat.messages] == ["Hello.", first, "Bye.", second]
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    assert chat(chat.messages[:3]) == second  # a list is a conversation of its own
    chat.reset()
    assert chat.messages == [] and chat("Hello.") == first and chat("Bye.") == second


def test_a_list_of_messages_leaves_the_conversation_as_it_is(chat):
    chat("Hello.")
    before, given = list(chat.messages), [TURN]
    chat(given)
    list(chat.stream(given))
    assert chat.messages == before and given == [TURN]


def test_an_answer_that_is_broken_off_is_not_part_of_the_conversation(chat):
    stream = chat.stream("Hello.")
    next(stream)
    stream.close()
    assert chat.messages == [] and not torch.is_inference_mode_enabled()
    assert not any("joined" in vars(module) for module in chat.model.modules())


def test_a_conversation_that_grows_too_long_is_bad_input_and_is_kept(chat):
    first = chat("Hello.")
    with pytest.raises(BadInput, match=r"^prompt too long in this conversation: \d+ tokens, .* Shorten it$"):
        chat("so " * 300)
    assert [m["content"] for m in chat.messages] == ["Hello.", first] and chat("Bye.")


@mutation(
    "lora/inference/session.py", "chat = load_chat(base, adapter, system, template, date, verify, template_args)",
    "chat = load_chat(base, None, system, template, date, verify, template_args)",
)  # fmt: skip
def test_the_chat_is_that_of_the_training_unless_it_is_told(work, chat, capsys):
    assert chat([TURN]) == chat([{"role": "system", "content": "Be brief."}, TURN])
    lora.open(adapter=work / "a", **HOW)
    assert "system   as in training: Be brief.\n" in capsys.readouterr().err
    told = lora.open(adapter=work / "a", system="Hm.", **HOW)
    assert told("Hello.") == asked(work, "Hello.", "--system", "Hm.") != chat([TURN])
    assert lora.open(adapter=work / "a", system=False, **HOW)("Hello.") == asked(work, "Hello.", "--no-system")


# ---- opening ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["no adapter", "another base", "no model"])
def test_what_cannot_be_opened_raises_the_line_that_generate_py_prints(work, tmp_path, what):
    other = cli.write_model(tmp_path / "other", seed=1)
    model, adapter = {"no adapter": (None, "none"), "another base": (other, work / "a"), "no model": ("none", None)}[
        what
    ]
    argv = [*(("--model", model) if model else ()), *(("--adapter", adapter) if adapter else ())]
    done = cli.ask(*argv, "--prompt", "x", cwd=work)
    with pytest.raises(LoraError) as raised:
        lora.open(model, adapter, **HOW)
    assert done.code == raised.value.code == 2 and done.errors == [f"error: {line}" for line in raised.value.problems]
    if what == "another base":
        assert lora.open(model, adapter, verify=False, **HOW)("Hello.")


def test_two_sessions_of_one_process_do_not_know_each_other(work, chat):
    first = chat("Hello.")
    other = lora.open(adapter=work / "b", **HOW)
    assert other("Hello.") != first and chat("Bye.") == chat(chat.messages[:3])
    chat.reset()
    assert chat("Hello.") == first


def test_opening_and_asking_changes_nothing_global(work):
    def state():
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return [*handlers, torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype(),
                torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.backends.mkldnn.enabled]  # fmt: skip

    before = state()
    stream = lora.open(adapter=work / "a", **HOW).stream("Hello.", **DRAWN)
    for _ in stream:
        assert state() == before  # while the caller has a piece, too
    assert state() == before


def test_a_thread_may_open_and_ask(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(lora.open(adapter=work / "a", **HOW)("Hello.")))
    thread.start()
    thread.join()
    assert found == [asked(work, "Hello.")]


@mutation("lora/inference/session.py", "            self.before()\n            answer", "            answer")
def test_sessions_that_share_a_model_answer_each_with_its_own_adapter(work):
    sessions = open_sessions(None, [str(work / "a"), str(work / "b")], **HOW)
    alone = {"base": lora.open(cli.model_folder(), **HOW)}
    alone |= {name: lora.open(adapter=work / name, **HOW) for name in ("a", "b")}
    assert list(sessions) == ["base", "a", "b"] and len({id(s.model) for s in sessions.values()}) == 1
    for name in ("a", "b", "base", "b", "a"):
        assert sessions[name]([TURN]) == alone[name]([TURN])
        assert list(sessions[name].answers([sessions[name].encode("Bye.")])) == [alone[name]("Bye.")]
        alone[name].reset()


# ---- names -----------------------------------------------------------------------------------------------------------


@mutation("lora/__init__.py", "    return __all__", "    return list(globals())")
def test_the_public_names_are_listed_and_importing_them_is_left_to_their_first_use():
    assert {"open", "inject", "merge", "LoraError"} <= set(dir(lora)) == set(lora.__all__)
    code = (
        "import lora, sys; dir(lora); before = 'torch' in sys.modules; lora.open; print(before, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cli.ROOT, timeout=120)
    assert done.stdout.strip() == "False True", done.stderr
