"""Files: what they are, and reading them without running anything that they hold."""
