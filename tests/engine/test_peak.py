"""How fast devices are: of those that are known, and of this one."""

import time

import pytest
import torch

from taming_dist.engine.peak import known, measured, peak_of
from taming_dist.engine.settings import EngineConfig

BF16, TF32 = EngineConfig(precision="bf16"), EngineConfig(tf32="all")


@pytest.mark.parametrize(
    ("name", "engine", "tflops"),
    [
        ("NVIDIA H200", BF16, 989),
        ("NVIDIA H100 80GB HBM3", BF16, 989),
        ("NVIDIA H100 80GB HBM3", TF32, 495),
        ("NVIDIA H100 80GB HBM3", EngineConfig(), 67),
        ("NVIDIA H100 PCIe", BF16, 756),
        ("NVIDIA A100-SXM4-80GB", EngineConfig(precision="fp16"), 312),
        ("NVIDIA L40S", BF16, 362),
        ("NVIDIA L4", BF16, 121),
        ("NVIDIA GeForce RTX 4090", BF16, 165.2),
    ],
)
def test_a_gpu_is_known_by_its_name_and_the_precision_of_products(
    name: str, engine: EngineConfig, tflops: float
) -> None:
    assert known(name, engine) == tflops * 1e12


@pytest.mark.parametrize("name", ["NVIDIA A10G", "NVIDIA RTX A4000", "Tesla V100-SXM2-16GB"])
def test_a_name_that_only_begins_like_a_known_one_is_not_known(name: str) -> None:
    assert known(name, BF16) is None


def test_another_device_is_measured_without_a_random_number() -> None:
    before = torch.get_rng_state()
    found = peak_of(torch.device("cpu"), EngineConfig())
    assert not found.known
    assert torch.equal(torch.get_rng_state(), before)


def test_the_fastest_product_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 0.01, 0.01, 0.03, 0.04, 0.04, 0.05, 1.0])  # products of 20 and 10 ms
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    assert measured(torch.device("cpu"), None) == pytest.approx(2 * 1024**3 / 0.01)
