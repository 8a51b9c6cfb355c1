"""The front door: the `darkroom` command, the local stack, remote jobs and the whole pipeline."""
