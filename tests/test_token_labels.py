"""Token labels say which object covers each image token, and the optimizer sorts every parameter into one group."""

import pytest
import torch
from torch import nn

from internvl.synthetic.scenes import COLOURS, LAYOUTS, PLACES, SHAPES, TILE_SIZE, sample_scene, scene_generator
from internvl.training.models.dense_supervision import ATTRIBUTES, GRID, token_labels
from internvl.training.models.parameter_groups import hidden_matrices, parameter_groups
from internvl.training.optimizers import MuonWithAdamW, orthogonalize

from . import tiny


def labels_at(scene, x, y):
    column, row = int(x / scene.width * GRID), int(y / scene.height * GRID)
    return dict(zip(ATTRIBUTES, token_labels(scene)[row * GRID + column].tolist(), strict=True))


@pytest.mark.parametrize("layout", ["mixed", "crowd", "digits", "many_tiles"])
def test_the_token_in_the_middle_of_an_object_names_it(layout):
    for index in range(10):
        scene = sample_scene(scene_generator("train", 8, index), LAYOUTS[layout], "train")
        for item in scene.shapes():
            labels = labels_at(scene, *item.centre)
            assert SHAPES[labels["shape"] - 1] == item.value
            assert list(COLOURS)[labels["colour"] - 1] == item.colour
            assert PLACES[labels["place"] - 1] == PLACES[item.place]
            assert labels["digit"] == labels["text"] == 0
        for item in scene.digits():
            assert labels_at(scene, *item.centre)["digit"] - 1 == int(item.value)


def test_small_text_of_a_large_image_is_not_labelled_because_one_tile_cannot_show_it():
    scene = sample_scene(scene_generator("train", 8, 0), LAYOUTS["many_tiles"], "train")
    assert scene.texts()
    assert min(TILE_SIZE / scene.width, TILE_SIZE / scene.height) < 1
    assert token_labels(scene)[:, ATTRIBUTES.index("text")].eq(0).all()


def test_text_is_labelled_on_a_page():
    scene = sample_scene(scene_generator("train", 8, 0), LAYOUTS["page"], "train")
    for item in scene.texts():
        assert labels_at(scene, *item.centre)["text"] > 0


def test_tokens_without_an_object_have_no_label():
    scene = sample_scene(scene_generator("train", 8, 1), LAYOUTS["mixed"], "train")
    labels = token_labels(scene)
    empty = labels[:, ATTRIBUTES.index("place")] == 0
    assert empty.any()
    assert labels[empty].eq(0).all()


def test_orthogonalized_matrices_have_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((16, 40), (40, 16)):
        singular = torch.linalg.svdvals(orthogonalize(torch.randn(shape)).float())
        assert singular.min() > 0.5
        assert singular.max() < 1.4


def grouped(model: nn.Module, weight_decay: float = 0.0) -> list[dict]:
    hidden = hidden_matrices(model)
    others = [parameter for parameter in model.parameters() if parameter not in hidden]
    return [
        {"params": list(hidden), "use_muon": True, "weight_decay": weight_decay},
        {"params": others, "use_muon": False},
    ]


def test_both_kinds_of_parameters_learn():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    assert hidden_matrices(model) == {model[0].weight, model[2].weight, model[4].weight}
    optimizer = MuonWithAdamW(grouped(model), lr=1e-2)
    images, classes = torch.randn(6, 3, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2])
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(images), classes)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]


def test_muon_trains_hidden_matrices_and_adamw_the_rest():
    model = tiny.chat_model()
    learning_rates = dict.fromkeys(("vision", "projector", "language"), 1e-3)
    groups = parameter_groups(model, learning_rates, weight_decay=0.1, muon_learning_rate=1e-2)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in groups:
        assert (group["lr"], group["weight_decay"]) == ((1e-2, 0.1) if group["use_muon"] else (1e-3, 0.0))
    hidden = {names[id(parameter)] for group in groups if group["use_muon"] for parameter in group["params"]}
    assert "vision_model.embeddings.patch_embedding.weight" in hidden
    assert not any("lm_head" in name or "embed_tokens" in name or "norm" in name for name in hidden)


def test_a_restored_optimizer_goes_on_exactly():
    def run(restore_at):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3))
        optimizer = MuonWithAdamW(grouped(model, 0.1), lr=1e-2)
        inputs = torch.randn(5, 4)
        for step in range(6):
            if step == restore_at:
                state = optimizer.state_dict()
                optimizer = MuonWithAdamW(grouped(model, 0.1), lr=1e-2)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            model(inputs).square().sum().backward()
            optimizer.step()
        return model[0].weight

    torch.testing.assert_close(run(3), run(None), rtol=0, atol=0)
