"""Which samples are trained when, and by whom; the loaders that give them.

Stands on ``distributed`` for the rank. Where a position is saved never enters: it is plain data.
"""
