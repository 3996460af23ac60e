"""The arithmetic of the benchmarks, and the page that is written from their results."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from bench import kernels, report, results
from bench.figures import Panel
from bench.fits import parts, slope
from bench.queueing import Mode, rate_within, ttft, waits


def test_waits_are_those_of_a_queue_served_step_by_step() -> None:
    rng = np.random.default_rng(0)
    gaps, total = rng.exponential(1, 500), rng.exponential(0.9, 500)
    free, expected = 0.0, []
    for arrived, took in zip(np.cumsum(gaps), total, strict=True):
        start = max(arrived, free)
        expected.append(start - arrived)
        free = start + took
    np.testing.assert_allclose(waits(gaps, total), expected, atol=1e-9)


def test_waits_of_equal_requests_are_those_of_the_formula_for_m_d_1() -> None:
    gaps = np.random.default_rng(0).exponential(1, 400_000)
    assert waits(gaps, np.full(len(gaps), 0.7)).mean() == pytest.approx(0.7 * 0.7 / 0.6, rel=0.03)


def test_the_rate_within_a_limit_keeps_it_and_no_higher_one_does() -> None:
    mode = Mode("fused", [0.4, 0.6], [0.5, 0.8], 0.85)
    gaps = np.random.default_rng(0).exponential(1, 10_000)
    rate = rate_within(mode, 2.0, gaps)
    assert rate < mode.saturation
    assert np.quantile(ttft(mode, gaps / rate), 0.95) <= 2
    assert np.quantile(ttft(mode, gaps / (1.01 * rate)), 0.95) > 2
    assert rate_within(mode, 0.1, gaps) == 0


def test_parts_are_found_again() -> None:
    sizes = [512, 1024, 2048, 4096]
    times = [0.002 + 3e-5 * n + 2e-9 * n**2 for n in sizes]
    assert parts(sizes, times) == pytest.approx((0.002, 3e-5, 2e-9))


def test_no_part_is_below_nothing() -> None:
    sizes = [512, 1024, 2048, 4096]
    a, b, c = parts(sizes, [3e-5 * n**0.9 for n in sizes])
    assert min(a, b, c) == c == 0 < min(a, b)


def test_slope() -> None:
    assert slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


@dataclass(frozen=True)
class Row:
    name: str
    seconds: list[float]


def measure() -> list[Row]:
    return [Row("fused", [0.5, 0.25])]


def test_what_was_found_is_kept_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results.finish("rows", measure(), "| a table |", tmp_path)
    assert "| a table |" in capsys.readouterr().out
    assert results.load(tmp_path, "rows", list[Row]).found == measure()


def test_the_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = ModuleType("bench.rows", "Rows of numbers: ``python -m bench.rows``.\n\nOf ``fused``.\n")
    curves = {"fused": [(1.0, 2.0), (2.0, 4.0)]}
    vars(made).update(
        measure=measure,
        table=lambda found: f"| {found[0].seconds} |\n",
        panels=lambda found: [Panel("Rows", "n", "s", curves)],
    )
    results.finish("rows", measure(), "", tmp_path)
    report.write([made], tmp_path, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "## Rows of numbers\n\nOf `fused`.\n\n![Rows of numbers](figures/rows.svg)" in page
    assert "| [0.5, 0.25] |\n\n`python -m bench.rows` on " in page
    before = (tmp_path / "figures" / "rows.svg").read_bytes()
    report.write([made], tmp_path, tmp_path / "page.md")
    assert (tmp_path / "figures" / "rows.svg").read_bytes() == before


def test_kernels_are_compared_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["bench.kernels"])
    with pytest.raises(SystemExit, match="needs CUDA, and torch finds no GPU here"):
        kernels.main()


def test_the_tables_of_kernels() -> None:
    placing = kernels.Placing("Llama", 40_000_000, 2e-3, 1e-3)
    times: dict[str, float | None] = {"SDPA": 3e-3, "Triton": None}
    attending = kernels.Attending("Llama", 4096, 0.15, times, {"SDPA": 0.0, "Triton": None})
    shown = kernels.table(kernels.Found("a GPU", [placing], [attending], ["Triton fails"]))
    assert "| Llama | 2.000 | 20 | 1.000 | 40 | 2.00 |" in shown
    assert "| Llama | 4,096 | 0.15 | 3.000 | – | 0.0e+00 | – |" in shown and "- Triton" in shown


def test_a_kernel_that_is_wrong_or_fails_has_no_time() -> None:
    failed: list[str] = []
    want = torch.ones(2, 3)
    for work in (lambda: 2 * want, lambda: want @ want):
        assert kernels.tried("it", work, want, failed) == (None, None)
    assert failed[0] == "it is off by 1.0e+00" and failed[1].startswith("it fails: RuntimeError")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can begin the peak anew")
def test_peak_memory_begins_anew() -> None:
    numbers = np.ones(10_000_000)
    with_them = results.peak_mib()
    del numbers
    results.begin_peak()
    assert results.peak_mib() < with_them - 50


@pytest.mark.parametrize("module", report.BENCHMARKS, ids=report.name)
def test_every_benchmark_has_a_heading(module: ModuleType) -> None:
    heading, text = report.about(module)
    assert heading and "python" not in heading and text
