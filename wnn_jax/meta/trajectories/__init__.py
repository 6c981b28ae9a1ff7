"""Trajectories, the weights of training runs over time: how they are collected, kept on disk, and cut into windows."""
