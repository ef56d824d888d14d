"""The bundled run at a size for tests: a few steps of each stage on a few images."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch

from internvl.reproduction.run import BundledRun, bundled_run
from internvl.synthetic.captions import LANGUAGES
from internvl.synthetic.tokenizer import caption_tokenizer, question_tokenizer
from internvl.training.data import generated
from internvl.training.data.generated import SceneBatches
from internvl.training.models import build
from internvl.training.recipes import Batch, Recipe


PAIRS = (Batch(1.0, len(LANGUAGES), {"one_shape": 1, "one_digit": 1}),)
DIALOGUES = (Batch(1.0, 2, {"mixed": 1}),)


def shortened(recipe: Recipe, batches: tuple[Batch, ...], *steps: int, **changes):
    """The recipe with so many steps in each phase, the first of which are warm-up, and other batches."""
    phases = [
        replace(phase, steps=count, warmup_steps=min(1, count - 1), batches=batches)
        for phase, count in zip(recipe.phases, steps, strict=True)
    ]
    return replace(recipe, phases=tuple(phases), use_bf16=False, save_steps=1, **changes)


def tiny_run() -> BundledRun:
    run = bundled_run()
    stage1 = replace(run.stage1, phases=(run.stage1.phases[0], run.stage1.phases[2]))
    return BundledRun(
        shortened(stage1, PAIRS, 3, 1, eval_steps=2, eval_samples=4),
        shortened(run.stage2, PAIRS, 2, 3, eval_steps=2, eval_samples=4, num_query_token=4),
        {name: shortened(recipe, DIALOGUES, 1, 1, 3, num_turns=2) for name, recipe in run.chats.items()},
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """So that sums come out the same twice."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def few_scenes_and_one_thread(starts_workers_anew: bool = False) -> Iterator[None]:
    """Tokenizers of few scenes, which are soon trained, and workers that need not import everything first."""
    with pytest.MonkeyPatch.context() as patch, one_thread():
        patch.setattr(build, "caption_tokenizer", partial(caption_tokenizer, 20))
        patch.setattr(build, "question_tokenizer", partial(question_tokenizer, 20))
        if not starts_workers_anew:
            patch.setattr(generated, "START_METHOD", "fork")
        yield


@contextmanager
def stopped_at(name: str, step: int) -> Iterator[None]:
    """Training in this context must stop where the scenes of a phase's step are drawn, a little ahead of it. Workers
    must be forked: one that is started anew would not know.
    """
    original = SceneBatches.scenes

    def stop(self: SceneBatches, index: int):
        if (self.name, index) == (name, step):
            raise OSError("stopped")
        return original(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SceneBatches, "scenes", stop)
        with pytest.raises(OSError, match="stopped"):
            yield
