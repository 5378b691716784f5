"""Look at an adapted model and prove what it does: summary, tree, verification."""
