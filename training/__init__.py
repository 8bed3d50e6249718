"""The training room: from a configuration and a schedule to a run that can change while it runs.

Imports inside go one way: records -> operations -> schedule, run -> orchestrator -> loop (docs/architecture.md).
"""
