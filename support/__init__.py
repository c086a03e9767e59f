"""What the scripts stand on: errors, ranks and signals, the log, the plan, drawing, metrics."""
