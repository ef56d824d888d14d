"""Where did it look: `python -m internvl.evaluation look MODEL IMAGE --ask TEXT --output FILE`.

Draws maps over an image, one for each word of a chat model's answer or of an InternVL-G's caption, or one for each
query, see attention_maps. FILE is a picture (`.png`), or a page (`.html`), which has letters for every language.
"""

import argparse
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import printable
from ..rows.texts import check_text
from ..writing import check_writable, write_whole


if TYPE_CHECKING:  # `--help` and wrong arguments need no torch
    from PIL import Image

    from .attention_maps import AttentionMap


LANGUAGES = ("en", "zh", "ja", "ar", "it")


def add_look_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", metavar="MODEL", help="folder or Hub name of an InternVL-G or a chat model")
    parser.add_argument("image", type=Path, metavar="IMAGE", help="a file")
    parser.add_argument("--subfolder", default="", help="where in the folder the model lies")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--ask", metavar="TEXT", help="a question to a chat model: a map of each word of its answer")
    what.add_argument("--text", metavar="TEXT", help="a caption, of which each word gets a map (default: its own)")
    what.add_argument("--match", metavar="TEXT", help="a text, each word of which matches or does not")
    what.add_argument("--queries", action="store_true", help="what each query of QLLaMA reads")
    parser.add_argument("--language", choices=LANGUAGES, default="en", help="of captions (default: en)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a .png or .html (default: IMAGE.maps.png)")


def run(options: argparse.Namespace) -> None:
    """Draws the maps of one image."""
    output = options.output or options.image.with_suffix(".maps.png")
    if output.suffix.lower() not in (".png", ".html"):
        raise ValueError(f"{output} has to be a .png or a .html.")
    for name in ("ask", "text", "match"):
        _check_given(getattr(options, name), f"`--{name}`")
    check_writable(output)
    if output.resolve() == options.image.resolve():
        raise ValueError(f"{output} is the image: name another file by --output.")
    from transformers import AutoModel, AutoProcessor

    from ..kinds import check_kind, kind_of
    from .map_drawing import cells_of, sheet_of, write_maps_page
    from .sample_images import read_rgb

    image = read_rgb(options.image)
    where = {"pretrained_model_name_or_path": options.model, "subfolder": options.subfolder}
    kinds = ("chat",) if options.ask else ("InternVL-G",) if options.text or options.match else ("InternVL-G", "chat")
    kind = kind_of(check_kind(options.model, *kinds, door="a map", subfolder=options.subfolder))
    if kind == "chat" and not (options.ask or options.queries):
        raise ValueError(f"{options.model} is a chat model: give a question by --ask.")
    model = AutoModel.from_pretrained(**where, dtype=options.dtype).eval()
    maps = _maps(model, AutoProcessor.from_pretrained(**where), image, options)
    if output.suffix.lower() == ".html":
        write_maps_page(output, [(options.ask or options.image.name, image, maps)])
    else:
        content = BytesIO()
        sheet_of(cells_of(image, maps)).save(content, "png", optimize=True)
        write_whole(output, content.getvalue())
    print(printable(f"{' '.join(found.text for found in maps)}: {output}"))  # noqa: T201


def _check_given(text: str | None, name: str) -> None:
    if text is None:
        return
    if not text.strip():
        raise ValueError(f"{name} is empty: leave it out, or give a text.")
    check_text(text, name)


def _maps(model: Any, processor: Any, image: "Image.Image", options: argparse.Namespace) -> list["AttentionMap"]:
    from .attention_maps import answer_maps, caption_maps, matching_maps, query_maps

    if options.queries:
        return query_maps(model, processor, image)
    if options.ask:
        return answer_maps(model, processor, image, options.ask)
    if options.match:
        return matching_maps(model, processor, image, options.match)
    return caption_maps(model, processor, image, options.text, options.language)
