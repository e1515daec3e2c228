"""What a run reports, and where that is kept: events, the journal, dashboards, crash records.

Stands on ``checkpoint`` and ``storage``; no torch. It never decides anything.
"""
