"""The neural graph of a model: read, built, and passed messages along."""
