"""What is where in an audit's folder."""

HARVEST, ANALYSIS, ANSWERS, VERIFY = "harvest", "analysis", "answers", "verify"
"""The folders in it, each made by the part of [`shapedpo.audit`] of that name; `answers` are the reference's own."""
SUMMARY, PAGE = "summary.txt", "audit.html"
