"""What a model is made of, learned by running it."""
