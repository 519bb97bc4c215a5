"""The contract of an objective, the objectives, and losses that they share."""
