"""A hundred requests of all kinds, good and bad, at once: `bench/soak.py` in short."""

import asyncio
import os
import sys

from bench import soak
from tests.mutation import mutation
from tests.serving import adapter_in, served_model, serving


@mutation("lora/serve/engine.py", "            self.known -= 1\n", "            pass\n")
def test_whatever_clients_do_answers_stay_right_and_nothing_is_left_behind(tmp_path, capfd):
    served = served_model(adapter_in(tmp_path, "heron", 1), adapter_in(tmp_path, "crane", 2), slots=32)
    with serving(served) as url:
        one = soak.Soak(url, os.getpid() if sys.platform == "linux" else 0, [*served.chats], seed=1)
        asyncio.run(one.run(100))
    one.report()
    seen = {kind for kind, _ in one.seen}
    assert not one.wrong and sum(one.seen.values()) == 100 and len(seen) >= 8
    assert "Traceback" not in capfd.readouterr().err and served.engine.known == 0
