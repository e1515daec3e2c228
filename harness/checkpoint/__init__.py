"""The checkpoint engine: the format, the commit protocol, the catalog, and saves while a program continues.

Stands on ``storage``; ``format``, ``catalog`` and ``retention`` import no torch. Modules, optimizers and ranks that talk
to each other never enter: a checkpoint has named parts, which hold tensors. ``checkpointer`` is its public face.
"""
