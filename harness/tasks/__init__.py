"""Small complete examples of what a user brings.

Each stands on ``harness.task`` alone, as a user's own task does.
"""
