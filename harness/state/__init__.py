"""What a step changes: live objects to named parts, and back into live objects.

Stands on ``checkpoint`` for what a part may hold, and on ``data`` for loaders. Storage never enters.
"""
