"""The six strategies: each is a DeepSpeed config for the one training program."""
