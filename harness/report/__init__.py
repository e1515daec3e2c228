"""What became of a run, from its URL alone: numbers, a few lines for the terminal, a page for the browser.

Stands on ``telemetry`` and ``checkpoint``; no torch. It changes nothing in a run's URL.
"""
