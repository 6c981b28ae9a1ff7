"""Make nowcasters: collect trajectories, train on them, measure forecast errors, export."""
