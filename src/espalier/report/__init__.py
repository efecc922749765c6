"""What happened: sizes, latencies, requested against achieved."""

from espalier.report.bench import BenchReport
from espalier.report.measure import SiteSize, Size, size, sizes
from espalier.report.summary import FIGURES, achieved, latencies, print_summary

__all__ = ["FIGURES", "BenchReport", "SiteSize", "Size", "achieved", "latencies", "print_summary", "size", "sizes"]
