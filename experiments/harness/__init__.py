"""What the experiments share: data, models, arms, the training loop, the report and the command line."""
