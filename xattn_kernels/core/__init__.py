"""What every op shares: the call and its check, the layout of its results, the op around it."""
