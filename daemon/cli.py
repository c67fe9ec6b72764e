"""The command line: parses arguments and hands over; every command lives in its own room."""

from __future__ import annotations


def main() -> int:
    """Entry point of ``fastsd``."""
    return 0
