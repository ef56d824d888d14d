"""The calls of the published model cards, unchanged apart from the path, against converted checkpoints.

Reads like those cards. Weights are tiny and random, so the tests assert that the calls run and
give what the cards say they give.
"""

from threading import Thread

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPImageProcessor, TextIteratorStreamer

from internvl.conversion import convert

from .fixtures_published import published, published_14b, published_chat
from .fixtures_text import make_image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards")
    for index, size in enumerate([(90, 60), (40, 70)]):
        make_image(*size, seed=index).save(folder / f"image{index + 1}.jpg")
    return folder


@pytest.fixture(scope="module")
def vit_path(folder):
    return str(convert(published("intern_vit_6b", folder), folder / "InternViT-6B", show_progress=False))


@pytest.fixture(scope="module")
def path_14b(folder):
    return str(convert(published_14b(folder), folder / "InternVL-14B", show_progress=False))


@pytest.fixture(scope="module")
def chat_path(folder):
    return str(convert(published_chat(folder), folder / "InternVL-Chat", show_progress=False))


def clip_image_processor(path):
    try:
        return CLIPImageProcessor.from_pretrained(path)
    except ImportError:  # some releases of transformers want torchvision for it
        pytest.skip("CLIPImageProcessor needs torchvision here")


# ------------------------------------------------------------------------------------------------ InternViT
def test_internvit_card(vit_path, folder):
    model = AutoModel.from_pretrained(
        vit_path, torch_dtype=torch.bfloat16, low_cpu_mem_usage=True, trust_remote_code=True
    ).eval()
    image = Image.open(folder / "image1.jpg").convert("RGB")
    image_processor = clip_image_processor(vit_path)
    pixel_values = image_processor(images=image, return_tensors="pt").pixel_values
    pixel_values = pixel_values.to(torch.bfloat16)
    with torch.no_grad():
        outputs = model(pixel_values)
    assert outputs.last_hidden_state.shape == (1, 17, 64)
    assert outputs.last_hidden_state.dtype == torch.bfloat16
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state[:, 0])


@pytest.mark.parametrize("model_path", ["vit_path", "path_14b"])
def test_clips_image_processor_makes_the_pixels_of_ours(model_path, folder, request):
    path = request.getfixturevalue(model_path)
    image = Image.open(folder / "image1.jpg").convert("RGB")
    published = clip_image_processor(path)(images=image, return_tensors="pt").pixel_values
    ours = AutoImageProcessor.from_pretrained(path)(images=image, return_tensors="pt").pixel_values
    assert published.shape == ours.shape == (1, 3, 56, 56)
    torch.testing.assert_close(published, ours, atol=1e-6, rtol=0)


# --------------------------------------------------------------------------------------------- InternVL-14B
@pytest.fixture(scope="module")
def model_14b(path_14b):
    return AutoModel.from_pretrained(
        path_14b, torch_dtype=torch.bfloat16, low_cpu_mem_usage=True, trust_remote_code=True
    ).eval()


@pytest.fixture(scope="module")
def images_14b(path_14b, folder):
    image_processor = clip_image_processor(path_14b)
    images = [Image.open(folder / name).convert("RGB") for name in ("image1.jpg", "image2.jpg")]
    return image_processor(images=images, return_tensors="pt").pixel_values.to(torch.bfloat16)


def test_internvl_14b_card_compares_images_and_texts(path_14b, model_14b, images_14b):
    model, pixel_values = model_14b, images_14b
    tokenizer = AutoTokenizer.from_pretrained(path_14b, use_fast=False, add_eos_token=True)
    tokenizer.pad_token_id = 0  # set pad_token_id to 0

    prefix = "summarize:"
    texts = [prefix + "a photo of a red bus", prefix + "a cat", prefix + "many people on a street"]
    input_ids = tokenizer(texts, return_tensors="pt", max_length=80, truncation=True, padding="max_length").input_ids
    assert input_ids.shape == (3, 80)
    assert (input_ids[:, 0] == 1).all()  # the begin token, and the end token at the end
    assert all((row[row > 0])[-1] == 2 for row in input_ids)

    with torch.no_grad():
        logits_per_image, logits_per_text = model(image=pixel_values, text=input_ids, mode="InternVL-C")
        assert logits_per_image.shape == (2, 3)
        assert torch.equal(logits_per_text, logits_per_image.T)
        probs = logits_per_image.softmax(dim=-1)
        assert torch.isfinite(probs).all()
        logits_per_image_g, _ = model(image=pixel_values, text=input_ids, mode="InternVL-G")
        assert not torch.equal(logits_per_image_g, logits_per_image)

        image_features = model.encode_image(pixel_values, mode="InternVL-C")
        text_features = model.encode_text(input_ids)
    assert image_features.shape == (2, 24)
    assert text_features.shape == (3, 24)


def test_internvl_14b_card_writes_captions(path_14b, model_14b, images_14b):
    model, pixel_values = model_14b, images_14b[:1]
    tokenizer = AutoTokenizer.from_pretrained(path_14b, use_fast=False, add_eos_token=True)
    tokenizer.pad_token_id = 0  # set pad_token_id to 0
    tokenizer.add_eos_token = False
    tokenized = tokenizer("English caption:", return_tensors="pt")
    assert tokenized.input_ids[0, 0] == 1
    assert tokenized.input_ids[0, -1] != 2
    pred = model.generate(
        pixel_values=pixel_values,
        input_ids=tokenized.input_ids,
        attention_mask=tokenized.attention_mask,
        num_beams=5,
        min_new_tokens=8,
        max_new_tokens=12,  # the card has none; random weights do not stop by themselves
    )
    assert 8 <= pred.shape[1] <= 12
    caption = tokenizer.decode(pred[0], skip_special_tokens=True).strip()
    assert "English caption:" not in caption


# -------------------------------------------------------------------------------------------- InternVL-Chat
@pytest.fixture(scope="module")
def model(chat_path):
    return AutoModel.from_pretrained(
        chat_path, torch_dtype=torch.bfloat16, low_cpu_mem_usage=True, use_flash_attn=True, trust_remote_code=True
    ).eval()


@pytest.fixture(scope="module")
def tokenizer(chat_path):
    return AutoTokenizer.from_pretrained(chat_path, trust_remote_code=True, use_fast=False)


@pytest.fixture(scope="module")
def load_image(chat_path, folder):
    """The cards' own function of this name: tiles of one image."""
    image_processor = AutoImageProcessor.from_pretrained(chat_path)

    def load(name, max_num=12):
        return image_processor(folder / name, max_num=max_num, return_tensors="pt").pixel_values.to(torch.bfloat16)

    return load


GENERATION_CONFIG = {"max_new_tokens": 4, "do_sample": True}


@pytest.fixture
def generation_config():
    torch.manual_seed(0)
    return dict(GENERATION_CONFIG)


def test_chat_card_pure_text_conversation(model, tokenizer, generation_config):
    question = "Hello, who are you?"
    response, history = model.chat(tokenizer, None, question, generation_config, history=None, return_history=True)
    assert isinstance(response, str)
    assert history == [(question, response)]

    question = "Can you tell me a story?"
    response, history = model.chat(tokenizer, None, question, generation_config, history=history, return_history=True)
    assert len(history) == 2
    assert history[1] == (question, response)
    assert generation_config == GENERATION_CONFIG


def test_chat_card_single_image_single_round(model, tokenizer, load_image, generation_config):
    pixel_values = load_image("image1.jpg", max_num=12)
    assert pixel_values.shape[1:] == (3, 56, 56)
    question = "<image>\nPlease describe the image shortly."
    response = model.chat(tokenizer, pixel_values, question, generation_config)
    assert isinstance(response, str)


def test_chat_card_question_without_placeholder(model, tokenizer, load_image, generation_config):
    pixel_values = load_image("image1.jpg")
    _, history = model.chat(
        tokenizer, pixel_values, "What is this?", generation_config, history=None, return_history=True
    )
    assert history[0][0] == "<image>\nWhat is this?"


def test_chat_card_single_image_multi_round(model, tokenizer, load_image, generation_config):
    pixel_values = load_image("image1.jpg", max_num=12)
    question = "<image>\nPlease describe the image in detail."
    _, history = model.chat(tokenizer, pixel_values, question, generation_config, history=None, return_history=True)
    kept = list(history)
    question = "Please write a poem according to the image."
    _, longer = model.chat(tokenizer, pixel_values, question, generation_config, history=history, return_history=True)
    assert history == kept
    assert longer[:1] == kept
    assert longer[1][0] == question


def test_chat_card_several_images_combined(model, tokenizer, load_image, generation_config):
    pixel_values = torch.cat((load_image("image1.jpg"), load_image("image2.jpg")), dim=0)
    question = "<image>\nDescribe the two images in detail."
    response, _ = model.chat(tokenizer, pixel_values, question, generation_config, history=None, return_history=True)
    assert isinstance(response, str)


def test_chat_card_several_images_separate(model, tokenizer, load_image, generation_config):
    pixel_values1, pixel_values2 = load_image("image1.jpg"), load_image("image2.jpg")
    pixel_values = torch.cat((pixel_values1, pixel_values2), dim=0)
    num_patches_list = [pixel_values1.size(0), pixel_values2.size(0)]
    question = "Image-1: <image>\nImage-2: <image>\nDescribe the two images in detail."
    _, history = model.chat(
        tokenizer,
        pixel_values,
        question,
        generation_config,
        num_patches_list=num_patches_list,
        history=None,
        return_history=True,
    )
    question = "What are the similarities and differences between these two images."
    _, history = model.chat(
        tokenizer,
        pixel_values,
        question,
        generation_config,
        num_patches_list=num_patches_list,
        history=history,
        return_history=True,
    )
    assert len(history) == 2


def test_chat_card_batch(model, tokenizer, load_image, generation_config):
    pixel_values1, pixel_values2 = load_image("image1.jpg"), load_image("image2.jpg")
    num_patches_list = [pixel_values1.size(0), pixel_values2.size(0)]
    pixel_values = torch.cat((pixel_values1, pixel_values2), dim=0)
    questions = ["<image>\nDescribe the image in detail."] * len(num_patches_list)
    responses = model.batch_chat(
        tokenizer,
        pixel_values,
        num_patches_list=num_patches_list,
        questions=questions,
        generation_config=generation_config,
    )
    assert len(responses) == 2
    assert all(isinstance(response, str) for response in responses)


def test_chat_card_video(model, tokenizer, load_image, generation_config):
    frames = [load_image(name, max_num=1) for name in ("image1.jpg", "image2.jpg", "image1.jpg")]
    num_patches_list = [frame.size(0) for frame in frames]
    pixel_values = torch.cat(frames)
    video_prefix = "".join([f"Frame{i + 1}: <image>\n" for i in range(len(num_patches_list))])
    question = video_prefix + "What is the red panda doing?"
    _, history = model.chat(
        tokenizer,
        pixel_values,
        question,
        generation_config,
        num_patches_list=num_patches_list,
        history=None,
        return_history=True,
    )
    assert history[0][0] == question


def test_chat_card_streaming(model, tokenizer, load_image):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    generation_config = {"max_new_tokens": 4, "do_sample": False, "streamer": streamer}
    pixel_values, question = load_image("image1.jpg"), "What is this?"
    settings = {
        "tokenizer": tokenizer,
        "pixel_values": pixel_values,
        "question": question,
        "history": None,
        "return_history": False,
        "generation_config": generation_config,
    }
    thread = Thread(target=model.chat, kwargs=settings)
    thread.start()
    generated_text = ""
    for new_text in streamer:
        if new_text == model.conv_template.sep:
            break
        generated_text += new_text
    thread.join()
    plain = model.chat(tokenizer, pixel_values, question, {"max_new_tokens": 4, "do_sample": False})
    assert generated_text.split(model.conv_template.sep.strip())[0].strip() == plain


def test_chat_model_features_and_generate(model, tokenizer, load_image):
    pixel_values = load_image("image1.jpg", max_num=1)
    with torch.no_grad():
        assert model.extract_feature(pixel_values).shape == (1, 4, 64)
    prompt = tokenizer("<img>" + "<IMG_CONTEXT>" * 4 + "</img>\nWhat?", return_tensors="pt")
    tokens = model.generate(
        pixel_values=pixel_values,
        input_ids=prompt["input_ids"],
        attention_mask=prompt["attention_mask"],
        max_new_tokens=3,
        do_sample=False,
    )
    assert tokens.shape[1] > prompt["input_ids"].shape[1]


def test_chat_attributes_that_others_read(model, tokenizer):
    assert model.num_image_token == 4
    assert model.img_context_token_id == tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert model.template == "internvl2_5"
    assert model.conv_template.name == "internvl2_5"
    assert model.system_message == model.conv_template.default_system_message
    assert model.vision_model.config.hidden_size == model.config.vision_config.hidden_size == 56
    assert len(model.mlp1) == 4
    assert model.language_model.config.model_type == model.config.llm_config.model_type == "qwen2"
    config = model.config
    assert (config.select_layer, config.downsample_ratio, config.ps_version) == (-1, 0.5, "v2")
    assert (config.force_image_size, config.min_dynamic_patch, config.max_dynamic_patch) == (56, 1, 12)
    assert config.use_thumbnail is True
