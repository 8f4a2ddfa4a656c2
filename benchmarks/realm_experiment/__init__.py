"""What `benchmarks/realm_gain.py` is made of: its plan, its databases, pre-training, questions, and its page."""
