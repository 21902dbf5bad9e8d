"""What a run keeps: its folder, checkpoints, trajectories, metrics."""
