"""The tasks that `foveate train` knows, one module each."""
