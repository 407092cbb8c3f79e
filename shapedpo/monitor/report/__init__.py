"""`report.html`: one self-contained page of a run, made from its records."""

from .page import ReportSink, render, write_whole


__all__ = ["ReportSink", "render", "write_whole"]
