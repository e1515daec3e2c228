"""Small, complete examples of tasks.

Each stands on ``harness.task`` alone, as a user's own task does.
"""
