"""MTEB and MIEB (https://github.com/embeddings-benchmark/mteb) on InternVL-C and InternVL-G.

    import mteb
    from internvl.evaluation.harnesses.mteb import internvl_meta

    mteb.evaluate(internvl_meta("FOLDER", "InternVL-G"), mteb.get_tasks(["Flickr30kI2TRetrieval"]))

or `python -m internvl.evaluation.harnesses.mteb FOLDER --mode InternVL-G --tasks Flickr30kI2TRetrieval --output DIR`.
`ImageClassification` and `ImageTextRetrieval` are tasks over images of one's own.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModel, AutoProcessor

from ... import register
from ...console import exit_status
from ...kinds import check_kind
from ...modeling_internvl import MODES
from ..checkpoints import checkpoint_state
from ..embeddings import embed_images, embed_texts
from . import harness


with harness("'mteb[image]'"):
    import datasets
    import mteb
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta


LANGUAGES_OF_THE_PAPER = ["eng-Latn", "zho-Hans", "jpn-Jpan", "arb-Arab", "ita-Latn"]
SPLIT = "test"
AnImage = Image.Image | str | Path


# --------------------------------------------------------------------------------------------------------------- model
class InternVLEncoder(AbsEncoder):
    """An `InternVLModel` as an encoder of MTEB.

    Args:
        model_name: MTEB's name of the model.
        revision: Of a checkpoint on the Hub.
        device: Where it computes.
        folder: Folder or Hub name of the checkpoint.
        mode: "InternVL-C" or "InternVL-G".
        **kwargs: For `from_pretrained`, such as `dtype`.
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        device: str | None = None,
        *,
        folder: str | None = None,
        mode: str = MODES[0],
        **kwargs: Any,
    ) -> None:
        register()
        folder = folder or model_name
        where = {} if revision is None or Path(folder).is_dir() else {"revision": revision}
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = AutoModel.from_pretrained(folder, **where, **kwargs).to(device).eval()
        self.processor = AutoProcessor.from_pretrained(folder, **where)
        self.mode = mode

    def encode(self, inputs: Any, *, batch_size: int = 32, **kwargs: Any) -> torch.Tensor:
        """Embeds rows of texts, of images, or of both, whose embeddings are added.

        Args:
            inputs: MTEB's data loader, whose batches hold lists called "text" and "image".
            batch_size: Of the model.
            **kwargs: What else MTEB tells an encoder; unused, these models take no instructions.

        Returns:
            Unit vectors (rows, E).

        Raises:
            ValueError: If there are neither texts nor images.
        """
        columns = inputs.dataset.features
        parts = []
        if "text" in columns:
            texts = (text for batch in inputs for text in batch["text"])
            parts.append(embed_texts(self.model, self.processor, texts, batch_size))
        if "image" in columns:
            images = (image for batch in inputs for image in batch["image"])
            parts.append(embed_images(self.model, self.processor, images, self.mode, batch_size))
        if not parts:
            raise ValueError(f"InternVL embeds texts and images, but the task has {', '.join(columns)}.")
        return F.normalize(torch.stack(parts).sum(dim=0), dim=-1)


def internvl_meta(
    model: str | Path, mode: str = MODES[0], revision: str | None = None, dtype: str = "auto"
) -> ModelMeta:
    """Describes a checkpoint to MTEB; `mteb.evaluate` takes it as the model.

    Args:
        model: Folder or Hub name of an InternVL-C or InternVL-G.
        mode: "InternVL-C" or "InternVL-G".
        revision: Of a checkpoint on the Hub.
        dtype: As in `from_pretrained`: "auto" is that of the weights.

    Raises:
        OSError: If there is no such checkpoint.
        ValueError: If it is of another kind, or has no such mode.
    """
    if mode not in MODES:
        raise ValueError(f"`mode` is one of {', '.join(MODES)}, not {mode!r}.")
    register()
    kinds = MODES[1:] if mode == MODES[1] else MODES
    settings = {} if revision is None else {"revision": revision}
    config = check_kind(model, *kinds, door=f"MTEB in mode {mode}", **settings)
    folder = Path(model)
    is_local = folder.is_dir()
    return ModelMeta(
        loader=InternVLEncoder,
        loader_kwargs={"folder": str(model)},
        experiment_kwargs={"mode": mode, "dtype": dtype},  # MTEB keeps results of each apart, and reads them again
        name=f"internvl/{folder.resolve().name}" if is_local else str(model),
        revision=checkpoint_state(model) if is_local else revision,  # else results of other weights would be read
        release_date=None,
        languages=LANGUAGES_OF_THE_PAPER,
        n_parameters=None,
        memory_usage_mb=None,
        max_tokens=None,
        embed_dim=config.clip_embed_dim,
        license="mit",
        open_weights=True,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch", "Transformers"],
        reference="https://huggingface.co/OpenGVLab/InternVL-14B-224px",
        similarity_fn_name="cosine",
        use_instructions=False,
        training_datasets=None,
        modalities=["image", "text"],
    )


# --------------------------------------------------------------------------------------------------------------- tasks
class ImageClassification(AbsTaskZeroShotClassification):
    """Zero-shot classification of images of one's own.

    Args:
        name: Of the task.
        images: Images or their paths.
        labels: The class of each image.
        prompts: One text per class; MTEB does not average several.
        languages: Of the prompts, as MTEB writes them.
    """

    def __init__(
        self,
        name: str,
        images: Iterable[AnImage],
        labels: Iterable[int],
        prompts: Sequence[str],
        languages: Sequence[str] = ("eng-Latn",),
    ) -> None:
        self.metadata = _metadata(name, "ZeroShotClassification", "i2t", "accuracy", languages)
        self.prompts = list(prompts)
        super().__init__()
        rows = {"image": _as_cells(images), "label": [int(label) for label in labels]}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        self.dataset = {SPLIT: datasets.Dataset.from_dict(rows, features=features)}
        self.data_loaded = True  # so that MTEB neither loads nor drops it

    def get_candidate_labels(self) -> list[str]:
        """Returns the text of every class."""
        return self.prompts


class ImageTextRetrieval(AbsTaskRetrieval):
    """Retrieval over images of one's own: captions by images, or images by captions.

    `hit_rate_at_k` of MTEB is the R@k of the papers: the share of queries with a match among the first k.

    Args:
        name: Of the task.
        images: Images or their paths.
        captions: Those of every image, one or more.
        to: What is found: "text" or "image".
        languages: Of the captions, as MTEB writes them.
    """

    def __init__(
        self,
        name: str,
        images: Iterable[AnImage],
        captions: Sequence[Sequence[str]],
        to: str = "text",
        languages: Sequence[str] = ("eng-Latn",),
    ) -> None:
        if to not in ("text", "image"):
            raise ValueError(f'`to` is "text" or "image", not {to!r}.')
        category = "i2t" if to == "text" else "t2i"
        self.metadata = _metadata(name, "Any2AnyRetrieval", category, "hit_rate_at_1", languages)
        super().__init__()
        cells = _as_cells(images)
        texts = {f"text{n}-{k}": text for n, of_image in enumerate(captions) for k, text in enumerate(of_image)}
        pairs = [(f"image{n}", f"text{n}-{k}") for n, of_image in enumerate(captions) for k in range(len(of_image))]
        sides = {
            "image": datasets.Dataset.from_dict(
                {"id": [f"image{n}" for n in range(len(cells))], "image": cells},
                features=datasets.Features({"id": datasets.Value("string"), "image": datasets.Image()}),
            ),
            "text": datasets.Dataset.from_dict({"id": list(texts), "text": list(texts.values())}),
        }
        query, corpus = ("image", "text") if to == "text" else ("text", "image")
        relevant: dict[str, dict[str, int]] = {}
        for image, text in pairs:
            relevant.setdefault(image if query == "image" else text, {})[text if query == "image" else image] = 1
        split = {"corpus": sides[corpus], "queries": sides[query], "relevant_docs": relevant, "top_ranked": None}
        self.dataset = {"default": {SPLIT: split}}
        self.data_loaded = True  # so that MTEB neither loads nor drops it


def _as_cells(images: Iterable[AnImage]) -> list[Image.Image | str]:
    return [str(image) if isinstance(image, Path) else image for image in images]


def _metadata(name: str, kind: str, category: str, main_score: str, languages: Sequence[str]) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        description=f"{kind} of local images.",
        dataset={"path": f"local/{name}", "revision": "local"},
        type=kind,
        category=category,
        modalities=["text", "image"],
        eval_splits=[SPLIT],
        eval_langs=list(languages),
        main_score=main_score,
    )


# ------------------------------------------------------------------------------------------------------------- command
def run(options: argparse.Namespace) -> None:
    """Runs tasks of MTEB; their results are JSON below the output folder."""
    meta = internvl_meta(options.model, options.mode, dtype=options.dtype)
    tasks = mteb.get_tasks(tasks=options.tasks)
    cache = mteb.ResultCache(options.output)
    result = mteb.evaluate(meta, tasks, cache=cache, encode_kwargs={"batch_size": options.batch_size})
    scores: Mapping[str, float] = {task.task_name: task.get_score() for task in result.task_results}
    for name, score in scores.items():
        sys.stdout.write(f"{name:<40} {score:.4f}\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m internvl.evaluation.harnesses.mteb", description="Runs tasks of MTEB and MIEB on a checkpoint."
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub name of an InternVL-C or InternVL-G")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="NAME", help="names of MTEB's tasks")
    parser.add_argument("--mode", choices=MODES, default=MODES[0])
    parser.add_argument(
        "--dtype", default="auto", metavar="D", help="as in `from_pretrained` (default: of the weights)"
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N")
    parser.add_argument("--output", metavar="DIR", required=True, help="where the results go")
    options = parser.parse_args(arguments)
    return exit_status(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
