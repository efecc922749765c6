"""What happened: sizes, latencies, requested against achieved."""

from espalier.report.measure import SiteSize, Size, size, sizes
from espalier.report.summary import FIGURES, achieved, latencies, print_summary

__all__ = ["FIGURES", "SiteSize", "Size", "achieved", "latencies", "print_summary", "size", "sizes"]
