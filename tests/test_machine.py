import pytest
import torch
from torch import nn

from helpers.measure import machine
from helpers.measure.machine import bandwidth, beyond_cache, last_level_cache, share_of_bandwidth

SIZE = 1 << 26


def test_the_largest_cache_is_found(monkeypatch, tmp_path):
    for i, size in enumerate(["48K", "2048K", "36M"]):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(f"{size}\n")
    monkeypatch.setattr(machine, "CACHES", tmp_path)
    assert last_level_cache() == 36 << 20 and beyond_cache() == 1 << 28
    (tmp_path / "index2" / "size").write_text("480M\n")
    assert beyond_cache() == 4 * 480 << 20
    monkeypatch.setattr(machine, "CACHES", tmp_path / "nowhere")
    assert last_level_cache() is None and beyond_cache() == 1 << 28


def test_memory_is_read_at_some_speed():
    assert 1e8 < bandwidth(size=SIZE, repeats=2) < 1e13


class Reader(nn.Module):
    """Reads an array some times over."""

    def __init__(self, times: int):
        super().__init__()
        self.weight, self.times = torch.ones(SIZE // 4), times

    def forward(self, x):
        return sum(self.weight.dot(self.weight) for _ in range(self.times))


@pytest.mark.flaky(reruns=2)  # a busy machine lengthens times
def test_the_share_is_that_of_a_plain_read():
    """What reads the same bytes four times has about a quarter of the share."""
    once, often = (share_of_bandwidth(Reader(times), 8, SIZE, size=SIZE, repeats=9) for times in (1, 4))
    assert 0.3 < once < 3 and 0.1 < often / once < 0.6


def test_a_linear_has_a_share():
    linear = nn.Linear(1024, 1024, bias=False)
    assert 0 < share_of_bandwidth(linear, 1024, linear.weight.nbytes, size=SIZE, repeats=5) < 100
