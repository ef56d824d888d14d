"""Pointing game: `python -m internvl.evaluation pointing MODEL` (https://arxiv.org/abs/1608.00507, section 4.2).

An object of a generated scene is named, and the map of the name points at it if the highest value lies within the
object's box. InternVL-G is given names in five languages, to write (caption), to match, and to compare; a chat model
is asked questions about one object each, and its map is that of the right answer.
"""

from collections import Counter
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from ..synthetic.captions import LANGUAGES
from ..synthetic.scenes import PLACES, Scene, SceneObject, bounding_box, draw_scene
from .attention_maps import SCORES, AttentionMap, answer_maps, joined, text_maps
from .embeddings import batches
from .generated import scene_name, scene_named
from .reports import Report, metrics_of, new_report, samples_file, write_report
from .samples import Sample, SampleLog


MOST = 6  # objects or questions of one scene, so that scenes of many objects do not outweigh the others


def is_pointed_at(found: AttentionMap, item: SceneObject) -> bool:
    """Whether the highest value of a map lies within an object's box."""
    x, y = found.highest()
    left, top, right, bottom = bounding_box(item)
    return left <= x <= right and top <= y <= bottom


def chance(scene: Scene, item: SceneObject) -> dict[str, float]:
    """How often a map would point at an object by chance: anywhere in the image, and at any of its objects."""
    left, top, right, bottom = bounding_box(item)
    return {
        "chance": (right - left) * (bottom - top) / (scene.width * scene.height),
        "chance among objects": 1 / len(scene.objects),
    }


def named_once(scene: Scene, language: str) -> list[SceneObject]:
    """The objects whose name, with the colour of shapes, fits no other object of the scene."""
    words = LANGUAGES[language]
    counts = Counter(words.names_of(item)[0] for item in scene.objects)
    return [item for item in scene.objects if counts[words.names_of(item)[0]] == 1]


def questions_about_objects(scene: Scene) -> Iterator[tuple[str, SceneObject, str, str]]:
    """Yields kind, object, question and answer, for the questions that one object of a scene answers."""
    for item in scene.shapes():
        if sum(other.value == item.value for other in scene.shapes()) == 1:
            yield "colour", item, f"What colour is the {item.value}?", item.colour
            yield "position", item, f"Where is the {item.value}?", PLACES[item.place]
        if sum(other.colour == item.colour for other in scene.shapes()) == 1:
            yield "shape", item, f"Which shape is {item.colour}?", item.value
    for item in scene.digits():
        yield "digit", item, f"Which digit is at the {PLACES[item.place]}?", item.value
    for kind, is_small, size in (("small_text", True, "small"), ("text", False, "big")):
        texts = [item for item in scene.texts() if item.is_small == is_small]
        if len(texts) == 1:
            yield kind, texts[0], f"What does the {size} text say?", texts[0].value


def point_at_names(
    model: PreTrainedModel, processor: ProcessorMixin, scene: Scene, items: Sequence[SceneObject]
) -> list[Sample]:
    """Whether the maps of objects' names point at them: "scores" and the English name of each."""
    image, samples = draw_scene(scene), [Sample(scores={}, text=LANGUAGES["en"].names_of(item)[0]) for item in items]
    asked = [(language, number) for language in LANGUAGES for number in range(len(items))]
    names = [LANGUAGES[language].names_of(items[number])[0] for language, number in asked]
    for score in SCORES:
        maps = text_maps(model, processor, image, names, score, [language for language, _ in asked])
        for (language, number), found in zip(asked, maps, strict=True):
            samples[number]["scores"][f"{score}/{language}"] = float(is_pointed_at(found, items[number]))
    for sample, item in zip(samples, items, strict=True):
        sample["scores"].update(chance(scene, item))
    return samples


def point_at_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    scene: Scene,
    questions: Sequence[tuple[str, SceneObject, str, str]],
) -> list[Sample]:
    """Whether the maps of right answers point at the objects that were asked about."""
    image, samples = draw_scene(scene), []
    for kind, item, question, answer in questions:
        hit = float(is_pointed_at(joined(answer_maps(model, processor, image, question, answer)), item))
        scores = {"answer": hit, f"answer/{kind}": hit, **chance(scene, item)}
        samples.append({"scores": scores, "question": question, "expected": answer})
    return samples


def pointing_samples(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: int,
    seed: int = 0,
    done: Container[str] = (),
) -> Iterator[Sample]:
    """Yields the samples of so many held-out scenes, by the model's kind, but for those whose ids are `done`."""
    is_chat = not hasattr(model, "get_matching_logits")
    for (number,) in batches(range(images), 1, "pointing"):
        name = scene_name("tiles" if is_chat else "pairs", seed, number)
        scene = scene_named(name)
        # Whose name is unique in English is so in every language.
        asked: list[Any] = list(questions_about_objects(scene)) if is_chat else named_once(scene, "en")
        left = {f"{name}/{place}": one for place, one in enumerate(asked[:MOST]) if f"{name}/{place}" not in done}
        point: Any = point_at_answers if is_chat else point_at_names
        found = point(model, processor, scene, list(left.values())) if left else []
        for identity, sample in zip(left, found, strict=True):
            yield {"id": identity, "cluster": name, "image": name, **sample}


def evaluate_pointing(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: int = 100,
    seed: int = 0,
    log: SampleLog | None = None,
) -> dict[str, Any]:
    """Plays the pointing game on so many held-out generated scenes.

    Args:
        model: An InternVL-G or a chat model.
        processor: Its processor.
        images: How many scenes.
        seed: Of the stream of scenes.
        log: An open log, which gets every sample, and whose samples are not measured again.

    Returns:
        "images", and "metrics", see `metrics_of`: the share of hits, of an InternVL-G by score and language
        ("caption/en"), of a chat model altogether ("answer") and by kind of question; and those of a random point of
        the image ("chance") and of a random object ("chance among objects").
    """
    samples = dict(log.done) if log else {}
    for sample in pointing_samples(model, processor, images, seed, samples.copy()):
        samples[sample["id"]] = sample
        if log:
            log.add(sample)
    return {"images": images, "metrics": metrics_of(samples.values())}


def report_pointing(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    output: Path,
    name: str,
    state: str | None = None,
    images: int = 100,
    seed: int = 0,
) -> Report:
    """Runs `evaluate_pointing` and writes its report, and beside it every sample; one that was stopped goes on.

    Args:
        model: An InternVL-G or a chat model.
        processor: Its processor.
        output: The report's file.
        name: Of the model, for the report.
        state: Of its weights, see `checkpoint_state`.
        images: How many scenes.
        seed: Of the stream of scenes.

    Raises:
        OSError: If a file cannot be written.
        ValueError: If the samples are those of another run.
    """
    settings = {"task": "pointing", "model": name, "state": state, "seed": seed, "images": images}
    with SampleLog(samples_file(output), settings) as log:
        found = evaluate_pointing(model, processor, images, seed, log)
    report = new_report("pointing", name, settings, samples=samples_file(output).name, **found)
    write_report(output, report)
    return report
