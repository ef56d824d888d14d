"""Maps of where a model looked: they are made of the weights that were used, leave the model as it was, lie where the
object is, and are put together and drawn in their place.
"""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageChops
from transformers import AutoModel, AutoProcessor

from internvl.evaluation import look
from internvl.evaluation.__main__ import main
from internvl.evaluation.attention_maps import (
    SCORES,
    AttentionMap,
    _tiles,
    answer_maps,
    caption_maps,
    contributions,
    margins,
    matching_maps,
    put_together,
    query_maps,
    recorded_attention,
    relevance,
    seen_box,
    text_maps,
    tile_grid,
    words_of_tokens,
)
from internvl.evaluation.generated import image_named
from internvl.evaluation.map_drawing import cells_of, drawn_over, sheet_of
from internvl.evaluation.pointing import (
    chance,
    evaluate_pointing,
    is_pointed_at,
    named_once,
    pointing_samples,
    questions_about_objects,
)
from internvl.evaluation.reports import metrics_of, read_report, samples_file
from internvl.evaluation.samples import SampleLog, read_samples
from internvl.image_processing_internvl import InternVLImageProcessor
from internvl.layers_internvl_chat import pixel_shuffle
from internvl.modeling_internvl import InternVLModel
from internvl.modeling_internvl_chat import InternVLChatForConditionalGeneration
from internvl.processing_internvl import InternVLProcessor
from internvl.synthetic.captions import LANGUAGES
from internvl.synthetic.scenes import LAYOUTS, bounding_box, draw_scene, sample_scene, scene_generator
from internvl.synthetic.tokenizer import caption_corpus, train_tokenizer

from . import tiny


WHOLE = (0.0, 0.0, 448.0, 448.0)


@pytest.fixture(scope="module")
def processor():
    image_processor = InternVLImageProcessor(size={"height": 56, "width": 56}, resize_mode="squash")
    return InternVLProcessor(image_processor, train_tokenizer(caption_corpus(num_scenes=20), 400), mode="contrastive")


@pytest.fixture
def model(processor):
    config = tiny.internvl_model().config
    config.qllama_config.vocab_size = len(processor.tokenizer)
    return tiny.randomize(InternVLModel(config))


@pytest.fixture(scope="module")
def bundled_g(root):
    where = {"pretrained_model_name_or_path": root, "subfolder": "internvl_g"}
    return AutoModel.from_pretrained(**where, dtype="float32").eval(), AutoProcessor.from_pretrained(**where)


@pytest.fixture(scope="module")
def bundled_chat(root):
    return AutoModel.from_pretrained(root, dtype="float32").eval(), AutoProcessor.from_pretrained(root)


def scene_of(layout: str, number: int = 0):
    return sample_scene(scene_generator("held_out", 3, number), LAYOUTS[layout], "held_out")


# ----------------------------------------------------------------------------------------------------------- recording
def test_what_is_recorded_are_the_weights_of_eager_attention(model):
    pixels, ids = torch.randn(2, 3, 56, 56), torch.randint(5, 90, (4, 6))
    arguments = {
        "input_ids": ids,
        "query_embeds": model.query_tokens.expand(4, -1, -1),
        "vision_hidden_states": model.vision_model(pixels).last_hidden_state,
        "attention_mode": "matching",
    }
    with torch.no_grad(), recorded_attention(model) as recorded:
        model.qllama.model(**arguments)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model.qllama.model(**arguments, output_attentions=True).cross_attentions
    assert len(recorded) == len(expected) == sum(layer.cross_attn is not None for layer in model.qllama.model.layers)
    for weights, of_rows in zip(recorded, expected, strict=True):
        rows = weights.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)  # (P, H, r M, N) -> (P r, H, M, N)
        torch.testing.assert_close(rows, of_rows)


@pytest.mark.parametrize("connector", ["queries_and_patches", "patches"])
def test_recording_leaves_a_model_as_it_was(connector, model):
    for one in (model, tiny.chat_model("qwen3", connector)):
        configs = [m.config for m in one.modules() if hasattr(m, "config")]
        before = [config._attn_implementation for config in configs]
        pixels = torch.randn(1, 3, 56, 56)
        features = one.get_image_features(pixels)
        with pytest.raises(KeyError), recorded_attention(one) as recorded:  # noqa: PT012
            one.get_image_features(pixels)
            assert any(config._attn_implementation != name for config, name in zip(configs, before, strict=True))
            raise KeyError
        count = len(recorded)
        assert [config._attn_implementation for config in configs] == before
        again = one.get_image_features(pixels)
        assert len(recorded) == count
        assert torch.equal(getattr(again, "pooler_output", again), getattr(features, "pooler_output", features))


def test_contributions_are_what_a_score_changes_by_as_a_weight_grows(model):
    pixels = torch.randn(1, 3, 56, 56, requires_grad=True)
    with recorded_attention(model) as recorded:
        score = model.get_matching_logits(pixels, torch.tensor([[7, 9, 8]]))[0, 1]
    gradients = torch.autograd.grad(score, recorded, retain_graph=True)
    unrelated = torch.ones(2, requires_grad=True)
    *found, of_unrelated = contributions(score, [*recorded, unrelated], keep_graph=True)
    assert not of_unrelated.any()
    for part, weights, gradient in zip(found, recorded, gradients, strict=True):
        assert torch.equal(part, weights * gradient)
        assert part.min() < 0 < part.max()
    assert all(part.min() == 0 for part in relevance(score, recorded))


def test_margins_are_over_the_best_other_token():
    logits = torch.tensor([[[1.0, 5.0, 3.0], [2.0, 0.0, -1.0]]])
    assert margins(logits, torch.tensor([[1, 2]])).tolist() == [[2.0, -3.0]]
    assert margins(logits, torch.tensor([[0, 0]])).tolist() == [[-4.0, 2.0]]


# ---------------------------------------------------------------------------------------------------------------- maps
@pytest.mark.parametrize("score", SCORES)
def test_maps_of_several_texts_are_those_of_each_alone(score, model, processor):
    image, texts = draw_scene(scene_of("mixed")), ["a red star", "il numero 7 in alto a sinistra", "a ring"]
    together = text_maps(model, processor, image, texts, score, languages := ["en", "it", "en"])
    alone = [
        text_maps(model, processor, image, [text], score, language)[0]
        for text, language in zip(texts, languages, strict=True)
    ]
    for found, expected in zip(together, alone, strict=True):
        assert found.text == expected.text
        assert found.values.shape == (4, 4)
        torch.testing.assert_close(found.values, expected.values)
        assert found.values.max() > found.values.min() >= 0
    assert not torch.allclose(together[0].values, together[1].values)


def test_words_of_a_caption_have_maps_that_later_words_do_not_change(model, processor):
    image = draw_scene(scene_of("mixed"))
    short, long = (caption_maps(model, processor, image, text) for text in ("a red star", "a red star at the left"))
    assert [found.text for found in long] == "a red star at the left".split()
    for first, second in zip(short, long[:3], strict=True):
        torch.testing.assert_close(first.values, second.values)


def test_what_a_word_adds_to_a_match_is_what_masking_it_takes(model, processor):
    image = draw_scene(scene_of("mixed"))
    maps = matching_maps(model, processor, image, "a red star")
    assert [found.text for found in maps] == ["a", "red", "star"]
    ids = processor(text=["a red star"], mode="caption", return_tensors="pt")["input_ids"]
    ids = torch.cat([ids, torch.tensor([[processor.tokenizer.eos_token_id]])], dim=1)
    words = words_of_tokens(processor.tokenizer, ids[0].tolist())
    pixels = processor(images=image, return_tensors="pt")["pixel_values"].requires_grad_()

    def spoke(masked: list[int]) -> torch.Tensor:
        mask = torch.ones_like(ids)
        mask[:, masked] = 0
        with recorded_attention(model) as recorded:
            logits = model.get_matching_logits(pixels, ids, mask)[0]
        return sum(part.sum(dim=(0, 1, 2))[1:] for part in contributions(logits[1] - logits[0], recorded))

    for found, (_, places) in zip(maps, words, strict=True):
        expected = (spoke([]) - spoke(places)).clamp(min=0)
        torch.testing.assert_close(found.values.flatten(), expected)
    assert max(found.values.max() for found in maps) > 0


def test_query_maps_are_shares_of_attention(model, processor):
    image = draw_scene(scene_of("mixed"))
    maps = query_maps(model, processor, image)
    assert len(maps) == 5
    assert all(0 < found.values.sum() < 1 for found in maps)  # the class token has the rest
    assert not torch.allclose(maps[0].values, maps[1].values)


def test_models_that_have_nothing_to_show_are_refused(model, processor, bundled_chat):
    image = draw_scene(scene_of("mixed"))
    with pytest.raises(ValueError, match="one of \\['caption', 'matching', 'similarity'\\], got 'sound'"):
        text_maps(model, processor, image, ["a"], "sound")
    with pytest.raises(ValueError, match="of a chat model use `answer_maps`"):
        caption_maps(*bundled_chat, image, "a")
    config = tiny.internvl_model().config
    config.qllama_config.num_query_token = 0
    with pytest.raises(ValueError, match="InternVL-C alone"):
        query_maps(InternVLModel(config), processor, image)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red star,  at the left", ["a", "red", "star,", "at", "the", "left"]),
        ("左上角的一个红色的圆形", None),
    ],
)
def test_tokens_are_grouped_to_words(text, expected, processor):
    ids = processor.tokenizer(text)["input_ids"] + [processor.tokenizer.eos_token_id]
    words = words_of_tokens(processor.tokenizer, ids)
    assert "".join(word for word, _ in words) == text.replace(" ", "")
    places = [place for _, places in words for place in places]
    assert places == sorted(set(places))
    assert len(ids) - 1 not in places  # the end token belongs to no word
    assert len(words) > 2 if expected is None else [word for word, _ in words] == expected


def test_bytes_of_one_character_are_one_word():
    pieces = {1: b"\xe5\xb7", 2: b"\xa6", 3: b" a", 4: b"b"}
    tokenizer = SimpleNamespace(decode=lambda ids, **_: b"".join(pieces[i] for i in ids).decode(errors="replace"))
    assert words_of_tokens(tokenizer, [1, 2, 3, 4]) == [("左", [0, 1]), ("ab", [2, 3])]


# ------------------------------------------------------------------------------------------------ places in an image
def test_maps_lie_where_the_image_processor_looked():
    processor = InternVLImageProcessor(resize_mode="crop", size={"shortest_edge": 64}, crop_size=32)
    assert seen_box((100, 200), processor) == (25.0, 75.0, 75.0, 125.0)
    assert seen_box((100, 200), InternVLImageProcessor(resize_mode="pad")) == (-50.0, 0.0, 150.0, 200.0)
    assert seen_box((100, 200), InternVLImageProcessor()) == (0.0, 0.0, 100.0, 200.0)


def test_the_highest_value_and_the_values_of_pixels_are_in_the_same_place():
    values = torch.zeros(4, 4)
    values[1, 3] = 2.0
    crop, padded = (25.0, 75.0, 75.0, 125.0), (-50.0, 0.0, 150.0, 200.0)
    for box, size in ((WHOLE, (448, 448)), (crop, (100, 200)), (padded, (100, 200))):
        found = AttentionMap("", values, box)
        over = found.over(size)
        assert over.shape == size[::-1]
        assert 0 <= over.min() <= over.max() <= 1
        x, y = found.highest()
        if 0 <= x < size[0]:
            assert over[int(y), int(x)] > 0.9 * over.max()
        else:  # it lies beyond the image, which its smoothed edge reaches
            assert over[:, :75].sum() == 0


def test_tiles_are_put_together_row_by_row_and_the_thumbnail_is_added():
    tiles = torch.arange(6.0)[:, None, None].expand(6, 2, 2)
    whole = put_together(tiles, (3, 2))
    assert whole[::2, ::2].tolist() == [[0, 1, 2], [3, 4, 5]]
    thumbnail = torch.full((1, 2, 2), 6.0)
    assert torch.equal(put_together(torch.cat([tiles, thumbnail]), (3, 2)), whole + 1)
    processor = InternVLImageProcessor()
    assert tile_grid(processor, (1344, 896), 7) == (3, 2)
    assert tile_grid(processor, (1344, 896), 1, max_num=1) == (1, 1)
    with pytest.raises(ValueError, match="9 tiles are no grid of 3 x 2"):
        tile_grid(processor, (1344, 896), 9)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_image_tokens_of_the_decoder_lie_over_the_patches_that_they_hold(version):
    model = tiny.chat_model(ps_version=version)
    side, per_tile = 4, model.num_image_token
    where = torch.arange(side * side).reshape(1, side * side, 1).float()
    patches_of = pixel_shuffle(where, 0.5, version)[0].int().tolist()
    is_image = torch.tensor([False] + [True] * per_tile + [False] * 2)
    for token, patches in enumerate(patches_of):
        weights = torch.zeros(1, 2, len(is_image), len(is_image))
        weights[0, 1, -1, 1 + token] = 3.0
        weights[0, 0, 0, :] = 5.0  # a row before the image, which cannot have read it
        found = _tiles(model, (side, side), [], [weights], is_image)
        assert found.flatten().nonzero().flatten().tolist() == sorted(patches)
        assert found.sum() == pytest.approx(3.0)


def test_a_map_is_drawn_where_it_is_high():
    values = torch.zeros(4, 4)
    values[0, 3] = 1.0
    image = Image.new("RGB", (64, 32), "black")
    found = AttentionMap("top right", values, (0.0, 0.0, 64.0, 32.0))
    drawn = drawn_over(image, found)
    red, green, blue = drawn.getpixel((60, 2))
    assert drawn.size == image.size
    assert min(red, green) > 2 * blue  # yellow
    assert len(set(drawn.getpixel((4, 28)))) == 1  # grey
    (_, plain), *cells = cells_of(image, [found] * 7)
    sheet = sheet_of([("a title that takes two lines below its image", plain), *cells], columns=4)
    assert sheet.size == (4 * 208 + 8, 2 * (100 + 2 * 18 + 8 + 8) + 8)
    second = sheet.crop((8 + 208, 8, 8 + 408, 108))
    assert second.resize((64, 32)).getpixel((60, 2))[2] < 100  # yellow again


# ------------------------------------------------------------------------------------------ the bundled checkpoint
def test_bundled_maps_point_at_what_is_named_in_every_language(bundled_g, root):
    model, processor = bundled_g
    image = Image.open(root / "examples" / "star.png").convert("RGB")
    left, top, right, bottom = ImageChops.difference(
        image, Image.new("RGB", image.size, image.getpixel((5, 5)))
    ).getbbox()
    assert (right - left) * (bottom - top) < 0.1 * image.width * image.height
    for language, words in LANGUAGES.items():
        for score in SCORES:
            (found,) = text_maps(model, processor, image, [words.shape_names("star", "red")[0]], score, language)
            x, y = found.highest()
            assert left <= x <= right, (language, score)
            assert top <= y <= bottom, (language, score)


def test_bundled_answers_were_read_where_the_asked_object_is(bundled_chat):
    """Of one tile and of several, the answer generated or given."""
    model, processor = bundled_chat
    report = evaluate_pointing(model, processor, images=1)
    assert report["metrics"]["answer"]["samples"] >= 3
    assert report["metrics"]["answer"]["value"] > 0.6 > 5 * report["metrics"]["chance"]["value"]
    scene = scene_of("few_tiles", 1)
    _, item, question, answer = next(iter(questions_about_objects(scene)))
    generated, given = (answer_maps(model, processor, draw_scene(scene), question, x) for x in (None, answer))
    assert " ".join(found.text for found in generated) == answer
    assert is_pointed_at(given[0], item)
    assert all(torch.equal(one.values, other.values) for one, other in zip(generated, given, strict=True))
    one_tile = answer_maps(model, processor, draw_scene(scene), question, answer, max_num=1)
    assert one_tile[0].values.shape == (16, 16)
    assert given[0].values.numel() > 256
    assert answer_maps(model, processor, draw_scene(scene), question, "") == []


@pytest.mark.parametrize("connector", ["patches", "queries", "queries_and_patches"])
@pytest.mark.parametrize("decoder", ["internlm2", "qwen3"])
def test_every_connector_and_decoder_has_maps_of_answers(connector, decoder, bundled_chat):
    _, processor = bundled_chat
    config = tiny.chat_config(decoder, connector)
    config.text_config.vocab_size = len(processor.tokenizer)
    config.image_token_id = processor.image_token_id
    model = tiny.randomize(InternVLChatForConditionalGeneration(config))
    image_processor = InternVLImageProcessor(size={"height": 56, "width": 56}, max_num=2)
    own = InternVLProcessor(
        image_processor, processor.tokenizer, model.num_image_token, chat_template=processor.chat_template
    )
    maps = answer_maps(model, own, Image.new("RGB", (112, 56), "red"), "What is it?", "a red star")
    assert [found.text for found in maps] == ["a", "red", "star"]
    for found in maps:
        assert found.values.shape == (4, 8)
        assert found.values.max() > 0


# ------------------------------------------------------------------------------------------------------- pointing game
def test_objects_of_a_scene_have_boxes_that_hold_their_pixels():
    for layout in ("mixed", "page", "many_tiles"):
        scene = scene_of(layout)
        image = draw_scene(scene)
        for item in scene.objects:
            left, top, right, bottom = bounding_box(item)
            assert 0 <= left < right <= scene.width
            assert 0 <= top < bottom <= scene.height
            colours = image.crop((int(left), int(top), int(right), int(bottom))).getcolors(10**6)
            assert len(colours) > 1
            image.paste(scene.background, (int(left) - 8, int(top) - 8, int(right) + 8, int(bottom) + 8))
        assert image.getcolors(10**6) == [(scene.width * scene.height, scene.background)]


def test_hits_and_chance_are_those_of_a_box():
    scene = scene_of("mixed")
    item = scene.objects[0]
    row, column = item.centre[1] * 16 // scene.height, item.centre[0] * 16 // scene.width
    values = torch.zeros(16, 16)
    values[row, column] = 1
    assert is_pointed_at(AttentionMap("", values, WHOLE), item)
    assert not is_pointed_at(AttentionMap("", values.flip(0).flip(1), WHOLE), item)
    assert chance(scene, item) == {
        "chance": pytest.approx((item.size / 448) ** 2),
        "chance among objects": 1 / len(scene.objects),
    }


def test_only_objects_that_a_name_fits_alone_are_named():
    scene = scene_of("crowd")
    names = [LANGUAGES["en"].names_of(item)[0] for item in scene.objects]
    assert [names.count(LANGUAGES["en"].names_of(item)[0]) for item in named_once(scene, "en")] == [1] * sum(
        names.count(name) == 1 for name in names
    )
    for _, _, question, answer in questions_about_objects(scene):
        assert question.endswith("?")
        assert answer


def test_a_game_goes_on_where_it_was_stopped(model, processor, tmp_path):
    whole = list(pointing_samples(model, processor, 1))
    file = tmp_path / "samples.jsonl"
    with SampleLog(file, {}) as log:
        log.add(whole[0])
    with SampleLog(file, {}) as log:
        report = evaluate_pointing(model, processor, 1, log=log)
        assert list(log.done.values()) == whole
    assert report == {"images": 1, "metrics": metrics_of(whole)}
    names = [f"{score}/{language}" for score in SCORES for language in LANGUAGES]
    assert list(report["metrics"]) == [*names, "chance", "chance among objects"]
    assert all(image_named(sample["image"]).size == (448, 448) for sample in whole)


# -------------------------------------------------------------------------------------------------------- command line
def test_the_command_draws_a_picture_or_a_page(root, tmp_path, capsys):
    star, picture, page = root / "examples" / "star.png", tmp_path / "maps.png", tmp_path / "maps.html"
    ask = ["look", str(root), str(star), "--ask", "What colour is the star?"]
    assert main([*ask, "--output", str(picture)]) == 0
    assert "red" in capsys.readouterr().out
    assert Image.open(picture).size[0] > 400
    arabic = ["look", str(root), str(star), "--subfolder", "internvl_g", "--language", "ar", "--output", str(page)]
    assert main(arabic) == 0
    assert "نجمة" in page.read_text(encoding="utf-8")


def test_the_command_offers_every_language_of_captions():
    """They are written out, because the table needs Pillow."""
    assert tuple(LANGUAGES) == look.LANGUAGES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["star.png", "--output", "maps.txt"], "has to be a .png or a .html"),
        (["no.png", "--ask", "What?"], "no.png"),
        (["star.png"], "is a chat model: give a question by --ask"),
        (["star.png", "--text", "a star"], "InternVL-G"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, message, root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(AutoModel, "from_pretrained", None)
    monkeypatch.chdir(root / "examples")
    assert main(["look", str(root), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_game_of_the_command_line_has_a_page_of_its_samples(root, tmp_path, capsys):
    report = tmp_path / "pointing.json"
    game = ["pointing", str(root), "--images", "1", "--output", str(report)]
    assert main(game) == 0
    assert main(["page", str(report)]) == 0
    metrics, samples = read_report(report)["metrics"], read_samples(samples_file(report))[1]
    assert metrics["answer"]["samples"] == len(samples) > 2
    assert capsys.readouterr().out.endswith(f"{len(samples)} samples: {tmp_path / 'pointing.html'}\n")
    text = (tmp_path / "pointing.html").read_text(encoding="utf-8")
    assert text.count('"data:image/') == 1  # all questions are about one scene, drawn again
    assert samples[0]["question"] in text
