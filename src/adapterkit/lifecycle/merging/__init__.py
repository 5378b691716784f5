"""Write adapters into the base's weights, and take them out again."""
