"""The sub-commands of `darkroom`, one file each."""
