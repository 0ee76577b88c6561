"""`python -m diffaccel` and `accelerate launch -m diffaccel`."""

from .cli.app import main

main()
