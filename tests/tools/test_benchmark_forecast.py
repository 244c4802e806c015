"""What is forecast follows from its assumptions, and docs/scaling.md shows what is computed now."""

import argparse
import sys
from pathlib import Path

import pytest

from taming_dist.engine.settings import EngineConfig

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "tools"))
from benchmarks import forecast  # noqa: E402
from benchmarks.forecast import Cluster, Machine, Measured, Work, exposed, step  # noqa: E402
from benchmarks.tables import BEGIN, END  # noqa: E402
from benchmarks.traffic import GATHER, SCATTER, SUM, expected, sent, summed, theory  # noqa: E402

SIZES = [1000, 24]
WORK = Work("work", (1,), [SIZES], [2], (1,), flop=1e9, small=0)
MACHINE = Machine(attained=1e12, fixed=0.5, overlap=0.0, noise=0.0)
SLOW = Cluster(gpus=4, inside=1e6, between=1e5, hop_inside=0.0, hop_between=0.0, launch=0.0)


def test_messages_are_those_that_the_stages_of_zero_take() -> None:
    def found(zero: int, **settings: int) -> dict[str, float]:
        engine = EngineConfig(zero=zero, persist_below=settings.pop("persist_below", 0))
        return dict(expected(SIZES, engine, 2, **settings))

    assert found(0, accumulation=2) == {SUM: 4096}
    assert found(1, accumulation=2) == {SUM: 4096, GATHER: 4096}
    assert found(2, accumulation=2) == {SUM: 2 * 4096, GATHER: 4096}
    assert found(3, walks=3) == {SCATTER: 4096, GATHER: 3 * 4096}
    assert found(3, persist_below=100, walks=3) == {SCATTER: 4096, GATHER: 3 * 4000 + 96}
    large = EngineConfig(zero=3, persist_below=0)
    assert expected([2**24, 4], large, 2) == {SCATTER: 2**26 + 16, GATHER: 2 * (2**26 + 16)}
    assert expected(SIZES, EngineConfig(zero=2), ranks=1) == {}
    assert summed([found(0), found(1)]) == {SUM: 2 * 4096, GATHER: 4096}


def test_a_rank_sends_what_a_ring_takes() -> None:
    assert sent({SUM: 100.0, GATHER: 100.0}, 4) == 2 * 75 + 75
    assert [sent(theory(25, zero), 2) for zero in range(4)] == [100, 100, 100, 150]


def test_a_step_waits_for_what_nothing_hides() -> None:
    """One image takes 0.5 s and 1 ms; 4,096 bytes go to another rank."""
    computing = 0.501
    assert step(WORK, MACHINE, SLOW, 0, ranks=1, batch=1) == pytest.approx(computing)
    assert step(WORK, MACHINE, SLOW, 0, 2, 1) == pytest.approx(computing + 4096 / 1e6)
    assert step(WORK, MACHINE, SLOW, 2, 2, 1) == pytest.approx(computing + 1.5 * 4096 / 1e6)
    # over two nodes a tenth of the bandwidth, and seven eighths of the bytes instead of a half
    assert step(WORK, MACHINE, SLOW, 0, 8, 1) == pytest.approx(computing + 2 * 4096 * 7 / 8 / 1e5)
    hiding = Machine(1e12, 0.5, overlap=1.0, noise=0.0)
    assert step(WORK, hiding, SLOW, 0, 2, 1) == step(WORK, MACHINE, SLOW, 0, 2, 1)
    assert step(WORK, hiding, SLOW, 2, 2, 1) == pytest.approx(computing + 0.5 * 4096 / 1e6)
    assert step(WORK, hiding, SLOW, 3, 2, 1) == pytest.approx(computing)


def test_the_slowest_of_many_ranks_is_slower() -> None:
    noisy = Machine(1e12, 0.5, 0.0, noise=0.01)
    few, many = (noisy.computing(WORK, 1, ranks) for ranks in (2, 1024))
    assert noisy.computing(WORK, 1, 1) == pytest.approx(0.501)
    assert 0.501 < few < many < 0.501 * 1.04


def test_hops_count_by_tree_and_by_ring() -> None:
    cluster = Cluster(gpus=8, inside=1e30, between=1e30, hop_inside=1.0, hop_between=10.0, launch=0)
    assert cluster.seconds(SUM, 1, 0, 8) == 2 * 3
    assert cluster.seconds(SUM, 1, 0, 64) == 2 * (3 + 3 * 10)
    assert cluster.seconds(GATHER, 2, 0, 8) == 2 * 7
    assert cluster.seconds(GATHER, 1, 0, 64) == 56 + 8 * 10


def test_speeds_that_were_measured_stand_for_those_of_a_cluster() -> None:
    link = Measured({SUM: 1e-6, GATHER: 2e-6}, latency=0.25)
    waiting = exposed(link, {SUM: 1e6, GATHER: 1e6, "broadcast": 1e6}, {SUM: 2, GATHER: 1}, 2, 0)
    assert waiting == pytest.approx(1 + 2 + 1 + 3 * 0.25)


def test_the_page_shows_what_is_computed() -> None:
    parser = argparse.ArgumentParser()
    forecast.add_arguments(parser)
    page = (REPOSITORY / "docs/scaling.md").read_text()
    shown = page.partition(BEGIN)[2].partition(END)[0].strip()
    assert shown == forecast.tables(parser.parse_args([])), "run tools/benchmark.py forecast --into"
