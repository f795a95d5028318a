"""The empirical privacy audit: planted canaries and exact checks against the shipped engine."""
