"""Held-out loss, KID and contact sheets."""
