"""Shards, their index and the order in which they are read."""
