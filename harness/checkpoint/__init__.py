"""The checkpoint engine: the format, the commit protocol, what is there, and saves beside a program that goes on.

Stands on ``storage``; ``format``, ``catalog`` and ``retention`` import no torch. Modules, optimizers and ranks that talk
to each other never enter: a checkpoint is of named parts, which hold tensors. ``checkpointer`` is its face.
"""
