"""The image processor in the modes that are not tiling."""

from specs import chat


CONFIG, MODELS, IMAGE_PROCESSOR, SKIPS = chat.CONFIG, chat.MODELS, chat.IMAGE_PROCESSOR, chat.SKIPS
GROUPS = ("image_processor",)
make_config, make_inputs = chat.make_config, chat.make_inputs
SIZE = {"height": 20, "width": 20}
IMAGE_SETTINGS = {
    "squash": {"size": SIZE, "resize_mode": "squash"},
    "crop": {"size": {"shortest_edge": 20}, "crop_size": SIZE, "resize_mode": "crop"},
    "pad": {"size": SIZE, "resize_mode": "pad"},
}
