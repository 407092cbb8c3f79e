"""`shapedpo suggest`: what an audit found that bears on a description of what the model should and should not learn."""

from __future__ import annotations

import argparse


HELP = "x"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""


def main(args: argparse.Namespace) -> int:
    return 0
