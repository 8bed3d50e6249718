"""What a run is, as plain values: configuration keys, Settings, Progress, and the errors that refuse bad input."""
