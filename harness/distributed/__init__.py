"""The ranks: who is there, and what they agree on; the same for one plain process.

Stands on ``runtime`` and the configuration. Models, data and storage never enter.
"""
