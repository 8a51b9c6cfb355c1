"""Answers requests with a model that training published."""
