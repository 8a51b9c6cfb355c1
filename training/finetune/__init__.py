"""Fine-tuning: a run that starts from a diffusers pipeline, whole or by an adapter."""
