"""Checks of `generate` on any model of the package; transformers' own generation suite is not in its source
distribution."""

import copy
import tempfile
from typing import Any

import torch


class GenerationChecks:
    """A mixin for test cases. `make()` gives (model class, tiny configuration, inputs of `generate` of batch size 2),
    `to_forward` turns inputs of `generate` into those of `forward`, padding is put in front of position
    `padding_start`."""

    NEW_TOKENS = 5

    def setUp(self) -> None:
        torch.manual_seed(0)
        self.model_class, config, self.inputs = self.make()
        self.model = self.model_class(config).eval()
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0

    def generate(
        self, model: Any = None, inputs: dict | None = None, length: int = NEW_TOKENS, **settings: Any
    ) -> Any:
        settings = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, **settings}
        return (model or self.model).generate(**{**self.inputs, **(inputs or {})}, **settings)

    def first_sample(self) -> dict:
        """The inputs of batch size 1; rows of images are spread evenly over the samples."""
        return {name: value[: len(value) // 2] for name, value in self.inputs.items()}

    def assert_equal(self, first: torch.Tensor, second: torch.Tensor) -> None:
        self.assertTrue(torch.equal(first, second), f"{first.tolist()} is not {second.tolist()}")

    def test_greedy_cache_equals_no_cache(self) -> None:
        self.assert_equal(self.generate(use_cache=True), self.generate(use_cache=False))

    def test_greedy_matches_forward_argmax(self) -> None:
        ids = self.inputs["input_ids"]
        for _ in range(self.NEW_TOKENS):
            inputs = {**self.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            logits = self.model(**self.to_forward(inputs)).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        self.assert_equal(self.generate(), ids)

    def test_static_cache(self) -> None:
        self.assert_equal(self.generate(), self.generate(cache_implementation="static"))

    def test_beam(self) -> None:
        self.assertEqual(self.generate(num_beams=3)[:, -self.NEW_TOKENS :].shape, (2, self.NEW_TOKENS))

    def test_beam_return_sequences(self) -> None:
        self.assertEqual(self.generate(num_beams=3, num_return_sequences=2).shape[0], 4)

    def test_sample_repeats_with_the_seed(self) -> None:
        torch.manual_seed(0)
        first = self.generate(do_sample=True)
        torch.manual_seed(0)
        self.assert_equal(first, self.generate(do_sample=True))

    def test_num_return_sequences_expands_images(self) -> None:
        self.assertEqual(self.generate(do_sample=True, num_return_sequences=2).shape[0], 4)

    def test_prompt_lookup(self) -> None:
        one = self.first_sample()
        self.assert_equal(self.generate(inputs=one), self.generate(inputs=one, prompt_lookup_num_tokens=2))

    def test_assisted(self) -> None:
        one = self.first_sample()
        assistant = copy.deepcopy(self.model)
        self.assert_equal(self.generate(inputs=one), self.generate(inputs=one, assistant_model=assistant))

    def test_left_padding_changes_nothing(self) -> None:
        ids, mask, start = self.inputs["input_ids"], self.inputs["attention_mask"], self.padding_start
        pad = torch.zeros(ids.shape[0], 4, dtype=ids.dtype)
        padded = {
            "input_ids": torch.cat([ids[:, :start], pad, ids[:, start:]], 1),
            "attention_mask": torch.cat([mask[:, :start], pad, mask[:, start:]], 1),
        }
        new = slice(-self.NEW_TOKENS, None)
        self.assert_equal(self.generate()[:, new], self.generate(inputs=padded)[:, new])

    def test_text_only(self) -> None:
        ids = torch.full((1, 6), 7)
        settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        output = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        self.assertEqual(output.shape, (1, 9))

    def test_continue_from_cache(self) -> None:
        first = self.generate(return_dict_in_generate=True)
        ids, settings = first.sequences, {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        mask = torch.ones_like(ids)
        second = self.model.generate(ids, attention_mask=mask, past_key_values=first.past_key_values, **settings)
        self.assert_equal(second, self.generate(length=self.NEW_TOKENS + 3))

    def test_outputs(self) -> None:
        self.model.set_attn_implementation("eager")
        names = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
        output = self.generate(return_dict_in_generate=True, **dict.fromkeys(names, True))
        for found in (output.scores, output.logits, output.attentions, output.hidden_states):
            self.assertEqual(len(found), self.NEW_TOKENS)

    def test_eager_equals_sdpa(self) -> None:
        eager = copy.deepcopy(self.model)
        eager.set_attn_implementation("eager")
        self.assertNotEqual(eager.config._attn_implementation, self.model.config._attn_implementation)
        self.assert_equal(self.generate(), self.generate(eager))

    def test_saved_model_generates_the_same(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            reloaded = self.model_class.from_pretrained(folder).eval()
        self.assert_equal(self.generate(), self.generate(reloaded))
