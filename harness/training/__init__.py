"""A training that survives: ``Run`` for a program's loop, the loop of ``harness train``, and how both end.

Stands on everything above it but the command line, the doctor and the report.
"""
