"""What a run tells of itself, and where that is kept: events, the journal, dashboards, records of crashes.

Stands on ``checkpoint`` and ``storage``; no torch. It never decides anything.
"""
