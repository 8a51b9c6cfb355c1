"""``python -m cluster`` is the ``darkroom`` command."""

from cluster.cli import main

main()
