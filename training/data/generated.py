"""Generated scenes as training data: item i of a phase is the whole batch of step i, made from the seed, the phase and
i alone.

Batches differ in size (few images with many tiles, or many of one tile), which a batch size cannot express.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from random import Random
from typing import Any

import torch
from torch.utils.data import Dataset

from ...processing_internvl import InternVLProcessor
from ...synthetic.captions import CAPTION_PROMPTS, LANGUAGES, PAIR_LAYOUTS, caption
from ...synthetic.scenes import (
    LAYOUTS,
    Layout,
    Scene,
    choose_questions,
    draw_scene,
    questions_about,
    sample_scene,
)
from ..models.dense_supervision import token_labels
from ..recipes import DialogueRecipe, Phase, Recipe
from .collators import GenerativeCollator


# A forked worker keeps a copy of every page that training writes to later, gigabytes in the end.
START_METHOD = "spawn" if sys.platform == "win32" else "forkserver"
# Share of captions in the plain wording, which names all there is; the others are worded at random.
PLAIN_SHARE = 0.5

# A scene with the generator of what else is drawn about it.
Drawn = tuple[Scene, Random]
Encode = Callable[[Sequence[Drawn]], dict[str, torch.Tensor]]


class SceneBatches(Dataset):
    """Batches of a phase.

    Args:
        name: Name of the data; data of different names share no scene.
        phase: The phase, which has `batches`.
        seed: Seed of the run.
        layouts: Layouts by the names that batches use.
        encode: Makes model inputs from scenes.
    """

    def __init__(self, name: str, phase: Phase, seed: int, layouts: Mapping[str, Layout], encode: Encode) -> None:
        self.name = name
        self.phase = phase
        self.seed = seed
        self.layouts = layouts
        self.encode = encode

    def __len__(self) -> int:
        return self.phase.steps

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        return self.encode(self.scenes(step))

    def scenes(self, step: int) -> list[Drawn]:
        """Return the scenes of a step, each with its generator."""
        rng = Random(f"{self.name}/{self.seed}/{step}")
        batch = rng.choices(self.phase.batches, weights=[batch.weight for batch in self.phase.batches])[0]
        scenes = []
        for layout in rng.choices(list(batch.layouts), weights=list(batch.layouts.values()), k=batch.num_images):
            own_rng = Random(rng.getrandbits(64))
            scenes.append((sample_scene(own_rng, self.layouts[layout], "train"), own_rng))
        return scenes


def only_item(items: list[Any]) -> Any:
    """Unpack a list of one: an item of `SceneBatches` is a batch already."""
    return items[0]


def encode_pairs(processor: InternVLProcessor, scenes: Sequence[Drawn]) -> dict[str, torch.Tensor]:
    """Encode images with captions in every language: all images in one language, then all in the next (stage 1)."""
    texts = [caption(scene, language, rng) for language in LANGUAGES for scene, rng in scenes]
    images = [draw_scene(scene) for scene, _ in scenes]
    return processor(images=images, text=texts, padding=True, return_tensors="pt")


def captioned_pair(scene: Scene, rng: Random) -> dict[str, Any]:
    """Return a row for `GenerativeCollator`: the image, and a caption in any language with its prompt (stage 2)."""
    language = rng.choice(list(LANGUAGES))
    text = caption(scene, language, None if rng.random() < PLAIN_SHARE else rng)
    return {"image": draw_scene(scene), "text": text, "prompt": CAPTION_PROMPTS[language]}


def encode_captions(collator: GenerativeCollator, scenes: Sequence[Drawn]) -> dict[str, torch.Tensor]:
    """Encode images with one caption each (stage 2)."""
    return collator([captioned_pair(*drawn) for drawn in scenes])


def encode_token_labels(processor: InternVLProcessor, scenes: Sequence[Drawn]) -> dict[str, torch.Tensor]:
    """Encode images as one tile each, with the labels of their tokens (dense supervision)."""
    images = [draw_scene(scene) for scene, _ in scenes]
    pixels = processor.image_processor(images, max_num=1, return_tensors="pt")
    labels = torch.stack([token_labels(scene) for scene, _ in scenes])
    return {"pixel_values": pixels["pixel_values"], "labels": labels}


def conversation_about(scene: Scene, rng: Random, num_turns: int) -> list[dict[str, Any]]:
    """Return messages with questions about a scene and their answers (stage 3)."""
    messages: list[dict[str, Any]] = []
    for question in choose_questions(questions_about(scene, rng), rng, num_turns):
        messages.append({"role": "user", "content": [{"type": "text", "text": question.text}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": question.answer}]})
    messages[0]["content"].insert(0, {"type": "image", "image": draw_scene(scene)})
    return messages


def encode_conversations(
    processor: InternVLProcessor, num_turns: int, scenes: Sequence[Drawn]
) -> dict[str, torch.Tensor]:
    """Encode conversations about images; only answers have labels (stage 3)."""
    return processor.apply_chat_template(
        [conversation_about(scene, rng, num_turns) for scene, rng in scenes],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_labels=True,
        padding=True,
    )


def scene_batches(recipe: Recipe, phase: Phase, encode: Encode) -> SceneBatches:
    """Return the data of a phase; stages 1 and 2 draw the layouts of pairs, stage 3 those of dialogues.

    Args:
        recipe: The recipe.
        phase: One of its phases.
        encode: Makes model inputs from scenes.
    """
    layouts = LAYOUTS if isinstance(recipe, DialogueRecipe) else PAIR_LAYOUTS
    return SceneBatches(f"{recipe.stage}/{phase.name}", phase, recipe.seed, layouts, encode)


def dialogue_batches(recipe: DialogueRecipe, phase: Phase, processor: InternVLProcessor) -> SceneBatches:
    """Return the data of a phase of stage 3: conversations, or labels of image tokens under dense supervision."""
    if phase.dense_supervision:
        return scene_batches(recipe, phase, partial(encode_token_labels, processor))
    return scene_batches(recipe, phase, partial(encode_conversations, processor, recipe.num_turns))
