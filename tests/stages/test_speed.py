"""The machine's own figures of a step."""

import pytest

from llmkit.plan.devices import DEVICES
from llmkit.stages import speed
from llmkit.train.fit import StepData


@pytest.mark.parametrize("ranks", [1, 8])
def test_mfu_is_of_the_devices_of_all_ranks(ranks, monkeypatch):
    monkeypatch.setattr(speed.torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(speed, "peak", lambda device: 0)
    shape = type("Shape", (), {"active": 10**9})
    data = StepData(0, (), (), tokens=10_000 * ranks, supervised=0, count=1)
    found = speed.measure(shape, "cuda", True, False, ranks, data, 1.0)
    assert found["tokens_per_second"] == 10_000 * ranks
    assert found["mfu"] == pytest.approx(6 * 10**9 * 10_000 / DEVICES["h100-80gb"].half)
