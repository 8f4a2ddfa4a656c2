"""What `benchmarks/retro_gain.py` is made of: its settings, its corpora and databases, its models, its page."""
