"""The run folder: checkpoints, metrics.jsonl, events.jsonl, and everything that writes or reads them."""
