"""Zero-shot classification, retrieval, linear probe and captions: metrics against slow references, and reports."""

import math
from collections import Counter
from functools import cache, partial
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import top_k_accuracy_score

from internvl.configuration_internvl import InternVLConfig
from internvl.evaluation import captioning, dialogue, embeddings, metrics, zero_shot
from internvl.evaluation.__main__ import _parser
from internvl.evaluation.captioning import score_facts
from internvl.evaluation.embeddings import embed_images, embed_texts
from internvl.evaluation.generated import CLASSES, held_out_scenes, labelled_images
from internvl.evaluation.linear_probe import evaluate_linear_probe, fit_and_score, linear_probe
from internvl.evaluation.metrics import accuracy, cider, rank_in_blocks, recalls, recalls_both_ways, words_of
from internvl.evaluation.retrieval import evaluate_retrieval, retrieve
from internvl.evaluation.zero_shot import classify, ensemble, evaluate_zero_shot
from internvl.image_processing_internvl import InternVLImageProcessor
from internvl.modeling_internvl import MODES, InternVLModel
from internvl.processing_internvl import InternVLProcessor
from internvl.synthetic.captions import LANGUAGES, caption
from internvl.synthetic.digits import FIRST_HELD_OUT
from internvl.synthetic.facts import facts_in, facts_of
from internvl.synthetic.scenes import Scene
from internvl.synthetic.tokenizer import caption_corpus, train_tokenizer

from . import tiny


@cache
def tiny_processor():
    image_processor = InternVLImageProcessor(size={"height": 56, "width": 56}, resize_mode="squash")
    tokenizer = train_tokenizer(caption_corpus(num_scenes=20), 400)
    return InternVLProcessor(image_processor, tokenizer, mode="contrastive")


@cache
def tiny_model(num_queries=5):
    tokenizer = tiny_processor().tokenizer
    qllama = {**tiny.QLLAMA, "vocab_size": len(tokenizer), "num_query_token": num_queries}
    config = InternVLConfig(
        vision_config=dict(tiny.VISION), qllama_config=qllama, clip_embed_dim=12, attn_pool_num_heads=4
    )
    return tiny.randomize(InternVLModel(config))


# ----------------------------------------------------------------------------------------------------------- zero-shot
def test_an_ensemble_is_the_direction_of_the_mean_of_its_prompts():
    embeds = torch.nn.functional.normalize(torch.randn(5, 4), dim=1)
    expected = [embeds[[0, 3]].mean(0), embeds[1], embeds[[2, 4]].mean(0)]
    classes = ensemble(embeds, [0, 1, 2, 0, 2])
    torch.testing.assert_close(classes, torch.stack([row / row.norm() for row in expected]))


def test_accuracy_and_recalls_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    images, classes = torch.randn(60, 8, generator=generator), torch.randn(7, 8, generator=generator)
    labels = torch.randint(7, (60,), generator=generator)
    similarity = images @ classes.T
    expected = [top_k_accuracy_score(labels, similarity, k=k, labels=range(7)) for k in (1, 3)]
    assert accuracy(images, classes, labels.tolist()) == pytest.approx(expected[0])
    found = recalls(similarity, torch.nn.functional.one_hot(labels, 7).bool(), (1, 3))
    assert list(found.values()) == pytest.approx(expected)


def test_labelled_images_show_their_class_and_held_out_writers_alone():
    for kind, values in CLASSES.items():
        items = labelled_images(kind, 60)
        assert len({item.label for item in items}) == len(values)
        again = labelled_images(kind, 5)
        assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(items, again, strict=False))
    assert all(item.digit_index >= FIRST_HELD_OUT for scene in held_out_scenes(20) for item in scene.digits())


def few_images(count=5):
    """Images of no scene, one after the other."""
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (9, 7 + number, 3), dtype=np.uint8)
        yield Image.fromarray(noise).resize((60, 70))


@pytest.mark.parametrize(("num_queries", "modes"), [(5, MODES), (0, MODES[:1])])
def test_classification_takes_images_and_prompts_from_anywhere(num_queries, modes):
    model, processor = tiny_model(num_queries), tiny_processor()
    prompts = {"numbers": [["seven", "7"], ["eight"], ["a nine"]], "shapes": [["a star"], ["a ring"]]}
    images = list(few_images())
    for mode in modes:
        for name, classes in prompts.items():
            means = [embed_texts(model, processor, texts).mean(0) for texts in classes]
            directions = torch.stack([mean / mean.norm() for mean in means])
            predicted = (embed_images(model, processor, images, mode) @ directions.T).argmax(1).tolist()
            labels = [predicted[0], predicted[1], *(1 - min(label, 1) for label in predicted[2:])]
            found = classify(model, processor, iter(images), labels, {name: classes}, batch_size=2)
            assert set(found) == set(modes)
            assert found[mode] == {name: pytest.approx(2 / 5)}


def test_zero_shot_reports_every_mode_language_and_kind():
    report = evaluate_zero_shot(tiny_model(), tiny_processor(), images=2)
    assert set(report["accuracy"]) == set(MODES)
    for languages in report["accuracy"].values():
        assert set(languages) == set(LANGUAGES)
        for kinds in languages.values():
            assert set(kinds) == set(CLASSES) == set(report["chance"])
            assert all(0 <= value <= 1 for value in kinds.values())


def test_embeddings_do_not_depend_on_the_batch_size():
    images = list(few_images())
    texts = ["a star", "the handwritten digit seven at the top left", "7"]
    model, processor = tiny_model(), tiny_processor()
    for mode in ("InternVL-C", "InternVL-G"):
        one, many = (embed_images(model, processor, images, mode, size) for size in (2, 8))
        torch.testing.assert_close(one, many)
        torch.testing.assert_close(one.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(embed_texts(model, processor, texts, 1), embed_texts(model, processor, texts, 3))


# ----------------------------------------------------------------------------------------------------------- retrieval
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


def test_equal_captions_match_each_others_images():
    embeds = torch.eye(4)
    swapped = embeds[[1, 0, 2, 3]]
    assert recalls_both_ways(swapped, embeds, list("abcd"), (1,))["image_to_text"]["R@1"] == 0.5
    assert recalls_both_ways(swapped, embeds, list("aacd"), (1,))["text_to_image"]["R@1"] == 1.0


def test_a_query_without_a_match_is_refused():
    with pytest.raises(ValueError, match="needs a match"):
        recalls(torch.zeros(2, 2), torch.tensor([[True, False], [False, False]]))


@pytest.mark.parametrize("dual_softmax", [None, 20.0])
def test_queries_in_blocks_have_the_ranks_and_neighbours_of_the_whole_table(dual_softmax, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    queries, items = (torch.nn.functional.normalize(torch.randn(n, 6, generator=generator)) for n in (13, 12))
    matches = [[place % 12, (place + 5) % 12] for place in range(13)]
    table = queries @ items.T
    if dual_softmax is not None:
        table = table * torch.softmax(dual_softmax * table, dim=0)
    order = [sorted(range(12), key=lambda item: -row[item]) for row in table.tolist()]
    monkeypatch.setattr(metrics, "BLOCK_BYTES", 4 * 12 * 3)  # three queries at a time
    ranks, near = rank_in_blocks(queries, items, matches, dual_softmax)
    assert ranks.tolist() == [min(map(row.index, own)) for row, own in zip(order, matches, strict=True)]
    assert near.tolist() == [row[: metrics.NEIGHBOURS] for row in order]


def test_each_of_several_captions_finds_its_image():
    model, processor = tiny_model(), tiny_processor()
    captions = [["a star", "one star"], ["a ring"], ["a circle", "a star", "7"]]
    texts, owners = [text for group in captions for text in group], [0, 0, 1, 2, 2, 2]
    found = retrieve(model, processor, few_images(3), {"en": captions}, (1, 2))
    for mode in MODES:
        similarity = embed_images(model, processor, few_images(3), mode) @ embed_texts(model, processor, texts).T
        is_match = torch.tensor([[text in captions[image] for text in texts] for image in range(3)])
        assert all(is_match[owner, number] for number, owner in enumerate(owners))
        for way, scores, matches in (
            ("image_to_text", similarity, is_match),
            ("text_to_image", similarity.T, is_match.T),
        ):
            assert found[mode]["en"][way] == {f"R@{k}": pytest.approx(slow_recall(scores, matches, k)) for k in (1, 2)}


def test_retrieval_reports_every_mode_and_language():
    report = evaluate_retrieval(tiny_model(), tiny_processor(), pairs=9)
    assert set(report["recall"]) == {"InternVL-C", "InternVL-G"}
    ways = report["recall"]["InternVL-G"]["ja"]
    assert set(ways) == {"image_to_text", "text_to_image"}
    assert ways["image_to_text"]["R@1"] <= ways["image_to_text"]["R@10"] <= 1


# -------------------------------------------------------------------------------------------------------- linear probe
def test_the_probe_reads_a_linear_feature_and_not_noise():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 240)
    noise = rng.normal(size=(240, 6))
    signal = np.concatenate([noise, np.eye(3)[labels]], axis=1)
    assert fit_and_score(signal[:180], labels[:180], signal[180:], labels[180:]) > 0.95
    assert fit_and_score(noise[:180], labels[:180], noise[180:], labels[180:]) < 0.55


def test_the_probe_takes_a_model_or_its_tower():
    images, labels = list(few_images(6)), [0, 1, 0, 1, 1, 0]
    for model in (tiny_model(), tiny_model().vision_model):
        assert linear_probe(model, tiny_processor(), iter(images), labels, iter(images), labels, batch_size=4) == 1.0
    report = evaluate_linear_probe(tiny_model().vision_model, tiny_processor(), train_images=20, images=3)
    assert set(report["accuracy"]) == set(CLASSES)


# ------------------------------------------------------------------------------------------------------------ captions
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
        ["a red star at the top", "this image shows a red star"],
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


def test_cider_refuses_images_without_references():
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


def test_an_empty_image_has_no_facts():
    assert facts_in("an empty picture") == Counter() == facts_of(Scene(8, 8, (0, 0, 0), ()))


def test_captioning_reports_every_language(monkeypatch):
    short = partial(captioning.generate_captions, max_new_tokens=3)  # random weights never end a caption
    monkeypatch.setattr(captioning, "generate_captions", short)
    report = captioning.evaluate_captioning(tiny_model(), tiny_processor(), images=2)
    for language in LANGUAGES:
        assert set(report[language]) == {"cider", "precision", "recall", "exact"}


# ----------------------------------------------------------------------------------------------------------- old names
def test_former_names_are_read_with_a_warning():
    with pytest.warns(FutureWarning, match="embed_images"):
        embed = embeddings.embed_pictures
    images = list(few_images(2))
    with pytest.warns(FutureWarning, match="`images`"):
        found = embed(tiny_model(), tiny_processor(), pictures=images)
    assert torch.equal(found, embed_images(tiny_model(), tiny_processor(), images))
    with pytest.warns(FutureWarning, match="labelled_images"):
        assert zero_shot.labelled_pictures is labelled_images
    with pytest.warns(FutureWarning, match="`image`"):
        assert labelled_images("digit", 1)[0].picture.size == (448, 448)
    with pytest.warns(FutureWarning, match="`--images`"):
        assert _parser().parse_args(["zero_shot", "folder", "--pictures", "3"]).images == 3
    with pytest.warns(FutureWarning, match="evaluate_questions"):
        assert dialogue.ask is dialogue.evaluate_questions
