"""The schedule: its file, its triggers, its ramps, and the orchestrator that fires its entries."""
