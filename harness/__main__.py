"""``python -m harness`` is the same program as ``harness``; so a debugger can be put in front of it."""

from harness.cli import main

main()
