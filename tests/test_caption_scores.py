"""Caption scores against pycocoevalcap's own evaluation and against slow formulas, adversarial captions included."""

import math
import os
import shutil
from collections import Counter
from random import Random

import numpy as np
import pytest
from pycocoevalcap import eval as coco_eval
from pycocoevalcap.tokenizer import ptbtokenizer

from internvl.evaluation import caption_scores
from internvl.evaluation.caption_scores import (
    OTHER_TOKENIZER,
    PTB_TOKENIZER,
    bleu_of_counts,
    score_captions,
    tokenize_captions,
)
from internvl.evaluation.corpus_intervals import interval_of_sums
from internvl.evaluation.metrics import cider


needs_java = pytest.mark.skipif(not shutil.which("java"), reason="the PTB tokenizer runs on Java")
WORDS = "a red blue ring star two of at the left right zoo man's dog-like 7 3.5 don't".split()
ODD = [
    "",
    " ",
    "...",
    "'",
    "-LRB- a )",
    "a\nb",
    "a\rb",
    "a\u2028b \x0b c\x85d",
    "红色的星形",
    "été à l'œil",
    "🙂 a",
    "<s>",
]


def captions(rng, number):
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(number)]


def captioned_images(number=200, seed=0):
    """Captions and references, some of them copies, empty or odd."""
    rng = Random(seed)
    references = [captions(rng, rng.randint(1, 5)) for _ in range(number)]
    found = captions(rng, number)
    for index in range(0, number, 5):
        found[index] = rng.choice(references[index])
    for index, text in enumerate(ODD):
        found[3 + 7 * index] = text
        references[4 + 5 * index].append(text)
    return [*found, ""], [*references, ["a dog"]]


class Annotations:
    """The two things that pycocoevalcap asks of COCO's own class."""

    def __init__(self, texts):
        self.imgToAnns = {index: [{"caption": text} for text in of_image] for index, of_image in enumerate(texts)}

    def getImgIds(self):
        return list(self.imgToAnns)


@needs_java
def test_scores_are_those_of_the_whole_coco_evaluation(monkeypatch):
    """Without METEOR and SPICE, which this package leaves out. pycocoevalcap itself reads one caption a line, so that
    line breaks are blanks here."""
    found, references = captioned_images()

    class NoScorer:
        def method(self):
            return ""

        def compute_score(self, gts, res):
            return 0.0, [0.0] * len(gts)

    monkeypatch.setattr(coco_eval, "Meteor", NoScorer)
    monkeypatch.setattr(coco_eval, "Spice", NoScorer)

    def plain(text):
        return " ".join(text.split())

    expected = Annotations([[plain(text) for text in texts] for texts in references])
    evaluation = coco_eval.COCOEvalCap(expected, Annotations([[plain(text)] for text in found]))
    evaluation.evaluate()

    tokenized = tokenize_captions([[text] for text in found], PTB_TOKENIZER)
    scores = score_captions([text for (text,) in tokenized], tokenize_captions(references, PTB_TOKENIZER))
    assert scores.cider.mean() == pytest.approx(evaluation.eval["CIDEr"])
    assert scores.rouge_l.mean() == pytest.approx(evaluation.eval["ROUGE_L"])
    assert scores.bleu_4 == pytest.approx(evaluation.eval["Bleu_4"])
    by_image = [evaluation.imgToEval[index] for index in range(len(found))]
    assert scores.sentence_bleu_4 == pytest.approx([part["Bleu_4"] for part in by_image])
    assert scores.cider == pytest.approx([part["CIDEr"] for part in by_image])
    assert 0.1 < scores.cider.mean() < 5


@needs_java
def test_captions_with_line_breaks_stay_with_their_images():
    texts = [["a\nred\rring", "\u2028"], [""], ["Two dogs, aren't they?\x0b"], [" "]]
    assert tokenize_captions(texts, PTB_TOKENIZER) == [["a red ring", ""], [""], ["two dogs are n't they"], [""]]


def test_a_tokenizer_that_loses_captions_is_no_score_of_zero(monkeypatch):
    """Java fails by printing nothing."""
    monkeypatch.setattr(ptbtokenizer.PTBTokenizer, "tokenize", lambda self, captions: {0: [""]})
    with pytest.raises(ValueError, match="java -version"):
        tokenize_captions([["a"]], PTB_TOKENIZER)


def test_without_java_the_other_tokenizer_is_named(monkeypatch):
    monkeypatch.setattr(caption_scores.shutil, "which", lambda name: None)
    assert caption_scores.available_tokenizer() == OTHER_TOKENIZER
    assert tokenize_captions([["A dog, two: cats!"]]) == [["a dog two cats"]]


@needs_java
def test_a_tokenizer_that_may_not_write_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(caption_scores.os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(PermissionError, match="virtual environment"):
        caption_scores.available_tokenizer()


def test_the_cider_of_generated_scenes_is_that_of_pycocoevalcap():
    """On texts that both split alike."""
    found, references = captioned_images(100)
    tokenized = tokenize_captions([[text] for text in found], OTHER_TOKENIZER)
    expected = score_captions([text for (text,) in tokenized], tokenize_captions(references, OTHER_TOKENIZER)).cider
    assert cider(found, references) == pytest.approx(expected)
    assert expected.max() > 1


def slow_bleu(pairs):
    correct, guessed, length, reference = Counter(), Counter(), 0, 0
    for text, texts in pairs:
        words = text.split()
        length += len(words)
        reference += min((abs(len(other.split()) - len(words)), len(other.split())) for other in texts)[1]
        for n in range(1, 5):
            grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
            most = Counter()
            for other in texts:
                other = other.split()
                most |= Counter(tuple(other[i : i + n]) for i in range(len(other) - n + 1))
            guessed[n] += grams.total()
            correct[n] += (grams & most).total()
    if not all(correct[n] for n in range(1, 5)):
        return 0.0
    mean = sum(math.log(correct[n] / guessed[n]) for n in range(1, 5)) / 4
    return math.exp(mean + min(0, 1 - reference / length))


def test_bleu_comes_from_the_counts_of_its_images():
    found, references = captioned_images(100)
    scores = score_captions(found, references)
    pairs = list(zip(found, references, strict=True))
    assert bleu_of_counts(scores.bleu_counts.sum(axis=0)) == pytest.approx(scores.bleu_4)
    assert scores.bleu_4 == pytest.approx(slow_bleu(pairs), rel=1e-6)
    part = scores.bleu_counts[:30].sum(axis=0)
    assert bleu_of_counts(part) == pytest.approx(slow_bleu(pairs[:30]), rel=1e-6)
    low, high = interval_of_sums(bleu_of_counts, scores.bleu_counts)
    assert low < scores.bleu_4 < high
    assert high - low > 0.01


def test_empty_captions_score_nothing_and_spoil_nothing():
    scores = score_captions(["", "a red ring at the left"], [["a dog", "two dogs"], ["a red ring at the left"]])
    assert scores.cider.tolist() == pytest.approx([0, 10])
    assert scores.rouge_l.tolist() == pytest.approx([0, 1])
    assert np.isfinite(scores.bleu_4)


@pytest.mark.parametrize(
    ("found", "references", "message"),
    [
        (["a", "b"], [["a"]], "2 captions"),
        (["a"], [[]], "list of references"),
        ([], [], "no words"),
        (["a"], [["", " "]], "no words"),
    ],
)
def test_what_cannot_be_scored_is_refused(found, references, message):
    with pytest.raises(ValueError, match=message):
        score_captions(found, references)
