"""The bundled example images: `python -m internvl.synthetic.examples examples` writes them again.

They come from the held-out stream, so the bundled checkpoint was trained on neither them nor their handwriting.
`questions.json` lists the image's file, the question and the correct answer.
"""

import argparse
import json
from pathlib import Path

from .scenes import (
    LAYOUTS,
    Question,
    Scene,
    choose_questions,
    draw_scene,
    questions_about,
    sample_scene,
    scene_generator,
)


# No evaluation draws from this seed.
SEED = 2026
# Name, layout, and index in the held-out stream.
EXAMPLES = (
    ("shapes", "mixed", 0),
    ("handwriting", "digits", 0),
    ("more_handwriting", "digits", 1),
    ("words", "reading", 0),
    ("wide_small_text", "many_tiles", 0),
    ("tall_small_text", "many_tiles", 1),
)
QUESTIONS_PER_IMAGE = 4
# Kinds of questions that need the handwriting, and the tiles.
TELLING_KINDS = ("digit", "small_text")


def example(name: str, layout: str, index: int) -> tuple[Scene, list[Question]]:
    """Return a scene and its questions: up to two about handwriting or small text, then one of each kind."""
    rng = scene_generator("held_out", SEED, index)
    scene = sample_scene(rng, LAYOUTS[layout], "held_out")
    asked = questions_about(scene, rng)
    telling = [question for question in asked if question.kind in TELLING_KINDS][:2]
    others = [question for question in asked if question.kind not in TELLING_KINDS]
    return scene, telling + choose_questions(others, rng, QUESTIONS_PER_IMAGE - len(telling))


def write_examples(folder: Path) -> None:
    """Write the images and `questions.json` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, layout, index in EXAMPLES:
        scene, questions = example(name, layout, index)
        file = f"{name}.png"
        draw_scene(scene).save(folder / file, optimize=True)
        rows += [{"file": file, "question": item.text, "answer": item.answer, "kind": item.kind} for item in questions]
    (folder / "questions.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write the examples from the command line."""
    parser = argparse.ArgumentParser(description="Write the bundled example images.")
    parser.add_argument("folder", type=Path)
    write_examples(parser.parse_args().folder)


if __name__ == "__main__":
    main()
