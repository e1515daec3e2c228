"""What a step changes: from live objects to named parts, and back.

Stands on ``checkpoint`` for what a part may hold, and on ``data`` for loaders. Storage never enters.
"""
