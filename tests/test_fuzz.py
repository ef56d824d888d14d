"""A small part of what `make fuzz` feeds to the package: whatever comes in, it is read or refused by name."""

import pytest

from .fuzz import checkpoints, images, messages, requests, rows
from .fuzz.watch import watch


SEED = 1  # `make fuzz` begins with 0
KINDS = {
    "images": lambda: images.inputs(SEED, 11),  # every file by every way in
    "image tokens": messages.injections,
    "messages": lambda: messages.malformed(SEED, 200),
    "checkpoints": lambda: checkpoints.inputs(SEED, 16),
    "rows": lambda: rows.inputs(SEED, 60),
    "requests": lambda: requests.inputs(SEED, 40),
}
INPUTS = {"images": 275, "image tokens": 161, "messages": 200, "checkpoints": 16, "rows": 60, "requests": 40}


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_input_is_read_or_refused_by_name_in_time_and_starts_nothing(kind):
    report = watch(kind, KINDS[kind]())
    assert report.inputs == INPUTS[kind]
    assert report.faults == []
    assert report.accepted > 0
    assert report.refused > report.inputs / 8


def test_what_the_fuzz_looks_for_is_found(monkeypatch):
    """A wrong type, a message that names nothing, an endless loop, a started program and an answer that is wrong."""
    import subprocess

    monkeypatch.setattr("tests.fuzz.watch.SECONDS", 0.2)

    def wrong_type():
        raise KeyError("x")

    def nameless():
        raise ValueError("no")

    def endless():
        while True:
            try:
                sum(range(100))
            except Exception:  # noqa: BLE001 (what a careless decoder does)
                continue

    def starts():
        subprocess.run(["true"], check=True)

    calls = {
        "KeyError": wrong_type,
        "does not name": nameless,
        "takes longer": endless,
        "starts": starts,
        "wrong": lambda: "wrong",
    }
    report = watch("probes", ((name, call, "Image 1 of 1") for name, call in calls.items()))
    assert [name in fault for name, fault in zip(calls, report.faults, strict=True)] == [True] * len(calls)
