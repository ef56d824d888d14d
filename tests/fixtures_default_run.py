"""The default run at a size for tests: a few steps of each stage on a few pictures."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch

from internvl.reproduction import phases, stage1, stage3
from internvl.reproduction.phases import Batch, Phase, SceneBatches
from internvl.reproduction.run import DefaultRun, default_run
from internvl.reproduction.stage2 import QueryPhase
from internvl.synthetic.captions import LANGUAGES
from internvl.synthetic.tokenizer import caption_corpus, tokenizer_corpus


def tiny_run() -> DefaultRun:
    pairs = (Batch(1.0, len(LANGUAGES), {"one_shape": 1, "one_digit": 1}),)
    run = default_run()
    phase = Phase(steps=1, batches=(Batch(1.0, 2, {"mixed": 1}),), warmup_steps=0, save_steps=10)
    answering = replace(phase, steps=3, save_steps=1)
    phase1 = next(iter(run.stage1.phases.values()))
    phase2 = run.stage2.phases["queries_and_llama"]
    return DefaultRun(
        replace(
            run.stage1,
            phases={"short": replace(phase1, steps=2, batches=pairs, warmup_steps=1)},
            curve_steps=1,
            curve_pictures=4,
        ),
        replace(
            run.stage2,
            phases={
                "queries": QueryPhase(steps=2, batches=pairs, warmup_steps=1),
                "queries_and_llama": replace(phase2, steps=3, batches=pairs, warmup_steps=1, save_steps=1),
            },
            num_query_token=4,
            curve_steps=2,
            curve_pairs=4,
        ),
        {
            name: replace(recipe, seeing=phase, connecting=phase, answering=answering, turns=2)
            for name, recipe in run.chats.items()
        },
    )


@contextmanager
def few_scenes_and_one_thread() -> Iterator[None]:
    """Tokenizers of few scenes, which are soon trained, and one thread, so that sums come out the same twice."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage1, "caption_corpus", partial(caption_corpus, num_scenes=20))
        patch.setattr(stage3, "tokenizer_corpus", partial(tokenizer_corpus, num_scenes=20))
        yield
    torch.set_num_threads(threads)


@contextmanager
def stopped_at(name: str, step: int) -> Iterator[None]:
    """Training in this context must stop where the scenes of a phase's step are drawn, which is a little ahead of it."""
    original = SceneBatches.scenes

    def stop(self: SceneBatches, index: int):
        if (self.name, index) == (name, step):
            raise OSError("stopped")
        return original(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SceneBatches, "scenes", stop)
        patch.setattr(phases, "START_METHOD", "fork")  # a worker that is started anew would not know
        with pytest.raises(OSError, match="stopped"):
            yield
