"""Caption scores as the COCO caption evaluation computes them: CIDEr-D, BLEU-4 and ROUGE-L by pycocoevalcap.

Published figures are over words of its Penn Treebank tokenizer, which runs on Java. Without Java captions are split by
`words_of`, and the scores are not to be set beside published ones. Not covered: METEOR and SPICE.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..extras import extra
from .metrics import words_of


PTB_TOKENIZER = "PTB"
OTHER_TOKENIZER = "other tokeniser"
MAX_NGRAM = 4
# A caption that goes through the tokenizer behind all others and comes back as it is. One lost line would shift the
# captions behind it to other images, and the process prints nothing at all where Java fails.
LAST_CAPTION = "last caption"


def available_tokenizer() -> str:
    """Returns `PTB_TOKENIZER` where Java is installed, else `OTHER_TOKENIZER`.

    Raises:
        OSError: If the PTB tokenizer, which writes into its own folder, may not.
        ValueError: If pycocoevalcap is not installed.
    """
    with extra("evaluate"):
        from pycocoevalcap.tokenizer import ptbtokenizer

    if not shutil.which("java"):
        return OTHER_TOKENIZER
    folder = Path(ptbtokenizer.__file__).parent
    if not os.access(folder, os.W_OK):
        raise PermissionError(
            f"pycocoevalcap's tokenizer writes captions into {folder}, which this user may not: install it in a "
            "virtual environment of your own."
        )
    return PTB_TOKENIZER


def tokenize_captions(captions: Sequence[Sequence[str]], tokenizer: str | None = None) -> list[list[str]]:
    """Splits the captions of images into lower-case words without punctuation, joined by single blanks.

    Args:
        captions: Those of each image, one or more.
        tokenizer: `PTB_TOKENIZER` or `OTHER_TOKENIZER`; None takes the available one.

    Raises:
        ValueError: If the PTB tokenizer gives back other lines than it was given, as where Java fails.
    """
    if (tokenizer or available_tokenizer()) == OTHER_TOKENIZER:
        return [[" ".join(words_of(text)) for text in of_image] for of_image in captions]
    with extra("evaluate"):
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # It reads one caption a line, and also ends lines where Python's `splitlines` does.
    lines = {
        index: [{"caption": " ".join(text.split())} for text in of_image] for index, of_image in enumerate(captions)
    }
    tokenized = PTBTokenizer().tokenize({**lines, len(captions): [{"caption": LAST_CAPTION}]})
    if tokenized.get(len(captions)) != [LAST_CAPTION]:
        raise ValueError(
            "pycocoevalcap's tokenizer did not give back the captions that it was given: does `java -version` work?"
        )
    return [tokenized[index] for index in range(len(captions))]


@dataclass(frozen=True)
class CaptionScores:
    """Scores of captions, each of the whole set and by image.

    Args:
        cider: CIDEr-D by image, as it is reported, where 1.0 is "100"; the set's is the mean.
        rouge_l: ROUGE-L by image; the set's is the mean.
        bleu_4: BLEU-4 of the whole set, which is no mean.
        sentence_bleu_4: BLEU-4 of each caption by itself.
        bleu_counts: (images, 10): what BLEU is computed from once summed, see `bleu_of_counts`.
    """

    cider: np.ndarray
    rouge_l: np.ndarray
    bleu_4: float
    sentence_bleu_4: np.ndarray
    bleu_counts: np.ndarray


def bleu_of_counts(counts: np.ndarray) -> np.ndarray:
    """Computes BLEU-4 of sets of captions.

    Args:
        counts: (..., 10), each the sum over the captions of a set: words, words of the references that are closest in
            length, n-grams for n of 1 to 4, and how many of these occur in a reference.
    """
    tiny, small = 1e-15, 1e-9  # pycocoevalcap's, against divisions by zero
    guessed, correct = counts[..., 2 : 2 + MAX_NGRAM], counts[..., 2 + MAX_NGRAM :]
    bleu = np.prod((correct + tiny) / (guessed + small), axis=-1) ** (1 / MAX_NGRAM)
    ratio = (counts[..., 0] + tiny) / (counts[..., 1] + small)
    return bleu * np.exp(np.minimum(0, 1 - 1 / ratio))


def score_captions(captions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Scores one tokenized caption of each image against its tokenized references, see `tokenize_captions`.

    Raises:
        ValueError: If an image has no reference, there is no image, or no reference has a word.
    """
    if len(captions) != len(references) or not all(references):
        raise ValueError(
            f"Each of the {len(captions)} captions needs a list of references, got {len(references)} lists, of "
            f"lengths {sorted({len(texts) for texts in references})}."
        )
    if not any(text.strip() for texts in references for text in texts):
        raise ValueError(f"The references of {len(references)} images have no words to compare captions with.")
    with extra("evaluate"):
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge

    expected = {index: list(texts) for index, texts in enumerate(references)}
    found = {index: [text] for index, text in enumerate(captions)}
    bleu = BleuScorer(n=MAX_NGRAM)
    for index, texts in expected.items():
        bleu += (captions[index], texts)
    of_set, by_caption = bleu.compute_score(option="closest", verbose=0)
    counts = []
    for part in bleu.ctest:
        words = part["testlen"]
        _, closest = min((abs(length - words), length) for length in part["reflen"])
        counts.append([words, closest, *part["guess"], *part["correct"]])
    return CaptionScores(
        cider=np.asarray(Cider().compute_score(expected, found)[1]),
        rouge_l=np.asarray(Rouge().compute_score(expected, found)[1]),
        bleu_4=float(of_set[-1]),
        sentence_bleu_4=np.asarray(by_caption[-1]),
        bleu_counts=np.asarray(counts),
    )
