"""The ablation of the data funnel: pairs polluted as they say, rules that find it, and a report of what came out."""

import io
import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModel, AutoProcessor

from internvl.reproduction import funnel
from internvl.reproduction.polluted_pairs import BOILERPLATE, CLEAN, POLLUTIONS, polluted_pairs, with_similarity
from internvl.synthetic.tokenizer import caption_tokenizer

from .fixtures_bundled_run import few_scenes_and_one_thread


@pytest.fixture(scope="module")
def scored():
    model = AutoModel.from_pretrained(funnel.SCORER).float().eval()
    return with_similarity(list(polluted_pairs(60, 0)), model, AutoProcessor.from_pretrained(funnel.SCORER))


def test_pairs_repeat_by_seed_and_are_polluted_in_the_shares_that_are_asked_for():
    pairs, again, other = (list(polluted_pairs(12, seed)) for seed in (0, 0, 1))
    assert pairs == again
    assert pairs != other
    assert {pair["pollution"] for pair in polluted_pairs(60, 0)} == {CLEAN, *POLLUTIONS}
    assert sum(POLLUTIONS.values()) < 1


def test_each_pollution_is_what_it_says(scored):
    by_kind = {kind: [pair for pair in scored if pair["pollution"] == kind] for kind in (CLEAN, *POLLUTIONS)}
    assert {pair["caption"] for pair in by_kind["boilerplate"]} <= set(BOILERPLATE)
    least = min(pair["similarity"] for pair in by_kind[CLEAN])
    assert all(pair["similarity"] < least for pair in (*by_kind["wrong caption"], *by_kind["boilerplate"]))
    assert all(pair["similarity"] > 0.5 for pair in by_kind["copy"])  # their captions are right
    assert {Image.open(io.BytesIO(pair["image"])).format for pair in by_kind["copy"]} == {"JPEG"}
    assert len({pair["caption"] for pair in by_kind["copy"]}) <= 20
    noticed = Counter((pair["pollution"] == "watermark", pair["watermark"] > 0.95) for pair in scored)
    assert noticed[True, True] > noticed[True, False]
    assert noticed[False, False] > 5 * noticed[False, True]


@pytest.mark.slow
def test_every_variant_is_trained_measured_and_reported_and_a_finished_one_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(funnel, "caption_tokenizer", partial(caption_tokenizer, 20))
    size = funnel.FunnelAblation(pairs=80, steps=1, images=2, calibration=12, batch_size=4, use_bf16=False)
    with few_scenes_and_one_thread():
        report = funnel.ablate_funnel(size, tmp_path / "out", [0])
        found = report["0"]
        assert list(found) == list(funnel.VARIANTS_OF_DATA)
        every, first, second, single = (found[name]["pairs"] for name in found)
        assert sum(every.values()) == 80
        assert not {"wrong caption", "boilerplate"} & {*first, *second}
        assert first[CLEAN] > every[CLEAN] / 2  # the score of watermarks errs, and a dozen pairs calibrate
        assert second[CLEAN] <= first[CLEAN]
        assert sum(single.values()) < sum(second.values())
        names = {"zero_shot_digit", "zero_shot_shape", "zero_shot_colour", "recall_at_1_InternVL-C"}
        assert all(set(part["results"]) == names for part in found.values())

        with pytest.raises(ValueError, match=r"`variants` are of .*all pairs.*got \['no duplicates'\]"):
            funnel.ablate_funnel(size, tmp_path / "other", [0], variants=["no duplicates"])
        with pytest.raises(ValueError, match="must be an empty folder"):
            funnel.ablate_funnel(size, tmp_path / "out", [0])
        file = tmp_path / "out" / funnel.REPORT_NAME
        kept = {**report, "0": {**found, funnel.ALL: {**found[funnel.ALL], "results": dict.fromkeys(names, 0.25)}}}
        file.write_text(json.dumps(kept))
        assert funnel.ablate_funnel(size, tmp_path / "out", [0], resume=True) == kept


def test_the_published_table_is_that_of_the_published_results():
    results = Path(funnel.__file__).parent / "results"
    page = (results / "README.md").read_text(encoding="utf-8")
    assert "\n".join(funnel.summary_of(json.loads((results / "funnel.json").read_text()))) in page


def test_the_page_has_means_and_differences_of_every_seed():
    def seed(*values: float) -> dict:
        return {
            name: {"pairs": {CLEAN: 10}, "results": {"recall": value}}
            for name, value in zip(funnel.VARIANTS_OF_DATA, values, strict=True)
        }

    lines = funnel.summary_of({"0": seed(0.5, 0.6, 0.4, 0.5), "1": seed(0.7, 0.9, 0.7, 0.7)})
    assert lines[2:6] == [
        "| all pairs | 10 | 60.0 % |",
        "| rules of stage 1 | 10 | 75.0 % (+15.0 ± 7.1) |",
        "| rules of stage 2 | 10 | 55.0 % (-5.0 ± 7.1) |",
        "| rules of stage 2, no duplicates | 10 | 60.0 % (+0.0 ± 0.0) |",
    ]
    few = {name: part for name, part in seed(0.5, 0.6, 0.4, 0.5).items() if name != "rules of stage 2"}
    some = funnel.summary_of({"0": few, "1": seed(0.7, 0.9, 0.7, 0.7)})
    assert some[2:5] == [*lines[2:4], lines[5]]  # what every seed has
    assert lines[-1].startswith("| rules of stage 2, no duplicates | 10 | 0")
