"""Pure modules: plain arguments in, tensors out. They know nothing of hosts, names or configs."""
