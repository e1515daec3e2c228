"""Which samples are trained when, and by which rank; the loaders that fetch them.

Stands on ``distributed`` for the rank. Saving a position never enters: it is plain data.
"""
