"""What happened: sizes, latencies, requested against achieved."""

from espalier.report.bench import BenchReport
from espalier.report.measure import SiteSize, Size, size, sizes
from espalier.report.picture import write_picture
from espalier.report.screen import screen, tell
from espalier.report.summary import FIGURES, achieved, latencies, print_summary

__all__ = [
    "FIGURES",
    "BenchReport",
    "SiteSize",
    "Size",
    "achieved",
    "latencies",
    "print_summary",
    "screen",
    "size",
    "sizes",
    "tell",
    "write_picture",
]
