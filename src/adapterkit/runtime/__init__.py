"""What sits in an adapted model and runs: sites, hooks, steps, and the model's state."""
