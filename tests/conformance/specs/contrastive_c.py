"""InternVL-C alone, as stage 1 of the training makes it: no queries."""

from specs import contrastive


CONFIG, MODELS, AUTO = contrastive.CONFIG, contrastive.MODELS, contrastive.AUTO
GROUPS = ("model",)


def make_config(config_class: type) -> object:
    config = contrastive.make_config(config_class)
    return config_class(**{**config.to_dict(), "num_query_token": 0})


def make_inputs(config: object, batch_size: int) -> dict:
    return {**contrastive.make_inputs(config, batch_size), "mode": "InternVL-C"}


TESTER, MODEL_ATTRS = contrastive.TESTER, contrastive.MODEL_ATTRS
NOT_RUN, SKIPS = contrastive.NOT_RUN, contrastive.SKIPS
