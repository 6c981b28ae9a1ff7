"""Nowcasters of your own: collect trajectories, train on them, evaluate, export."""
