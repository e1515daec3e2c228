"""The ranks: who is there, and what they agree on. One plain process has the same interface.

Stands on ``runtime`` and the configuration. Models, data and storage never enter.
"""
