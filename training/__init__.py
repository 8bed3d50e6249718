"""The training room: from a configuration and a schedule to a run that can change while it runs.

Its rooms, lowest floor first: settings, run, store and operations, schedule, session; then plan and loop. Imports go
down only (docs/architecture.md).
"""
