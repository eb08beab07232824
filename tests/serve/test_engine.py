"""An answer in a crowd is the answer alone: requests join and leave, adapters share a batch; what fails ends alone."""

import copy
import gc
import threading
import weakref
from functools import cache

import pytest
import torch

from lora.adapter import sets
from lora.adapter.layer import LoRALinear
from lora.adapter.variants import DoRALinear, RsDoRALinear, RsLoRALinear
from lora.inference.generate import Sampling, generate
from lora.quant.packed import Packed
from lora.serve import engine as product
from lora.serve import rows
from lora.serve.engine import Engine, Full, Request
from tests.helpers import bits, close, far, tiny_model
from tests.mutation import mutation
from tests.network.test_families import family_model
from tests.quantised import both
from tests.serving import STOP, Job, adapter, answer, engine_of, some_jobs, turn

NAMES = ("base", "lora", "dora", "pattern", "rs")
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def several(model) -> dict[str, sets.AdapterSet]:
    """Adapters of four kinds, on different targets."""
    dtype = model.dtype
    return {
        "lora": adapter(model, ("all",), 1, dtype=dtype),
        "dora": adapter(model, ("q_proj", "down_proj"), 2, 4, DoRALinear, dtype),
        "pattern": adapter(model, ("attention",), 3, 2, LoRALinear, dtype, k_proj=3, o_proj=1),
        "rs": adapter(model, ("mlp", "v_proj"), 4, 5, RsLoRALinear, dtype),
    }


@cache
def served(dtype) -> Engine:
    model = tiny_model(dtype, num_hidden_layers=2)
    return engine_of(model, several(model))


def same_answers(engine: Engine, jobs: list[Job], crowds=(1, 2)) -> bool:
    """Has each token of each answer the bits of its logits, alone and in crowds?"""
    alone = [(job.events, job.bits) for job in answer(engine, jobs)]
    assert sum(len(events) for events, _ in alone) > 2 * len(jobs)
    for crowd in crowds:
        for job, (events, logits) in zip(answer(engine, jobs, crowd), alone, strict=True):
            if job.events != events or not torch.equal(bits(job.bits), bits(logits)):
                print(crowd, job.adapter, len(job.ids), job.events, events)
                return False
    return True


# ---- alone and in a crowd --------------------------------------------------------------------------------------------


@mutation("lora/serve/rows.py", "mine, start = slice(start, start + count), start + count", "mine = slice(0, count)")
@mutation("lora/serve/rows.py", "        if not self.least:\n", "        if False:\n", case="torch.float32")
@mutation(
    "lora/serve/engine.py",
    "zip(self.caches, k.split(1), v.split(1), strict=True)",
    "zip(self.caches[:1] * len(k), k.split(1), v.split(1), strict=True)",
)
@DTYPES
def test_an_answer_in_a_crowd_has_the_bits_that_it_has_alone(dtype):
    assert same_answers(served(dtype), some_jobs(NAMES, 131))


@mutation("lora/serve/engine.py", "ByRows() if self.ragged else nullcontext()", "nullcontext()")
@mutation("lora/serve/rows.py", "x = F.pad(x, (0, 0, 0, self.least - rows))", "pass")
def test_bits_do_not_depend_on_vectors_nor_on_the_number_of_rows_of_a_product():
    """In float32, where kernels differ most, with an MLP whose width is no whole number of vectors."""
    model = tiny_model(torch.float32, intermediate_size=41, hidden_size=96, num_attention_heads=6)
    assert same_answers(engine_of(model, several(model), 20), some_jobs(NAMES, 131, 24), (1,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2", "gemma2", "gemma3_text", "gemma4_text", "mistral"])
def test_hybrids_windows_and_soft_caps_are_the_same_in_a_crowd(kind, dtype):
    model = family_model(kind, 1, dtype)
    engine = engine_of(model, {"a": adapter(model), "b": adapter(model, ("all",), 2)})
    assert same_answers(engine, some_jobs(("base", "a", "b"), model.config.vocab_size, 12), (1,))


@mutation("lora/serve/rows.py", 'packed = getattr(base, "packed", None)', "packed = None")
def test_a_packed_base_is_the_same_in_a_crowd_and_stays_packed():
    model, _ = both(tiny_model(torch.bfloat16, hidden_size=48))
    engine = engine_of(model, several(model))
    packed = [one.product.weight for one in model.modules() if isinstance(one, rows.RowsLinear) and not one.base.bias]
    assert sum(isinstance(weight, Packed) for weight in packed) == 14
    assert same_answers(engine, some_jobs(NAMES, 131, 10), (1,))


@mutation("lora/serve/engine.py", "request.ids[request.read : request.read + PIECE]", "request.ids[request.read :]")
def test_pieces_of_prompts_end_at_the_same_places_and_take_turns(monkeypatch):
    """A prompt of 50 pieces is read while others come, are answered, and go."""
    monkeypatch.setattr(product, "PIECE", 7)
    engine = served(torch.float32)
    long, short = Job("lora", list(range(100)) * 3, 4), Job("dora", [5, 6], 4)
    alone = [(job.events, job.bits) for job in answer(engine, [long, short])]
    engine.submit(long.request())
    turn(engine)
    assert engine.reading[0].read == 7
    engine.submit(short.request())
    turns = 0
    while not short.events or isinstance(short.events[-1], int):
        turn(engine)
        turns += 1
    assert turns <= 5 and not long.events
    while engine.open:
        turn(engine)
    assert [long.events, short.events] == [events for events, _ in alone]


@mutation("lora/serve/engine.py", "min(request.max_new, ROOM)", "request.max_new")
def test_a_cache_grows_with_its_answer_and_not_with_what_was_asked(monkeypatch):
    monkeypatch.setattr(product, "ROOM", 4)
    engine = served(torch.float64)
    job = Job("lora", [1, 2, 3], 400)
    engine.submit(job.request())
    for _ in range(30):
        turn(engine)
    assert len(job.tokens) == 31 and product.room_of(engine.active[0].cache) == 56  # 7, 14, 28, 56
    engine.active[0].cancelled = True
    turn(engine)
    few = answer(engine, [Job("lora", [1, 2, 3], 25)])[0].tokens
    monkeypatch.setattr(product, "ROOM", 64)
    assert answer(engine, [Job("lora", [1, 2, 3], 25)])[0].tokens == few


# ---- as `generate` has it --------------------------------------------------------------------------------------------


@mutation("lora/serve/rows.py", "(s * B).to(dtype)", "B.to(dtype)")
@mutation("lora/serve/rows.py", "y[mine] = finish(y[mine] + ", "y[mine] = (y[mine] + ")
@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_generate_with_that_adapter(name):
    model = tiny_model(torch.float64)
    adapters = several(model)
    jobs = [job for job in some_jobs((name,), 131, 10, 5)]
    expected = []
    with sets.in_place(model, adapters.get(name, sets.AdapterSet({}, None))):
        for job in jobs:
            expected += generate(model, [job.ids], {STOP}, job.most, job.sampling)
        truth = model(torch.tensor(jobs[0].ids))[-1]
    plain = model(torch.tensor(jobs[0].ids))[-1]
    answer(engine_of(model, adapters), jobs, 3)
    assert [job.tokens for job in jobs] == expected
    assert close(jobs[0].logits[0], truth, 1e-12) and (name == "base" or far(plain, truth, 1e-12))


@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2", "gemma2", "gemma4_text", "olmo3"])
def test_families_answer_as_generate_does(kind):
    model = family_model(kind, 1)
    jobs = some_jobs(("base",), model.config.vocab_size, 6, lengths=(5, 33))
    expected = [generate(model, [job.ids], {STOP}, job.most, job.sampling)[0] for job in jobs]
    assert [job.tokens for job in answer(engine_of(model), jobs, 3)] == expected


def test_rows_of_a_variant_are_its_own_layers():
    model = tiny_model(torch.float64)
    x, base = torch.randn(5, 24, dtype=torch.float64), model.model.layers[0].self_attn.q_proj
    layers = {
        name: one.layers["model.layers.0.self_attn.q_proj"]
        for name, one in {
            "a": adapter(model, kind=DoRALinear, dtype=torch.float64),
            "b": adapter(model, kind=RsDoRALinear, seed=2, dtype=torch.float64),
        }.items()
    }
    shared = rows.Rows()
    linear = rows.RowsLinear(base, layers, shared)
    with shared.of([("a", 2), ("base", 1), ("b", 2)]):
        y = linear(x)
    expected = torch.cat([layers["a"](x[:2]), base(x[2:3]), layers["b"](x[3:])])
    assert close(y, expected, 1e-13) and far(base(x), expected, 1e-13)


# ---- ends ------------------------------------------------------------------------------------------------------------


@mutation("lora/serve/engine.py", "        request.cache = None\n", "        pass\n")
@mutation("lora/serve/engine.py", "            if request.cancelled:\n", "            if False:\n")
def test_a_cancelled_request_frees_its_row_and_its_cache():
    engine, job = served(torch.float32), Job("lora", [1, 2, 3], 100)
    other = Job("base", [4, 5], 3)
    request = job.request()
    engine.submit(request, other.request())
    turn(engine)
    held = weakref.ref(request.cache)
    assert len(engine.active) == 2 and held() is not None
    request.cancelled = True
    turn(engine)
    gc.collect()
    assert held() is None and job.events[-1] == "cancelled" and request not in engine.open
    while engine.open:
        turn(engine)
    assert other.events[-1] in ("length", "stop") and engine.known == 0


@mutation("lora/serve/engine.py", "self.known + len(requests) > self.room", "False")
def test_the_queue_is_bounded_and_takes_all_of_a_request_or_none():
    engine = engine_of(tiny_model(torch.float32), slots=2, waiting=3)
    jobs = [Job("base", [1, 2], 2) for _ in range(6)]
    engine.submit(*[job.request() for job in jobs[:4]])
    with pytest.raises(Full):
        engine.submit(*[job.request() for job in jobs[4:]])
    engine.submit(jobs[4].request())
    while engine.open or not engine.inbox.empty():
        turn(engine)
        assert len(engine.active) + len(engine.reading) <= 2
    assert all(job.events and job.events[-1] in ("length", "stop") for job in jobs[:5]) and not jobs[5].events
    engine.submit(jobs[5].request())


@mutation(
    "lora/serve/engine.py",
    "                self.fail([request], error)\n                continue\n            left",
    "                raise\n            left",
)
def test_an_error_in_a_prompt_ends_that_request_alone(monkeypatch, capsys):
    engine = served(torch.float32)
    jobs = [Job("lora", [1, 2], 5), Job("base", [131], 5), Job("dora", [7], 5)]  # no such token
    requests = [job.request() for job in jobs]
    engine.submit(*requests)
    while engine.open or not engine.inbox.empty():
        turn(engine)
    assert jobs[1].events == ["error"] and isinstance(requests[1].error, IndexError) and requests[0].error is None
    assert {job.events[-1] for job in (jobs[0], jobs[2])} <= {"length", "stop"}
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: 1 answers ended early") and "IndexError" in line


@mutation("lora/serve/engine.py", "            return self.fail(requests, error)\n", "            raise\n")
def test_an_error_in_a_pass_ends_the_answers_under_way_and_the_engine_lives_on(monkeypatch):
    engine, trunk = served(torch.float32), served(torch.float32).model.trunk
    jobs = [Job("lora", [1, 2], 50), Job("base", [3], 50)]
    engine.submit(*[job.request() for job in jobs])
    turn(engine)
    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "trunk", lambda *given, **how: (_ for _ in ()).throw(RuntimeError("no memory")))
        turn(engine)
    assert [job.events[-1] for job in jobs] == ["error", "error"] and engine.known == 0
    assert engine.model.trunk == trunk
    [job] = answer(engine, [Job("lora", [1, 2], 3)])
    assert job.events[-1] in ("length", "stop")


@mutation(
    "lora/serve/engine.py",
    "                self.fail([request], error)\n                continue\n            self.take_token",
    "                raise\n            self.take_token",
)
def test_an_answer_that_cannot_be_drawn_ends_alone():
    """Weights of one adapter that are not finite give no distribution."""
    model = tiny_model(torch.float32)
    broken = adapter(model, ("all",))
    for layer in broken.layers.values():
        layer.lora_A.fill_(torch.inf)
    engine = engine_of(model, {"broken": broken})
    jobs = [Job("broken", [1, 2], 5, Sampling(1.0)), Job("base", [1, 2], 5, Sampling(1.0))]
    alone = answer(engine, [copy.deepcopy(jobs[1])])[0].events
    answer(engine, jobs, 1)
    assert jobs[0].events == ["error"] and jobs[1].events == alone


@mutation(
    "lora/serve/engine.py",
    "        except Exception:  # who asked is no longer there\n            request.cancelled = True",
    "        except ZeroDivisionError:\n            pass",
)
def test_who_no_longer_listens_ends_nobody_else():
    engine = served(torch.float32)

    def gone(event):
        raise RuntimeError("Event loop is closed")

    job = Job("base", [1, 2], 4)
    engine.submit(Request("base", [1], 50, {STOP}, Sampling(), gone), job.request())
    for _ in range(6):
        turn(engine)
    assert not engine.open and job.events[-1] in ("length", "stop")


@mutation(
    "lora/serve/engine.py",
    '            for request in self.open:\n                self.end(request, "cancelled")',
    "            pass",
)
def test_a_stopped_engine_ends_what_is_open_and_takes_no_more():
    engine = engine_of(tiny_model(torch.float32, max_position_embeddings=100_000), slots=2)
    ended = [threading.Event() for _ in range(3)]
    seen = [[] for _ in ended]

    def listener(i):
        def push(event):
            seen[i].append(event)
            if isinstance(event, str):
                ended[i].set()

        return push

    engine.start()
    engine.submit(*[Request("base", [1, i], 10**6, set(), Sampling(), listener(i)) for i in range(3)])
    engine.stop()
    assert all(one.wait(10) for one in ended) and [events[-1] for events in seen] == ["cancelled"] * 3
    with pytest.raises(Full):
        engine.submit(Job("base", [1]).request())
