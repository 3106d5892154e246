"""What maintainers and teachers run from a clone: `python -m tools COMMAND`."""
