"""Zero-shot classification, retrieval, linear probe and captions: the measures against slow references, and whole reports."""

import math
from collections import Counter
from functools import cache
from random import Random

import numpy as np
import pytest
import torch

from internvl.configuration_internvl import InternVLConfig
from internvl.evaluation.captioning import cider, evaluate_captioning, facts_in, facts_of, score_facts, words_of
from internvl.evaluation.embeddings import embed_pictures, embed_texts
from internvl.evaluation.linear_probe import evaluate_linear_probe, fit_and_score
from internvl.evaluation.retrieval import evaluate_retrieval, held_out_scenes, recalls, recalls_both_ways
from internvl.evaluation.zero_shot import CLASSES, accuracy, ensemble, evaluate_zero_shot, labelled_pictures
from internvl.image_processing_internvl import InternVLImageProcessor
from internvl.modeling_internvl import InternVLModel
from internvl.processing_internvl import InternVLProcessor
from internvl.synthetic.captions import LANGUAGES, caption
from internvl.synthetic.digits import FIRST_HELD_OUT
from internvl.synthetic.scenes import Scene
from internvl.synthetic.tokenizer import build_tokenizer, caption_corpus

from . import tiny


@cache
def tiny_processor():
    image_processor = InternVLImageProcessor(size={"height": 56, "width": 56}, resize_mode="squash")
    tokenizer = build_tokenizer(caption_corpus(num_scenes=20), 400)
    return InternVLProcessor(image_processor, tokenizer, mode="contrastive")


@cache
def tiny_model(num_queries=5):
    tokenizer = tiny_processor().tokenizer
    qllama = {**tiny.QLLAMA, "vocab_size": len(tokenizer), "num_query_token": num_queries}
    config = InternVLConfig(
        vision_config=dict(tiny.VISION), qllama_config=qllama, clip_embed_dim=12, attn_pool_num_heads=4
    )
    return tiny.randomize(InternVLModel(config))


# ------------------------------------------------------------------------------------------------------------ zero-shot
def test_an_ensemble_is_the_direction_of_the_mean_of_its_prompts():
    embeds = torch.nn.functional.normalize(torch.randn(5, 4), dim=1)
    expected = [embeds[[0, 3]].mean(0), embeds[1], embeds[[2, 4]].mean(0)]
    classes = ensemble(embeds, [0, 1, 2, 0, 2])
    torch.testing.assert_close(classes, torch.stack([row / row.norm() for row in expected]))


def test_accuracy_counts_the_most_similar_class():
    assert accuracy(torch.eye(3), torch.eye(3), [0, 1, 0]) == pytest.approx(2 / 3)


def test_labelled_pictures_show_their_class_and_held_out_writers_alone():
    for kind, values in CLASSES.items():
        items = labelled_pictures(kind, 60)
        assert len({item.label for item in items}) == len(values)
        again = labelled_pictures(kind, 5)
        assert all(a.picture.tobytes() == b.picture.tobytes() for a, b in zip(items, again, strict=False))
    assert all(item.digit_index >= FIRST_HELD_OUT for scene in held_out_scenes(20) for item in scene.digits())


@pytest.mark.parametrize(("num_queries", "modes"), [(5, {"InternVL-C", "InternVL-G"}), (0, {"InternVL-C"})])
def test_zero_shot_reports_every_mode_language_and_kind(num_queries, modes):
    report = evaluate_zero_shot(tiny_model(num_queries), tiny_processor(), pictures=6)
    assert set(report["accuracy"]) == modes
    for languages in report["accuracy"].values():
        assert set(languages) == set(LANGUAGES)
        for kinds in languages.values():
            assert set(kinds) == set(CLASSES) == set(report["chance"])
            assert all(0 <= value <= 1 for value in kinds.values())


def test_embeddings_do_not_depend_on_the_batch_size():
    pictures = [item.picture for item in labelled_pictures("shape", 5)]
    texts = ["a star", "the handwritten digit seven at the top left", "7"]
    model, processor = tiny_model(), tiny_processor()
    for mode in ("InternVL-C", "InternVL-G"):
        one, many = (embed_pictures(model, processor, pictures, mode, size) for size in (2, 8))
        torch.testing.assert_close(one, many)
        torch.testing.assert_close(one.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(embed_texts(model, processor, texts, 1), embed_texts(model, processor, texts, 3))


# ------------------------------------------------------------------------------------------------------------ retrieval
def slow_recall(similarity, is_match, k):
    hits = 0
    for scores, matches in zip(similarity.tolist(), is_match.tolist(), strict=True):
        # Of equal scores, those that do not match come first.
        order = sorted(range(len(scores)), key=lambda j: (-scores[j], matches[j]))
        hits += any(matches[j] for j in order[:k])
    return hits / len(similarity)


@pytest.mark.parametrize("levels", [3, 1000])  # many ties, and hardly any
def test_recalls_equal_the_slow_reference(levels):
    generator = torch.Generator().manual_seed(0)
    similarity = torch.randint(levels, (17, 23), generator=generator).float()
    is_match = torch.rand(17, 23, generator=generator) < 0.15
    is_match[:, 4] = True
    found = recalls(similarity, is_match, (1, 2, 5))
    assert found == {f"R@{k}": pytest.approx(slow_recall(similarity, is_match, k)) for k in (1, 2, 5)}


def test_equal_captions_match_each_others_pictures():
    embeds = torch.eye(4)
    swapped = embeds[[1, 0, 2, 3]]
    assert recalls_both_ways(swapped, embeds, list("abcd"), (1,))["image_to_text"]["R@1"] == 0.5
    assert recalls_both_ways(swapped, embeds, list("aacd"), (1,))["text_to_image"]["R@1"] == 1.0


def test_a_query_without_a_match_is_refused():
    with pytest.raises(ValueError, match="needs a match"):
        recalls(torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]))


def test_retrieval_reports_every_mode_and_language():
    report = evaluate_retrieval(tiny_model(), tiny_processor(), pairs=9)
    assert set(report["recall"]) == {"InternVL-C", "InternVL-G"}
    ways = report["recall"]["InternVL-G"]["ja"]
    assert set(ways) == {"image_to_text", "text_to_image"}
    assert ways["image_to_text"]["R@1"] <= ways["image_to_text"]["R@10"] <= 1


# ---------------------------------------------------------------------------------------------------------- linear probe
def test_the_probe_reads_a_linear_feature_and_not_noise():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 240)
    noise = rng.normal(size=(240, 6))
    signal = np.concatenate([noise, np.eye(3)[labels]], axis=1)
    assert fit_and_score(signal[:180], labels[:180], signal[180:], labels[180:]) > 0.95
    assert fit_and_score(noise[:180], labels[:180], noise[180:], labels[180:]) < 0.55


@pytest.mark.parametrize("part", ["whole", "tower"])
def test_the_probe_takes_a_model_or_its_tower(part):
    model = tiny_model() if part == "whole" else tiny_model().vision_model
    report = evaluate_linear_probe(model, tiny_processor(), train_pictures=40, pictures=10)
    assert set(report["accuracy"]) == set(CLASSES)


# ------------------------------------------------------------------------------------------------------------- captions
def slow_cider(candidate, references, all_references):
    """CIDEr-D from its definition, by lists."""

    def grams(text, n):
        words = words_of(text)
        return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]

    def weight(gram, text, n):
        occurs_in = sum(any(gram in grams(other, n) for other in texts) for texts in all_references)
        return grams(text, n).count(gram) * math.log(len(all_references) / max(1, occurs_in))

    total = 0.0
    for n in (1, 2, 3, 4):
        for reference in references:
            vocabulary = sorted({*grams(candidate, n), *grams(reference, n)})
            own = [weight(gram, candidate, n) for gram in vocabulary]
            other = [weight(gram, reference, n) for gram in vocabulary]
            lengths = math.sqrt(sum(x * x for x in own)) * math.sqrt(sum(x * x for x in other))
            if lengths:
                dot = sum(min(x, y) * y for x, y in zip(own, other, strict=True))
                difference = len(words_of(candidate)) - len(words_of(reference))
                total += math.exp(-(difference**2) / 72) * dot / lengths
    return 10 * total / 4 / len(references)


def test_cider_equals_the_slow_reference():
    references = [
        ["a red star at the top", "this picture shows a red star"],
        ["a blue ring at the left, a handwritten 7 at the right"],
        ["一个红色的星形", "红色星形"],
        ["a red ring at the top, a red ring at the left"],
    ]
    candidates = ["a red star at the left", "", "红色的星形", "a ring, a ring, a ring, a red ring at the zoo"]
    expected = [slow_cider(text, texts, references) for text, texts in zip(candidates, references, strict=True)]
    assert cider(candidates, references) == pytest.approx(expected)
    assert expected[0] > 0
    assert expected[1] == 0


def test_cider_of_the_only_reference_is_ten():
    references = [["a red star at the top"], ["two blue rings on the left"], ["one green cross below"]]
    assert cider([texts[0] for texts in references], references) == pytest.approx([10, 10, 10])


def test_cider_refuses_pictures_without_references():
    with pytest.raises(ValueError, match="2 candidates"):
        cider(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="list of references"):
        cider(["a"], [[]])


@pytest.mark.parametrize("language", LANGUAGES)
def test_facts_are_read_from_every_wording(language):
    for number, scene in enumerate(held_out_scenes(12)):
        assert facts_in(caption(scene, language), language) == facts_of(scene)
        if len(scene.objects) > 1:
            for seed in range(6):
                text = caption(scene, language, Random(f"{number}/{seed}"))
                assert facts_in(text, language) == facts_of(scene), text


def test_facts_are_right_only_with_place_and_colour_and_as_often_as_they_are_there():
    scene = held_out_scenes(2)[1]
    text = caption(scene)
    count = len(scene.objects)
    assert score_facts([text], [scene]) == {"precision": 1.0, "recall": 1.0, "exact": 1.0}
    assert score_facts([f"{text}, nonsense"], [scene]) == {
        "precision": count / (count + 1),
        "recall": 1.0,
        "exact": 0.0,
    }
    first = text.split(", ")[0]
    assert score_facts([f"{first}, {first}"], [scene])["precision"] == 0.5
    assert score_facts(["a red star"], [scene])["recall"] == 0.0


def test_an_empty_picture_has_no_facts():
    assert facts_in("an empty picture") == Counter() == facts_of(Scene(8, 8, (0, 0, 0), ()))


def test_captioning_reports_every_language():
    report = evaluate_captioning(tiny_model(), tiny_processor(), pictures=2)
    for language in LANGUAGES:
        assert set(report[language]) == {"cider", "precision", "recall", "exact"}
