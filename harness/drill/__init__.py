"""``harness drill``: kills somebody's own training in every way that we know, and says whether it survives and is exact.

A drill launches the unchanged job again and again, for some dozen steps, in a folder of its own (``harness.drill.trials``).
In the ranks a recorder writes down what each step has done, and carries out the deaths (``harness.drill.recorder``). What
differs from a run without deaths is named, with its most likely cause (``harness.drill.causes``).
"""
