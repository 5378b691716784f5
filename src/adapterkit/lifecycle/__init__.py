"""What the kit's verbs do: add, activate, freeze, fuse, merge and combine."""
