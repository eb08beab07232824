"""Whether the blocks of a run are compiled, and that they are.

On a CPU their code is made once, for any number of tokens, before the first step; it is kept on disk for the next run
(https://docs.pytorch.org/tutorials/recipes/torch_compile_caching_tutorial.html). So a long run is compiled unasked.
"""

import time

import torch

from lora import device as machine
from lora import threads
from lora.errors import BadEnvironment, say
from lora.methods import samples
from lora.network.compiled import as_written, compile_blocks, is_compilable
from lora.network.decoder import Model
from lora.run.settings import TrainSettings
from lora.train.distributed import DistContext

# Additions and multiplications of a run, for each thread: some ten to twenty minutes of them. The code takes half a
# minute to one to make, and a step then a tenth to a fifth less time (bench/techniques.py).
WORTH = 1.2e14


def is_worth_it(args: TrainSettings, empty: Model, tokens: int, processes: DistContext) -> bool:
    """Is a run over so many tokens compiled that was not asked to be? A function of settings and data alone, so that a
    resumed run does as the first did."""
    plainly = args.no_compile or args.plain or args.fsdp or args.quant or args.checkpoint_activations or args.dropout
    if plainly or samples(args.method) or processes.size > 1 or processes.device.type != "cpu":
        return False
    operations = 4 * tokens * sum(p.numel() for p in empty.parameters())  # forward, and ∂x backward
    if operations < WORTH * torch.get_num_threads() or not is_compilable(empty):
        return False
    try:
        machine.check_compiler(processes.device)
    except BadEnvironment:
        return False
    return True


def compile_model(model: Model, asked: bool) -> bool:
    """Compile its blocks; False where that fails though nobody `asked` for it: then they run as written.

    On a CPU the code is made here, by a pass over a few tokens. Raises BadEnvironment where it cannot be, if asked.
    """
    compile_blocks(model)
    if model.device.type != "cpu":
        say("compile  the first step takes a minute or two longer")
        return True
    say("compile  making code for the blocks; a minute the first time")
    begun = time.monotonic()
    try:
        with threads.unbound():  # the compiler starts processes, as many as there are cores
            model.trunk(torch.zeros(48, dtype=torch.long), [32, 16]).sum().backward()
    except Exception as error:  # whatever compilers say
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if asked:
            raise BadEnvironment(f"no compiled blocks in this environment: {why}. Leave out --compile") from error
        as_written(model)
        say(f"note: the blocks are not compiled: {why}. --no-compile does without trying")
        return False
    finally:
        model.zero_grad()
    say(f"compile  done in {time.monotonic() - begun:.0f} s")
    return True
