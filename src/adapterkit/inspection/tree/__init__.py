"""A model as a tree that fits on a screen: repeated blocks folded, what each part is, where adapters sit."""

from .grow import tree_of
from .nodes import Mark, TreeNode
from .tree import Tree

__all__ = ["Mark", "Tree", "TreeNode", "tree_of"]
