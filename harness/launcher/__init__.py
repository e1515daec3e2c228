"""The parent process: torchrun as ``harness launch`` runs it, and what a rank leaves for it when it ends.

Stands on ``runtime``. Nothing of a training enters: the launcher must outlive it.
"""
