"""Test classes made from a specification and transformers' mixins; `run.py` starts pytest on this file.

What a specification may hold (only the first four are needed):

    CONFIG          "module.Class" of the configuration, in the package
    MODELS          "module.Class" of each model class, the one with the head first
    make_config     (Config) -> a tiny configuration
    make_inputs     (config, batch size) -> a dictionary of tensors
    GROUPS          names of the groups to run, keys of `GROUPS` below
    AUTO            {name of an Auto class: "module.Class"}, registered for CONFIG
    RANDOM_IDS_BELOW
                    the mixins' random token ids stay below it
    TESTER          attributes of the object that the model mixin calls `model_tester`
    make_generation_inputs, to_forward, PADDING_START
                    like make_inputs, for `generate`; turns its inputs into those of `forward`; where padding goes.
                    Where they differ.
    MODEL_ATTRS     attributes of the model test class: flags of the mixin, or test methods that replace its own
    CONFIGURATION   keyword arguments of transformers' `ConfigTester`
    BACKBONE        "module.Class" of the backbone
    IMAGE_PROCESSOR, IMAGE_SETTINGS: {name: settings of one run}
    PROCESSOR, processor_settings(load_class), make_components(load_class) -> {attribute: object}
    NOT_RUN         {test name: reason}, not started at all
    SKIPS           {pattern of transformers' message: reason} for the tests that skip themselves
"""

import functools
import os
import unittest
from pathlib import Path
from typing import Any

import run
import transformers
from generation_checks import GenerationChecks
from transformers.dynamic_module_utils import get_class_from_dynamic_module


PACKAGE = os.environ["CONFORMANCE_PACKAGE"]
spec = run.load_spec(Path(os.environ["CONFORMANCE_SPEC"]))


@functools.cache
def load_class(reference: str) -> type:
    """A class of the package, loaded as remote code, or one of transformers' own ("transformers.Class")."""
    if reference.startswith("transformers."):
        return getattr(transformers, reference.removeprefix("transformers."))
    return get_class_from_dynamic_module(reference, PACKAGE)


Config = load_class(spec.CONFIG)
Models = tuple(load_class(reference) for reference in spec.MODELS)


def register() -> None:
    """Makes the Auto classes know the classes, so that reloading asks for no trust, and by name, as the mixins look
    them up."""
    if spec.CONFIG.startswith("transformers."):
        return
    transformers.AutoConfig.register(Config.model_type, Config, exist_ok=True)
    for auto_name, reference in getattr(spec, "AUTO", {}).items():
        auto_class, model_class = getattr(transformers, auto_name), load_class(reference)
        auto_class.register(Config, model_class, exist_ok=True)
        if (
            auto_name != "AutoModel" or not model_class.can_generate()
        ):  # under this name the mixins look for headless classes
            auto_class._model_mapping._model_mapping[Config.model_type] = model_class.__name__
    if hasattr(spec, "IMAGE_PROCESSOR"):
        classes = dict.fromkeys(("pil", "torchvision"), load_class(spec.IMAGE_PROCESSOR))
        transformers.AutoImageProcessor.register(Config, image_processor_classes=classes, exist_ok=True)
    if hasattr(spec, "PROCESSOR"):
        transformers.AutoProcessor.register(Config, load_class(spec.PROCESSOR), exist_ok=True)


class Tester:
    """What transformers' mixins ask of a `model_tester`."""

    is_training = True
    causal_lm_class = None
    conditional_generation_class = Models[0] if Models[0].can_generate() else None
    base_model_class = next((model for model in Models if not model.can_generate()), Models[0])

    def __init__(self, parent: unittest.TestCase, batch_size: int = 3) -> None:
        self.parent, self.batch_size = parent, batch_size
        config, inputs = self.prepare_config_and_inputs_for_common()
        text = config.get_text_config()
        if "input_ids" in inputs:
            self.seq_length = inputs["input_ids"].shape[1]
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
            setattr(self, name, getattr(text, name, None))
        self.text_config = text.to_dict()
        if hasattr(config, "vision_config"):
            self.vision_config = config.vision_config.to_dict()
        self.__dict__.update(getattr(spec, "TESTER", {}))

    def get_config(self) -> Any:
        return spec.make_config(Config)

    def prepare_config_and_inputs_for_common(self) -> tuple:
        config = self.get_config()
        return config, spec.make_inputs(config, self.batch_size)

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


class TrainingTester(Tester):
    """The training mixin is written for text models and reads `config.vocab_size`."""

    def get_config(self) -> Any:
        config = super().get_config()
        if not hasattr(config, "vocab_size"):
            config.vocab_size = config.get_text_config().vocab_size
        return config


def make_case(name: str, *bases: type, tester: type = Tester, batch_size: int = 3, **attributes: Any) -> type:
    """A test case over `Models`, with the tests of `NOT_RUN` skipped."""

    def set_up(self: unittest.TestCase) -> None:
        self.model_tester = tester(self, batch_size)

    # `model_tester` on the class: an abstract property in one mixin, and pytest passes over abstract classes
    attributes = {
        "all_model_classes": Models,
        "model_tester": None,
        "setUp": set_up,
        "__module__": __name__,
        **attributes,
    }
    case = type(name, (*bases, unittest.TestCase), attributes)
    for test, reason in getattr(spec, "NOT_RUN", {}).items():
        if hasattr(case, test):
            setattr(case, test, unittest.skip(reason)(lambda self: None))
    return case


# The mixins are imported where they are used: pytest would collect them from the top of this file.
def model() -> type:
    import tests.test_modeling_common as upstream
    from tests.generation.test_utils import GenerationTesterMixin
    from tests.test_modeling_common import ModelTesterMixin

    if hasattr(spec, "RANDOM_IDS_BELOW"):
        draw = upstream.ids_tensor
        upstream.ids_tensor = lambda shape, vocab_size, *rest: draw(
            shape, min(vocab_size, spec.RANDOM_IDS_BELOW), *rest
        )
    bases = (ModelTesterMixin, GenerationTesterMixin) if Models[0].can_generate() else (ModelTesterMixin,)
    return make_case("Model", *bases, pipeline_model_mapping={}, **getattr(spec, "MODEL_ATTRS", {}))


def generation() -> type:
    def make(self: unittest.TestCase) -> tuple:
        config = spec.make_config(Config)
        return Models[0], config, getattr(spec, "make_generation_inputs", spec.make_inputs)(config, 2)

    attributes = {
        "setUp": GenerationChecks.setUp,
        "make": make,
        "to_forward": staticmethod(getattr(spec, "to_forward", dict)),
        "padding_start": getattr(spec, "PADDING_START", 0),
    }
    return make_case("Generation", GenerationChecks, **attributes)


def training() -> type:
    from tests.test_training_mixin import TrainingTesterMixin

    return make_case("Training", TrainingTesterMixin, tester=TrainingTester, batch_size=2)


def tensor_parallel() -> type:
    import tests.test_tensor_parallel_mixin as upstream

    upstream.TP_DISTRIBUTED_TEST_MODEL_TYPES = None  # it runs these for a list of its own models only
    return make_case("TensorParallel", upstream.TensorParallelTesterMixin)


def configuration() -> type:
    from tests.test_configuration_common import ConfigTester

    def test_common(self: unittest.TestCase) -> None:
        settings = {"has_text_modality": False, **getattr(spec, "CONFIGURATION", {})}
        ConfigTester(self, config_class=Config, **settings).run_common_tests()

    return make_case("Configuration", test_common=test_common)


def backbone() -> type:
    from tests.test_backbone_common import BackboneTesterMixin

    attributes = {"all_model_classes": (load_class(spec.BACKBONE),), "config_class": Config}
    return make_case("Backbone", BackboneTesterMixin, **attributes)


def processor() -> type:
    from tests.test_processing_common import ProcessorTesterMixin

    components = functools.partial(spec.make_components, load_class)
    attributes = {
        "processor_class": load_class(spec.PROCESSOR),
        "_setup_component": classmethod(lambda cls, attribute: components()[attribute]),
        # transformers finds the class of a component by the folder of the test file; here there is none
        "_get_component_class_from_processor": classmethod(
            lambda cls, attribute, use_fast=True: type(components()[attribute])
        ),
        "prepare_processor_dict": staticmethod(lambda: spec.processor_settings(load_class)),
        "setUp": unittest.TestCase.setUp,
    }
    return make_case("Processor", ProcessorTesterMixin, **attributes)


def image_processor() -> list[type]:
    from tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin

    image_class = load_class(spec.IMAGE_PROCESSOR)

    def make(name: str, settings: dict) -> type:
        class ImageTester(ImageProcessingTester):
            """Makes random images."""

            def __init__(self, parent: unittest.TestCase, **changes: Any) -> None:
                super().__init__(parent, **{**settings, **changes})

            def _get_image_processing_classes(self) -> dict[str, type]:
                return {"pil": image_class, "torchvision": image_class}  # as the package registers it

        attributes = {"image_processor_tester_class": ImageTester, "setUp": ImageProcessingTestMixin.setUp}
        return make_case(name, ImageProcessingTestMixin, **attributes)

    return [make(f"ImageProcessor_{name}", settings) for name, settings in spec.IMAGE_SETTINGS.items()]


GROUPS = {
    "model": model,
    "generation": generation,
    "training": training,
    "tensor_parallel": tensor_parallel,
    "configuration": configuration,
    "backbone": backbone,
    "processor": processor,
    "image_processor": image_processor,
}

register()
wanted = [group for group in os.environ.get("CONFORMANCE_ONLY", "").split(",") if group] or spec.GROUPS
for group in spec.GROUPS:
    if group in wanted:
        made = GROUPS[group]()
        globals().update({case.__name__: case for case in (made if isinstance(made, list) else [made])})
del made
