"""Where people already train: one file for each library, imported only by who asks for it.

An integration stands on the public surface of ``harness``, and on that of its library as far as that suffices. Nothing else
in ``harness`` imports one.
"""
