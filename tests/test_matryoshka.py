"""Embeddings that can be cut: stages 1 and 2 and retrieval train several lengths, and their folders say which."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig

from internvl.configuration_internvl import InternVLConfig
from internvl.training.__main__ import main
from internvl.training.models import pretraining
from internvl.training.models.pretraining import (
    InternVLForContrastiveTraining,
    InternVLForGenerativeTraining,
    InternVLForRetrievalTraining,
)
from internvl.training.recipes import with_steps
from internvl.training.stages import Run, run_retrieval, run_stage1, run_stage2

from .fixtures_pairs import sample, write_tar
from .fixtures_text import make_tokenizer
from .test_stages import RETRIEVAL, STAGE1, STAGE2
from .training_models import contrastive_batch, generative_batch, retrieval_batch, tiny_model


DIMS = [6, 3]
MODELS = {
    InternVLForContrastiveTraining: contrastive_batch,
    InternVLForGenerativeTraining: generative_batch,
    InternVLForRetrievalTraining: retrieval_batch,
}


def contrastive_part(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(0)
    output = model(**batch)
    return output.loss if isinstance(model, InternVLForContrastiveTraining) else output.loss_itc


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_contrastive_losses_are_means_over_all_lengths(kind, chunk_size, monkeypatch):
    model, batch = tiny_model(kind, grad_cache_chunk_size=chunk_size), MODELS[kind]()
    whole = contrastive_part(model, batch)
    wanted = []

    def slow(loss_of, images, texts, dims):
        cuts = [[F.normalize(rows[:, :size], dim=-1) for rows in (images, texts)] for size in (12, *dims)]
        wanted.append(sum(loss_of(*cut) for cut in cuts) / len(cuts))
        return wanted[-1]

    model.config.matryoshka_dims = DIMS
    found = contrastive_part(model, batch)
    assert abs(found - whole) > 1e-3  # the lengths took effect
    monkeypatch.setattr(pretraining, "matryoshka_loss", slow)
    torch.testing.assert_close(contrastive_part(model, batch), found)
    assert len(wanted) == (2 if kind is InternVLForRetrievalTraining else 1)


def test_lengths_beyond_the_embedding_are_refused():
    with pytest.raises(ValueError, match=r"lengths from 1 to `clip_embed_dim` 8, got \[9\]"):
        InternVLConfig(clip_embed_dim=8, matryoshka_dims=[9])
    for sizes in (4, "4", ["4"], [4.0], [True]):  # as a file that somebody else wrote may have
        with pytest.raises(ValueError, match="lengths from 1 to"):
            InternVLConfig(clip_embed_dim=8, matryoshka_dims=sizes)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> list[str]:
    file = tmp_path_factory.mktemp("shards") / "0.tar"
    return [str(write_tar(file, [sample(number) for number in range(16)]))]


@pytest.fixture(scope="module")
def first(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("first")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    recipe = replace(with_steps(STAGE1, 1), matryoshka_dims=(6, 3))
    run_stage1(recipe, shards, Run(folder / "model"), folder / "tokenizer")
    return folder / "model"


def test_folders_say_to_which_lengths_vectors_may_be_cut_and_later_stages_keep_them(first, shards, tmp_path):
    assert AutoConfig.from_pretrained(first).matryoshka_dims == [6, 3]
    run_stage2(with_steps(STAGE2, 1), shards, Run(tmp_path / "second"), first)
    assert AutoConfig.from_pretrained(tmp_path / "second").matryoshka_dims == [6, 3]
    recipe = replace(with_steps(RETRIEVAL, 1), matryoshka_dims=(4,))
    run_retrieval(recipe, shards, Run(tmp_path / "third"), tmp_path / "second")
    assert AutoConfig.from_pretrained(tmp_path / "third").matryoshka_dims == [4]


def test_the_command_line_names_lengths(first, shards, tmp_path, capsys):
    line = f"finetune --model {first} --data {shards[0]} --output {tmp_path} --steps 1 --batch-size 4 --workers 0"
    assert main([*line.split(), "--matryoshka-dims", "2", "5"]) == 0
    assert AutoConfig.from_pretrained(tmp_path).matryoshka_dims == [5, 2]
    assert main([*line.split(), "--task", "captions", "--matryoshka-dims", "2"]) != 0
    assert main([*line.replace(str(tmp_path), str(tmp_path / "other")).split(), "--matryoshka-dims", "13"]) != 0
    assert "lengths from 1 to `clip_embed_dim` 12" in capsys.readouterr().err
