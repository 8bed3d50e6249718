"""One start of a run: how it begins or goes on, saves, heals and ends."""
