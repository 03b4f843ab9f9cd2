"""Low-rank adapters of public models, in PEFT's format."""
