"""The process itself: its environment, signals, threads and console.

Imports ``harness.errors``, and torch only if a module says so. Training and saving never enter.
"""
