"""`python -m studies.output_modes`."""

from studies.output_modes.command import main

main()
