"""The process itself: its environment, its signals, its threads, its voice.

Imports ``harness.errors``, and no torch but where a module says so. What is trained, and where it is saved, never enters.
"""
