"""The model room: one GPT built from one ModelConfig, its adapters, its surgery and its files. Knows no training."""
