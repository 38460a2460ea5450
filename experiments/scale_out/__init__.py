"""Beyond one process: training, jobs on engines, replicas, a split index."""
