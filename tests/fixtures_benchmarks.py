"""Small data sets in the layouts in which benchmarks are published, of generated scenes."""

import json
from pathlib import Path

import av
import numpy as np
from PIL import Image

from internvl.evaluation.data.folders import imagenet
from internvl.evaluation.generated import CLASSES, held_out_scenes, labelled_images
from internvl.synthetic.captions import caption
from internvl.synthetic.scenes import draw_scene


NUM_SCENES = 6
SIZE = 64


def scenes() -> list:
    return held_out_scenes(NUM_SCENES, seed=3)


def small(scene) -> Image.Image:
    return draw_scene(scene).resize((SIZE, SIZE))


def captions_of(scene, language: str = "en", number: int = 1) -> list[str]:
    text = caption(scene, language)
    return [text, f"A scene, with a comma. {text}"][:number]


def write_class_folders(folder: Path, names: list[str], count: int = 12, suffix: str = "jpg") -> None:
    """Images of coloured shapes, a folder each kind of shape, called as `names` say."""
    for number, item in enumerate(labelled_images("shape", count, seed=5)):
        place = folder / names[item.label % len(names)]
        place.mkdir(parents=True, exist_ok=True)
        item.image.resize((SIZE, SIZE)).save(place / f"image_{number:03d}.{suffix}")


def write_imagenet(root: Path) -> None:
    """ImageNet-1K (with ReaL labels), -A, -V2 and Sketch, a few classes each."""
    ids = imagenet()["wordnet_ids"]
    validation = root / "imagenet-1k" / "val"
    write_class_folders(validation, ids[:3])
    for number, path in enumerate(sorted(validation.rglob("*.jpg")), start=1):
        path.rename(path.with_name(f"ILSVRC2012_val_{number:08d}.JPEG"))
    real = [[0], [], [0, 5]] + [[number % 3] for number in range(50_000 - 3)]
    (root / "imagenet-1k" / "real.json").write_text(json.dumps(real))
    write_class_folders(root / "imagenet-a", [ids[number] for number in imagenet()["imagenet-a"][:2]])
    write_class_folders(root / "imagenetv2" / "ImageNetV2-matched-frequency", ["0", "10", "2"], suffix="jpeg")
    write_class_folders(root / "imagenet-sketch" / "sketch", ids[7:9], suffix="JPEG")


def write_eurosat(root: Path) -> None:
    """A small data set whose classes are called as clip-benchmark calls them."""
    write_class_folders(root / "eurosat" / "2750", ["annual_crop_land", "forest", "river", "lake_or_sea"])


def write_objectnet(root: Path) -> None:
    images = root / "objectnet-1.0"
    write_class_folders(images / "images", ["air_freshener", "banana", "backpack"], suffix="png")
    (images / "mappings").mkdir()
    labels = {"air_freshener": "Air freshener", "banana": "Banana", "backpack": "Backpack"}
    (images / "mappings" / "folder_to_objectnet_label.json").write_text(json.dumps(labels))
    shared = {"Banana": "banana", "Backpack": "backpack, back pack"}
    (images / "mappings" / "objectnet_to_imagenet_1k.json").write_text(json.dumps(shared))


def write_flickr30k(root: Path) -> None:
    folder = root / "flickr30k"
    (folder / "Images").mkdir(parents=True)
    for language, name in (("en", "flickr30k_test_karpathy.txt"), ("zh", "flickr30k_cn_test.txt")):
        lines = ["image,caption"]
        for number, scene in enumerate(scenes()):
            small(scene).save(folder / "Images" / f"{1000 + number}.jpg")
            lines += [f"{1000 + number}.jpg,{text}" for text in captions_of(scene, language, 2)]
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_coco(root: Path) -> None:
    folder = root / "mscoco_captions"
    (folder / "val2014").mkdir(parents=True)
    images, annotations = [], []
    for number, scene in enumerate(scenes()):
        name = f"COCO_val2014_{number:012d}.jpg"
        small(scene).save(folder / "val2014" / name)
        images.append({"id": 100 - number, "file_name": name})
        for text in captions_of(scene, number=2):
            annotations.append({"id": len(annotations), "image_id": 100 - number, "caption": text})
    content = {"images": images, "annotations": annotations}
    (folder / "coco_test_karpathy.json").write_text(json.dumps(content))


def write_xtd(root: Path) -> None:
    folder = root / "xtd"
    for place in ("val2014", "train2014"):
        (folder / place).mkdir(parents=True)
    names = [f"COCO_{('val', 'train')[number % 2]}2014_{number:012d}.jpg" for number in range(NUM_SCENES)]
    for name, scene in zip(names, scenes(), strict=True):
        small(scene).save(folder / ("val2014" if "val" in name else "train2014") / name)
    (folder / "test_image_names.txt").write_text("\n".join(names) + "\n")
    for language in ("en", "zh", "it"):
        texts = [caption(scene, language) for scene in scenes()]
        (folder / f"test_1kcaptions_{language}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")


def write_clip(path: Path, images: list[Image.Image]) -> None:
    """A video that shows each of the images for two frames."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for image in [image for image in images for _ in range(2)]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(image.convert("RGB")), format="rgb24")))
        container.mux(stream.encode())


def write_videos(root: Path) -> None:
    """MSR-VTT's JSON, and Kinetics in folders of classes."""
    folder = root / "msrvtt"
    (folder / "videos" / "all").mkdir(parents=True)
    drawn = [small(scene) for scene in scenes()]
    videos, sentences = [], []
    for number, scene in enumerate(scenes()):
        write_clip(folder / "videos" / "all" / f"video{number}.mp4", [drawn[number], drawn[number - 1]])
        videos.append({"video_id": f"video{number}", "split": "train" if number == 0 else "test"})
        sentences.append({"sen_id": number, "video_id": f"video{number}", "caption": caption(scene, "en")})
    (folder / "test_videodatainfo.json").write_text(json.dumps({"videos": videos, "sentences": sentences}))
    for number, name in enumerate(("riding a bike", "abseiling")):
        place = root / "kinetics400" / "val" / name
        place.mkdir(parents=True)
        write_clip(place / f"{number}.mp4", drawn[number : number + 3])


def write_own_classes(root: Path) -> None:
    """A data set of nobody's benchmark, with names of its classes beside the folders."""
    shapes = CLASSES["shape"]
    write_class_folders(root / "own", [f"class_{number}" for number in range(len(shapes))])
    folders = sorted(path.name for path in (root / "own").iterdir())
    names = {name: shapes[int(name.removeprefix("class_"))] for name in folders}
    (root / "own" / "classnames.json").write_text(json.dumps(names))


def write_all(root: Path) -> None:
    for write in (
        *(write_imagenet, write_eurosat, write_objectnet, write_flickr30k),
        *(write_coco, write_xtd, write_videos, write_own_classes),
    ):
        write(root)
