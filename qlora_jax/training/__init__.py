"""Training: configuration, the jitted step, the run's directory, the loop."""
